"""The covariate shift, measured while training: a number that moves when the loss does not."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.backbones.sampling import noise, renoising
from ddil_lightning.bounds import at_least, seeds, within
from ddil_lightning.diffusion.denoiser import evaluating, to_w
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.imitation.gaps import loss, states
from ddil_lightning.imitation.mixing import Actor, Actors
from ddil_lightning.imitation.shift import energy_distance
from ddil_lightning.records import take

PAIRS = 2000
"""Samples per set in a distance, whose memory is quadratic."""
LEAST = 4
"""Samples per set without which `imitation.shift` measures nothing."""


class ShiftProbe(Callback):
    """How far the student's own latents are from the teacher's and from forward latents, node by node.

    The teacher walks its DDIM steps under the same guidance and is recorded at the student's nodes, from independent noise. Forward latents
    alone are the wrong yard-stick under guidance: the guided teacher is shifted against them itself. Writes shift/teacher and shift/forward
    (energy distance, mean over nodes), and the same with a node's time. Node 0 is pure noise for both and is left out. shift/coverage is
    the share of the teacher's latents at the last node that have one of the student's within the distance of their fifth neighbour
    (Naeem et al. 2020): it falls when the student leaves whole regions out. Both sets are of the same prompts, and the latent of the same
    prompt is counted like any other: a student that draws one image for each prompt, whatever the noise, is not seen by it, but by the
    energy distance. It is left out with fewer than six captions; four are the least that
    are measured. Of a student that is finished, `ddil-probe` measures more. One that learns in stages of fewer and fewer steps (PD) is
    sampled in `steps` from the first on, for which it is not trained before the last: until then the numbers are of that, too.

    Args:
        every: student updates between two probes.
        count: captions that are sampled, spread over the data, the same ones every time.
        steps: of the student's sampler.
        teacher_steps: DDIM steps of the teacher.
        seed: of the noise, the same for every probe.
        losses: captions on whose latents the loss is measured besides: shift/loss_ratio, the student's own over the teacher's
            (`imitation.gaps.loss`), with a node's time, too. The teacher then walks at every probe; 0 leaves it out.
    """

    def __init__(
        self, every: int = 100, count: int = 128, steps: int = 4, teacher_steps: int = 32, seed: int = 30_000, losses: int = 0
    ) -> None:
        at_least(1, every=every, teacher_steps=teacher_steps)
        at_least(2, steps=steps)
        within(8, 10**6, count=count)
        within(0, count, losses=losses)
        seeds(seed=seed)
        self.every, self.count, self.steps, self.teacher_steps, self.seed, self.losses = every, count, steps, teacher_steps, seed, losses
        self._references: dict[str, dict[int, Tensor]] = {}
        self._probed: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ValueError on all processes, now, for a step count that the student cannot take, and for data with too few captions.

        What is due at the clock that a run goes on from was measured before the stop: a batch that leaves the clock does not repeat it.
        """
        pl_module.deployment.sampler(self.steps)
        there = len(pl_module.feed.reference(LEAST).rows)
        if there < LEAST:
            raise ValueError(f"ShiftProbe compares at least {LEAST} latents, and the data have {there} captions: leave the probe out")
        self._probed = pl_module.student_updates

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure after every `every` student updates and publish. All processes sample: a sharded student answers only then."""
        clock = pl_module.student_updates
        if clock == self._probed or clock == 0 or clock % self.every:
            return
        self._probed = clock
        with torch.no_grad(), trainer.precision_plugin.forward_context(), evaluating(pl_module.deployment.network):
            values = self.measure(pl_module, pl_module.feed)
        pl_module.measures.publish(clock, values)

    def measure(self, method: Any, data: Any) -> dict[str, float]:
        """The energy distances at the present weights, by the names in the class's docstring; the references are sampled once."""
        from ddil_lightning.evaluation.metrics.prdc import DensityCoverage, density_coverage  # which few runs need

        batch = data.reference(self.count)
        policy, grid = method.deployment.sampler(self.steps)
        inner = grid.nodes.tolist()[1:]
        fine = Grid.named("trailing", self.teacher_steps, method.teacher.schedule.steps)
        # Under the guidance of its feedback: a student of DMD2 is moved to the real score's distribution and to no other.
        walker = Policy(method.teacher.apart(), ddim, fine=fine, asks=getattr(method.policies.teacher, "asks", None))
        if not self._references:
            # Every set of latents has seeds of its own: seed + i is that of sample i.
            self._references["teacher"] = self._states(walker, grid, method, batch, self.seed + self.count)
            if batch.latent is not None:
                eps, schedule = self._noise(batch, method, self.seed + 2 * self.count), method.teacher.schedule
                self._references["forward"] = {t: schedule.add_noise(batch.latent, eps, t) for t in inner}
        mine = self._states(policy, grid, method, batch, self.seed)
        values: dict[str, float] = {}
        for name, reference in self._references.items():
            nodes = {f"shift/{name}@{t}": energy_distance(mine[t][:PAIRS], reference[t][:PAIRS], paired=True) for t in inner}
            values |= {**nodes, f"shift/{name}": sum(nodes.values()) / len(nodes)}
        theirs, own = (x[inner[-1]][:PAIRS].flatten(1) for x in (self._references["teacher"], mine))
        if len(theirs) >= DensityCoverage.least_real:
            values["shift/coverage"] = density_coverage(theirs, own)[1]
        return values | (self._ratios(policy, walker, grid, method, batch, mine) if self.losses else {})

    def _ratios(self, policy: Policy, walker: Policy, grid: Grid, method: Any, batch: Any, mine: dict[int, Tensor]) -> dict[str, float]:
        """The loss on the student's own latents over that on the teacher's, and its mean over nodes."""
        some = slice(self.losses)
        c = take(batch.c, some).guided(to_w(method.eval_guidance))
        actors, ratios = Actors(Actor(policy, c), Actor(walker, c)), {}
        walk = {t: x[some] for t, x in self._references["teacher"].items()}
        for j, t in list(enumerate(grid.nodes.tolist()))[1:]:
            on, off = loss(actors, grid, j, mine[t][some]), loss(actors, grid, j, walk[t], walk)
            ratios[f"shift/loss_ratio@{t}"] = float(on.mean() / off.mean())
        return {**ratios, "shift/loss_ratio": sum(ratios.values()) / len(ratios)}

    def _states(self, policy: Policy, grid: Grid, method: Any, batch: Any, seed: int) -> dict[int, Tensor]:
        c = batch.c.guided(to_w(method.eval_guidance))
        return states(policy, grid, self._noise(batch, method, seed), c, renoising(len(batch.rows), seed))

    def _noise(self, batch: Any, method: Any, seed: int) -> Tensor:
        shape = method.backbone.latent_shape if batch.latent is None else batch.latent.shape[1:]
        return noise(len(batch.rows), shape, seed).to(method.device)
