"""Long work: how far it is, said while it goes on, and what several threads ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
PATIENCE = 15.0  # seconds without a word
READERS = 16
"""Threads that ask for files, each of which waits for its answer where they lie on a network."""


def counted(
    items: Iterable[T], total: int, what: str, show: bool = True, rows: Callable[[T], int] | None = None
) -> Generator[T, None, None]:
    """The items, with a bar on a terminal, and elsewhere a line for every tenth of what takes longer than some seconds.

    `rows`: how many rows an item has, for who wants to see rows a second.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    bar = Progress(*Progress.get_default_columns(), console=console, transient=True, disable=not (show and console.is_terminal))
    task = bar.add_task(what, total=total)
    begun, told, done = time.monotonic(), 0, 0
    with bar:
        for i, item in enumerate(items, 1):
            yield item
            seconds, tenth = time.monotonic() - begun, 10 * i // total
            done += rows(item) if rows else 0
            rate = f"{done / seconds:.3g} rows/s, " if rows and seconds else ""
            bar.update(task, advance=1, description=f"{what}, {rate}"[:-2] if rate else what)
            if show and bar.disable and tenth > told and seconds > PATIENCE:
                print(f"{what}: {i} of {total}, {rate}about {seconds / i * (total - i):.0f} s left", flush=True)
                told = tenth


def in_threads(ask: Callable[[S], T], items: Sequence[S], what: str, show: bool = True) -> Generator[T, None, None]:
    """What `ask` says of each of the items, in order, asked by several threads; `what` is being done, where it takes long."""
    ahead = 16 * READERS  # no more, or all answers would be in memory before the first is taken
    pool = ThreadPoolExecutor(READERS)
    try:
        rounds = (pool.map(ask, items[i : i + ahead]) for i in range(0, len(items), ahead))
        yield from counted(chain.from_iterable(rounds), len(items), what, show)
    finally:
        pool.shutdown(cancel_futures=True)
