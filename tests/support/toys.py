"""An exact toy method and a stand-in trainer, for tests of the DataModule that need no fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.diffusion.analytic import Corrupted, Gaussian
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import renoise
from ddil_lightning.feed import Feed, Wants
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.records import Context, LatentBatch
from options import options

SCHEDULE = NoiseSchedule.scaled_linear()
FORWARD_ONLY, STUDENT_ONLY, HALF = SamplingPrior(), SamplingPrior(0, 1, 0), SamplingPrior(0.5, 0.5)


class Toy:
    """What the DataModule sees of a method: exact policies on four nodes, a clock, and dropout that would show in roll-outs."""

    stage, wants = 0, Wants()

    def __init__(self, bias: float = 0.0) -> None:
        exact = Gaussian(0.5, 1.0, SCHEDULE)
        self.calls = 0
        student = nn.Sequential(nn.Dropout(0.9)).train()
        student.forward = lambda x, t, c: self.act(student[0](Corrupted(exact, 1.1, bias)(x, t, c)))  # type: ignore[method-assign]
        self.policies = Policies(Policy(Denoiser(student, SCHEDULE, "x0"), renoise), Policy(Denoiser(exact, SCHEDULE, "x0")))
        self.grid, self.guidance = Grid.named("linspace", 4), (2.0, 8.0)
        self.question, self.asked_of_moving = "toy", 0
        self.stage_updates, self.student_updates, self.progress, self.feed = 0, 0, 0.0, Feed()
        self.backbone: Any = SimpleNamespace(latent_shape=(2, 4, 4), about={"dataset": "digits"}, captions=None)

    def act(self, x0: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls += 1
        return x0


def data(n: int = 20, images: bool = True) -> Encoded:
    g = torch.Generator().manual_seed(7)
    return Encoded(torch.randn(n, 2, 4, 4, generator=g) if images else None, Context(torch.randn(n, 3, 2, generator=g)))


def attach(made: DDILDataModule, toy: Any, rank: int = 0, world: int = 1, training: bool = True) -> DDILDataModule:
    trainer = SimpleNamespace(lightning_module=toy, training=training, global_rank=rank, world_size=world, num_nodes=1)
    trainer.is_global_zero = rank == 0
    trainer.precision_plugin = Precision()
    trainer.strategy = SimpleNamespace(root_device=torch.device("cpu"), reduce_boolean_decision=lambda mine: mine)
    made.trainer = trainer  # type: ignore[assignment]
    return made


def module(
    prior: SamplingPrior = HALF, captions: Captions | None = None, toy: Any = None, rank: int = 0, world: int = 1, **kwargs: Any
) -> DDILDataModule:
    made = DDILDataModule(captions or data(), prior, **options(DDILDataModule, {"batch_size": 4, "rollouts": {"every": 3}}, kwargs))
    return attach(made, toy or Toy(), rank, world)


def batches(made: DDILDataModule) -> Iterator[LatentBatch]:
    """Training as the Trainer does it: loader, hook, step (here the clock alone), commit; epoch after epoch."""
    while True:
        for raw in made.train_dataloader():
            latents = made.on_after_batch_transfer(raw, 0)
            assert isinstance(latents, LatentBatch)
            made.learner.stage_updates += 1  # type: ignore[misc]
            made.commit()
            yield latents


def first(n: int, made: DDILDataModule) -> list[LatentBatch]:
    """The next `n` steps."""
    return list(islice(batches(made), n))


def equal(a: Any, b: Any) -> bool:
    """Bitwise equality of records of records."""
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
