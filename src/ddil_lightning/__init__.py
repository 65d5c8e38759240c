"""ddil-lightning: few-step students of diffusers pipelines by imitation learning (DDIL, arXiv 2410.11971)."""
