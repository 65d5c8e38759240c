"""What separates a student from its teacher on given latents: where it goes, what its next step costs, and whether that is made good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddil_lightning.backbones.sampling import batch, noise, renoising
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.imitation.mixing import Actor, Actors
from ddil_lightning.imitation.shift import shift_report
from ddil_lightning.records import Context, take, wide
from ddil_lightning.streams import Generators


def states(policy: Policy, grid: Grid, x_T: Tensor, c: Context, generators: Sequence[torch.Generator] | None = None) -> dict[int, Tensor]:
    """{time: latents [B, ...]} that a walk down `grid` meets, its start and its end among them; `parts` of them walk at a time."""
    walks = []
    for part in parts(x_T):
        own = None if generators is None else generators[part]
        walks.append([x_T[part], *policy.walk(x_T[part], grid, take(c, part), own)])
    return {t: torch.cat(x) for t, *x in zip(grid.times.tolist(), *walks, strict=True)}


def parts(x: Tensor) -> list[slice]:
    """The rows of latents [B, C, h, w], or of points [B, D], that a network is asked about at a time."""
    size = batch(x.shape[1:])
    return [slice(start, start + size) for start in range(0, len(x), size)]


def rest(actor: Actor, grid: Grid, node: int, x_t: Tensor, generators: Generators | None = None) -> Tensor:
    """What the actor makes of latents [B, ...] at a node, at the end of the grid."""
    times = grid.times.tolist()[node:]
    for t, s in zip(times, times[1:], strict=False):
        x_t = actor.policy(x_t, t, s, actor.c, generators)
    return x_t


def loss(actors: Actors, grid: Grid, node: int, x_t: Tensor, solved: dict[int, Tensor] | None = None) -> Tensor:
    """[B] mean squares of the student's answer to latents at a node, minus the teacher's finer solution from the same latents.

    A class-A loss (METHODS 1.4): it needs no clean image, so it has the same meaning on latents of any origin. A student that steps
    deterministically is asked where it lands at the next node, and a teacher in substeps should land there. One that draws noise on its
    way lands at random: it is asked for x0, and the teacher goes on to the end of the grid. `solved`: the walk of the teacher that
    these latents are from, where they are its own, which need not be made again.
    """
    each = [
        _loss(
            Actors(*(Actor(a.policy, take(a.c, part)) for a in actors)),
            grid,
            node,
            x_t[part],
            None if solved is None else {time: x[part] for time, x in solved.items()},
        )
        for part in parts(x_t)
    ]
    return torch.cat(each)


def _loss(actors: Actors, grid: Grid, node: int, x_t: Tensor, solved: dict[int, Tensor] | None) -> Tensor:
    """`loss` of as many latents as are asked about at a time."""
    (policy, c), teacher = actors
    t, s = grid.times.tolist()[node : node + 2]
    if policy.transition.noisy:
        mine = policy.denoiser(x_t, torch.full((len(x_t),), t, device=x_t.device), c).x0
        return _squares(mine - (rest(teacher, grid, node, x_t) if solved is None else solved[int(grid.times[-1])]))
    return _squares(policy(x_t, t, s, c) - (teacher.policy(x_t, t, s, teacher.c) if solved is None else solved[s]))


def recovery(actors: Actors, grid: Grid, node: int, walk: dict[int, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """([B], [B]) mean squares of the student's continuation minus the teacher's, behind one step from the teacher's latents at a node.

    The first after a step of the student, injected into the teacher's `walk`; the second after the teacher's own, which is what the two
    continuations differ by without an error to recover from. Noise that a student draws on its way is part of both.
    """
    student, teacher = actors
    t, s = grid.times.tolist()[node : node + 2]
    n = len(walk[t])
    injected = student.policy(walk[t], t, s, student.c, renoising(n, seed))
    mine = [rest(student, grid, node + 1, x_s, renoising(n, seed + n)) for x_s in (injected, walk[s])]
    return _squares(mine[0] - rest(teacher, grid, node + 1, injected)), _squares(mine[1] - walk[int(grid.times[-1])])


class Seen(NamedTuple):
    """What one batch of samples shows: latents at every time of the grid, and numbers [B] at every node."""

    student: dict[int, Tensor]
    teacher: dict[int, Tensor]
    forward: dict[int, Tensor]  # {} without data
    values: dict[int, dict[str, Tensor]]  # {node: {name: [at most B]}}


@torch.no_grad()
def see(
    actors: Actors, grid: Grid, shape: Sequence[int], seeds: tuple[int, int, int], data: Tensor | None = None, asked: int | None = None
) -> Seen:
    """The student's walk, the teacher's from independent noise, forward latents of `data` [B, ...], and what is lost at every node.

    `seeds` of the three noises; sample i has each of them + i. `asked`: losses and recovery, which cost the teacher most, are those of so
    many first samples; by default of all.
    """
    student, teacher = actors
    n, schedule, times = len(student.c.text), student.policy.schedule, grid.nodes.tolist()
    first, second, third = (noise(n, shape, seed).to(student.c.text.device) for seed in seeds)
    mine = states(student.policy, grid, first, student.c, renoising(n, seeds[0]))
    theirs = states(teacher.policy, grid, second, teacher.c, renoising(n, seeds[1]))
    forward = {} if data is None else {t: schedule.add_noise(data, third, t) for t in times}
    some = slice(asked)
    few = Actors(*(actor._replace(c=take(actor.c, some)) for actor in actors))
    walk = {t: x[some] for t, x in theirs.items()}
    values: dict[int, dict[str, Tensor]] = {t: {} for t in times if asked != 0}
    for j, (t, found) in enumerate(values.items()):
        found |= {"on": loss(few, grid, j, mine[t][some]), "teacher": loss(few, grid, j, walk[t], walk)}
        if forward:
            found["forward"] = loss(few, grid, j, forward[t][some])
        if j + 1 < len(times):
            found["injected"], found["plain"] = recovery(few, grid, j, walk, seeds[0] + j)
    return Seen(mine, theirs, forward, values)


def nodes(seen: Sequence[Seen], grid: Grid) -> list[dict[str, object]]:
    """A row for every node: `shift` from the teacher's latents and from forward ones, mean `loss` by latents, its `ratio`, `recovery`.

    `ratio`: the loss on the student's own latents over that on the teacher's, and on forward ones. `recovery`: the root of the mean square
    of `gaps.recovery` after a step of the student (`injected`) and of the teacher (`plain`). `asked`: of so many samples are losses and
    recovery. Without data, nothing says `forward`. Raises ValueError for fewer than 4 samples.
    """

    def joined(name: str) -> dict[int, Tensor]:
        return {t: torch.cat([getattr(part, name)[t].cpu() for part in seen]) for t in grid.nodes.tolist()}

    others = {name: joined(name) for name in ("teacher", "forward") if getattr(seen[0], name)}
    shifts = {name: shift_report(joined("student"), latents, paired=True) for name, latents in others.items()}
    rows: list[dict[str, object]] = []
    for t in grid.nodes.tolist():
        told = [part.values[t] for part in seen if part.values]
        every = {key: torch.cat([values[key].cpu() for values in told]) for key in told[0]}
        mean = {key: float(x.mean()) for key, x in every.items()}
        losses = {name: mean[name] for name in ("on", *others)}
        ratio = {name: losses["on"] / losses[name] if losses[name] > 0 else None for name in others}
        back = {key: mean[key] ** 0.5 for key in ("injected", "plain") if key in mean}
        shift = {name: found[t] for name, found in shifts.items()}
        rows.append({"t": t, "shift": shift, "loss": losses, "ratio": ratio, "recovery": back, "asked": len(every["on"])})
    return rows


def _squares(x: Tensor) -> Tensor:
    return wide(x).square().flatten(1).mean(1)
