"""What several processes of one run must do together, and what one of them does for all. One process alone is the ordinary case of it."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ddil_lightning.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for the others: the first may read a whole data set for all, and each may have a share of its own to do."""

IN_STEP = timedelta(hours=2)
"""The same between the batches of a training, where one does little alone: it writes a checkpoint, draws previews, exports a stage. Who
waits longer waits for a process that is lost or hangs."""

SILENCE = 5.0
"""For how many seconds an error may wait for what the other processes are at before it is told."""

LOOK = 1.0
"""How many seconds apart a process that does its share asks whether another has failed."""

_jobs = itertools.count()
"""The numbers of `Processes.by_all`, which all processes count alike: what fails in one job is not heard in the next."""


def averaged(x: Tensor) -> Tensor:
    """The mean over all processes of a statistic `x` of their own batches, without its gradient; of one process alone `x`.

    Of batches of one size it is the mean over all of them, so that a step is the same on one process and on several. All ask together.
    """
    from torch import distributed

    x = x.detach()
    if not (distributed.is_available() and distributed.is_initialized()):
        return x
    total = x.clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def wait_at_most(time: timedelta) -> None:
    """Have this process wait so long for the others in all that they do together from now on."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        newer = getattr(distributed, "set_timeout", None)  # torch 2.11 has the other
        (newer or distributed.distributed_c10d._set_pg_timeout)(time)


class Elsewhere(SystemExit):
    """The end of a process because of what went wrong in another, which tells it: a second line would say the same.

    `error`: what it says there, on one line. `foreseen`: it is a ValueError there, so that who goes on after one does so here as well.
    """

    def __init__(self, error: str, foreseen: bool = False) -> None:
        super().__init__(2)
        self.error, self.foreseen = error, foreseen

    def __str__(self) -> str:
        return self.error


class Processes:
    """The processes of a Trainer's run; of this one alone where `trainer` is None. `nodes`: the machines that they are on."""

    def __init__(self, trainer: Any = None, nodes: int = 1) -> None:
        self.nodes = nodes
        self.rank: int = trainer.global_rank if trainer is not None else 0
        self.world: int = trainer.world_size if trainer is not None else 1
        self._strategy = trainer.strategy if trainer is not None and self.world > 1 else None
        self._job = ""  # the key by which a failure in the present `by_all` is known to the others

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    def by_first(self, job: Callable[[], T]) -> T:
        """The result of `job`, which the first process does for all. What it raises ends the others too, as Elsewhere."""
        if self._strategy is None:
            return job()
        told: tuple[Any, tuple[str, bool] | None] = (None, None)
        failure: BaseException | None = None
        if self.first:
            try:
                told = job(), None
            except Exception as error:
                failure, told = error, (None, _told(error))
        result, wrong = self._strategy.broadcast(told)
        if wrong is not None:
            raise failure or Elsewhere(*wrong)
        return result

    def by_all(self, job: Callable[[], T]) -> T:
        """The result of `job`, of which every process does its share. What one of them raises ends all together: those whose share goes
        through `watching` soon, the others at its end; meanwhile the error is told where it happened."""
        if self._strategy is None:
            return job()
        self._job = f"ddil/failed/{next(_jobs)}"
        failure: BaseException | None = None
        result: Any = None
        try:
            result = job()
        except Elsewhere as error:
            failure = error
        except Exception as error:
            failure = error
            if (store := _store()) is not None:
                store.set(self._job, one_line(error))
        with self._told_meanwhile(failure):
            every = self._strategy.reduce_boolean_decision(failure is None)
        said, self._job = "" if every else self._failed(), ""
        if not every:
            raise failure or Elsewhere(said or "another process has failed")
        return result

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """The items of a process's share of a job for `by_all`. Raises Elsewhere between two of them when another process has failed: else
        an error on the first day would be known when the last share is done."""
        looked = time.monotonic()
        for item in items:
            if time.monotonic() - looked >= LOOK:
                if said := self._failed():
                    raise Elsewhere(said)
                looked = time.monotonic()
            yield item

    def alike(self, job: Callable[[], T]) -> T:
        """The result of `job`, of which every process does its share. What goes wrong in several is told by the first of these alone."""
        failure: Exception | None = None
        result: Any = None
        try:
            result = job()
        except Exception as error:
            failure = error
        with self._told_meanwhile(failure):
            told = self.gathered(None if failure is None else _told(failure))
        wrong = next(((rank, said) for rank, said in enumerate(told) if said is not None), None)
        if wrong is None:
            return result
        rank, said = wrong
        raise failure if rank == self.rank and failure is not None else Elsewhere(*said)

    def gathered(self, mine: T) -> list[T]:
        """What every process gives, in their order, in all of them."""
        every: list[Any] = [mine]
        if self._strategy is not None:
            from torch import distributed

            every = every * self.world
            distributed.all_gather_object(every, mine)
        return every

    def host(self) -> Any:
        """A group of all processes for `collected` that leaves the devices alone; None where their own group does. All ask together."""
        from torch import distributed

        if self._strategy is None or not distributed.is_initialized() or distributed.get_backend() == "gloo":
            return None
        return distributed.new_group(backend="gloo")  # of processes that are in step: half an hour is long

    def collected(self, mine: T, group: Any = None) -> list[T]:
        """What every process gives, in their order, in the first of them; in the others nothing.

        By NCCL all of it passes through the memory of the first GPU; by the `group` that `host` makes, through no GPU's.
        """
        if self._strategy is None:
            return [mine]
        from torch import distributed

        every: list[Any] | None = [None] * self.world if self.first else None
        distributed.gather_object(mine, every, dst=0, group=group)
        return every or []

    def _failed(self) -> str:
        """What has failed in another process in the present job; empty where nothing has."""
        store = _store() if self._job else None
        return store.get(self._job).decode() if store is not None and store.check([self._job]) else ""

    @contextmanager
    def _told_meanwhile(self, failure: BaseException | None) -> Iterator[None]:
        """Inside, where this process waits for the others, what has failed in it is told if that takes longer than some seconds."""
        if failure is None or isinstance(failure, Elsewhere):
            yield
            return
        said = f"process {self.rank} of {self.world}: {one_line(failure)} (it waits for the others to end)"
        teller = threading.Timer(SILENCE, lambda: print(said, file=sys.stderr, flush=True))
        teller.daemon = True
        teller.start()
        try:
            yield
        finally:
            teller.cancel()

    def wait(self) -> None:
        """Wait until every process of the run has come here."""
        if self._strategy is not None:
            self._strategy.barrier()


def _store() -> Any:
    """What all processes of a run can read and write without meeting each other; None where there is none."""
    from torch import distributed

    found = getattr(distributed.distributed_c10d, "_get_default_store", None) if distributed.is_available() else None
    return found() if found is not None and distributed.is_initialized() else None


def _told(error: Exception) -> tuple[str, bool]:
    """What the other processes hear of an error: the arguments of Elsewhere."""
    return one_line(error), isinstance(error, ValueError)
