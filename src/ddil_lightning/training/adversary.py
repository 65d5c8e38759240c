"""The adversary: a critic that follows the student's distribution, and a discriminator on its features, on a time scale of their own.

DMD and DMD2, EM distillation, adversarial distillation in latents or pixels and moment matching share it, and methods whose GAN has no
critic but a head on the frozen teacher's features: a method holds one, asks it whose turn it is, and hands it its samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, softplus

from ddil_lightning.backbones.roles import Role
from ddil_lightning.bounds import within
from ddil_lightning.diffusion.losses import mse, per_sample
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.records import END, Context, LatentBatch
from ddil_lightning.streams import Streams


@dataclass(frozen=True)
class Gan:
    """A discriminator's part; 0 and 0 for none.

    Args:
        weight: lambda_g, of the discriminator's verdict in the student's loss.
        critic_weight: lambda_d, of telling real from fake in the critic's loss.
        features: whose features the head reads: the critic's, which learns to tell them apart, or the frozen teacher's.
        layers: at which layers of that network (down0, mid, up1, ... of a U-Net); by default at its bottleneck.
        loss: of the logits: `softplus`, the logistic one, or `hinge`, which asks for logits beyond -1 and 1 and no further.
    """

    weight: float = 0.0
    critic_weight: float = 0.0
    features: Literal["critic", "teacher"] = "critic"
    layers: tuple[str, ...] = ()
    loss: Literal["softplus", "hinge"] = "softplus"

    def __post_init__(self) -> None:
        if self.loss not in ("softplus", "hinge"):
            raise ValueError(f"gan.loss is 'softplus' or 'hinge', not {self.loss!r}")
        within(0, 1000, **{"gan.weight": self.weight, "gan.critic_weight": self.critic_weight})
        if self.weight and not self.critic_weight:
            raise ValueError(f"gan.weight = {self.weight} needs a discriminator that learns: set gan.critic_weight")
        if self.layers and not self.is_on:
            raise ValueError(f"gan.layers = {list(self.layers)} without a discriminator: set gan.weight and gan.critic_weight")

    @property
    def is_on(self) -> bool:
        """Whether there is a discriminator at all."""
        return bool(self.weight or self.critic_weight)

    def real(self, logits: Tensor) -> Tensor:
        """[B] how far logits [B, ...] are from the verdict `real`; with the other sign, from `fake`."""
        return per_sample(softplus(-logits) if self.loss == "softplus" else relu(1 - logits))


@dataclass(frozen=True)
class Critic:
    """A critic's time scale.

    Args:
        steps: updates of the critic to one of the student's.
        lr: its learning rate, by default the student's.
    """

    steps: int = 5
    lr: float | None = None

    def __post_init__(self) -> None:
        within(1, 10**6, **{"critic.steps": self.steps})
        within(0, 10, **{"critic.lr": self.lr})


class Span(NamedTuple):
    """Samples of a time and the times that they are noised to before they are judged; by default clean ones and all times."""

    since: Tensor | int = END  # [B]
    low: Tensor | int = 0  # [B]
    high: Tensor | int | None = None  # [B], itself one of them; None for the last of all


CLEAN = Span()


class Adversary:
    """Critic and head of a `method` (a Distillation), which casts them: their turns, their losses, their noise and their state.

    Without a critic (None) the head reads the teacher's features; without a head either there is nothing to descend. `every`: the critic's
    updates to one of the student's. The student's turn is the last batch of its cycle, so that the critic has caught up. The noise of all
    losses follows from the feed's seed and from the clocks, so that a resumed run repeats it.
    """

    def __init__(self, method: Any, critic: Role | None, head: nn.Module | None, every: int, gan: Gan) -> None:
        if critic is None and gan.is_on and gan.features == "critic":
            raise ValueError(f"gan.features is 'critic', and {type(method).__name__} has none: set it to teacher")
        self.method, self.critic, self.head = method, critic, head
        self.every, self.gan = every, gan
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
        return [p for part in (self.critic, self.head) if part is not None for p in part.parameters() if p.requires_grad]

    # Losses --------------------------------------------------------------------------------------------------------------------------

    def realism(self, x: Tensor, b: LatentBatch, span: Span = CLEAN) -> Tensor | float:
        """[B] the student's side of the GAN on its samples x [B, C, H, W]: softplus(-D), or what `gan.loss` says."""
        if not self.gan.weight:
            return 0.0
        y, t, _ = self.diffuse(x, "realism", span.low, span.high, span.since)
        return self.gan.real(self._logits(self._features(y, t, b.c)))

    def descend(self, optimizer: Any, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN) -> None:
        """Follow the student: one micro-batch of `following` on its samples x, detached."""
        if self.critic is None and self.head is None:
            return
        if self.method.descend(optimizer, self.following(x, b, real, span), "critic_loss"):
            self.updates += 1

    def following(self, x: Tensor, b: LatentBatch, real: Tensor | None = None, span: Span = CLEAN) -> Tensor:
        """The critic's denoising loss on samples x in the network's own space, and the other side of the GAN, from one forward of both.

        `real`: what the GAN compares x with, sample by sample, for a method whose "real" is another network's answer; by default the data.
        """
        y, t, eps = self.diffuse(x, "critic", span.low, span.high, span.since)
        gan = self.gan
        features: tuple[Tensor, ...] = ()
        loss = torch.zeros(len(x), device=x.device)
        if self.critic is not None:
            together = gan.critic_weight and gan.features == "critic"
            p, features = self.critic.with_features(y, t, b.c, gan.layers) if together else (self.critic(y, t, b.c), ())
            loss = mse(self.critic.output(p), self.critic.schedule.target(self.critic.predicts, x, eps, t))
            self.method.measures.record(denoising=loss)
        given, c, weight = (b.real, b.real_c, 1.0) if real is None else (real, b.c, b.weight)
        if not gan.critic_weight or given is None or c is None:
            return (b.weight * loss).mean()
        if gan.features == "teacher":
            features = self._features(y, t, b.c)
        z, t, _ = self.diffuse(given, "real", span.low, span.high, span.since)
        verdicts = b.weight * gan.real(-self._logits(features)) + weight * gan.real(self._logits(self._features(z, t, c)))
        self.method.measures.record(gan=verdicts)
        return (b.weight * loss + gan.critic_weight * verdicts).mean()

    def diffuse(
        self, x: Tensor, purpose: str, low: Tensor | int = 0, high: Tensor | int | None = None, since: Tensor | int = END
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha x + sigma eps, t, eps) with t [B] ~ U{low..high} (all times), each rank and purpose with numbers of its own.

        `since`: of which time x is, the clean end by default; bounds and that may be [B].
        """
        generator = self.numbers(purpose, x.device)
        schedule: NoiseSchedule = self.method.student.schedule
        high = schedule.steps - 1 if high is None else high
        if isinstance(low, int) and isinstance(high, int):
            t = torch.randint(low, high + 1, (len(x),), generator=generator, device=x.device)
        else:
            share = torch.rand(len(x), generator=generator, device=x.device, dtype=torch.float64)
            t = low + (share * (high - low + 1)).long()
        eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return schedule.add_noise(x, eps, t, since), t, eps

    def numbers(self, purpose: str, device: torch.device) -> torch.Generator:
        """The present batch's random numbers for a purpose, other ones on every rank."""
        step = self.updates * self.method.descent.accumulate + self.method.descent.micro.get("critic_loss", 0)
        return Streams(self.method.feed.seed, step, self.method.stage, self.method.global_rank).local(purpose, device)

    def _features(self, x: Tensor, t: Tensor, c: Context) -> tuple[Tensor, ...]:
        """The features [B, F, ...] that the head reads, a layer each."""
        role: Role = self.critic if self.critic is not None and self.gan.features == "critic" else self.method.teacher
        return role.features(x, t, c, self.gan.layers)

    def verdict(self, x: Tensor, t: Tensor, c: Context) -> Tensor:
        """The head's logits [B, ...] of noised samples, as it gives them: of a discriminator at its best log p_real / p_fake."""
        assert self.head is not None
        return self.head(*(z.float() for z in self._features(x, t, c)))

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """[B, ...] of the head in float32; a batch's features may come from a network in half precision."""
        assert self.head is not None
        return self.head(*(x.float() for x in features)).float().flatten(1)

    # State ---------------------------------------------------------------------------------------------------------------------------

    def check_data(self, has_images: bool) -> None:
        """Raises ValueError for a GAN without data."""
        if self.head is not None and not has_images:
            raise ValueError(
                f"{type(self.method).__name__}'s GAN compares with data, but the data set has no images: give images, or set "
                "model.gan.weight and model.gan.critic_weight to 0"
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
