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
    """Raises ValueError for an option that is not finite or is below `low`."""
    _check(options, lambda x: x >= low, f"of at least {low:g}")


def above(low: float, **options: Any) -> None:
    """Raises ValueError for an option that is not finite or is no larger than `low`."""
    _check(options, lambda x: x > low, f"above {low:g}")


def within(low: float, high: float, **options: Any) -> None:
    """Raises ValueError for an option outside `low` to `high`, both of which are allowed."""
    _check(options, lambda x: low <= x <= high, f"from {low:g} to {high:g}")


def fraction(**options: Any) -> None:
    """Raises ValueError for an option, such as a decay, that is below 0 or not below 1."""
    _check(options, lambda x: 0 <= x < 1, "from 0 to below 1")


def seeds(**options: Any) -> None:
    """Raises ValueError for an option that is no whole number from 0 to SEED, which every generator takes for a seed."""
    for name, value in options.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= SEED):
            raise ValueError(f"{name} is {_told(value)}: give a whole number from 0 to {SEED}")


def lengths(count: int | None = None, /, **options: Any) -> None:
    """Raises ValueError for a list that has not `count` entries, or without `count` for an empty one."""
    for name, value in options.items():
        if value is not None and (len(value) != count if count is not None else not len(value)):
            raise ValueError(f"{name} is {_told(list(value))}: give {count or 'at least one'}{' numbers' if count else ''}")


def divides(total: int, what: str, **options: int) -> None:
    """Raises ValueError, naming the nearest that do, unless options divide `total`, which is `what`."""
    for name, value in options.items():
        if value < 1 or total % value:
            known = [n for n in range(1, total + 1) if total % n == 0]
            below, above = [n for n in known if n < value][-1:], [n for n in known if n > value][:1]
            raise ValueError(f"{name} = {value} does not divide {what}: take {' or '.join(map(str, below + above))}")


def is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold, and neither NaN nor infinite."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def _told(value: Any) -> str:
    """A value as one line can hold it: Python itself refuses to write whole numbers of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:50]} ... {text[-40:]}"


def _check(options: dict[str, Any], fine: Callable[[float], bool], what: str) -> None:
    for name, given in options.items():
        for value in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
            if value is not None and not (is_number(value) and fine(value)):
                raise ValueError(f"{name} is {_told(given)}: give {'numbers' if value is not given else 'a number'} {what}")
