"""The processes of growth.py: a training that takes its turns, the start of one, and a cache that is written."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import common
import torch
from lightning.pytorch import Callback

from ddil_lightning import DDILDataModule, Distillation, assemble
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.imitation.rollout import collect
from ddil_lightning.records import CaptionBatch, Context
from ddil_lightning.runs.memory import Meter

EVERY = 2
"""Updates between two roll-outs, and of a turn, which then holds the same work as every other."""


def clocks() -> tuple[float, float]:
    """Seconds of the wall's clock and of this process on its cores."""
    return time.perf_counter(), time.process_time()


class Turns(Callback):
    """Trains a block of updates whenever the other side says so, and answers with the seconds of one, by both clocks."""

    def __init__(self, connection: Connection, meter: Meter, fill: bool) -> None:
        self.connection, self.meter, self.fill = connection, meter, fill
        self._since, self._due = (0.0, 0.0), EVERY

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what loading has taken, and wait for the first turn."""
        self.meter.begin()
        if self.fill:
            filled(trainer.datamodule, pl_module)
        self._wait()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The end of a block: say what it has cost, and wait for the next one."""
        if pl_module.student_updates < self._due:
            return
        self.connection.send([(now - then) / EVERY for now, then in zip(clocks(), self._since, strict=True)])
        self._due += EVERY
        if self._due <= pl_module.updates:
            self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self._since = clocks()


def filled(data: DDILDataModule, method: Distillation) -> None:
    """Fill the buffer with one roll-out of the student's, which is kept as many times as there is room for it."""
    assert data.buffer is not None
    n, learner = data.trajectories, data.learner
    batch = CaptionBatch(None, method.backbone.null().expand(n), torch.arange(n))
    made = collect(batch, learner, data.prior, data.streams, method.backbone.latent_shape)
    for _ in range(data.buffer.capacity // len(made.t)):
        data.buffer.add(made, 0, data.streams.stage)


def trains(
    connection: Connection, config: str, words: Sequence[str], rank: int = 0, world: int = 1, meet: str = "", fill: bool = False
) -> None:
    """A training on random latents, or one of the `world` processes of it that `meet` in a file, each on a core of its own.

    `fill`: its buffer is full from the beginning.
    """
    begun()
    if meet:
        joined(rank, world, meet)
    meter = Meter()
    trainer, method, data = assemble(config, *words, callbacks=[Turns(connection, meter, fill)])
    n, c = 2 * data.batch_size * world, method.backbone.null()
    data.captions = Encoded(torch.randn(n, *method.backbone.latent_shape), Context(c.text.repeat(n, 1, 1)))
    trainer.fit(method, datamodule=data)
    meter.end(torch.device("cpu"), (method, *method.backbone.parts()))
    connection.send(meter.peak)


def starts(connection: Connection, config: str, words: Sequence[str]) -> None:
    """From a config to the end of its first update."""
    begun()
    meter, since = Meter(), clocks()
    trainer, method, data = assemble(config, *words, "--updates", "1")
    trainer.fit(method, datamodule=data)
    connection.send([now - then for now, then in zip(clocks(), since, strict=True)])
    meter.end(torch.device("cpu"), (method, *method.backbone.parts()))
    connection.send(meter.peak)


def caches(connection: Connection, words: Sequence[str]) -> None:
    """ddil-cache, which says nothing here."""
    from ddil_lightning.commands.cache import cache

    begun()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        connection.send(cache(list(words)))


def begun() -> None:
    """A process begins: quiet, and with one thread."""
    common.quiet()
    torch.set_num_threads(1)


def joined(rank: int, world: int, meet: str) -> None:
    """Give this process a core of its own, where the system can, and make it one of `world`, as a launcher does: Lightning finds them."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    if world > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(n) for name, n in numbers.items()}, TORCHELASTIC_RUN_ID="growth")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)


def alone(work: Callable[..., None], theirs: Connection, *given: Any) -> None:
    """`work` in a process that was forked: without its copy of the other end of the connection, it ends when nobody hears it any more."""
    theirs.close()
    work(*given)


class Workers:
    """Processes that do `work` together, each with arguments of its own, and what they say.

    They are forked, and find imported what the benchmark has imported, which must have had neither autograd nor threads: a child does not
    have these, and would wait for them.
    """

    def __init__(self, work: Callable[..., None], *given: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("fork")
        self.ends: list[Connection] = []
        for arguments in given:
            ours, theirs = context.Pipe()
            context.Process(target=alone, args=(work, ours, theirs, *arguments), daemon=True).start()
            theirs.close()  # so that ours ends with the process
            self.ends.append(ours)

    def go(self) -> None:
        """Tell all of them to do their next turn."""
        for end in self.ends:
            end.send(None)

    def said(self) -> list[Any]:
        """The next that each of them says. Raises RuntimeError where one has ended without."""
        try:
            return [end.recv() for end in self.ends]
        except (EOFError, ConnectionError):
            raise RuntimeError("a process has failed: what it said is above") from None
