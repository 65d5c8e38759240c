"""Pretraining of the built-in teachers: a whole Stable Diffusion in miniature, from nothing, on two CPU cores."""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from ddil_lightning.bounds import at_least, seeds
from ddil_lightning.files import check_writable, replacing_folder, switch, unused
from ddil_lightning.miniature import flow, networks, weights_path
from ddil_lightning.miniature.card import guided, measure, save_teacher
from ddil_lightning.miniature.settings import AutoencoderTraining, Interim, Measurement, TransformerTraining, UnetTraining
from ddil_lightning.miniature.sources import load_source
from ddil_lightning.miniature.stages import AutoencoderStage, Denoiser, DenoiserStage, FreshImages, FreshLatents, Stage, loader, token_ids

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline


def pretrain(
    *,
    dataset: Literal["shapes", "digits"] = "shapes",
    images: int = 750_000,
    seed: int = 0,
    out: str = "runs/pretrain/shapes",
    unet: UnetTraining = UnetTraining(),
    autoencoder: AutoencoderTraining = AutoencoderTraining(),
    transformer: TransformerTraining | None = None,
    measurement: Measurement = Measurement(),
    interim: Interim = Interim(),
    resume: str | None = None,
) -> Path:
    """Train a teacher and write it to `out`, which is answered, as a diffusers folder with a model card.

    Args:
        dataset: the built-in data set.
        images: images that the U-Net sees.
        seed: of weights, data and noise; the result is the same for the same `unet.devices`.
        out: folder to write; a pipeline folder of that name is replaced.
        unet: the training of U-Net and text encoder.
        autoencoder: the training of the autoencoder.
        transformer: instead of all that, the training of a transformer by flow matching on the latents of the built-in pipeline of the
            same data, whose autoencoder and text encoder it keeps: a Stable Diffusion 3 in miniature.
        measurement: what the teacher is measured by.
        interim: snapshots while the U-Net trains.
        resume: folder of an earlier run's snapshots; its autoencoder and last weights are trained on, with a fresh decay.

    Raises ValueError before the training for an `out` that holds something else and for numbers that cannot be trained with.
    """
    out, folder, resume = (None if path is None else os.path.expanduser(path) for path in (out, interim.folder, resume))  # type: ignore[assignment]
    at_least(1, images=images)
    seeds(seed=seed)
    check(out, folder)
    state = None if resume is None else _snapshot(Path(resume) / "state.pt")
    started = time.time()
    seed_everything(seed, verbose=False)
    pipeline: Any = begin(dataset, transformer)
    before = 0 if state is None else _restore(pipeline, state)
    if transformer is None and state is None:
        train_autoencoder(pipeline, dataset, steps=autoencoder.steps, seed=seed, progress=interim.progress)
    told = unet if transformer is None else transformer
    size = told.batch_size
    snapshots = None if folder is None else Snapshots(pipeline, folder, max(1, interim.every // size), size, before)
    train_denoiser(
        pipeline, dataset, told, steps=max(1, images // size), seed=seed + before, snapshots=snapshots, progress=interim.progress
    )
    if transformer is None:
        train_autoencoder(pipeline, dataset, steps=autoencoder.decoder_steps, seed=seed + 1, progress=interim.progress, decoder_only=True)
    prompts = measurement.prompts
    best, scores = guided(pipeline, dataset, measurement.guidance, n=min(256, prompts))
    table = {steps: measure(pipeline, dataset, n=prompts, steps=steps, guidance=best) for steps in (32, 4, 2, 1)}
    parts = {"unet": unet, "autoencoder": autoencoder} if transformer is None else {"transformer": transformer}
    settings = {"dataset": dataset, "seed": seed, "images": images}
    settings |= {f"{name}.{key}": value for name, part in parts.items() for key, value in vars(part).items()}
    facts = {
        "dataset": dataset, "kind": KINDS[transformer is not None], "guidance": best, "settings": settings,
        "images": images + before, "resumed": resume is not None,
        "minutes": round((time.time() - started) / 60, 1), "guidance_scores": scores,
    }  # fmt: skip
    return save_teacher(pipeline, out, facts, table)


KINDS = (
    "StableDiffusionPipeline in miniature (v-prediction, trailing DDIM steps), trained from nothing",
    "StableDiffusion3Pipeline in miniature (flow matching, no T5), its transformer trained beside the built-in U-Net's other parts",
)
"""What a card calls its pipeline."""


def begin(dataset: str, transformer: TransformerTraining | None) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """A pipeline with fresh weights, but for the frozen parts of the built-in one where a transformer is trained beside them."""
    if transformer is None:
        return networks.build_pipeline(load_source(dataset).words, networks.SIZES[dataset])
    from diffusers import StableDiffusionPipeline

    return flow.build_pipeline(StableDiffusionPipeline.from_pretrained(weights_path(dataset)), transformer)


def live_of(pipeline: Any) -> torch.nn.Module:
    """What is trained of a pipeline: its denoiser, a U-Net's with the text encoder."""
    if hasattr(pipeline, "transformer"):
        return flow.FlowDenoiser(pipeline.transformer, pipeline.text_encoder)
    return Denoiser(pipeline.unet, pipeline.text_encoder)


def check(out: str, interim: str | None) -> None:
    """Raises ValueError with one line for what would fail after the training, or delete what is not ours."""
    folder = Path(out).resolve()
    if interim is not None and Path(interim).absolute().is_relative_to(folder):
        raise ValueError(f"interim {interim} lies in out {out}, which is replaced at the end: give another --interim.folder")
    if interim is not None and Path(interim).exists() and not Path(interim).is_symlink():
        raise ValueError(
            f"interim {interim} is there and no link of ours, which is switched to every snapshot: give another --interim.folder"
        )
    if folder.exists() and not (folder / "ddil.json").is_file() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{out} holds other files; give another --out: an empty or a new folder, or one that ddil-pretrain wrote")
    for path in filter(None, [out, interim]):
        check_writable(Path(path) / "model_index.json" if not Path(path).is_symlink() else Path(path).parent / ".new")


def train_autoencoder(
    pipeline: StableDiffusionPipeline, dataset: str, *, steps: int, seed: int, progress: bool = False, decoder_only: bool = False
) -> None:
    """Train `pipeline.vae` in place and set its scaling factor, so that the latents have standard deviation one."""
    if steps == 0:
        return
    source, lr = load_source(dataset), 1.5e-3 if decoder_only else 3e-3
    stage = AutoencoderStage(live=pipeline.vae, decoder_only=decoder_only, steps=steps, lr=lr, hold=0.3, ema=0.98, seed=seed)
    fit(stage, loader(FreshImages(source=source.draw, batch_size=16, seed=seed)), devices=1, progress=progress)
    pipeline.vae.load_state_dict(stage.average.state_dict())
    pipeline.vae.requires_grad_(False).eval()
    if not decoder_only:
        with torch.no_grad():
            latents = pipeline.vae.encode(source.draw(1024, seed)[0]).latent_dist.mean
        pipeline.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))


def train_denoiser(
    pipeline: Any, dataset: str, told: UnetTraining | TransformerTraining, *,
    steps: int, seed: int, snapshots: Callback | None = None, progress: bool = False,
) -> None:  # fmt: skip
    """Train what is `live_of` the pipeline in place on `steps` batches of latents of fresh images."""
    empty = token_ids(pipeline.tokenizer, [""])
    options: dict[str, Any] = {
        "steps": steps,
        "lr": told.lr,
        "hold": told.hold,
        "ema": told.ema,
        "focus": told.focus,
        "seed": seed,
        "empty": empty,
    }
    live: Any = live_of(pipeline).train()
    if isinstance(live, Denoiser):
        stage: Stage = DenoiserStage(live=live, scheduler=pipeline.scheduler, **options)
    else:
        stage = flow.FlowStage(live=live, **options)
    data = FreshLatents(source=load_source(dataset).draw, pipeline=pipeline, batch_size=told.batch_size // told.devices, seed=seed)
    fit(stage, loader(data), devices=told.devices, progress=progress, callbacks=[snapshots] if snapshots else [])
    put_average(pipeline, stage.average)


def put_average(pipeline: Any, average: Any) -> None:
    """Copy averaged weights into the pipeline and make it ready for sampling."""
    live = live_of(pipeline)
    live.load_state_dict(average.state_dict())
    live.eval()


def _snapshot(file: Path) -> dict[str, Any]:
    """The weights and the count of images in a snapshot's file. Raises ValueError where it is missing or no snapshot."""
    try:
        state = torch.load(file, weights_only=True)
        return {name: state[name] for name in ("live", "vae", "scaling_factor", "images")}
    except Exception as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else f"it cannot be read ({type(error).__name__})"
        raise ValueError(f"resume: the snapshot {file}: {reason}; give the folder that --interim.folder of an earlier run names") from error


def _restore(pipeline: Any, state: dict[str, Any]) -> int:
    """Put a snapshot's autoencoder and last weights into the pipeline, and answer how many images they have seen.

    Raises ValueError for a snapshot of another data set.
    """
    try:
        pipeline.vae.load_state_dict(state["vae"])
        live_of(pipeline).load_state_dict(state["live"])
    except RuntimeError as error:
        raise ValueError("resume: the snapshot is of another data set or network: its weights do not fit") from error
    pipeline.vae.register_to_config(scaling_factor=state["scaling_factor"])
    pipeline.vae.requires_grad_(False).eval()
    return int(state["images"])


def fit(stage: Stage, data: Any, *, devices: int, progress: bool, callbacks: Sequence[Callback] = ()) -> None:
    """One pass of Lightning's Trainer over `stage.steps` batches, on `devices` CPU processes. Raises KeyboardInterrupt for Ctrl-C."""
    listener, others = signal.getsignal(signal.SIGINT), multiprocessing.active_children()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        max_epochs=1,
        limit_train_batches=stage.steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        use_distributed_sampler=False,
        callbacks=[*callbacks],
    )
    try:
        trainer.fit(stage, data)
    except SystemExit as stop:  # what Lightning makes of a KeyboardInterrupt, ignoring all later ones
        signal.signal(signal.SIGINT, listener)
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()  # a signal to this process alone has not reached it, and Python would wait for it
        raise KeyboardInterrupt from stop


class Snapshots(Callback):
    """Every so many steps: a line of progress, the averaged pipeline under `folder`, and all weights in its `state.pt`.

    `folder` is a link that is switched to the finished snapshot, so a reader never sees half of one.
    """

    def __init__(self, pipeline: Any, folder: str, every: int, batch_size: int, before: int = 0) -> None:
        self.pipeline = copy.deepcopy(pipeline)  # the average goes into it, while the weights of the original are in training
        self.folder, self.every, self.batch_size, self.before = Path(folder), every, batch_size, before
        self.started, self.loss = time.time(), 0.0
        self.written: list[Path] = []  # only these are deleted: another run's, or a folder of the user's, may have such a name

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock by which images per second are counted."""
        self.started = time.time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Print a line of progress every 200 steps, and write a snapshot when it is due."""
        step = batch_idx + 1
        self.loss += (float(outputs["loss"]) - self.loss) / min(step, 200)
        if not trainer.is_global_zero:
            return
        if step % 200 == 0:
            rate = step * self.batch_size / (time.time() - self.started)
            print(f"{step * self.batch_size:>8} images  loss {self.loss:.4f}  {rate:.0f} images/s", flush=True)
        if step % self.every == 0 or step == pl_module.steps:
            self.write(pl_module, self.before + step * self.batch_size)

    def write(self, stage: Any, images: int) -> None:
        """Save, then switch the link; of this run's snapshots the newest two stay. Raises OSError, with the older ones as they were."""
        put_average(self.pipeline, stage.average)
        target, vae = self.folder.with_name(f"{self.folder.name}-{images:08d}"), self.pipeline.vae
        target = target if target in self.written else unused(target)
        state = {"live": stage.live.state_dict(), "vae": vae.state_dict(), "scaling_factor": vae.config.scaling_factor, "images": images}
        with replacing_folder(target) as work:
            self.pipeline.save_pretrained(work)
            with open(work / "state.pt", "wb") as file:  # torch's own writer raises no OSError
                torch.save(state, file)
        switch(self.folder, target.name)
        self.written = [*(p for p in self.written if p != target), target]
        for old in self.written[:-2]:
            shutil.rmtree(old, ignore_errors=True)
        self.written = self.written[-2:]


def main(argv: Sequence[str] | None = None) -> None:
    """ddil-pretrain --config pretrain.yaml [--images 1000000 ...]; prints the folder. Raises jsonargparse.ArgumentError."""
    from jsonargparse import CLI

    print(CLI(pretrain, args=None if argv is None else list(argv), as_positional=False, exit_on_error=False, prog="ddil-pretrain"))


if __name__ == "__main__":
    main()
