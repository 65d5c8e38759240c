"""EM distillation, EMD (Xie et al. 2024, arXiv 2405.16852; METHODS 5.1), as a feedback loss of DDIL."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.bounds import above, within
from ddil_lightning.diffusion.losses import mse, per_sample
from ddil_lightning.records import LatentBatch, sent, take
from ddil_lightning.streams import normal
from ddil_lightning.training.adversary import Critic
from ddil_lightning.training.scores import TwoScores

Cancel = Literal["linear", "stein", "sum", "raw"]
ENERGY = 1e3  # mean squares of e and z along a chain, which lie about 1; one beyond this goes on to infinity


@dataclass(frozen=True)
class Chain:
    """The E-step: Langevin steps towards the teacher's law, on the noise e and on the student's input z.

    Args:
        steps: K; each is an evaluation of student, teacher and critic. 1 is Diff-Instruct's gradient.
        gamma_e: step size of e.
        gamma_z: step size of z, at the first node alone, where its law is known; where z keeps still, as everywhere with 0, the student is
            asked once. How far z moves decides how far from the mode-seeking reverse KL divergence one is.
        cancel: how the noise of the chain is taken out of e_K: `linear` subtracts what is left of it, as the paper does; `stein` puts
            sigma (s_q - s_p) of the last state in its place, which long chains need; `sum` subtracts it as it was injected; `raw` keeps it.
    """

    steps: int = 8
    gamma_e: float = 0.4**2
    gamma_z: float = 0.004**2
    cancel: Cancel = "linear"

    def __post_init__(self) -> None:
        within(1, 10_000, **{"chain.steps": self.steps})
        above(0, **{"chain.gamma_e": self.gamma_e})
        within(0, 1, **{"chain.gamma_e": self.gamma_e, "chain.gamma_z": self.gamma_z})
        if self.cancel not in ("linear", "stein", "sum", "raw"):
            raise ValueError(f"chain.cancel is {self.cancel!r}: give linear, stein, sum or raw")


class Posterior(NamedTuple):
    """The end of a chain."""

    z: Tensor  # [B, ...] the student's input z_K
    e: Tensor  # [B, ...] the noise e_K
    e_hat: Tensor  # [B, ...] e_K without the chain's own noise
    x: Tensor  # [B, ...] the student's samples at z_0, which no step has moved, without their graph
    still: Tensor  # [B, ...] those of rows whose z no step moves, with the graph that the M-step's gradient takes; 0 for the others
    ratio: Tensor  # [B, 1, ...] sigma_t / alpha_t at the chain's time
    moving: list[int]  # the rows for which the student is asked again, at z_K


class EMD(TwoScores):
    """The student's samples should have the teacher's law, by maximum likelihood of the latter's samples: expectation-maximisation.

    E-step: with a time t per sample, x_t = alpha g(z) + sigma e, Langevin steps take (e, z) to where the teacher would have x_t. M-step:
    g(z_K) follows g(z_K) + (sigma / alpha) e_hat. The critic learns the score of the student's law from samples that no chain has moved.
    EMD is one step from pure noise (`steps: 1`, with `start` its t*); at the later nodes of a grid z is the latent there, and keeps still,
    for the law of what is rolled out is not known. No latent needs an x0, so all sources are legal.

    Args:
        critic: the critic's time scale.
        chain: the E-step.
    """

    def __init__(self, *, critic: Critic = Critic(1), chain: Chain = Chain(), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        last = self.tau[1]
        if self.backbone.schedule.alphas[last] == 0:  # sigma / alpha there is infinite
            raise ValueError(
                f"scores.tau = {list(self.scores.tau)} has chains at t = {last}, which is noise alone and says nothing of a sample: end it "
                "below 1, such as 0.98"
            )
        self.chain = chain
        self.oppose(critic)

    def training_step(self, b: LatentBatch, i: int) -> None:
        """A chain and the student's update, every `critic.steps`-th time; and one update of the critic, on samples at z_0."""
        student, critic = self.both()
        if self.adversary.student_turn:
            with self.adversary.still():
                end = self.posterior(b)
                self.check(end, b)
                if self.descend(student, self.feedback(b, self.maximisation(end, b))):
                    self.advance()
            x = end.x
        else:
            with torch.no_grad():
                x = self.samples(b.x_t, b.t, b.c)
        self.adversary.descend(critic, x.detach(), b)

    def posterior(self, b: LatentBatch) -> Posterior:
        """The E-step: one chain for every latent, from z = x_t and e ~ N(0, I), at a time t of its own."""
        k, numbers = self.chain, self.adversary.generator("chain", b.x_t.device)
        t, e = self.start(b)
        z, (alpha, sigma) = b.x_t.detach(), self.critic.schedule.at(t, e)
        gamma_z = k.gamma_z * (b.node == 0).to(z.dtype).view(-1, *(1,) * (z.ndim - 1))
        own = e if k.cancel in ("linear", "sum") else torch.zeros_like(e)             # the chain's own noise in e
        moving = self.moving(b)
        rest = [row for row in range(len(z)) if row not in moving]
        still = self.again(torch.zeros_like(z), z, rest, b)                           # the M-step's gradient passes through these
        begin = x = self.again(still.detach(), z.requires_grad_(bool(moving)), moving, b)
        for step in range(k.steps):
            if step:
                x = self.again(still.detach(), z.requires_grad_(bool(moving)), moving, b)
            drift = self.drift(alpha * x.detach() + sigma * e, t, b)                  # sigma (s_q - s_p)
            noise = (2 * k.gamma_e) ** 0.5 * normal(e, numbers)
            e = (1 - k.gamma_e) * e + k.gamma_e * drift + noise
            own = (1 - k.gamma_e) * own + noise if k.cancel == "linear" else own + noise
            if k.gamma_z:
                d = alpha / sigma * drift                                             # alpha (s_q - s_p)
                pull = torch.autograd.grad(x, z, d)[0] if moving else torch.zeros_like(z)  # J^T d
                z = (z + gamma_z * (pull - z) + (2 * gamma_z).sqrt() * normal(z, numbers)).detach()
        e_hat = e - own if k.cancel in ("linear", "sum") else e
        if k.cancel == "stein":
            with torch.no_grad():
                e_hat = self.drift(alpha * self.again(still, z, moving, b) + sigma * e, t, b)
        return Posterior(z.detach(), e, e_hat, begin.detach(), still, sigma / alpha, moving)

    def maximisation(self, end: Posterior, b: LatentBatch) -> Tensor:
        """[B] of the M-step: half the squared distance of g(z_K) from g(z_K) + (sigma / alpha) e_hat (METHODS 5.1 with w' = 1)."""
        x = self.again(end.still, end.z, end.moving, b)
        return 0.5 * mse(x, (x + end.ratio * end.e_hat).detach())

    def moving(self, b: LatentBatch) -> list[int]:
        """The rows for which the student is asked again, those whose z moves; under fsdp2 all, where every process must ask as often."""
        if not self.chain.gamma_z:
            return []
        if self.shards.split:
            return list(range(len(b.t)))
        return [row for row, node in enumerate(self.feed.origin(b).node) if node == 0]

    def again(self, x: Tensor, z: Tensor, moving: list[int], b: LatentBatch) -> Tensor:
        """The student's samples [B, ...] at z: it is asked for those of the rows `moving`; all others are `x`."""
        if len(moving) == len(z):
            return self.samples(z, b.t, b.c)
        if not moving:
            return x
        rows = sent(torch.tensor(moving), z.device)
        found = self.samples(z[rows], b.t[rows], take(b.c, rows))
        return x.to(found.dtype).index_copy(0, rows, found)

    def start(self, b: LatentBatch) -> tuple[Tensor, Tensor]:
        """The time t [B] of every chain and its first noise e [B, ...]."""
        _, t, e = self.adversary.diffuse(b.x_t.detach(), "matching", *self.tau)
        return t, e

    @torch.no_grad()
    def drift(self, x_t: Tensor, t: Tensor, b: LatentBatch) -> Tensor:
        """sigma (s_q - s_p) = (alpha / sigma) (x0_q - x0_p) at x_t [B, ...], the scores as `scores` and `reflects` say."""
        real, fake = self.estimates(x_t, t, b)
        alpha, sigma = self.critic.schedule.at(t, x_t)
        return alpha / sigma * (real - fake)

    def check(self, end: Posterior, b: LatentBatch) -> None:
        """Record how far z has moved. A chain that has diverged ends the run, in every process."""
        first = (b.node == 0).to(end.z.dtype)
        self.measures.add("chain/moved", (per_sample((end.z - b.x_t).square()) * first).sum(), first.sum())
        energy = torch.stack([per_sample(x.square()).max() for x in (end.e, end.z)])
        fine = (energy < ENERGY).all() | ~end.x.isfinite().all()  # a network's fault is the loss's to name
        self.descent.watch.ask(fine, partial(self._diverged, energy, self.student_updates))

    def _diverged(self, energy: Tensor, updates: int, mine: bool) -> str:
        """What is said of a chain that has diverged, here (`mine`) or elsewhere."""
        e, z = energy.tolist()
        found = f": the mean square of e is {e:.3g} and that of z {z:.3g}, which are about 1" if mine else " on another process"
        return (
            f"the Langevin chain of {self.chain.steps} steps diverged at student update {updates}{found}; lower "
            f"model.chain.gamma_e, which is {self.chain.gamma_e:g}, or model.chain.gamma_z, which is {self.chain.gamma_z:g}"
        )
