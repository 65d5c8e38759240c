"""Files that several processes make which know nothing of each other, such as the tasks of an array job on one folder."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path


class Missing:
    """The numbers of files that this process is to make in `folder`; each is looked for again just before its turn.

    They come in order, until one turns out to be there that was missing: then somebody else makes them too, and the rest comes in an order
    of chance, so that two do not make the same files side by side. A file that two make all the same is the same, for it is a function of
    its number. `in_order`: stay in order, for who reads data that can be read in no other.
    """

    def __init__(self, numbers: Sequence[int], is_made: Callable[[int], bool], folder: Path, in_order: bool = False) -> None:
        self._left, self._is_made, self._folder, self._in_order = list(reversed(numbers)), is_made, folder, in_order
        self._met = False

    def __iter__(self) -> Iterator[int]:
        while self._left:
            number = self._left.pop()
            if not self.is_made(number):
                yield number

    def is_made(self, number: int) -> bool:
        """Whether somebody else has made a file by now."""
        if not self._is_made(number):
            return False
        if not self._met and not self._in_order:
            random.SystemRandom().shuffle(self._left)
        if not self._met:
            rest = "; a stream cannot be shared so: start them by torchrun" if self._in_order else ": what is missing is shared"
            logging.getLogger(__name__).warning(f"another process writes into {self._folder} as well{rest}")
        self._met = True
        return True
