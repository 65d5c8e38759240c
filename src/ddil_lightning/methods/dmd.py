"""Distribution matching distillation, DMD (Yin et al. 2023; METHODS 4, end of 4.6), as a feedback loss of DDIL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddil_lightning.feed import Pairs, Wants
from ddil_lightning.methods.dmd2 import DMD2
from ddil_lightning.records import FORWARD, TEACHER, LatentBatch, Origin, sent
from ddil_lightning.training.adversary import Critic, Heard
from ddil_lightning.training.gan import Gan
from ddil_lightning.training.regression import Regression


class DMD(DMD2):
    """Matching by two scores, as DMD2 does it, and regression on the teacher's own answers to noise in the place of a GAN (Eq. 7 to 9).

    L = L_matching(x) + lambda d(x, y) with x the student's x0 at x_t and y where the teacher's flow takes x_t. There is a y for the noise
    of a stored pair, which is a forward latent at the first node, and for any state of a trajectory that is the teacher's as a whole;
    other latents are matched alone. The student source at the first node is fresh noise, as the paper adds to its pairs (Alg. 1). Critic
    and student are updated by turns, one to one. With several nodes forward latents at the later ones are
    the teacher's answers under independent noise, as the student's own are when it is sampled.

    Args:
        steps: nodes of the grid; the paper's generator has one. A divisor of the schedule's times.
        critic: the critic's time scale.
        regression: on the teacher's answers.
        pairs: noise and the teacher's answer to it, for forward latents at the first node.
    """

    def __init__(
        self,
        *,
        steps: int = 1,
        rollouts: tuple[int, ...] | None = None,
        critic: Critic = Critic(1),
        regression: Regression = Regression(),
        pairs: Pairs = Pairs(),
        **kwargs: Any,
    ) -> None:
        super().__init__(steps=steps, rollouts=(steps,) if rollouts is None else rollouts, critic=critic, gan=Gan(), **kwargs)
        self.regression, self._distance = regression, regression.between(self.backbone)
        if regression.weight:
            if self.scores.guidance is not None and (self.scores.guidance,) * 2 != self.guidance:
                raise ValueError(
                    f"scores.guidance = {self.scores.guidance:g} moves the student elsewhere than its pairs, whose guidance is "
                    f"{' to '.join(f'{g:g}' for g in dict.fromkeys(self.guidance))}: leave it out, and set model.guidance"
                )
            self.wants = Wants(pure_noise=True, ends=True, pairs=pairs, real=False)

    def loss(self, x: Tensor, b: LatentBatch, heard: Heard | None = None) -> Tensor:
        """[B] matching, and the regression where there is an answer of the teacher's."""
        loss = self.matching(x, b, heard)
        if not self.regression.weight or b.end is None or b.whole is None:
            return loss
        rows = answered(self.feed.origin(b))
        if len(rows) == len(x):
            distance = self._distance(x, b.end)
            self.measures.record(regression=distance)
            loss = loss + self.regression.weight * distance
        elif rows:                                                              # an image is decoded only where it is compared
            has = sent(torch.tensor(rows), x.device)
            distance = self._distance(x[has], b.end[has])
            self.measures.record(regression=distance)
            loss = loss.index_add(0, has, self.regression.weight * distance)
        return loss


def answered(origin: Origin) -> list[int]:
    """The rows with an answer of the teacher's: forward latents at the first node, which are stored pairs, and states of its own."""
    assert origin.whole is not None  # `wants` asks for ends
    kinds = zip(origin.source, origin.node, origin.whole, strict=True)
    return [row for row, (source, node, whole) in enumerate(kinds) if whole == TEACHER or (source == FORWARD and node == 0)]
