"""Student out: a diffusers pipeline folder with the scheduler its method declares, checked against the trainer's own samples."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import sampling
from .backbones import UNet, load_pipeline
from .files import writing

if TYPE_CHECKING:
    from .methods.base import Distillation


def scale(method: Distillation, g: float) -> float:
    """The `guidance_scale` to call the exported pipeline with: g for a w-conditioned student, 1 for one with g baked in."""
    return g if _network(method).w_conditioned else 1.0


def exportable(method: Distillation) -> bool:
    """Whether the student is a network that a diffusers pipeline can hold."""
    return isinstance(method.deployed(), UNet)


def check_prompts(method: Distillation, examples: Sequence[str]) -> list[str]:
    """The prompts by which an exported pipeline is compared: the card's previews, else `examples` of the data, else empty ones."""
    return (list(method.backbone.about.get("previews") or examples) or ["", ""])[:4]


def export(method: Distillation, folder: Path, steps: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    """Write the deployed student as a pipeline folder: the teacher's encoders, the student's U-Net, the trained scheduler, a card.

    Everything is written beside `folder` first and moved there when complete, so a full disk leaves no half a pipeline.
    """
    backbone, network = method.backbone, _network(method)
    unet = network.unet if dtype == torch.float32 else copy.deepcopy(network.unet).to(dtype)
    # Frozen parts that were trained with in half precision are exported as they came.
    frozen = backbone.pipe if backbone.dtype == torch.float32 else load_pipeline(backbone.path)
    parts = {**frozen.components, "unet": unet, "scheduler": method.scheduler()}
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipe = type(backbone.pipe)(**parts, **extra)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(folder):
            pipe.save_pretrained(temporary, safe_serialization=True)
        about = about_student(method, steps)
        (temporary / "ddil.json").write_text(json.dumps(about, indent=2) + "\n")
        (temporary / "README.md").write_text(card(about, backbone.path))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def about_student(method: Distillation, steps: int) -> dict[str, Any]:
    """ddil.json: what a folder says of itself."""
    g = method.student_guidance
    _, grid = method.sampler(steps)
    return {
        "method": type(method).__name__,
        "student_updates": method.student_updates,
        "steps": steps,
        "made_for": list(method.steps),
        "guidance": g,
        "guidance_scale": scale(method, g),
        "guidance_range": list(method.guidance) if _network(method).w_conditioned else [g, g],
        "timesteps": grid.nodes.tolist(),
        "dataset": method.backbone.about.get("dataset"),
        "teacher": method.backbone.path,
    }


def card(about: dict[str, Any], teacher: str) -> str:
    """The model card of a student."""
    nodes, g, (low, high) = ", ".join(map(str, about["timesteps"])), about["guidance_scale"], about["guidance_range"]
    why = f"within the trained range ({low:g} to {high:g})" if g > 1 else f"right because guidance {low:g} is part of the weights"
    return f"""---
library_name: diffusers
tags: [text-to-image, distillation, ddil]
---
# A {about["steps"]}-step student of `{teacher}`

Distilled with {about["method"]} by [ddil-lightning](https://pypi.org/project/ddil-lightning/), {about["student_updates"]} student updates.

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(".")
image = pipe("a prompt", num_inference_steps={about["steps"]}, guidance_scale={g:g}).images[0]
```

The scheduler holds the timesteps it was trained for ({nodes} at {about["steps"]} steps); another scheduler or a "leading" spacing
fails in silence. `guidance_scale` {g:g} is {why}.
"""


def verify(method: Distillation, folder: Path, prompts: list[str], steps: int, seed: int = 0, tolerance: float = 1e-3) -> float:
    """The largest difference between latents of the reloaded folder and of the trainer's own sampler, relative to their size.

    Raises ValueError above `tolerance`: then the folder's scheduler, timesteps or guidance are not the trained ones.
    """
    policy, grid = method.sampler(steps)
    g, backbone, pipe = method.eval_guidance, method.backbone, load_pipeline(folder).to(method.backbone.device)
    if backbone.dtype != torch.float32:
        backbone = copy.copy(backbone)
        backbone.pipe = pipe  # the encoders are exported in full precision, so both sides read their text states
    mine = sampling.latents(backbone, policy, grid, prompts, g, seed).cpu()
    theirs = sampling.pipeline_latents(pipe, prompts, steps, scale(method, g), seed).cpu()
    difference = relative(mine, theirs)
    if not difference <= tolerance:
        raise ValueError(
            f"the exported pipeline does not sample as the trainer does: at {steps} steps its latents differ by {difference:.2e} "
            f"of their size, and {tolerance:g} is allowed"
        )
    return difference


def deliver(method: Distillation, folder: Path, prompts: list[str], steps: int, dtype: torch.dtype = torch.float32) -> float:
    """`export`, `verify`, and only then the name `folder` -> the difference. Raises as they do, and then leaves no folder."""
    temporary = folder.with_name(f".{folder.name}.unverified")
    try:
        with rounded(_network(method), dtype):
            export(method, temporary, steps, dtype)
            difference = verify(method, temporary, prompts, steps)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


@contextmanager
@torch.no_grad()
def rounded(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The weights of `network` as `dtype` holds them, so that an export in half precision can be compared as strictly as any."""
    exact = [] if dtype == torch.float32 else [p.clone() for p in network.parameters()]
    for p in network.parameters() if exact else ():
        p.copy_(p.to(dtype))
    try:
        yield
    finally:
        for p, value in zip(network.parameters(), exact, strict=False):
            p.copy_(value)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / rms(a)."""
    return float((a - b).abs().max() / a.square().mean().sqrt())


def _network(method: Distillation) -> UNet:
    network = method.deployed()
    if not isinstance(network, UNet):
        raise ValueError(f"only diffusers U-Nets can be exported, and this student is a {type(network).__name__}")
    return network
