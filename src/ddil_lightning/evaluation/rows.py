"""Rows of results: the teacher and the student of a method, or a pipeline folder, on a suite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.digests import settings, weights
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.repositories import called
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Multistep, Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.evaluation import known
from ddil_lightning.evaluation.generation import Generation, Source
from ddil_lightning.evaluation.stamps import by_name, short
from ddil_lightning.evaluation.suite import Suite, make_row
from ddil_lightning.records import END

if TYPE_CHECKING:
    from ddil_lightning.training.method import Distillation

ALONE = Generation()
"""One process, whose images are not kept."""


def policy_row(
    suite: Suite,
    backbone: Backbone,
    name: str,
    policy: Policy,
    grid: Grid,
    g: float,
    how: Generation = ALONE,
    of: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The row of a sampler of this library at guidance `g`; its network evaluations (NFE) are counted, not assumed.

    `of`: what the row says of its network, with a digest of its `weights`; one of all that decides on its images is added.
    """
    source, denoiser = policy_source(backbone, name, policy, grid, g, how.batch), denoiser_of(policy)
    metrics, cost = how.measured(suite, source)
    said = how.said(suite, source, denoiser.network, backbone.size)
    if of is not None:
        said |= {**of, "digest": short([json.dumps([of["weights"], walk(policy, grid, g), said.get("size")])])}
    return make_row(name, len(grid), g, cost.nfe, cost.seconds_per_image, metrics, suite.protocol, said)


def policy_source(backbone: Backbone, name: str, policy: Policy, grid: Grid, g: float, batch: int | None = None) -> Source:
    """A sampler of this library at guidance `g` as a row's sampler, `batch` images at a time."""
    denoiser = denoiser_of(policy)

    def sample(prompts: list[str], seed: int) -> Tensor:
        return sampling.images(backbone, policy, grid, prompts, g, seed, batch)

    def about() -> dict[str, Any]:
        return {"name": name, **sampler(backbone, policy, grid, g)}

    return Source(name, sample, lambda: denoiser.evaluations, about, sampling.batch(backbone.latent_shape))


def denoiser_of(policy: Policy) -> Denoiser:
    """The denoiser of a policy, through whatever is around it."""
    return next(m for m in policy.modules() if isinstance(m, Denoiser))


def sampler(backbone: Backbone, policy: Policy, grid: Grid, g: float) -> dict[str, Any]:
    """All that decides on a policy's images besides prompts and noise."""
    return {"network": weights(denoiser_of(policy).network), "encoders": backbone.encoders(), **walk(policy, grid, g)}


def walk(policy: Policy, grid: Grid, g: float) -> dict[str, Any]:
    """How a policy steps."""
    denoiser = denoiser_of(policy)
    step = {"transition": f"{type(policy.transition).__name__} {vars(policy.transition)}", "solver": type(policy).__name__}
    between = {"substeps": policy.substeps, "fine": policy.fine and policy.fine.times.tolist()}
    once = {"unguided": True} if denoiser.unguided else {}  # half the evaluations of a guided one at guidance 1
    return step | between | once | {"nodes": grid.times.tolist(), "guidance": g, "predicts": str(denoiser.predicts)}


def teacher_row(suite: Suite, method: Distillation, n: int, fresh: bool = False, folder: Path | None = None) -> dict[str, Any]:
    """The row teacher@n of a method: the one that was kept of this very teacher, unless it is to be `fresh` (`known.recalled`)."""
    backbone, baseline, name = method.backbone, method.baseline, f"teacher@{n}"
    policy, grid = baseline.sampler(n)
    noise = [backbone.schedule.sigmas.tolist(), list(backbone.latent_shape)]
    key = known.key_of({"name": name, **sampler(backbone, policy, grid, baseline.guidance), "noise": noise}, suite.protocol)

    def measure() -> dict[str, Any]:
        return policy_row(suite, backbone, name, policy, grid, baseline.guidance)

    # Under the stamp of a network that is known by its name alone lies the row of any other of that name.
    return measure() if by_name(suite.protocol) else known.recalled(key, measure, fresh, folder)


def method_rows(
    suite: Suite,
    method: Distillation,
    teacher_steps: Sequence[int] = (32, 4, 2, 1),
    student_steps: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda name: None,
    stages: Mapping[int, Path] | None = None,
    dpm: bool = False,
    fresh: bool = False,
) -> list[dict[str, Any]]:
    """teacher@N and student@N rows at the method's evaluation guidance, all from the same noise. `say` hears of each before it starts.

    `stages`: pipeline folders of earlier students by their step counts, which are tested instead of the present student at these counts.
    `student_steps`: default all of `stages` and of the present student. `dpm`, `fresh`: see `runs.finish.Test`.
    """
    stages, rows, deployment = stages or {}, [], method.deployment
    for n in teacher_steps:
        say(f"teacher@{n}")
        rows.append(teacher_row(suite, method, n, fresh))
    for n in sorted({*stages, *deployment.steps}, reverse=True) if student_steps is None else student_steps:
        say(f"student@{n}")
        made = folder_sampler(stages[n], method.device) if n in stages else deployment.sampler(n)
        rows += student_rows(suite, method.backbone, {n: made}, deployment.quoted, dpm)
    return rows


def student_rows(
    suite: Suite,
    backbone: Backbone,
    samplers: Mapping[int, tuple[Policy, Grid]],
    g: float,
    dpm: bool = False,
    how: Generation = ALONE,
    of: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """student@N rows of samplers by step count, each when it is measured; with `dpm`, another of each that steps by DDIM.

    `of`: as for `policy_row`.
    """
    for n, (policy, grid) in samplers.items():
        yield policy_row(suite, backbone, f"student@{n}", policy, grid, g, how, of)
        if dpm and policy.transition == ddim:
            yield policy_row(suite, backbone, f"student@{n} dpm++", Multistep(policy.denoiser), grid, g, how, of)


def folder_sampler(folder: Path, device: torch.device) -> tuple[Policy, Grid]:
    """The student of an exported pipeline that steps by DDIM, on the nodes that its card names."""
    backbone = Pipeline(str(folder))
    backbone.network().to(device)  # the encoders are not asked
    return Policy(Denoiser(backbone.network(), backbone.schedule, backbone.predicts), ddim), Grid([*backbone.about["timesteps"], END])


def pipeline_source(
    backbone: Pipeline, steps: int, guidance_scale: float, dpm: bool = False, batch: int | None = None, calls: Sequence[int] = (0,)
) -> Source:
    """A diffusers pipeline as a row's sampler, `batch` images at a time: called as its users call it, with its own scheduler or (`dpm`)
    DPM-Solver++ 2M made from it. `calls`: where its evaluations are counted (`Pipeline.counting`). One without a card, of which nobody
    knows what it is, is named by its folder or id."""
    solved = backbone.with_solver(dpm)
    whose = "student" if "method" in backbone.about else "teacher" if backbone.about else called(backbone.path)
    name = f"{whose}@{steps}{' dpm++' if dpm else ''}"

    def sample(prompts: list[str], seed: int) -> Tensor:
        return sampling.decoded(solved, sampling.pipeline_latents(solved, prompts, steps, guidance_scale, seed, batch))

    def about() -> dict[str, Any]:
        scheduler = solved.pipe.scheduler
        made = {"scheduler": type(scheduler).__name__, "config": settings(scheduler), "steps": steps, "guidance_scale": guidance_scale}
        made |= {**solved.called_with, **({"remedy": str(solved.remedy)} if solved.remedy else {})}
        return {"name": name, "network": weights(solved.network()), "encoders": solved.encoders(), **made, "size": list(solved.size)}

    return Source(name, sample, lambda: calls[0], about, sampling.batch(solved.latent_shape))


def provenance(backbone: Pipeline, steps: int, guidance_scale: float) -> dict[str, Any]:
    """What a row says of its pipeline: where it lies, its LoRAs, sampler and weights, and the size of its images.

    `digest`: of all that decides on its images besides the suite, wherever the same weights lie.
    """
    scheduler = backbone.pipe.scheduler
    decides = {
        "sampler": f"{type(scheduler).__name__} {backbone.remedy or ''}".strip(),
        "size": list(backbone.size),
        "latents": list(backbone.latent_shape),
        "weights": short([backbone.content()]),
        **backbone.called_with,
    }
    digest = short([json.dumps([decides, settings(scheduler), steps, guidance_scale])])
    loras = [f"{lora.path} * {lora.scale:g}" for lora in backbone.source.lora]
    clock = {"student_updates": backbone.about["student_updates"]} if "student_updates" in backbone.about else {}
    return {"pipeline": backbone.path, "lora": loras, **clock, **decides, "digest": digest}


def of_checkpoint(path: Path, method: Distillation) -> dict[str, Any]:
    """What a row says of the checkpoint that its student is from: the file, its student updates, and a digest of the deployed weights."""
    updates, network = method.student_updates, method.deployment.network
    return {"checkpoint": str(path), "student_updates": updates, "weights": short([weights(network)])}


def pipeline_row(
    suite: Suite, backbone: Pipeline, steps: int, guidance_scale: float, dpm: bool = False, how: Generation = ALONE, name: str = ""
) -> dict[str, Any]:
    """The row of a diffusers pipeline (`pipeline_source`), by its own name or another one."""
    with backbone.counting() as calls:
        source = pipeline_source(backbone, steps, guidance_scale, dpm, how.batch, calls)
        source = source._replace(name=name or source.name)
        metrics, cost = how.measured(suite, source)
    g = backbone.guidance if backbone.baked else guidance_scale
    said = how.said(suite, source, backbone.network(), backbone.size) | provenance(backbone.with_solver(dpm), steps, guidance_scale)
    return make_row(source.name, steps, g, cost.nfe, cost.seconds_per_image, metrics, suite.protocol, said)
