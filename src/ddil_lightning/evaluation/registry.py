"""The metrics that a suite measures by, an entry each: the package's own, and those of anyone who registers one.

Every list of keys, labels and directions is made from here. The package's own are loaded when the first is asked for, for torchmetrics
alone costs seconds.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from ddil_lightning import plugins
from ddil_lightning.evaluation.columns import ARROWS, POINTS, Column

if TYPE_CHECKING:
    from ddil_lightning.evaluation.metrics.base import Metric

M = TypeVar("M", bound="type[Metric]")

METRICS = (
    "frechet.Frechet",
    "clip.ClipScore",
    "prdc.DensityCoverage",
    "kid.Kid",
    "cmmd.Cmmd",
    "patches.PatchFrechet",
    "teacher.FrechetTeacher",
    "diversity.Diversity",
    "vendi.Vendi",
    "tones.Tones",
    "alignment.Alignment",
    "modes.ModeCoverage",
    "blur.Blur",
    "hps.Hps",
    "pickscore.PickScore",
    "imagereward.ImageReward",
)
"""The package's own, FILE.CLASS below `evaluation/metrics/`, in the order of the columns."""

PASSES = ("prompts", "probes")
"""The images that a metric can be over: one of every held-out prompt, or several of a few."""

ROW = ("name", "steps", "guidance", "n", "nfe", "seconds_per_image", "metrics", "protocol", "generation")
"""What a row of results holds beside its metrics, so no metric can be called it."""

_added: dict[str, type[Metric]] = {}


def metrics() -> list[type[Metric]]:
    """The classes of all metrics: the package's own, then the registered ones in their order, those of plugins among them."""
    plugins.load()
    return [*_own(), *_added.values()]


def wanted(asked: Sequence[str] | None) -> list[type[Metric]]:
    """The classes of the metrics that have one of the keys `asked`, all for None. Raises ValueError for a key that is no metric's."""
    every = metrics()
    known = [c.key for metric in every for c in metric.columns]
    for key in asked or ():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            raise ValueError(f"no metric {key!r}: {'did you mean ' + ' or '.join(near) + '?' if near else 'known are ' + ', '.join(known)}")
    return [metric for metric in every if asked is None or {c.key for c in metric.columns} & set(asked)]


def register(metric: M) -> M:
    """Add a metric, as a decorator or called: from now on every suite measures by it, and every table has its columns.

    One that comes again from the same place (a cell that is run twice) replaces itself. Raises ValueError, a line that names it, for what
    it has not declared, and for a key that is another's.
    """
    name = f"{metric.__module__}.{metric.__qualname__}"
    taken = {c.key: other.__name__ for other in metrics() if f"{other.__module__}.{other.__qualname__}" != name for c in other.columns}
    taken |= {c.key: "the analytic toy" for c in POINTS}
    wrong = next(_faults(metric, taken), None)
    if wrong:
        raise ValueError(f"metric {metric.__name__}: {wrong}")
    _added[name] = metric
    return metric


def unregister(metric: type[Metric]) -> None:
    """Take a registered metric out again; one of the package's own stays."""
    _added.pop(f"{metric.__module__}.{metric.__qualname__}", None)


def columns() -> list[Column]:
    """The columns that all registered metrics fill, in their order."""
    return [column for metric in metrics() for column in metric.columns]


def keys() -> list[str]:
    """The keys of all metrics' columns, which are the names in a row's `metrics`."""
    return [column.key for column in columns()]


def column(key: str) -> Column:
    """The column of a key, of a suite's metric or of the toy's. Raises KeyError for one that nothing measures."""
    return {c.key: c for c in (*POINTS, *columns())}[key]


def unmeasured() -> dict[str, Any]:
    """What a row's `metrics` hold where nothing was measured: None for every number, the details empty, and no intervals."""
    details = [(name, value) for metric in metrics() for name, value in metric.details.items()]
    return dict.fromkeys(keys()) | {name: type(value)(value) for name, value in details} | {"intervals": {}}


def computed(made: Sequence[Metric]) -> dict[str, Any]:
    """The numbers of all metrics that have measured anything, and those of the others."""
    out = unmeasured()
    for metric in (m for m in made if m.update_called):
        found = _declared(metric, metric.compute())
        out |= found | {"intervals": out["intervals"] | found.get("intervals", {})}
    return out


def _declared(metric: Metric, found: dict[str, Any]) -> dict[str, Any]:
    """What a metric computed. Raises ValueError where that is not what it has declared, and for a number that is none: one that is not
    defined is None, and NaN would be written as if nothing had been measured."""
    declared = {c.key for c in metric.columns} | set(metric.details)
    given = {*found, *found.get("intervals", {})} - {"intervals"}
    if given != declared:
        raise ValueError(f"metric {type(metric).__name__}: it computes {sorted(given)} and declares {sorted(declared)}")
    wrong = [c.key for c in metric.columns if isinstance(value := found.get(c.key), float) and not math.isfinite(value)]
    if wrong:
        raise ValueError(f"metric {type(metric).__name__}: {wrong[0]} is {found[wrong[0]]}; mend what it is made of, or give None")
    return found


@cache
def _own() -> tuple[type[Metric], ...]:
    found = []
    for entry in METRICS:
        file, name = entry.split(".")
        found.append(getattr(import_module(f"ddil_lightning.evaluation.metrics.{file}"), name))
    return tuple(found)


def _faults(metric: type[Metric], taken: dict[str, str]) -> Iterator[str]:
    """What keeps a metric from being registered, in words."""
    from ddil_lightning.evaluation.given import NEEDS
    from ddil_lightning.evaluation.metrics.base import Metric

    if not (inspect.isclass(metric) and issubclass(metric, Metric)):
        yield "it is no subclass of ddil_lightning.evaluation.metrics.base.Metric"
        return
    missing = sorted(metric.__abstractmethods__)
    if missing:
        yield f"it does not define {' and '.join(missing)}"
    if not metric.columns:
        yield "it declares no number; write `columns = (Column(key, label, better, meaning),)`"
    for c in metric.columns:
        if not isinstance(c, Column) or not (c.key and c.label and c.meaning):
            yield f"a column needs a key, a label and a meaning: {c!r}"
        elif c.better not in ARROWS:
            yield f"{c.key}: better={c.better!r}; it is 'higher', 'lower', or '' where neither is"
        elif c.key in taken:
            yield f"{c.key} is a number of {taken[c.key]} already; choose another key"
        elif c.key in (*ROW, "intervals"):
            yield f"{c.key} is the name of another part of a row; choose another key"
    unknown = sorted({*metric.needs, *metric.wants} - set(NEEDS))
    if unknown:
        yield f"needs {', '.join(unknown)}: no suite has it; choose among {', '.join(NEEDS)}"
    if metric.over not in PASSES:
        yield f"over={metric.over!r}; it is {' or '.join(map(repr, PASSES))}"
