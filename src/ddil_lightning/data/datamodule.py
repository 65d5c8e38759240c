"""DDILDataModule: captions in, mixed roll-out latents out. It asks the method for its policies and grid, and imports no method."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from ddil_lightning.bounds import at_least, seeds, within
from ddil_lightning.data.cachefolder import CacheFolder
from ddil_lightning.data.captions import Captions, Prompts, RawBatch
from ddil_lightning.data.encoded import Encoded, encode_batch
from ddil_lightning.data.notices import Notices
from ddil_lightning.data.pairs import Stored, stored
from ddil_lightning.data.preparation import check_latents, encodes, is_encoded, latent_box, prepared, second_moment, settle
from ddil_lightning.data.sampler import CounterSampler, Parting, carried, say_carried
from ddil_lightning.data.visits import spread
from ddil_lightning.diffusion.denoiser import evaluating
from ddil_lightning.feed import without_images
from ddil_lightning.imitation.learner import Learner, check_learner
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.replay import Replay
from ddil_lightning.processes import Processes
from ddil_lightning.records import CaptionBatch, LatentBatch, send
from ddil_lightning.streams import Streams


class DDILDataModule(LightningDataModule, Replay):
    """Data, prior, roll-outs and buffer of DDIL, for any method.

    Args:
        captions: a data set; by default the built-in one that the pipeline names.
        prior: the shares of forward, student and teacher latents; annealed by the callback AnnealPrior.
        batch_size: samples per process and micro-batch.
        rollouts: when roll-outs are made, and how a batch is mixed with them.
        buffer: what is kept of them.
        cache: encode everything once (`true`), keep it in a file in half precision (a path), or encode on the fly (`false`);
            or read what ddil-cache has encoded into a folder (its path), which needs no `captions` besides.
        truncate: cut prompts that are too long, instead of refusing them.
        workers: processes that read captions and pictures.
        seed: of everything random here; a run gives its own.
        on_error: a row whose picture or caption cannot be read stops the run (`stop`), or is left out, counted and told (`skip`).
    """

    def __init__(
        self,
        captions: Captions | None = None,
        prior: SamplingPrior = SamplingPrior(),
        batch_size: int = 32,
        rollouts: Rollouts = Rollouts(),
        buffer: Buffer = Buffer(),
        cache: bool | str = True,
        truncate: bool = False,
        workers: int = 0,
        seed: int = 0,
        on_error: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        within(0, 512, workers=workers)
        seeds(seed=seed)
        if cache == "":
            raise ValueError("cache is an empty path: give a file's name, true or false")
        self.captions, self.prior = captions, prior
        self.remember(rollouts, buffer, batch_size)
        self.cache, self.truncate, self.workers, self.seed, self.on_error = cache, truncate, workers, seed, on_error
        self.notices = Notices()
        self._ahead = 0  # of `done`: the place in the data, where a run has gone on with batches of another size
        self._examples: list[str] = []
        self._stored: Stored | None = None
        self._first: Tensor | None = None
        self._names: dict[int, str] = {}
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # of latents, by `RawBatch.shape`: `setup` asks for each
        self._host: Any = None  # the processes' group for what is large and lies on the host

    # The learner ---------------------------------------------------------------------------------------------------------------

    @property
    def learner(self) -> Learner:
        """The method in training. Raises RuntimeError outside a Trainer."""
        if self.trainer is None or self.trainer.lightning_module is None:
            raise RuntimeError("the DataModule meets its method in Trainer.fit(method, datamodule); outside it, call rollout.draw")
        method: Any = self.trainer.lightning_module
        return method

    @property
    def split(self) -> bool:
        """Whether all processes ask a network together, for it is sharded."""
        return self.trainer is not None and isinstance(self.trainer.strategy, ModelParallelStrategy)

    @property
    def streams(self) -> Streams:
        """The random streams of the next batch."""
        trainer = self.trainer
        return Streams(self.seed, self.done, self.learner.stage, trainer.global_rank if trainer else 0)

    # Data ------------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Encode the captions (or map the cache), and hand itself to the method. Raises TypeError for one that lacks what is asked."""
        if stage != "fit":
            return
        check_learner(self.learner)
        self.learner.feed = self
        self.unsteered()
        if self.buffer is not None:  # the method of a second fit may ask something else
            self.buffer.answers.restore(self.buffer.answers.question)
        backbone = self.learner.backbone
        given = backbone.captions if self.captions is None else self.captions
        if self.trainer is not None:
            # Lightning moves the method only after this hook, and no data set should be encoded on a CPU beside an idle GPU.
            settle(backbone, self.trainer.strategy.root_device, is_encoded(given, self.cache))
        options = (self.cache, self.truncate, self.workers, self.on_error)
        us = Processes(self.trainer, self.trainer.num_nodes if self.trainer is not None else 1)
        self._host = None if self.buffer is None else us.host()
        given, self.captions = prepared(given, backbone, *options, self.notices, us)
        if not isinstance(given, Encoded) or isinstance(given, CacheFolder):
            self._examples = given.some(16)
        self.encodes = encodes(self.captions, self.cache)
        no_images = self.captions.latents is None if isinstance(self.captions, Encoded) else isinstance(self.captions, Prompts)
        if self.prior.forward > 0 and no_images and self.needs_images(self.learner):
            raise without_images("the prior")
        there = isinstance(self.captions, Encoded) and self.captions.file is not None
        # Of a cache its own: pictures that are named besides would all be opened for it, by every process.
        self._names = {int(rows[0]): name for rows, name in (self.captions if there else given).groups()}
        self.captions.sizes = given.sizes  # a second fit finds them as they were
        self._stored = None  # of another method, before a second fit
        self._first, shapes = check_latents(self.captions, backbone, given.sizes is None, lambda rows: self._taken(rows).latent)
        if self.buffer is not None:
            self.buffer.shares = self._parting(us).shares(shapes)
        self._stored = stored(self.learner, given, self.captions.groups(), self._taken, self.batch_size, self.trainer)
        if self._stored is not None and self._stored.reflection is not None:
            self._stored.reflection.to(backbone.device)  # before Lightning moves the method: its own setup looks at the data

    def teardown(self, stage: str) -> None:
        """Say what of the data was not as it should be."""
        us = Processes(self.trainer)
        if self._reads:
            self.notices.join(us)
        if us.first:
            self.notices.close()

    @property
    def _reads(self) -> bool:
        """Whether rows that cannot be read are skipped while the run trains: not where all were encoded first."""
        return self.captions is not None and self.captions.on_error == "skip" and not isinstance(self.captions, Encoded)

    def has_images(self) -> bool:
        """Whether the data set has images."""
        return self.reference(1).latent is not None

    def examples(self, n: int) -> list[str]:
        """A few captions of the data, for previews; none from a set that was given encoded."""
        return self._examples[:n]

    def reference(self, n: int) -> CaptionBatch:
        """Some `n` captions and images, spread over the data, encoded and on the method's device: the same rows every time, for probes.

        Of images of several sizes those of the size that the pipeline samples at.
        """
        assert self.captions is not None  # setup ran
        rows = torch.arange(len(self.captions)) if self._first is None else self._first
        return self._taken(rows[spread(len(rows), n)])

    def _taken(self, rows: Tensor) -> CaptionBatch:
        batch: Any = self.captions[rows.tolist()]  # type: ignore[index]
        backbone = self.learner.backbone
        made = encode_batch(batch, backbone, self.truncate) if isinstance(batch, RawBatch) else send(batch, backbone.device)
        if isinstance(batch, RawBatch):
            self._shapes[batch.shape] = tuple(backbone.latent_shape if made.latent is None else made.latent.shape[1:])
        return made if self._stored is None else self._stored.joined(made)

    def box(self) -> tuple[list[float], list[float]] | None:
        """The latent box of the data (preparation.latent_box); None without images."""
        return latent_box(self.captions, self.learner.backbone, Processes(self.trainer))

    def train_dataloader(self) -> DataLoader:
        """Batches of rows from where the counter stands."""
        assert self.captions is not None  # setup ran
        us, groups = Processes(self.trainer), self.captions.groups()
        rows, alone = [group.rows for group in groups], self._stored is None  # a pair is that of one caption
        sampler = CounterSampler(len(self.captions), self.batch_size, self.seed, us.world, us.rank, self._place, rows, alone)
        if us.first:
            sampler.say_left_out([self._names.get(int(group.rows[0]), group.name) for group in groups])
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        kept = self.workers > 0  # the processes stay from epoch to epoch, and are handed the rows that the sampler then gives
        return DataLoader(
            self.captions, batch_size=None, sampler=sampler, num_workers=self.workers, pin_memory=pinned, persistent_workers=kept
        )

    def _place(self) -> int:
        """The number of the next batch in the order of the data."""
        return self.done + self._ahead

    # Algorithm 1 -----------------------------------------------------------------------------------------------------------------

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Encoded batches on the device, so that the host goes on meanwhile (`records.sent`), with the pairs of their rows, which the host
        still knows; raw ones are sent where they are encoded."""
        if isinstance(batch, CaptionBatch):
            rows, batch = batch.rows, send(batch, device)
            return batch if self._stored is None else self._stored.joined(batch, self.streams, rows)
        return batch if isinstance(batch, RawBatch) else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> CaptionBatch | LatentBatch:
        """Captions to latents, on the device, with the student as it is now.

        Lightning calls this with gradients on, outside autocast and with the student in train mode; roll-outs want none of these.
        """
        if self.trainer is None or not self.trainer.training:
            return batch
        learner = self.learner
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            self.expire()
            size, encoded = len(batch.rows), self._encoded(batch)
            shape = tuple(learner.backbone.latent_shape if encoded.latent is None else encoded.latent.shape[1:])
            rolls = self.rolls(shape)
            self.dropout = self.streams.number("dropout")
            # Switching some hundred submodules costs more than the draw itself, so only where a network will be called.
            with evaluating(learner.policies.student) if rolls else nullcontext():
                if rolls:
                    self.collect(encoded, shape, self.trainer.strategy.reduce_boolean_decision)
                if len(encoded.rows) < size and self.buffer is not None and not self.buffer.held(shape):  # all states were rejected
                    encoded = encode_batch(batch, learner.backbone, self.truncate)
                return self.draw(encoded, shape, size)

    def _encoded(self, batch: Any) -> CaptionBatch:
        """A batch of a loader after the frozen encoders; of a raw one its first rows, as many as are needed."""
        rows = batch.rows
        if isinstance(batch, RawBatch):
            self.notices.hear(batch, len(self.captions or ()))
            batch = encode_batch(batch.first(self._needed(batch)), self.learner.backbone, self.truncate)
        return batch if self._stored is None or batch.pair is not None else self._stored.joined(batch, self.streams, rows)

    def _needed(self, raw: RawBatch) -> int:
        """How many rows of a raw batch, the first ones, must be encoded: all of them for a method that reads the data's latents."""
        size, shape = len(raw.rows), self._shapes.get(raw.shape)
        return size if shape is None or self.learner.wants.real or self._stored is not None else self.needed(size, shape)

    @cached_property
    def _moment(self) -> float | None:
        """The mean square of the data's latents; None where they are not in memory."""
        return second_moment(self.captions)

    def statistics(self) -> dict[str, float]:
        """What the run's curves show of the prior, the buffer and rows that were skipped."""
        if self._reads:
            self.notices.join(Processes(self.trainer))
        skipped = {"data/skipped": float(self.notices.count)} if self.notices.count else {}
        return super().statistics() | skipped

    # State -----------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The counters and, on rank 0 (whose return is what Lightning keeps), every rank's buffer."""
        mine: Any = self.buffer.state_dict() if self.buffer is not None and self._saves_buffer else None
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        # To rank 0 alone, and over the host: on a device the buffers of all ranks would be beside what trains there.
        us = Processes(self.trainer)
        every = [mine] * us.world if mine is None or not several else us.collected(mine, self._host)
        place = {"done": self.done, "ahead": self._ahead, "batch_size": self.batch_size, "rows": list(self._parting(us).groups)}
        if self._reads:
            self.notices.join(us)
            place |= self.notices.state()
        return {**place, **self.collecting.state_dict(), "buffers": every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore, to the bit with as many processes and batches of the same size. With others the place in the data stays
        (`sampler.carried`), and every process has its own buffer again; where one has none there, all of them begin with an empty one."""
        us, buffers = Processes(self.trainer), state["buffers"]
        self.done, self._ahead = state["done"], state.get("ahead", 0)
        self.collecting.load_state_dict(state)
        if us.world > len(buffers) or buffers[us.rank] is None:
            self.flush()  # on all of them: whether they roll out is the same on all, or they would wait for each other
        elif self.buffer is not None:
            self.buffer.load_state_dict(buffers[us.rank], self.learner.wants.ends or self.learner.wants.noise)
        now = self._parting(us)
        # Checkpoints of before do not say how large batches were, nor how many rows there were.
        was = Parting(len(buffers), state.get("batch_size", now.batch), tuple(state.get("rows", now.groups)))
        if self._reads:
            self.notices.restore(state, was.groups == now.groups)
        if was != now:
            self._ahead = carried(self._place(), was, now) - self.done
            if us.first:
                say_carried(was, now, state["collected_at"] is not None)

    def _parting(self, us: Processes) -> Parting:
        """How an epoch of the data is shared out."""
        assert self.captions is not None  # setup ran
        return Parting(us.world, self.batch_size, tuple(len(group.rows) for group in self.captions.groups()))
