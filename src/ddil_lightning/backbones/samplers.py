"""From a few-step pipeline of diffusers, whoever made it, to a policy and its nodes: what its scheduler does, read from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ddil_lightning.backbones import flows
from ddil_lightning.diffusion.denoiser import Boundary, Consistency, Denoiser, to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.remedies import Remedy
from ddil_lightning.diffusion.transitions import TCD, Posterior, Transition, ddim, renoise
from ddil_lightning.records import END, Context

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline

NAMES = {"lcm": "LCMScheduler", "tcd": "TCDScheduler", "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "ddpm": "DDPMScheduler"}
"""Samplers by name, and the class of diffusers that each is."""

FLOWS = {"lcm": "FlowMatchLCMScheduler", "ddim": "FlowMatchEulerDiscreteScheduler", "euler": "FlowMatchEulerDiscreteScheduler"}
"""The same of a flow."""

SOLVER = "DPMSolverMultistepScheduler"
OFF = 2
"""How far a scheduler's step may end from its own next node, by rounding alone."""


def named(backbone: Pipeline, name: str, eta: float | None = None) -> Pipeline:
    """The pipeline with the sampler of NAMES in the place of its own, on trailing nodes where it has a choice.

    `ddim-ts20`, `ddim-es1.01`, `ddim-ts20-es1.01`: with shifted times in a window of 20, with eps divided by 1.01 (`diffusion.remedies`);
    `ddim-ts20-tv1.0-tc100`: of data whose variance is 1, and at times above 100 alone. `ddim-nc`: with noise correction, as Imagine Flash
    samples, these behind it or not. `eta`: TCD's gamma, by default that of the pipeline's card, else its authors'.
    """
    import diffusers

    name, *remedies = name.split("-")
    if backbone.network().flow:
        return _flowing(backbone, name, remedies)
    remedy = Remedy.named(remedies) if remedies else None
    kind, config = getattr(diffusers, NAMES[name]), backbone.pipe.scheduler.config
    own = {} if name in ("lcm", "tcd") else {"timestep_spacing": "trailing"}
    clips: dict[str, Any] = {} if name == "euler" else {"clip_sample": False}
    clips |= {"variance_type": "fixed_small"} if name == "ddpm" else {}
    gamma = backbone.about.get("eta", TCD.gamma) if eta is None else eta
    made = backbone.stepping(kind.from_config(config, **own, **clips), TCD(gamma).called_with if name == "tcd" else None)
    made.remedy = remedy
    return made


def _flowing(backbone: Pipeline, name: str, remedies: Sequence[str]) -> Pipeline:
    """A flow's pipeline with another sampler on the nodes of its own, of DPM-Solver++ (SANA) those before rounding.

    Raises ValueError for a name that is none of FLOWS.
    """
    import diffusers

    if name not in FLOWS or remedies:
        what = "-".join((name, *remedies))
        raise ValueError(f"{backbone.path} is a flow, which is not sampled by {what}: known are {', '.join(FLOWS)}")
    kind = getattr(diffusers, FLOWS[name])
    if backbone.shift is not None and "Flow" not in type(backbone.pipe.scheduler).__name__:
        return backbone.stepping(flows.even(kind, backbone.schedule.steps, backbone.shift))
    return backbone.stepping(kind.from_config(backbone.pipe.scheduler.config, **({} if name == "lcm" else {"stochastic_sampling": False})))


def exactly(backbone: Pipeline, steps: int, g: float) -> tuple[Policy, Grid]:
    """The policy and its grid that sample as the pipeline does at guidance_scale `g`, on the very nodes of its scheduler.

    A flow's are no times of its schedule: the policy's own schedule then has them alone. Raises ValueError as `grid_of` does.
    """
    policy = policy_of(backbone, g)
    if not backbone.network().flow:
        return policy, grid_of(backbone, steps)
    schedule, grid = flows.exactly(_sigmas(backbone, steps), backbone.schedule.steps)
    d = next(m for m in policy.modules() if isinstance(m, Denoiser))
    return Policy(Denoiser(d.network, schedule, d.predicts, d.null), policy.transition), grid


def _sigmas(backbone: Pipeline, steps: int) -> Tensor:
    """The nodes of a flow's own scheduler. Raises ValueError for one whose nodes are not known, or that cannot take so many steps."""
    scheduler, kind = backbone.pipe.scheduler, type(backbone.pipe.scheduler).__name__
    if kind not in FLOWS.values():
        known = ", ".join(FLOWS)
        raise ValueError(f"the {kind} of {backbone.path} has nodes that are not known: give a flow another sampler by name ({known})")
    backbone.check_steps(steps)
    return flows.nodes(scheduler, steps, backbone.network(), backbone.latent_shape)


def grid_of(backbone: Pipeline, steps: int) -> Grid:
    """The nodes of a pipeline's own scheduler in so many steps, and where its last step ends; of a flow the nearest times of its schedule.

    Raises ValueError, naming it, for a scheduler that is none of NAMES nor DPM-Solver++, one whose settings no policy here has, and one
    that cannot take so many steps.
    """
    if backbone.network().flow:
        return flows.grid(backbone.schedule, _sigmas(backbone, steps))
    scheduler, kind = backbone.pipe.scheduler, type(backbone.pipe.scheduler).__name__
    config, where = scheduler.config, f"the {type(scheduler).__name__} of {backbone.path}"
    if kind not in (*NAMES.values(), SOLVER):
        known = ", ".join(NAMES)
        raise ValueError(f"{where} is no sampler of a student whose nodes are known: give it another one by name ({known})")
    for option in ("clip_sample", "thresholding", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(option):
            raise ValueError(f"{where} has {option} set, which changes its nodes or steps: set it to false in its scheduler_config.json")
    try:
        backbone.check_steps(steps)
        times = [round(float(t)) for t in scheduler.timesteps]
    except ValueError as error:
        raise ValueError(f"{where} cannot take {steps} steps ({error}): give another number") from error
    if kind in (NAMES["ddim"], NAMES["ddpm"]):
        _check_strides(where, times, config["num_train_timesteps"] // steps)
    clean = {NAMES["tcd"]: False, NAMES["ddim"]: bool(config.get("set_alpha_to_one", True))}
    end = END if clean.get(kind, config.get("final_sigmas_type", "zero") == "zero") else 0
    return Grid([*times, END if times[-1] == 0 else end], rule=kind)


def _check_strides(where: str, times: Sequence[int], stride: int) -> None:
    """Raises ValueError for DDIMScheduler, which steps down by T // N, on nodes that lie elsewhere."""
    if any(abs(t - stride - s) > OFF for t, s in zip(times, times[1:], strict=False)):
        raise ValueError(f"{where} steps down by {stride} and its nodes are {list(times)}: set its timestep_spacing to trailing")


def transition_of(backbone: Pipeline) -> Transition:
    """How a pipeline's own scheduler steps between nodes; DPM-Solver++ in its first order, which is DDIM's step, as is Euler's.

    TCD's with the strength of noise that the pipeline's call is given as `eta` (`Pipeline.called_with`).
    """
    kind = type(backbone.pipe.scheduler).__name__
    if kind == FLOWS["lcm"] or backbone.pipe.scheduler.config.get("stochastic_sampling"):
        return renoise
    gamma = backbone.called_with.get("eta", TCD.gamma)
    return {NAMES["lcm"]: renoise, NAMES["tcd"]: TCD(gamma), NAMES["ddpm"]: Posterior()}.get(kind, ddim)


def policy_of(backbone: Pipeline, g: float, transition: Transition | None = None, substeps: int = 1) -> Policy:
    """The policy that samples as the pipeline does at guidance_scale `g`; with another `transition` its network's, which steps so."""
    told = backbone.network().w_conditioned
    denoiser = Denoiser(backbone.network(), backbone.schedule, backbone.predicts, None if told or g <= 1 else backbone.null())
    if transition is not None:
        return Policy(denoiser, transition, substeps)
    own: Any = denoiser
    if transition_of(backbone) == renoise and not backbone.network().flow:
        own = Consistency(denoiser, Boundary(float(backbone.pipe.scheduler.config.get("timestep_scaling", 10.0))))
    policy = Policy(own, transition_of(backbone), substeps)
    return policy if backbone.remedy is None else backbone.remedy.on(policy)


def context_of(backbone: Pipeline, prompts: Sequence[str], g: float) -> Context:
    """What the policy of `policy_of` is told of prompts: guidance where there is some, or where its network is told of none, too."""
    c = backbone.encode_text(prompts, truncate=True)
    return c.guided(to_w(g) if backbone.network().w_conditioned or g > 1 else None)


def check_alike(student: Pipeline, teacher: Pipeline) -> None:
    """Raises ValueError for two pipelines whose latents mean different things: of another shape, or of another forward process."""
    if student.latent_shape != teacher.latent_shape:
        raise ValueError(
            f"{student.path} has latents {list(student.latent_shape)} and {teacher.path} {list(teacher.latent_shape)}: "
            "give a student and a teacher of the same latent space"
        )
    a, b = student.schedule.alphas, teacher.schedule.alphas
    if a.shape != b.shape or float((a - b).abs().max()) > 1e-4:
        raise ValueError(
            f"{student.path} and {teacher.path} have other noise at the same times (their schedulers' betas or shift): give a student and "
            "a teacher of the same forward process"
        )


def scale_of(backbone: Pipeline, given: Any, g: float) -> float:
    """The guidance_scale that a student is called with: as `given`, or as its card says; without one `g` if it is told, else none (1)."""
    if given is not None:
        return float(given)
    told = backbone.network().w_conditioned
    return float(backbone.about.get("guidance_scale", g if told else 1.0))
