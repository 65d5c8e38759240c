"""Whether numbers are sound, asked of a device without waiting for it: what it answers is read one batch later.

`bool(tensor)` has the host wait until the device has caught up; the device then waits for the host's next kernels. Where computing and
asking are one and the same device, the CPU, an answer is read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Fault = Callable[[bool], str]
"""What to say of numbers that are not sound; `mine`: whether they are this process's own."""


class Asked(NamedTuple):
    """An answer on its way to the host: [2], whether the numbers are sound in this process, and in all."""

    answer: Tensor
    there: Any  # a CUDA event; None where it has arrived
    fault: Fault


class Watch:
    """Answers that are on their way, by batch."""

    def __init__(self) -> None:
        self._now: list[Asked] = []
        self._before: list[Asked] = []

    def ask(self, fine: Tensor, fault: Fault) -> Tensor:
        """[] float32, 1 if the numbers are `fine` [] (bool) in all processes and else 0, on the device. All processes ask together.

        Raises FloatingPointError with what `fault` says where that is known at once; otherwise `read` does, a batch later.
        """
        mine = fine.detach().to(torch.float32)
        every = mine.clone()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All processes stop together: one that left alone would leave the others waiting for its gradients.
            torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN)
        answer, there = sent_home(torch.stack([mine, every]))
        self._now.append(Asked(answer, there, fault))
        if there is None:
            self.read(all_of_them=True)
        return every

    def read(self, all_of_them: bool = False) -> None:
        """A batch begins: read the answers of the one before the last. `all_of_them`: wait for the others too.

        Raises FloatingPointError for the first that is not sound.
        """
        due, self._before = self._before, self._now
        self._now = []
        if all_of_them:
            due, self._before = due + self._before, []
        for asked in due:
            if asked.there is not None:
                asked.there.synchronize()
            mine, every = asked.answer.tolist()
            if not every:
                self._before.clear()  # one fault ends a run; it is not said again by what cleans up after it
                raise FloatingPointError(asked.fault(not mine))


def sent_home(x: Tensor) -> tuple[Tensor, Any]:
    """`x` on its way to the CPU, and the event that it has arrived; None where it is there."""
    if not x.is_cuda:
        return x, None
    home = x.to("cpu", non_blocking=True)  # in pinned memory, as torch does it
    return home, torch.cuda.current_stream(x.device).record_event()
