"""diffusers schedulers: one that steps as a student does, DPM-Solver++ 2M for any, and whether one can take so many steps."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch

from ddil_lightning.backbones import flows
from ddil_lightning.diffusion.betas import is_flow
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.diffusion.transitions import NEAR, TCD, Posterior, Transition, ddim, renoise
from ddil_lightning.errors import one_line

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family

PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""What a diffusers scheduler says of the forward process. Everything else in its configuration is a way to sample."""

PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def process(
    scheduler: Any, path: str, family: Family, shape: Sequence[int], shift: float | None = None
) -> tuple[NoiseSchedule, Predicts, float | None]:
    """The forward process of a pipeline's scheduler, what its network predicts, and of a flow the shift of its times.

    `shift`: by default its scheduler's for latents [C, h, w] of a `shape`. Raises ValueError for a process that is not distilled.
    """
    name, network = type(scheduler).__name__, type(family).__name__
    if family.flow != is_flow(scheduler):
        raise unfit(name, path, type(family))
    if family.flow:
        if scheduler.config.get("invert_sigmas"):
            raise ValueError(f"the {name} of {path} has invert_sigmas set, whose times run the other way: set it to false")
        own = flows.shift(scheduler, family, shape, path) if shift is None else shift
        return NoiseSchedule.from_scheduler(scheduler, own), "flow", own
    if shift is not None:
        raise ValueError(f"model.pipeline.shift = {shift:g} is for flows, and {path} has a {network}: leave it out")
    schedule, kind = NoiseSchedule.from_scheduler(scheduler), scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTS:
        raise ValueError(f"the pipeline {path} predicts {kind!r}: known are {', '.join(PREDICTS)}")
    if PREDICTS[kind] == "eps" and schedule.alphas.min() == 0:
        raise ValueError(
            f"the pipeline {path} predicts epsilon and has zero terminal SNR (rescale_betas_zero_snr), where epsilon says nothing of the "
            "image: such checkpoints predict v, so set prediction_type in its scheduler_config.json, or rescale_betas_zero_snr to false"
        )
    return schedule, PREDICTS[kind], None


def unfit(name: str, path: str, family: type[Family]) -> ValueError:
    """The refusal of a pipeline whose scheduler, of the class `name`, is for another forward process than its network's `family`."""
    which = "a flow, so give it FlowMatchEulerDiscreteScheduler" if family.flow else "no flow, so give it that of its forward process"
    return ValueError(f"the pipeline {path} has the scheduler {name}, and its {family.__name__} is {which}")


def may_be_flow(name: str) -> bool | None:
    """Whether schedulers of the class `name` are for flows; None where that depends on their settings, or nobody knows the class."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if "Flow" in name or kind is None:
        return True if "Flow" in name else None
    return None if "use_flow_sigmas" in inspect.signature(kind).parameters else False


def student(
    teacher: Any,
    transition: Transition,
    prediction: str,
    rule: str,
    steps: int,
    scaling: float | None = None,
    times: int | None = None,
) -> Any:
    """The scheduler that steps as a student does which was trained at given nodes, on the forward process of its `teacher`'s scheduler.

    `Renoise` on `steps` nodes of LCM's training grid: LCMScheduler, whose boundary conditions have the time scaling `scaling` (None: they
    vanish). `TCD` on the same nodes: TCDScheduler, whose gamma its pipeline's call says. `Posterior` on trailing nodes: DDPMScheduler.
    `DDIM` on `steps` nodes of the `rule` (trailing, linspace): DDIMScheduler; where it would leave them, DPM-Solver++ of first order, which
    is DDIM between any nodes. `prediction`: the network's, by diffusers' name. `times`: of the forward process, the first so many, for a
    student that starts below the last. Raises ValueError for another transition, and where there is none that stands on these nodes.
    """
    own: dict[str, Any] = {"prediction_type": prediction}
    total = teacher.config.num_train_timesteps
    if times is not None and times < total:
        # These are rescaled already, and would be once more, to zero SNR at the student's first time.
        own |= {"num_train_timesteps": times, "trained_betas": teacher.betas[:times].tolist(), "rescale_betas_zero_snr": False}
        total = times
    if transition == renoise:
        own |= {"original_inference_steps": steps, "timestep_scaling": 1e10 if scaling is None else scaling}
        return _made("LCMScheduler", teacher, set_alpha_to_one=True, clip_sample=False, **own)
    if isinstance(transition, TCD):
        return _made("TCDScheduler", teacher, clip_sample=False, original_inference_steps=steps, **own)
    if transition == Posterior():
        if rule != "trailing" or total % steps:
            raise ValueError(f"DDPMScheduler steps down by T // N: {steps} steps do not divide the {total} times of trailing nodes")
        return _made("DDPMScheduler", teacher, variance_type="fixed_small", clip_sample=False, timestep_spacing=rule, **own)
    if transition != ddim:
        known = f"{ddim}, {renoise}, {TCD()} and {Posterior()}"
        raise ValueError(f"no scheduler of diffusers is known to step by {transition}: known are {known}; {NEAR}")
    own["timestep_spacing"] = rule
    # DDIMScheduler steps down by T // N, whatever the next node is.
    if rule == "trailing" and total % steps == 0:
        return _made("DDIMScheduler", teacher, set_alpha_to_one=True, clip_sample=False, **own)
    rest = {"algorithm_type": "dpmsolver++", "solver_order": 1, "final_sigmas_type": "zero"}
    made = _made("DPMSolverMultistepScheduler", teacher, **rest, **own)
    tried = copy.deepcopy(made)
    tried.set_timesteps(steps)
    if tried.timesteps.tolist() != Grid.named(rule, steps, total).nodes.tolist():  # the rounding of its arange may add a time
        raise ValueError(
            f"DPMSolverMultistepScheduler does not stand on the {steps} {rule} nodes below {total} that the student is trained at (it "
            f"makes {len(tried.timesteps)}): take another step count, such as one that divides {total}"
        )
    return made


def _made(kind: str, teacher: Any, **own: Any) -> Any:
    """diffusers' scheduler `kind` on the teacher's forward process, with `own` options and nothing else of the teacher's.

    A teacher's ways to sample (Karras or other sigmas, thresholding, an offset, rules for the last step) are not the student's.
    """
    import diffusers

    read = inspect.signature(type(teacher)).parameters  # a configuration may have kept what another class once said
    process = {name: value for name, value in teacher.config.items() if name in PROCESS and name in read}
    # An offset of 1 has no effect but on `leading` times, and diffusers warns of any other at every load.
    return getattr(diffusers, kind)(**{**process, "steps_offset": 1, "thresholding": False, **own})


def dpm(scheduler: Any, shift: float | None = None) -> Any:
    """DPM-Solver++ 2M with everything else as `scheduler` has it; `shift` of a flow's times."""
    from diffusers import DPMSolverMultistepScheduler

    if is_flow(scheduler):
        own = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        return DPMSolverMultistepScheduler(num_train_timesteps=scheduler.config.num_train_timesteps, solver_order=2, **own)
    return DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=2)


def check_steps(scheduler: Any, n: int, family: Family, shape: Sequence[int], device: torch.device) -> None:
    """Raises ValueError, with its reason, for a step count that a scheduler cannot take on latents [C, h, w]."""
    try:
        if family.flow:
            with numpy.errstate(invalid="ignore"):  # of one step, by a scheduler that stretches its nodes to the last
                flows.set_steps(scheduler, n, family, shape, device)
        else:
            scheduler.set_timesteps(n, device=device)
        # Without sigmas to interpolate, a scheduler looks its times up: "leading" ones with an offset may lie beyond the last.
        if not hasattr(scheduler, "sigmas") and int(scheduler.timesteps.max()) >= scheduler.config.num_train_timesteps:
            raise ValueError(f"its times begin at {int(scheduler.timesteps.max())}")
    except Exception as error:  # whatever a scheduler of diffusers raises
        raise ValueError(f"{type(scheduler).__name__}: {one_line(error).split('. ')[0]}") from error
