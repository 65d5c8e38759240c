"""Where networks come from: pipelines of diffusers, and how latents and images are drawn from them."""
