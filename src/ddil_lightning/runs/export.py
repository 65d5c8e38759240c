"""Student out: a diffusers pipeline folder with the scheduler its method declares, checked against the trainer's own samples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.resting import visiting
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.files import move_contents, read_table, replacing_folder, unused
from ddil_lightning.runs.card import Card
from ddil_lightning.runs.replay import replayed
from ddil_lightning.runs.reread import NotAsTrained, check_settings, check_weights, is_lean, loads, reloaded
from ddil_lightning.training.sharing import merged, standing_in

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family
    from ddil_lightning.backbones.interface import Backbone, Dtypes
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.training.deployment import Deployment
    from ddil_lightning.training.method import Distillation


def exported(folder: Path) -> bool:
    """Whether a folder is a student's pipeline that this library has written."""
    return "method" in read_table(folder / "ddil.json")


def unheld(method: Distillation) -> str | None:
    """Why no pipeline can hold the student of a method, in a few words; None where one can."""
    if method.outgoing.s_conditioned:
        return "no pipeline of diffusers tells a network the time that it jumps to, as this student is told it"
    return None if method.backbone.holds_students else f"no pipeline can hold the student of {method.backbone.path}"


def check_steps(deployment: Deployment, steps: int) -> None:
    """Raises ValueError for a step count that the grid cannot take, and for another one where the student is made for one alone."""
    deployment.sampler(steps)
    if len(deployment.steps) == 1 and steps not in deployment.steps:
        (made,) = deployment.steps
        raise ValueError(f"the student is made for {made} step{'s' * (made > 1)} alone, and its pipeline for no other count")


def untrained(method: Distillation, deployment: Deployment, steps: int) -> str | None:
    """A line that says at which times a student is asked in so many steps and is not trained; None where there are none."""
    trained = {t for grid in (method.grid, *method.walks()) for t in grid.nodes.tolist()}
    strange = [t for t in deployment.sampler(steps)[1].nodes.tolist() if t not in trained]
    return f"at {steps} steps the student is asked at t = {', '.join(map(str, strange))}, where it is not trained" if strange else None


def check_prompts(method: Distillation, examples: Sequence[str]) -> list[str]:
    """At most four prompts by which an exported pipeline is compared: the card's previews, else `examples` of the data, else empty ones."""
    return (list(method.backbone.about.get("previews") or examples) or ["", ""])[:4]


def as_held(method: Distillation) -> Dtypes:
    """The precision that a run delivers its student in: float32, or of a lean one that of the training, mostly not the autoencoder's."""
    return {"default": loads(method), "vae": cast("Pipeline", method.backbone).pipe.vae.dtype} if is_lean(method) else torch.float32


def export(
    method: Distillation,
    folder: Path,
    steps: int = 4,
    dtype: Dtypes = torch.float32,
    safety_checker: bool = False,
    licence: str | None = None,
) -> Path:
    """Write the deployed student as a pipeline folder: the teacher's encoders, the student's network, the trained scheduler, a card.

    All of it in `dtype` (`Backbone.save`). `safety_checker`: with the teacher's, if it has one. `licence`: by default the teacher's, for
    which the hub may be asked. An older folder is replaced when the new one is complete. Raises ValueError where the backbone's students
    are no pipelines.
    """
    backbone, deployment = method.backbone, method.deployment
    if why := unheld(method):
        raise ValueError(f"{why}: its weights are in checkpoints")
    about = about_student(method, steps)
    with replacing_folder(folder) as temporary, merged(method):
        backbone.save(temporary, method.deployment.network, partial(deployment.made_scheduler, steps), dtype, safety_checker)
        (temporary / "ddil.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        said = dtype if isinstance(dtype, torch.dtype) else dtype["default"]
        (temporary / "README.md").write_text(card(method, steps, dtype=said, licence=licence).text(), encoding="utf-8")
    return folder


def about_student(method: Distillation, steps: int) -> dict[str, Any]:
    """The content of a student's ddil.json, which `loading.recommended` reads: what it is made for, and how it is called."""
    deployment = method.deployment
    g = deployment.quoted
    return {
        "method": type(method).__name__,
        "student_updates": method.student_updates,
        "steps": steps,
        "made_for": [steps] if deployment.is_flow else list(deployment.steps),
        "guidance": g,
        "guidance_scale": deployment.guidance_scale,
        **deployment.called_with,
        "guidance_range": list(method.guidance) if deployment.told or deployment.guided else [g, g],
        "timesteps": deployment.grid(steps).nodes.tolist(),
        **(flow_nodes(method.backbone, deployment.grid(steps)) if deployment.is_flow else {}),
        "dataset": method.backbone.about.get("dataset"),
        "teacher": method.backbone.path,
        **({"teacher_options": options} if (options := cast("Pipeline", method.backbone).source.options) else {}),
        **({"size": list(method.backbone.size or ())} if method.backbone.says_size else {}),
        **({"sampler": deployment.remark} if deployment.remark else {}),
    }


def flow_nodes(backbone: Backbone, grid: Grid) -> dict[str, Any]:
    """Where the nodes of a flow's student lie: sigma at its times, and the shift that says at which sigma a time is."""
    return {"shift": backbone.shift, "sigmas": [round(sigma, 6) for sigma in backbone.schedule.sigmas[grid.nodes].tolist()]}


def card(method: Distillation, steps: int, **known: Any) -> Card:
    """The model card of the student that `method` deploys; `known`: fields of Card besides."""
    backbone, adapter = cast("Pipeline", method.backbone), method.adapter
    rank = adapter.rank if method.outgoing.shared else None
    return Card(
        about_student(method, steps),
        method.deployment.made_scheduler(steps),
        type(backbone.pipe).__name__,
        backbone.size,
        told=method.deployment.told,
        adapter=None if rank is None else (rank, rank if adapter.alpha is None else adapter.alpha),
        called_with=backbone.network().called_with,
        asked_by=cast("Family", method.outgoing.network).asked_by,
        # What ComfyUI makes of two answers is not brought to the norm of one.
        in_comfy=backbone.network().in_comfy and (backbone.network().norm_patch is None or method.deployment.guidance_scale <= 1),
        times=backbone.schedule.steps,
        unguided=backbone.network().scale(1.0),
        negative=backbone.network().negative,
        source=backbone.source,
        vae=type(backbone.pipe.vae).__name__,
        base=loads(method),
        **known,
    )


def verify(method: Distillation, folder: Path, prompts: Sequence[str], steps: int) -> float:
    """`confirm` the pipeline in `folder`, loaded as its users load it; raises and answers as that does."""
    return confirm(method, reloaded(method, folder), prompts, steps)


def confirm(method: Distillation, made: Pipeline, prompts: Sequence[str], steps: int, trained: Deployment | None = None) -> float:
    """The largest relative difference between latents of a reloaded pipeline, `made`, and of the trainer, as `compare` answers it.

    `trained`: what to compare with, by default the student as it is exported. Adapters on a network in half precision are compared
    without a second network on the device: the caller holds the weights against each other, number by number, and here both samplers have
    the answers of one network, the one in training (`replay`). The reloaded network stays on the CPU.
    """
    if not is_lean(method):
        return compare(method, trained or method.deployment, made, prompts, steps)
    with standing_in(method, None):
        return compare_samplers(method.deployment, made, prompts, steps)


def compare_samplers(deployment: Deployment, made: Pipeline, prompts: Sequence[str], steps: int) -> float:
    """`compare` by the answers of the trained network alone: only how it is asked, and what is made of its answers, can differ."""
    with full_precision(made.device):
        found = replayed(deployment, made, prompts, steps)
    if isinstance(found, str):
        raise NotAsTrained(f"the exported pipeline does not sample as the trainer does: at {steps} steps {found}")
    difference = relative(*found)
    if not difference <= LEAST:
        raise NotAsTrained(
            f"the exported pipeline does not sample as the trainer does: at {steps} steps its latents differ by {difference:.2e} of their "
            f"size, where rounding explains {LEAST:.0e}"
        )
    return difference


def compare(method: Distillation, deployment: Deployment, made: Pipeline, prompts: Sequence[str], steps: int, seed: int = 0) -> float:
    """The largest difference between latents of a reloaded pipeline and of the trainer's own sampler, relative to their size.

    Both compute in float32 without TF32, from weights of one layout, one after the other: the reloaded network is on the device when the
    trained one has answered, in the place of the frozen one, which answers neither. What rounding alone can do depends on the network, so
    it is measured (`sensitivity`). Raises NotAsTrained above MARGIN times that: then scheduler, timesteps, guidance or weights are not the
    trained ones. Text states are those of the reloaded pipeline, in float32.
    """
    (policy, grid), g = deployment.exported.sampler(steps), deployment.guidance
    with full_precision(made.device):
        made = made.laid_out_as(deployment.network)
        with _on_device(method, deployment.network):
            mine = sampling.latents(made, policy, grid, prompts, g, seed).cpu()
            tolerance = max(LEAST, MARGIN * sensitivity(made, policy, grid, prompts, g, seed, mine))
        with _on_device(method, made.network()):
            theirs = sampling.pipeline_latents(made, prompts, steps, deployment.guidance_scale, seed).cpu()
        difference = relative(mine, theirs)
    if not difference <= tolerance:
        raise NotAsTrained(
            f"the exported pipeline does not sample as the trainer does: at {steps} steps its latents differ by {difference:.2e} "
            f"of their size, where rounding explains {tolerance:.0e}{other_nodes(made, deployment, grid)}"
        )
    return difference


def other_nodes(made: Pipeline, deployment: Deployment, grid: Grid) -> str:
    """Of a scheduler that has walked other times than the student's `grid`, both, as the end of a line; a flow's are no whole times."""
    if deployment.is_flow or made.remedy is not None:
        return ""
    scheduler, mine = made.pipe.scheduler, grid.nodes.tolist()
    theirs = [round(t) for t in scheduler.timesteps.tolist()]
    return "" if theirs == mine else f": {type(scheduler).__name__} walks t = {theirs}, and the student is deployed on {mine}"


def _on_device(method: Distillation, network: nn.Module) -> AbstractContextManager[None]:
    """Inside, `network` is on the device, and the frozen one and a student that was merged or gathered are not, unless it is among them."""
    others = [other for other in (method.backbone.network(), method.shards.whole) if other is not None and other is not network]
    return visiting(network, others, method.backbone.device)


ROUNDING, MARGIN, LEAST = 1e-5, 10, 1e-3
"""A disturbance of the network's outputs relative to their size, ten times what another order of sums makes, and the room over it.

At least LEAST is allowed: diffusers' DPM-Solver takes 2^-12 for an alpha of 0, and a node that is off by one makes some 1e-2."""


def sensitivity(backbone: Any, policy: Policy, grid: Grid, prompts: Sequence[str], g: float, seed: int, undisturbed: Tensor) -> float:
    """How far latents move, relative to their size, when every answer of the network is disturbed by ROUNDING of its own size."""
    denoiser: Any = next(m for m in policy.modules() if isinstance(m, Denoiser))
    calls = itertools.count()

    def disturb(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(next(calls))
        noise = torch.randn(out.shape, generator=generator).to(out)
        return out + ROUNDING * out.square().mean().sqrt() * noise

    handle = denoiser.network.register_forward_hook(disturb)
    try:
        moved = sampling.latents(backbone, policy, grid, prompts, g, seed).cpu()
    finally:
        handle.remove()
    return relative(undisturbed, moved)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, float32 is computed in full: without TF32 and without autocast. Afterwards the settings are as they were."""
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    own = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        with cudnn.flags(**own, allow_tf32=False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def deliver(
    method: Distillation,
    folder: Path,
    prompts: Sequence[str],
    steps: int,
    dtype: torch.dtype | None = None,
    safety_checker: bool = False,
) -> float:
    """`export` and `verify` the student beside `folder`, and only then give it that name; answers the relative difference of latents.

    `dtype`: by default float32, and of adapters on a network in half precision that network's, in which they were trained.
    Raises NotAsTrained for a pipeline that samples otherwise, which is kept as `folder`-unverified; an older `folder` stays as it is.
    """
    asked: Dtypes = as_held(method) if dtype is None else dtype
    dtype = loads(method) if dtype is None else dtype
    folder = folder if folder.name else folder.absolute()
    unverified = folder.with_name(f"{folder.name}-unverified")
    if unverified.exists() and not exported(unverified):
        unverified = unused(unverified)
    as_trained = method.deployment
    # A lean student's merged network is held against the written one, and not asked.
    held = dtype if is_lean(method) else torch.float32
    with replacing_folder(folder) as temporary, merged(method, held), rounded(method.deployment.network.parameters(), dtype):
        made = export(method, temporary / "made", steps, asked, safety_checker)
        # Adapters sample as their merged weights do, unless one of the two was rounded.
        exact = {dtype, method.backbone.dtype} == {torch.float32}
        try:
            difference = confirm(method, _same(method, made, dtype), prompts, steps, as_trained if exact else None)
        except NotAsTrained as error:
            with replacing_folder(unverified) as kept:
                move_contents(made, kept)
            raise NotAsTrained(f"{error}; it is kept as {unverified}") from error
        move_contents(made, temporary)
        made.rmdir()
    return difference


def rehearse(method: Distillation, folder: Path, prompts: Sequence[str], export_steps: int | None) -> None:
    """Export the student as it is, and compare it for every stage to come, each with its own scheduler and step count.

    The weights are written once, being the same for all stages. `export_steps`: the step count of the last one. Raises as `compare` does.
    """
    made, ahead = None, method.deployments()
    with merged(method, loads(method)):
        for deployment in ahead:
            steps = export_steps if export_steps is not None and deployment is ahead[-1] else deployment.steps[0]
            if made is None:
                # The card is thrown away with the rest: nobody is asked for the teacher's licence.
                made = _same(method, export(method, folder, steps, as_held(method), licence="other"), loads(method))
            else:
                scheduler = deployment.made_scheduler(steps)
                scheduler.save_pretrained(folder / "scheduler")
                made = made.stepping(type(scheduler).from_pretrained(folder / "scheduler"), deployment.called_with)
            if is_lean(method):
                compare_samplers(deployment, made, prompts, steps)
            else:
                compare(method, deployment, made, prompts, steps)


def _same(method: Distillation, folder: Path, dtype: torch.dtype) -> Pipeline:
    """The pipeline in `folder`, reloaded; of a lean student its network is compared with the merged one here (`confirm`)."""
    made = reloaded(method, folder)
    if is_lean(method):
        what, its, mine = f"the pipeline {folder.name}", made.network().model, cast("Family", method.deployment.network).model
        check_settings(its, mine, what)
        check_weights(its, mine, dtype, what)
    return made


@contextmanager
@torch.no_grad()
def rounded(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Inside, `parameters` are as `dtype` holds them, so that an export in half precision is compared as strictly as any."""
    exact = [] if dtype == torch.float32 else [(p, p.data) for p in parameters if p.dtype != dtype]
    for p, _ in exact:
        p.data = p.to(dtype).to(p.dtype)  # not in place: others may read the same tensor
    try:
        yield
    finally:
        for p, value in exact:
            p.data = value


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of one shape, relative to the root mean square of the first: max |a - b| / rms(a)."""
    return float((a - b).abs().max() / a.square().mean().sqrt())
