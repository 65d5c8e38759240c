"""Schedulers of flow matching: how their times are shifted, which nodes their plain call walks, and the one that steps as a student does.

`FlowMatchEulerDiscreteScheduler.set_timesteps(n)` takes u_k even from sigma_max to sigma_min, unless its pipeline hands it others, shifts
them, f_s(u) = s u / (1 + (s - 1) u), and, with `shift_terminal`, stretches 1 - sigma linearly so that the last node is that. sigma_min is
stored after the shift: one that does not depend on the size of the image is applied to it twice (diffusers issue 13243).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import NEAR, Transition, ddim, renoise
from ddil_lightning.records import END

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family

KINDS: dict[Transition, str] = {renoise: "FlowMatchLCMScheduler", ddim: "FlowMatchEulerDiscreteScheduler"}
"""The scheduler of diffusers by how a student steps."""

CLOSE = 1e-5
"""How far a scheduler's sigma may be from the trained one: it keeps float32."""


def mu(scheduler: Any, positions: int) -> float:
    """What pipelines tell a scheduler whose shift depends on the size of the image: linear in the `positions` that its network sees."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    start, end = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(start + (end - start) / (high - low) * (positions - low))


def shift(scheduler: Any, family: Family, shape: Sequence[int], path: str) -> float:
    """The shift s of a scheduler's times for latents [C, h, w]. Raises ValueError where it depends on their size in a way not known."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift" if "Flow" in type(scheduler).__name__ else "flow_shift") or 1.0)
    positions = family.positions(shape)
    if positions is None:
        raise ValueError(
            f"the {type(scheduler).__name__} of {path} shifts its times by the size of the image, and {type(family).__name__} has no rule "
            "for it: give model.pipeline.shift a number (1 leaves the times as they are, 3 moves them towards noise)"
        )
    told = mu(scheduler, positions)
    return told if config.get("time_shift_type") == "linear" else math.exp(told)


def set_steps(scheduler: Any, n: int, family: Family, shape: Sequence[int], device: Any = "cpu") -> None:
    """Give a scheduler its nodes for `n` steps on latents [C, h, w], as a plain call of its pipeline does."""
    positions = family.positions(shape)
    told = {"mu": mu(scheduler, positions)} if scheduler.config.get("use_dynamic_shifting") and positions is not None else {}
    if family.passes_sigmas and not scheduler.config.get("use_flow_sigmas"):  # DPM-Solver++, which takes its own
        told["sigmas"] = torch.linspace(1, 1 / n, n, dtype=torch.float64).tolist()  # type: ignore[assignment]
    scheduler.set_timesteps(n, device=device, **told)


def nodes(scheduler: Any, n: int, family: Family, shape: Sequence[int]) -> Tensor:
    """[n] the falling sigmas of a plain call in `n` steps, without the 0 that it ends in."""
    set_steps(scheduler, n, family, shape)
    return scheduler.sigmas[:n].double().cpu()  # type: ignore[no-any-return]


def check_trained(scheduler: Any, n: int, sigmas: Sequence[float], shift: float) -> None:
    """Raises ValueError unless a scheduler that was given `n` steps walks a student's nodes, f_s(1 - k / n).

    `sigmas`: those that it was exported with, which may be others, in their number; `shift`: s. A node may be off by less than one of the
    schedule's T times, as those of DPM-Solver++ are. One that holds few nodes (`student`) walks nodes of its own in any other number.
    """
    trained = torch.tensor(sigmas if n == len(sigmas) else [shift * u / (1 + (shift - 1) * u) for u in (1 - k / n for k in range(n))])
    walked = scheduler.sigmas[:n].double().cpu()
    even, its = (x / (shift - (shift - 1) * x) for x in (trained.double(), walked))
    if not float((its - even).abs().max()) < 1 / scheduler.config.num_train_timesteps:  # of one step they are no numbers
        shown, wanted = (", ".join(f"{sigma:.3g}" for sigma in x.tolist()) for x in (walked, trained))
        raise ValueError(
            f"its scheduler holds the nodes of {len(sigmas)} step{'s' * (len(sigmas) > 1)}, and would walk sigma = {shown} in the "
            f"place of {wanted}: another count needs an export of its own (ddil-export --steps {n}), where its method makes one"
        )


def exactly(sigmas: Tensor, total: int) -> tuple[NoiseSchedule, Grid]:
    """The linear path through nodes [N] that fall, whatever they are, and the grid that walks them."""
    return NoiseSchedule.through(sigmas.flip(0), total), Grid([*range(len(sigmas) - 1, -1, -1), END], rule="sigmas")


def grid(schedule: NoiseSchedule, sigmas: Tensor) -> Grid:
    """The nodes of a schedule that are nearest to the falling `sigmas` [N]. Raises ValueError where two of them are one."""
    table = schedule.sigmas[:-1]
    times = [int((table - sigma).abs().argmin()) for sigma in sigmas]
    if len(set(times)) < len(times):
        raise ValueError(f"{len(times)} steps come closer than the {schedule.steps} times of the schedule: give fewer")
    return Grid([*times, END], rule="sigmas")


def student(total: int, transition: Transition, sigmas: Tensor, passes_sigmas: bool) -> Any:
    """The scheduler whose plain call in N steps walks the trained nodes `sigmas` [N], at every size, stepping by `transition`.

    Re-noising: FlowMatchLCMScheduler. Deterministic steps: FlowMatchEulerDiscreteScheduler. Nodes of a shift, even before it, can be held:
    shifted and cut off at N they are what another shift makes of nodes that go down to 0, stretched to the last (`settings`).
    `total`: T. `passes_sigmas`: pipelines hand their scheduler linspace(1, 1/N, N). Raises ValueError for other nodes or steps.
    """
    import diffusers

    if transition not in KINDS:
        known = " and ".join(map(str, KINDS))
        raise ValueError(f"no scheduler of diffusers steps by {transition} on a flow: known are {known}; {NEAR}")
    n = len(sigmas)
    own = settings(sigmas.tolist(), total, passes_sigmas)
    made = getattr(diffusers, KINDS[transition])(num_train_timesteps=total, **own)
    told: dict[str, Any] = {"sigmas": torch.linspace(1, 1 / n, n).tolist()} if passes_sigmas else {}
    made.set_timesteps(n, **told)
    if not float((made.sigmas[:n].double().cpu() - sigmas).abs().max()) <= CLOSE:
        shown = ", ".join(f"{sigma:.3g}" for sigma in sigmas)
        raise ValueError(
            f"no flow scheduler of diffusers walks the nodes sigma = {shown} by itself: take trailing nodes from pure noise, of a count "
            f"that divides the schedule's {total} times"
        )
    return type(made).from_config(made.config)


def even(kind: type, total: int, shift: float) -> Any:
    """A scheduler of `kind`, of flow matching, whose plain call in N steps walks f_s(1 - k / N): where DPM-Solver++ of a flow stops, too.

    Its own plain call would shift sigma_min twice and spend its last step on it.
    """

    class Even(kind):  # type: ignore[misc, valid-type]
        def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **told: Any) -> None:
            if sigmas is None and num_inference_steps is not None and told.get("timesteps") is None:
                sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
            super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, **told)

    Even.__name__ = kind.__name__  # which is what is read of a scheduler
    return Even(num_train_timesteps=total, shift=shift)


def settings(sigmas: Sequence[float], total: int, passes_sigmas: bool = False) -> dict[str, float]:
    """`shift` and `shift_terminal` whose nodes are `sigmas`, if any are: the second and the last are, in any case.

    1 - f_s(u) is a quotient of two linear functions of k that is 0 at k = 0, and so are even nodes of any shift that end above 0: one pole
    is to be met. With u_k = 1 - k d, d = (1 - sigma_min) / (N - 1) and sigma_min = f_s(1 / T) that is, for
    rho = (1 - sigma_1) / (1 - sigma_{N-1}), (1 - rho (N - 1)) s^2 - rho (N - 2) (T - 1) s + (1 - rho) (T - 1) = 0, the smaller root.
    """
    n = len(sigmas)
    if n == 1:
        return {"shift": 1.0}
    if passes_sigmas:  # u_1 = 1 - 1 / N
        return {"shift": sigmas[1] / ((1 - sigmas[1]) * (n - 1))}
    if n == 2:
        return {"shift": 1.0, "shift_terminal": sigmas[-1]}
    rho = (1 - sigmas[1]) / (1 - sigmas[-1])
    a, b, c = 1 - rho * (n - 1), rho * (n - 2) * (total - 1), (1 - rho) * (total - 1)
    root = b * b - 4 * a * c
    return {"shift": 2 * c / (b + math.sqrt(max(root, 0.0))), "shift_terminal": sigmas[-1]}
