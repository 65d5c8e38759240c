"""What a config of ddil-pretrain says, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from ddil_lightning.bounds import at_least, fraction, lengths, within


@dataclass(frozen=True)
class UnetTraining:
    """The training of U-Net and text encoder.

    Args:
        batch_size: over all devices.
        devices: CPU processes of one thread each, since convolutions this small gain little from threads.
        lr: peak learning rate (AdamW).
        hold: share of the training at the peak learning rate, which decays over the rest.
        ema: decay of the averaged weights, which are the ones that ship.
        focus: share of the timesteps drawn from .5 to .95 alone, where the caption decides about shapes.
    """

    batch_size: int = 64
    devices: int = 2
    lr: float = 2e-3
    hold: float = 0.6
    ema: float = 0.998
    focus: float = 0.0

    def __post_init__(self) -> None:
        _check("unet", self)


@dataclass(frozen=True)
class TransformerTraining:
    """The training of a transformer by flow matching, beside the frozen parts of the built-in pipeline of the same data.

    Args:
        width: of a token.
        layers: its blocks.
        batch_size: over all devices.
        devices: CPU processes of one thread each.
        lr: peak learning rate (AdamW).
        hold: share of the training at the peak learning rate, which decays over the rest.
        ema: decay of the averaged weights, which are the ones that ship.
        focus: share of the sigmas drawn from .55 to .95 alone, where the caption decides about shapes.
        shift: of the pipeline's scheduler, which has no part in the training.
    """

    width: int = 128
    layers: int = 6
    batch_size: int = 64
    devices: int = 2
    lr: float = 1e-3
    hold: float = 0.6
    ema: float = 0.999
    focus: float = 0.4
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check("transformer", self)
        within(1, 64, **{"transformer.layers": self.layers})
        within(0.01, 100, **{"transformer.shift": self.shift})
        if self.width < HEAD or self.width % HEAD:
            raise ValueError(f"transformer.width {self.width}: give a multiple of {HEAD}, the width of a head")


HEAD = 32
"""Channels of an attention head."""


def _check(name: str, told: UnetTraining | TransformerTraining) -> None:
    """Raises ValueError for what no network is trained with."""
    at_least(1, **{f"{name}.batch_size": told.batch_size})
    within(1, 256, **{f"{name}.devices": told.devices})
    within(0, 10, **{f"{name}.lr": told.lr})
    within(0, 1, **{f"{name}.hold": told.hold, f"{name}.focus": told.focus})
    fraction(**{f"{name}.ema": told.ema})
    if told.batch_size % told.devices:
        raise ValueError(f"{name}.batch_size {told.batch_size}: give a multiple of {name}.devices ({told.devices}), which share a batch")


@dataclass(frozen=True)
class AutoencoderTraining:
    """The training of the autoencoder, before the U-Net's, and of its decoder, after it.

    Args:
        steps: batches of 16 for the autoencoder.
        decoder_steps: batches of 16 for its decoder alone, afterwards; the latents stay the same.
    """

    steps: int = 1000
    decoder_steps: int = 1300

    def __post_init__(self) -> None:
        at_least(0, **{"autoencoder.steps": self.steps, "autoencoder.decoder_steps": self.decoder_steps})


@dataclass(frozen=True)
class Measurement:
    """What the teacher is measured by, on held-out prompts.

    Args:
        prompts: how many.
        guidance: scales, of which the judge chooses the one that the pipeline recommends.
    """

    prompts: int = 1000
    guidance: tuple[float, ...] = (2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        at_least(1, **{"measurement.prompts": self.prompts})
        within(0, 1000, **{"measurement.guidance": self.guidance})
        lengths(**{"measurement.guidance": self.guidance})


@dataclass(frozen=True)
class Interim:
    """What is kept and shown while the network trains.

    Args:
        folder: of snapshots, a link that is switched to every one; null for none.
        every: images between two snapshots.
        progress: show progress bars.
    """

    folder: str | None = "runs/pretrain/interim"
    every: int = 60_000
    progress: bool = True

    def __post_init__(self) -> None:
        at_least(1, **{"interim.every": self.every})
