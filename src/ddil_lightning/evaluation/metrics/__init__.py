"""Evaluation metrics, a file each: a pure function where there is one, and a `base.Metric` around it.

`frechet` (FID), `clip` (CLIP score), `prdc` (density, coverage), `diversity` (LPIPS diversity), `alignment` (attributes), `modes` (mode
coverage), `blur`, `hps`, `pickscore`, `imagereward` (what people prefer); `pairs` reads the images and captions of a user. Nothing is
imported here: torchmetrics alone costs seconds. The list is `evaluation.registry.METRICS`.
"""
