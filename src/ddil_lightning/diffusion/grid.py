"""Grids of timesteps, by the rules of diffusers' schedulers: the nodes at which a student is trained and sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ddil_lightning.bounds import divides
from ddil_lightning.records import END


class Grid:
    """Nodes t_0 > t_1 > ... > t_{N-1} and the end that the last interval reaches; the timesteps a student is trained or sampled on.

    `times`: all N+1 of them. `rollouts`: the grids that inference walks, if they are coarser than the training grid (LCM trains on
    50 nodes and samples on 3, 4 or 5 of them); every node of theirs must be one of this grid's. Values come from a named rule
    (`Grid.named`), never from `t - T // N`: 499 against 500 fails in silence. `shares`: how often each node is drawn, relative to the
    others, by default equally often.
    """

    def __init__(self, times: Sequence[int], rollouts: Sequence[Grid] = (), rule: str = "", shares: Sequence[float] = ()) -> None:
        times = [int(t) for t in times]
        # END = -1 is below every time, so one comparison covers it.
        if len(times) < 2 or any(a <= b for a, b in zip(times, times[1:], strict=False)) or times[-1] < END:
            raise ValueError(f"a grid's times fall strictly and end in END = {END} or a time >= 0, got {times}")
        self.times = torch.tensor(times)
        self.rollouts = tuple(rollouts) or (self,)
        self.rule = rule
        self.shares = tuple(shares)
        if self.shares and (len(self.shares) != len(times) - 1 or min(self.shares) < 0 or not 0 < sum(self.shares) < float("inf")):
            raise ValueError(f"shares of {len(times) - 1} nodes are as many numbers >= 0 that are not all 0, not {list(self.shares)}")
        self._there: dict[torch.device, Tensor] = {}
        self._row = {t: i for i, t in enumerate(times[:-1])}
        for grid in rollouts:
            self.rows(grid.nodes)  # raises if a roll-out would leave the grid

    @property
    def nodes(self) -> Tensor:
        """[N] the times at which the student is evaluated."""
        return self.times[:-1]

    def __len__(self) -> int:
        return len(self.times) - 1

    def __repr__(self) -> str:
        return f"Grid({self.rule or 'custom'}, {self.times.tolist()})"

    def rows(self, t: Tensor) -> Tensor:
        """The node index of every time in `t`. Raises ValueError for a time that is no node."""
        try:
            return torch.tensor([self._row[int(x)] for x in t.flatten().tolist()], device=t.device).view(t.shape)
        except KeyError as missing:
            raise ValueError(f"t = {missing} is not a node of {self}: the finer grid must contain the coarser") from None

    def after(self, t: Tensor) -> Tensor:
        """The next node after every time in `t` (which must be nodes)."""
        return self.at(self.rows(t) + 1)

    def at(self, node: Tensor) -> Tensor:
        """The times of node indices, on their device, where they are kept: copying them in every batch would have the host wait for it."""
        if node.device not in self._there:
            with torch.inference_mode(False):
                self._there[node.device] = self.times.to(node.device)
        return self._there[node.device][node]

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """[n] node indices, independent, uniform or by `shares`: the times of the forward source."""
        if self.shares:
            weights = torch.tensor(self.shares, device=generator.device)
            return torch.multinomial(weights, n, replacement=True, generator=generator)
        return torch.randint(len(self), (n,), generator=generator, device=generator.device)

    def rollout(self, rng: random.Random) -> Grid:
        """One of the inference grids, uniform."""
        return rng.choice(self.rollouts)

    @classmethod
    def named(cls, rule: str, steps: int, total: int = 1000, *, solver_steps: int = 50) -> Grid:
        """The grid of a rule (METHODS 0.3), as diffusers' schedulers compute it.

        `linspace`: DPM-Solver++'s default, nodes nested under halving (4 steps: 999, 749, 500, 250); `trailing`: 999, 749, 499, 249 (DMD2);
        `leading`: 751, 501, 251, 1 (never starts at the noisiest step); `lcm`: nodes of LCMScheduler, all on the grid of `solver_steps`;
        `tcd`: the same nodes, but as TCDScheduler does it the last interval ends at time 0 and not at END.
        """
        if not 1 <= steps <= total:
            raise ValueError(f"a grid has between 1 and {total} steps, got {steps}")
        # The order of the operations is numpy's in diffusers: where a node falls on a half, rounding decides between 499 and 500.
        if rule == "linspace":
            times = [round(k * ((total - 1) / steps)) for k in range(steps, 0, -1)]
        elif rule == "trailing":
            times = [round(total + k * ((total - total / steps) - total)) - 1 for k in range(steps)]
        elif rule == "leading":
            times = [k * (total // steps) + 1 for k in reversed(range(steps))]
        elif rule in ("lcm", "tcd"):
            if steps > solver_steps:
                raise ValueError(
                    f"{'an LCM' if rule == 'lcm' else 'a TCD'} grid of {steps} steps does not fit on the {solver_steps} nodes of its solver"
                )
            skip = total // solver_steps
            fine = [k * skip - 1 for k in range(solver_steps, 0, -1)]
            times = [fine[int(k * solver_steps / steps)] for k in range(steps)]
        else:
            raise ValueError(f"no grid rule is called {rule!r}: known are linspace, trailing, leading, lcm, tcd")
        if times[0] >= total or len(set(times)) < steps:
            raise ValueError(f"the grid rule {rule!r} has no {steps} different times below {total}: take fewer steps")
        return cls([*times, 0 if rule == "tcd" else END], rule=rule)

    @classmethod
    def consistency(cls, solver_steps: int = 50, total: int = 1000, rollouts: Sequence[int] = (3, 4, 5), rule: str = "lcm") -> Grid:
        """LCM's training grid 999, 979, ..., 19 whose last interval ends at t = 0, where the solver's table stops, not at END.

        `rule`: of its `rollouts`. Raises ValueError when `solver_steps` does not divide `total`.
        """
        # Such a grid would start below the noisiest time, at which sampling starts, and fail in silence.
        divides(total, f"the schedule's {total} times", solver_steps=solver_steps)
        skip = total // solver_steps
        times = [k * skip - 1 for k in range(solver_steps, 0, -1)]
        walks = [cls.named(rule, n, total, solver_steps=solver_steps) for n in rollouts]
        return cls([*times, 0], rollouts=walks, rule=f"lcm-{solver_steps}")
