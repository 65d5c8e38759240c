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
        at_least(1, **{"unet.batch_size": self.batch_size})
        within(1, 256, **{"unet.devices": self.devices})
        within(0, 10, **{"unet.lr": self.lr})
        within(0, 1, **{"unet.hold": self.hold, "unet.focus": self.focus})
        fraction(**{"unet.ema": self.ema})
        if self.batch_size % self.devices:
            raise ValueError(f"unet.batch_size {self.batch_size}: give a multiple of unet.devices ({self.devices}), which share a batch")


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
    """Snapshots while the U-Net trains.

    Args:
        folder: a link that is switched to every snapshot; null for none.
        every: images between two snapshots.
    """

    folder: str | None = "runs/pretrain/interim"
    every: int = 60_000

    def __post_init__(self) -> None:
        at_least(1, **{"interim.every": self.every})
