"""Evaluation metrics, a file each: pure functions, and a `torchmetrics.Metric` whose states add up or concatenate over processes.

`frechet` (FID), `prdc` (density, coverage), `clip` (CLIP score), `diversity` (LPIPS diversity), `alignment` (attributes, modes).
Nothing is imported here: torchmetrics alone costs seconds.
"""
