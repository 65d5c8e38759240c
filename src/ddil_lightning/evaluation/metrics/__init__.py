"""Evaluation metrics, a file each: a pure function where there is one, and a `base.Metric` around it.

`frechet` (FID), `clip` (CLIP score), `prdc` (density, coverage), `diversity` (LPIPS diversity), `alignment` (attributes), `modes` (mode
coverage), `blur`. Nothing is imported here: torchmetrics alone costs seconds. The list is `evaluation.registry.METRICS`.
"""
