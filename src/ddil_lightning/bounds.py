"""What numbers an option takes, said in one line before anything is made of them: NaN and infinity pass most comparisons unseen.

    at_least(1, updates=updates, log_every=log_every)
    within(0, 10, lr=lr, critic_lr=critic_lr)  # None is an option that was left out, a list is judged number by number

Every check raises ValueError with the name, the value and what would do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

SEED = 2**32 - 1
"""The largest seed: that of numpy, which Lightning seeds as well."""


def at_least(low: float, **options: Any) -> None:
    """Finite and not below `low`."""
    _check(options, lambda x: x >= low, f"of at least {low:g}")


def above(low: float, **options: Any) -> None:
    """Finite and larger than `low`."""
    _check(options, lambda x: x > low, f"above {low:g}")


def within(low: float, high: float, **options: Any) -> None:
    """From `low` to `high`, both included."""
    _check(options, lambda x: low <= x <= high, f"from {low:g} to {high:g}")


def fraction(**options: Any) -> None:
    """From 0 to below 1, such as a decay."""
    _check(options, lambda x: 0 <= x < 1, "from 0 to below 1")


def seeds(**options: Any) -> None:
    """Whole numbers that seed every generator."""
    for name, value in options.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= SEED):
            raise ValueError(f"{name} is {value!r}: give a whole number from 0 to {SEED}")


def lengths(count: int | None = None, /, **options: Any) -> None:
    """Lists of `count` entries, or of at least one."""
    for name, value in options.items():
        if value is not None and (len(value) != count if count is not None else not len(value)):
            raise ValueError(f"{name} is {list(value)!r}: give {count or 'at least one'}{' numbers' if count else ''}")


def _check(options: dict[str, Any], fine: Callable[[float], bool], what: str) -> None:
    for name, given in options.items():
        for value in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and fine(value)):
                raise ValueError(f"{name} is {given!r}: give {'numbers' if value is not given else 'a number'} {what}")
