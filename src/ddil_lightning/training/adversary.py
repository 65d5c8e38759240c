"""The adversary: a critic that follows the student's distribution, and a discriminator on its features, on a time scale of their own.

DMD and DMD2, EM distillation, adversarial distillation in latents or pixels and moment matching share it: a method holds one, asks it whose
turn it is, and hands it its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import mse
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import END, Context, LatentBatch, Prediction, widest
from ddil_lightning.training.gan import Gan, Logits, leaves, slope, voices
from ddil_lightning.training.randomness import numbers_of
from ddil_lightning.training.sharding import kept, share


@dataclass(frozen=True)
class Critic:
    """A critic's time scale.

    Args:
        steps: updates of the critic to one of the student's.
        lr: its learning rate, by default the student's.
        pull: how far it is pulled to the student after each of the student's updates, critic <- (1 - pull) critic + pull student: without
            it the critic falls behind on large flow models (SenseFlow's implicit distribution alignment, Ge et al. 2025, arXiv 2506.00523).
    """

    steps: int = 5
    lr: float | None = None
    pull: float = 0.0

    def __post_init__(self) -> None:
        within(1, 10**6, **{"critic.steps": self.steps})
        within(0, 10, **{"critic.lr": self.lr})
        within(0, 1, **{"critic.pull": self.pull})

    def check_pull(self, student: Role, critic: Role | None) -> None:
        """Raises ValueError where there is nothing to pull, or where it is of another kind than the student, or trained in another way."""
        if not self.pull:
            return
        if critic is None:
            raise ValueError("critic.pull is for a critic that is a denoiser, and this method has none: set it to 0")
        mine, theirs = ({name: p.shape for name, p in role.network.named_parameters()} for role in (student, critic))
        if student.predicts != critic.predicts or mine != theirs:
            raise ValueError("critic.pull needs a critic of the student's architecture, both whole or both adapters: set it to 0")


class Span(NamedTuple):
    """Samples of a time and the times that they are noised to before they are judged; by default clean ones and all times."""

    since: Tensor | int = END  # [B]
    low: Tensor | int = 0  # [B]
    high: Tensor | int | None = None  # [B], itself one of them; None for the last of all


CLEAN = Span()


class Heard(NamedTuple):
    """What a critic has answered to noised samples, with its graph, for all who ask it the same."""

    y: Tensor  # [B, C, H, W] the samples, noised
    t: Tensor  # [B] to these times
    eps: Tensor  # [B, C, H, W] with this noise
    p: Prediction
    features: tuple[Tensor, ...] | None  # [B, F, ...] a layer each, where the discriminator reads the critic's
    span: Span  # that the times were drawn from


Times = Callable[[int, int, torch.Generator], Tensor]
"""[n] times below `total`, by a generator on the device: the law under which a discriminator is asked (`gan.LogitNormal`)."""
Real = tuple[Tensor, Context, Tensor]
"""Real samples [B, C, H, W], their captions, unguided, and the weight [B] of each."""


class Adversary:
    """Critic and head of a `method` (a Distillation), which casts them: their turns, their losses, their noise and their state.

    `critic`: None for a discriminator alone, which reads frozen features; without a head either there is nothing to descend. `every`: the
    critic's updates to one of the student's. The student's turn is the last batch of its cycle, so that the critic has caught up. `times`:
    of the noise that the discriminator's samples are given, by default uniform. The noise of all losses follows from the feed's seed and
    from the clocks, so that a resumed run repeats it.
    """

    conditions: int = 0
    """How many of the tensors of a view, the last ones, are no features but what the head is told of them."""
    heads: int = 1
    """Of how many heads' losses the sum is taken, where a paper adds them; 1 for their mean."""

    def __init__(self, method: Any, critic: Role | None, head: nn.Module | None, every: int, gan: Gan, times: Times | None = None) -> None:
        if critic is None and gan.is_on and gan.features == "critic":
            raise ValueError(f"gan.features is 'critic', and {type(method).__name__} has none: set it to teacher")
        self.method, self.critic, self.head = method, critic, head
        self.every, self.gan, self.times = every, gan, times
        self.updates = 0

    @property
    def student_turn(self) -> bool:
        """Whether the present batch updates the student too."""
        return (self.updates + 1) % self.every == 0

    @contextmanager
    def still(self) -> Iterator[None]:
        """Inside, no gradient reaches critic and head; it still passes through them to the student's samples."""
        with untouched(self.critic, self.head):
            yield

    def weights(self) -> list[nn.Parameter]:
        """What the critic's optimiser moves: the critic and, with a GAN, the head."""
        parts = [part for part in (self.critic, self.head) if part is not None]
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    # Losses --------------------------------------------------------------------------------------------------------------------------

    def realism(self, x: Tensor, b: LatentBatch, span: Span = CLEAN) -> Tensor | float:
        """[B] the student's side of the GAN on its samples x [B, C, H, W]."""
        if not self.gan.weight:
            return 0.0
        return self.heads * self.fooling(self._logits(self.view(x, b, b.c, "realism", span=span)))

    def descend(
        self, optimizer: Any, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN, heard: Heard | None = None
    ) -> None:
        """Follow the student: one micro-batch of `following` on its samples x, detached."""
        if self.critic is None and self.head is None:
            return
        if self.method.descend(optimizer, self.following(x, b, real, span, heard), "critic_loss"):
            self.updates += 1

    def following(self, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN, heard: Heard | None = None) -> Tensor:
        """The critic's denoising loss on samples x in the network's own space, and the other side of the GAN, from one forward of both.

        `real`: what the GAN compares x with, sample by sample, for a method whose "real" is another network's answer; by default `real()`.
        `heard`: the critic's answer to x, where it was asked before; real samples are then noised to times of the same span.
        """
        if self.critic is None:
            told = self.telling(x, b, None, real, span)
            # Heads that have nothing to compare with still get a gradient, of zero: all processes make the same step.
            return self.nothing(x) if told is None else self.gan.critic_weight * told.mean()
        _, t, eps, p, features, _ = self.hear(x, b, "critic") if heard is None else heard
        loss = mse(self.critic.output(p), self.critic.schedule.target(self.critic.predicts, x, eps, t))
        self.method.measures.record(denoising=loss)
        told = self.telling(x, b, features, real, span if heard is None else heard.span) if self.gan.critic_weight else None
        return (b.weight * loss).mean() if told is None else (b.weight * loss + self.gan.critic_weight * told).mean()

    def hear(self, x: Tensor, b: LatentBatch, purpose: str, span: Span = CLEAN) -> Heard:
        """What the critic answers to samples x, noised to times of a span; with its features where the discriminator reads them."""
        assert self.critic is not None
        y, t, eps = self.diffuse(x, purpose, span.low, span.high, span.since)
        together = self.gan.critic_weight and self.gan.features == "critic"
        p, features = self.critic.with_features(y, t, b.c, self.gan.layers) if together else (self.critic(y, t, b.c), None)
        return Heard(y, t, eps, p, features, span)

    def nothing(self, like: Tensor) -> Tensor:
        """0, in which every weight has a part: each gets a gradient."""
        return sum((0 * share(p).sum() for p in self.weights()), like.new_zeros(()))

    def telling(
        self, x: Tensor, b: LatentBatch, features: Sequence[Tensor] | None = None, given: Tensor | None = None, span: Span = CLEAN
    ) -> Tensor | None:
        """[B] the discriminator's loss on samples x (or the `features` of their view) and on real ones, with its slope's penalty.

        None where there is nothing real to compare with.
        """
        found = self.real(b) if given is None else (given, b.c, b.weight)
        if found is None:
            return None
        real, c, weight = found
        fakes = self.view(x, b, b.c, "critic", span=span) if features is None else features
        reals = self.view(real, b, c, "real", span=span)
        if self.gan.r1 and not self.gan.r1_noise and not any(x.requires_grad for x in reals):
            reals = leaves(reals)  # of a frozen network: the head answers once, for its loss and its slope
        fake, true = self._logits(fakes), self._logits(reals)
        gan = self.heads * (b.weight * self.gan.fake(fake) + weight * self.gan.real(true))
        self.method.measures.record(gan=gan)
        if not self.gan.r1:
            return gan
        r1 = self.slope(real, b, c, reals, true, span)
        self.method.measures.record(r1=r1)
        return gan + self.gan.r1 * weight * r1

    def slope(self, real: Tensor, b: LatentBatch, c: Context, features: Sequence[Tensor], logits: Logits, span: Span = CLEAN) -> Tensor:
        """[B] how steep the discriminator is at real samples: R1 at the head's inputs or, by noise, the squared change of its logits."""
        if self.gan.r1_noise:
            moved = self._logits(self.view(real, b, c, "real", self.gan.r1_noise, span))
            return voices(lambda d, e: (d - e).square(), moved, logits)
        if not all(x.is_leaf for x in features):  # a critic's, which learns by its loss and not by its slope
            features = leaves(features)
            logits = self._logits(features)
        assert self.head is not None
        with kept(self.head):
            return slope(logits, features[: len(features) - self.conditions])

    # What a method may have otherwise: what the discriminator sees, and what the student is to make of it ------------------------------

    def fooling(self, logits: Logits) -> Tensor:
        """[B] the student's side on the logits D of its samples: softplus(-D) or, of the hinge loss, -D."""
        return self.gan.fooling(logits)

    def real(self, b: LatentBatch) -> Real | None:
        """What counts as real: the data, if the batch has some; a network that is told its guidance is told the same of both sides."""
        return None if b.real is None or b.real_c is None else (b.real, b.real_c.guided(b.c.w), torch.ones_like(b.weight))

    def view(self, x: Tensor, b: LatentBatch, c: Context, purpose: str, jitter: float = 0.0, span: Span = CLEAN) -> tuple[Tensor, ...]:
        """The features [B, F, ...] of samples x of captions c, noised to random times of a span, a layer each.

        `b`: the batch that they belong to. `jitter`: the size of noise on what is seen, for the slope.
        """
        y, t, _ = self.diffuse(x, purpose, span.low, span.high, span.since, self.times)
        return self._features(self.jittered(y, jitter), t, c)

    def jittered(self, y: Tensor, size: float) -> Tensor:
        """y [B, ...] with noise of this `size`."""
        if not size:
            return y
        return y + size * torch.randn(y.shape, generator=self.generator("jitter", y.device), device=y.device, dtype=y.dtype)

    def diffuse(
        self,
        x: Tensor,
        purpose: str,
        low: Tensor | int = 0,
        high: Tensor | int | None = None,
        since: Tensor | int = END,
        times: Times | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha x + sigma eps, t, eps) with t [B] ~ U{low..high} (all times) or by `times`, each rank and purpose with its own numbers.

        `since`: of which time x is, the clean end by default; bounds and that may be [B].
        """
        generator = self.generator(purpose, x.device)
        schedule: NoiseSchedule = self.method.student.schedule
        high = schedule.steps - 1 if high is None else high
        if times is not None:
            t = times(len(x), schedule.steps, generator)
        elif isinstance(low, int) and isinstance(high, int):
            t = torch.randint(low, high + 1, (len(x),), generator=generator, device=x.device)
        else:
            share = torch.rand(len(x), generator=generator, device=x.device, dtype=widest(x.device))
            t = low + (share * (high - low + 1)).long()
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return schedule.add_noise(x, eps, t, since), t, eps

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """Random numbers of this rank for a `purpose` in the present micro-batch."""
        return numbers_of(self.method).local(purpose, device)

    def _features(self, x: Tensor, t: Tensor, c: Context) -> tuple[Tensor, ...]:
        """The features [B, F, ...] that the head reads, a layer each."""
        role: Role = self.method.roles[self.gan.features]
        return role.features(x, t, c, self.gan.layers)

    def verdict(self, x: Tensor, t: Tensor, c: Context) -> Tensor:
        """The head's logits [B, ...] of noised samples, as it gives them: of a discriminator at its best log p_real / p_fake."""
        assert self.head is not None
        return self.head(*(z.float() for z in self._features(x, t, c)))

    def _logits(self, features: Sequence[Tensor]) -> Logits:
        """Those of the head in float32; a batch's features may come from a network in half precision."""
        assert self.head is not None
        made = self.head(*(x.float() for x in features))
        return tuple(x.float() for x in made) if isinstance(made, tuple) else made.float()

    # State ---------------------------------------------------------------------------------------------------------------------------

    def check_data(self, has_images: bool, instead: str = "set model.gan.weight and model.gan.critic_weight to 0") -> None:
        """Raises ValueError for a GAN without data; `instead`: what else could be done about it."""
        if self.head is not None and not has_images:
            raise ValueError(
                f"{type(self.method).__name__}'s GAN compares with data, but the data set has no images: give images, or {instead}"
            )

    def state(self) -> dict[str, int]:
        """Where it stands, for a checkpoint."""
        return {"critic_updates": self.updates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where the adversary of a checkpoint stood."""
        self.updates = state["critic_updates"]


@contextmanager
def untouched(*modules: nn.Module | None) -> Iterator[None]:
    """No gradient reaches the parameters of `modules` inside; it still passes through them. Those that had none before have none after."""
    trained = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
