"""A method on a small problem: an untrained pipeline of 250 000 weights, thirty pictures, and a training of seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.testing.fitting import Run, fit
from ddil_lightning.training.method import Distillation
from ddil_lightning.training.optimisation import Optimizer

BATCH, EPOCH = 4, 7
"""Samples of a batch, and batches of an epoch."""
WORDS = "a an handwritten digit zero one two three four five six seven eight nine small large red blue circle square left of above".split()
"""What the small pipeline's tokenizer knows."""


def make_pipeline(folder: Path, prediction_type: str = "v_prediction", unet: tuple[int, ...] = (16, 32)) -> Path:
    """An untrained Stable Diffusion in miniature, written into `folder`: 8 x 8 latents, 16 pixels, channels `unet` of its levels."""
    from ddil_lightning.miniature import networks

    torch.manual_seed(0)
    sizes = networks.Sizes(image=16, tokens=16, text=16, autoencoder=(8, 8), unet=unet)
    tokenizer = networks.build_tokenizer(WORDS, sizes.tokens)
    text = networks.build_text_encoder(len(tokenizer), sizes)
    pipe = networks.assemble(networks.build_autoencoder(sizes), text, tokenizer, networks.build_unet(sizes))
    pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, "prediction_type": prediction_type})
    pipe.save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"guidance": 2.0, "dataset": "digits"}))
    return folder


class Pictures(Captions):
    """Grey discs of ten sizes with captions that the small tokenizer knows."""

    def __len__(self) -> int:
        return BATCH * EPOCH + 2  # two captions of every epoch are left over

    def prompts(self, index: Any) -> list[str]:
        """Of five kinds."""
        return [f"a handwritten {('zero', 'one', 'two', 'three', 'four')[i % 5]}" for i in index]

    def pixels(self, index: Any) -> Tensor:
        """[B, 3, 16, 16] in [-1, 1]."""
        y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
        return torch.stack([(x.square() + y.square() < (1 + i % 10) / 8).float().expand(3, -1, -1) * 2 - 1 for i in index])


@cache
def backbone(folder: Path) -> Pipeline:
    """Shared by all trainings of a process: a frozen pipeline has nothing to lose."""
    return Pipeline(str(folder))


@cache
def pictures(folder: Path) -> Encoded:
    """The small data, encoded by the pipeline in `folder`."""
    return encode(Pictures(), backbone(folder))


class Subject:
    """A method with its own settings, on the small problem in a folder.

    Args:
        method: a class of Distillation, or a function that makes one of the keywords that the base takes.
        folder: where the small pipeline lies, or is written.
        settings: keywords of the method. Of the base: an average, static reflection and a learning rate that shows within a few updates.
    """

    def __init__(self, method: Callable[..., Distillation], folder: str | Path, **settings: Any) -> None:
        self.method, self.folder, self.settings = method, Path(folder), settings

    @cached_property
    def pipeline(self) -> Path:
        """The folder of its pipeline."""
        there = self.folder / "pipeline"
        if (self.folder / "model_index.json").is_file():
            return self.folder
        return there if (there / "model_index.json").is_file() else make_pipeline(there, unet=(32,))

    def build(self, seed: int = 0, **more: Any) -> Distillation:
        """The method anew; `more` keywords go before those of the settings."""
        torch.manual_seed(seed)
        base = {"updates": 6, "optimizer": Optimizer(lr=1e-3), "ema": 0.9, "reflect": "static", "log_every": 1}
        return self.method(**{"pipeline": backbone(self.pipeline), **base, **self.settings, **more})

    def data(self, prior: SamplingPrior, seed: int = 0, **more: Any) -> DDILDataModule:
        """The small data, with a roll-out every second update."""
        options = {"batch_size": BATCH, "rollouts": Rollouts(every=2), "buffer": Buffer(capacity=64)}
        return DDILDataModule(pictures(self.pipeline), prior, **{"seed": seed, **options, **more})

    def run(self, *callbacks: Callback, ckpt: Path | None = None, seed: int = 0, **more: Any) -> Run:
        """A fit on forward latents and roll-outs of whoever the method has a target for."""
        method = self.build(seed, **more)
        return fit(method, self.data(mixed(method), seed), *callbacks, ckpt=ckpt)


def mixed(method: Distillation) -> SamplingPrior:
    """Half of the latents forward and half roll-outs, as far as the method has targets on them."""
    asked = [name for name in ("student", "teacher") if name in method.sources]
    if method.policies.teacher is None and "teacher" in asked:
        asked.remove("teacher")
    forward = 0.5 if "forward" in method.sources and asked else float("forward" in method.sources)
    student, teacher = ((1 - forward) / len(asked) if name in asked else 0.0 for name in ("student", "teacher"))
    return SamplingPrior(forward, student, teacher)
