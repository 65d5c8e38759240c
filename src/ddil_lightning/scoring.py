"""Rows of results: the teacher and the student of a method, or a pipeline folder, on a suite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import sampling
from .denoiser import Denoiser
from .evaluate import Suite, Timed, make_row

if TYPE_CHECKING:
    from .backbones import Backbone
    from .methods.base import Distillation
    from .schedule import Grid
    from .solver import Policy


def policy_row(suite: Suite, backbone: Backbone, name: str, policy: Policy, grid: Grid, g: float) -> dict[str, Any]:
    """One sampler of this library; its NFE are counted, not assumed."""
    denoiser = next(m for m in policy.modules() if isinstance(m, Denoiser))

    def sample(prompts: list[str], seed: int) -> Tensor:
        return sampling.images(backbone, policy, grid, prompts, g, seed)

    before = denoiser.evaluations
    timed = Timed(sample)
    metrics = suite.score(timed)
    nfe = round((denoiser.evaluations - before) / timed.images)
    return make_row(name, len(grid), g, len(suite.prompts), nfe, timed.seconds_per_image, metrics)


def method_rows(
    suite: Suite,
    method: Distillation,
    teacher_steps: Sequence[int] = (32, 4, 2, 1),
    student_steps: Sequence[int] = (4, 2, 1),
    say: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """teacher@N and student@N rows at the method's evaluation guidance, all from the same noise. `say` hears of each before it starts."""
    wanted = [("teacher", n, method.teacher_sampler) for n in teacher_steps] + [("student", n, method.sampler) for n in student_steps]
    rows = []
    for role, steps, sampler in wanted:
        say(f"{role}@{steps}")
        policy, grid = sampler(steps)
        rows.append(policy_row(suite, method.backbone, f"{role}@{steps}", policy, grid, method.eval_guidance))
    return rows


def pipeline_row(suite: Suite, backbone: Backbone, steps: int, guidance_scale: float) -> dict[str, Any]:
    """A diffusers pipeline, called as its users call it, with its own scheduler."""
    pipe, calls = backbone.pipe, [0]

    def count(module: Any, args: Any, kwargs: Any) -> None:
        calls[0] += len(args[0] if args else kwargs["sample"])

    def sample(prompts: list[str], seed: int) -> Tensor:
        return backbone.decode(sampling.pipeline_latents(pipe, prompts, steps, guidance_scale, seed)).cpu()

    handle = pipe.unet.register_forward_pre_hook(count, with_kwargs=True)
    timed = Timed(sample)
    try:
        metrics = suite.score(timed)
    finally:
        handle.remove()
    name = "student" if "method" in backbone.about else "teacher"
    return make_row(
        f"{name}@{steps}", steps, guidance_scale, len(suite.prompts), round(calls[0] / timed.images), timed.seconds_per_image, metrics
    )
