"""What a method and its callbacks may ask of the data in training: declared here, so that neither has to know the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ddil_lightning.bounds import seeds, within
from ddil_lightning.records import CaptionBatch, LatentBatch, Origin

Answer = Any
"""What a frozen network answers to a batch: a tensor [B, ...], or a plain tuple of such; where nothing is kept, anything."""

Ask = Callable[[LatentBatch], Answer]
"""The question: a function of every row of a batch by itself."""


@dataclass(frozen=True)
class Pairs:
    """How pairs of noise and the teacher's answer to it are made, for a method that trains on them: each belongs to a caption of the data.

    Args:
        path: a folder that keeps them for later runs, and for the same one if it is killed; by default each run makes them in memory.
        steps: of the teacher's DDIM, on trailing nodes.
        each: how many every caption has; 0 makes none, for a prior without a forward share.
        seed: of their noise, and of their guidance where the method has a range of it.
    """

    path: str | None = None
    steps: int = 32
    each: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        within(1, 10**4, **{"pairs.steps": self.steps})
        within(0, 1000, **{"pairs.each": self.each})
        seeds(**{"pairs.seed": self.seed})
        if self.path == "":
            raise ValueError("pairs.path is empty: give a folder's name, or leave it out")


@dataclass(frozen=True)
class Wants:
    """What a method needs of its latents besides Algorithm 1, as it declares in `Distillation.wants`.

    Args:
        pure_noise: forward latents at the first node carry no signal, as those that the deployed student sees there (DMD2). A method of one
            node then needs no images.
        ends: every latent comes with the two ends of its trajectory, `LatentBatch.noise` and `end` (reflow, DMD's regression): roll-outs go
            on to their end, which costs the transitions that are left.
        noise: every latent comes with the noise that its trajectory began in, `LatentBatch.noise`, and forward latents are that noise at
            every node: for a method without data (BOOT).
        pairs: forward latents are of a stored pair made as these say, noise and what the teacher's deterministic sampler makes of it: the
            noise at node 0, and at later nodes what it makes, in the place of data, under independent noise. `LatentBatch.noise` and `end`
            are the two ends of the pair, which a method that trains on the line between them mixes itself (reflow).
        real: the data's own latents come with every batch, `LatentBatch.real` and `real_c` (a GAN, a denoising loss). Of data that are
            encoded on the fly a method that reads none of them spares the images of rows which roll-outs take the place of.
    """

    pure_noise: bool = False
    ends: bool = False
    noise: bool = False
    pairs: Pairs | None = None
    real: bool = True

    def images(self, nodes: int) -> bool:
        """Whether forward latents on a grid of so many nodes need images."""
        return not self.pairs and not self.noise and (not self.pure_noise or nodes > 1 or self.ends)


class Feed:
    """The side of the data. A method has one from the start, `Distillation.feed`: this one, which stands for any loader of LatentBatch.

    `DDILDataModule` is the one that rolls out; it hands itself to the method in its `setup`, before the method's own. `prior`: its
    SamplingPrior. `collect_every`: student updates between two roll-outs, which a cadence sets.
    `seed`: of all that is random in the draw and in the method's losses. `truncate`: whether captions that are too long are cut.
    """

    collect_every: int = 1
    seed: int = 0
    truncate: bool = False
    encodes: bool = True
    """Whether it asks the backbone's encoders while a student trains; else they may leave the device."""
    dropout: int | None = None
    """The seed of the dropout in the step that trains on the last batch; None leaves it to torch's own numbers."""
    _given: Any = None
    _steered: Mapping[str, Any] = {}

    @property
    def prior(self) -> Any:
        """The prior in force: that of the plan's present stage or part, else that of the schedule, else its own."""
        return self._steered.get("plan") or self._steered.get("schedule") or self._given

    @prior.setter
    def prior(self, own: Any) -> None:
        self._given = own

    @property
    def holds_rollouts(self) -> bool:
        """Whether it keeps roll-outs of former weights, and what was answered to them."""
        return False

    @property
    def own_prior(self) -> Any:
        """What it was given, which holds where nobody steers."""
        return self._given

    def steer(self, by: Literal["plan", "schedule"], prior: Any) -> None:
        """What a plan or a schedule asks for from now on; None to leave it to the others. The one way in which a run changes its prior."""
        self._steered = {**self._steered, by: prior}

    def unsteered(self) -> None:
        """A run begins: what plans and schedules of another one asked for no longer holds."""
        self._steered = {}

    def box(self) -> tuple[list[float], list[float]] | None:
        """(lo, hi) per channel of the latents of its images; None where there are none, or none that it knows of."""
        return None

    def has_images(self) -> bool:
        """Whether its latents come with images' own (`LatentBatch.real`): a loader that says nothing of it is believed to."""
        return True

    def needs_images(self, method: Any) -> bool:
        """Whether a forward share of `method`'s prior needs images, on its present grid."""
        return method.wants.images(len(method.grid))

    def reference(self, n: int) -> CaptionBatch:
        """The same `n` captions and images every time, for probes. Raises ValueError where there are none."""
        raise ValueError("a probe needs captions of the data: train with DDILDataModule, or leave the probe out")

    def examples(self, n: int) -> list[str]:
        """Up to `n` of its captions, for previews."""
        return []

    def origin(self, batch: LatentBatch) -> Origin:
        """Where the rows of a batch come from, on the host: one that draws batches knows it; of any other the device is asked, and waited
        for. What a step does with a batch of so many roll-outs is decided by this, and not by the batch's own tensors."""
        return Origin.of(batch)

    def answered(self, batch: LatentBatch, ask: Ask, slot: Sequence[int] | None = None) -> Answer:
        """`ask(batch)`, without gradients: what the method asks its frozen networks for at every latent.

        `ask` must be a function of every row's (x_t, t, s, node, c, noise, end) by itself, and the same one all through a stage: no draw,
        no student, no average. What is asked of two networks is one `ask`, which answers with a tuple. A feed that keeps roll-outs keeps
        its answers to them, asks for the rest alone, and raises ValueError for a second question. Raises ValueError for an answer with a
        gradient, and where answers are kept for every network that moves.
        `slot` [B]: which states of the buffer the rows are, by `Origin.slot`, where they are not all of the batch that was drawn; -1 for a
        row that is asked something else than what is asked of its state.
        """
        return unmoved(ask(batch), ask)

    def observe(self, batch: LatentBatch, loss: Tensor) -> None:
        """Hear the per-sample losses [B] of a batch."""

    def commit(self) -> None:
        """The step that used the last batch is complete: a checkpoint may be written now."""

    def statistics(self) -> dict[str, float]:
        """What the run's curves show of it."""
        return {}

    def flush(self) -> None:
        """Forget every roll-out, as at the beginning of a stage."""


def without_images(what: str, remedy: str = "give that share to the teacher, or give images") -> ValueError:
    """The refusal of `what`, which has a forward share, where data lack the images that it needs."""
    return ValueError(f"{what} has a forward share but the data set has no images: {remedy}")


MOVES = (
    "asks its student, or another network that training moves, through feed.answered: what is kept of it goes stale; ask it in "
    "training_step itself, or end a step that copies weights, now and then, in self.feed.flush()"
)
"""What is said of an answer that is none of a frozen network's."""


def unmoved(found: Answer, ask: Ask) -> Answer:
    """The answer that `ask` has given. Raises ValueError for one with a gradient, which would be that of the rows asked anew alone."""
    inner = found.values() if isinstance(found, Mapping) else found if isinstance(found, list | tuple) else (found,)
    if any(isinstance(x, Tensor) and x.requires_grad for x in inner):
        raise ValueError(f"{named(ask)} {MOVES}")
    return found


def named(ask: Ask | None) -> str:
    """What a message calls a question."""
    function = getattr(ask, "func", ask)
    return str(getattr(function, "__qualname__", type(function).__name__))
