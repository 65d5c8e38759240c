"""Measuring a teacher by the exact judge, and writing it down: weights, figures and a model card."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.files import replacing_folder
from ddil_lightning.miniature.flow import called
from ddil_lightning.miniature.sources import load_source

FLOW_NODES = """ Few steps of
the flow are one fewer than they say: the last node of its pipeline's plain call lies next to the end of the path."""
"""What a card says of a transformer's figures: FlowMatchEulerDiscreteScheduler goes down to sigma_min, which it shifts twice."""


@torch.no_grad()
def sample(pipeline: Any, prompts: list[str], *, steps: int, guidance: float, seed: int, batch_size: int = 128) -> Tensor:
    """One image per prompt with the pipeline's own scheduler, [N, 3, H, W] float32 in [-1, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    rng, parts = torch.Generator().manual_seed(seed), []
    for i in range(0, len(prompts), batch_size):
        part = prompts[i : i + batch_size]
        made = pipeline(
            **(called(pipeline, part) if hasattr(pipeline, "transformer") else {"prompt": part}),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=rng,
            output_type="pt",
        )
        parts.append(made.images * 2 - 1)
    return torch.cat(parts)


def measure(pipeline: Any, dataset: str, *, n: int, steps: int, guidance: float, seed: int = 0) -> dict[str, float]:
    """What the judge finds in images of `n` held-out prompts that mention every attribute: means by name, rounded to four decimals."""
    source = load_source(dataset)
    prompts = source.prompts(n, seed)
    found = source.judge(sample(pipeline, prompts, steps=steps, guidance=guidance, seed=seed), prompts)
    scores = {"attribute accuracy": found.attribute_accuracy, "all right": found.all_right, **found.correct}
    return {name: round(float(v.nanmean()), 4) for name, v in (scores | {"residual": found.residual}).items()}


def guided(pipeline: Any, dataset: str, scales: tuple[float, ...], *, n: int) -> tuple[float, dict[str, dict[str, float]]]:
    """The smallest guidance scale that comes within .01 of the most all-right images, and the figures of all `scales`.

    More guidance than needed costs diversity. Sampled in 32 steps, on prompts that the final figures do not use.
    """
    scores = {f"{g:g}": measure(pipeline, dataset, n=n, steps=32, guidance=g, seed=1) for g in sorted(scales)}
    best = max(row["all right"] for row in scores.values())
    return next(float(g) for g, row in scores.items() if row["all right"] >= best - 0.01), scores


def save_teacher(pipeline: Any, out: str | Path, facts: dict[str, Any], table: dict[int, dict[str, float]]) -> Path:
    """Write the pipeline in half precision with `ddil.json` and a model card to the folder `out`, which is replaced and answered."""
    parts = {id(part): part for part in pipeline.components.values() if isinstance(part, nn.Module)}.values()
    with replacing_folder(Path(out)) as work:
        for part in parts:
            part.half()
        pipeline.save_pretrained(work)
        for part in parts:
            part.float()
        # transformers loads in the precision named here, diffusers in single: without this the parts would not fit together
        for config in work.glob("text_encoder*/config.json"):
            config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        (work / "ddil.json").write_text(json.dumps(facts | {"figures": table}, indent=2) + "\n")
        (work / "README.md").write_text(card(facts, table))
    return Path(out)


def card(facts: dict[str, Any], table: dict[int, dict[str, float]]) -> str:
    """The model card of a built-in teacher in Markdown: `facts` are those of ddil.json, `table` the judge's figures by step count."""
    names = list(next(iter(table.values())))
    rows = "\n".join(f"| {steps} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |" for steps, row in table.items())
    nodes = FLOW_NODES if any(key.startswith("transformer.") for key in facts["settings"]) else ""
    return f"""---
library_name: diffusers
tags: [ddil-lightning, miniature]
---
# The built-in teacher for "{facts["dataset"]}"

A {facts["kind"]}, trained on the data set that
`ddil_lightning.miniature.{facts["dataset"]}` draws. Recommended guidance scale: {facts["guidance"]:g}.

| steps | {" | ".join(names)} |
|---|{"---|" * len(names)}
{rows}

Means over held-out prompts, by the exact judge of the {facts["dataset"]} (ddil_lightning.miniature).{nodes}

- command: `ddil-pretrain {" ".join(f"--{key} {value}" for key, value in facts["settings"].items())}`
- images seen by the network: {facts["images"]}{", those of the resumed run included" if facts["resumed"] else ", in one run"}
- wall clock: {facts["minutes"]} minutes
- date: {datetime.date.today().isoformat()}; machine: {os.cpu_count()} x {platform.machine()}, torch {torch.__version__}
"""
