"""The tables of benchmarks/builtin.py: means over seeds, the gaps that a student closes, paired differences between variants, targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from tables import Report, Target, mean_se, target

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.registry import columns
from ddil_lightning.evaluation.table import gap_closed

SHIPPED = "both"  # what `ddil-fit --config METHOD_ddil.yaml` trains, and the targets are about
AGAINST = [(name, "base") for name in ("reflected", "ddil", "both", "same_times", "same_times_reflected")] + [
    ("both", "reflected"),
    ("ddil", "same_times"),
    ("both", "same_times_reflected"),
    ("both_critic", "both"),
]
TEACHER_STEPS = (32, 4, 2, 1)
STUDENT_STEPS: dict[str, tuple[int, ...]] = {"lcm": (4, 2, 1), "pd": (4, 2), "dmd2": (4, 2)}
GAPS = tuple(c.key for c in columns() if c.headline)
OWN = (
    Column("paired", "to teacher", "lower", "mean squared difference to the teacher's images in 32 steps from the same noise"),
    *(Column(f"gap_{c.key}", f"gap {c.short}", "higher", "share of the teacher's gap that is closed") for c in columns() if c.headline),
)
MEASURES = tuple(c.key for c in (*columns(), *OWN))
SHOWN = tuple(c for c in (*columns(), *OWN) if c.shown or c.key == "blur")  # the others are in the JSON
COLUMNS = (("variant", ""), ("name", ""), *((c.key, c.heading) for c in SHOWN))


class Baseline(TypedDict):
    """The teacher, as it is kept: a row of the suite for each step count."""

    rows: list[dict[str, Any]]


class Record(TypedDict):
    """One run, as it is kept; `seconds`: of its training, `network_evaluations`: of one sample each, by role."""

    variant: str
    seed: int
    seconds: float
    updates: int
    network_evaluations: dict[str, int]
    rows: list[dict[str, Any]]


def report(method: str, baseline: Baseline, records: list[Record], variants: Sequence[str], size: dict[str, int]) -> Report:
    """Rows of the teacher, means over seeds (shown), every run (in the JSON), and the paired differences."""
    order = {name: i for i, name in enumerate(variants)}
    records = sorted(records, key=lambda r: (order[r["variant"]], r["seed"]))
    teachers = {row["steps"]: row for row in baseline["rows"]}
    each = [{"variant": r["variant"], "seed": r["seed"], **with_gaps(row, teachers)} for r in records for row in r["rows"]]
    means = [mean_row(name, title, each) for name in order for title in dict.fromkeys(row["name"] for row in each)]
    top = [{"variant": "teacher", "seed": None, **row} for row in baseline["rows"]]
    differences = [difference(a, b, f"student@{k}", each) for a, b in AGAINST if a in order and b in order for k in STUDENT_STEPS[method]]
    shown = [("variant", ""), ("against", "minus"), *COLUMNS[1:]]
    spent = {name: mean_se([sum(r["network_evaluations"].values()) for r in records if r["variant"] == name])[0] for name in order}
    return {
        "benchmark": f"builtin: {method}",
        "columns": COLUMNS,
        "rows": top + means,
        "parts": [{"title": "Paired differences over seeds", "columns": shown, "rows": differences}] if differences else [],
        "runs": each,
        "seconds_training": {f"{r['variant']}/{r['seed']}": r["seconds"] for r in records},
        "targets": targets(method, teachers, {row["name"]: row["metrics"] for row in means if row["variant"] == SHIPPED}),
        "notes": [
            f"{size['seeds']} seed(s), ± is the standard error of their mean; {size['prompts']} prompts; {records[0]['updates']} updates",
            "network evaluations of a training, one sample each: " + ", ".join(f"{name} {n:,.0f}" for name, n in spent.items()),
            "blur: residual of the judge's template fit; to teacher: mean squared difference to the teacher's images in 32 steps from "
            "the same noise; gap: share of the way from the teacher at the same steps to the teacher at 32",
        ],
    }


def with_gaps(row: dict[str, Any], teachers: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A student's row with the shares of the gaps that it closes."""
    m, same, full = row["metrics"], teachers[row["steps"]]["metrics"], teachers[TEACHER_STEPS[0]]["metrics"]
    known = {k: None not in (m[k], same[k], full[k]) for k in GAPS}
    return {**row, "metrics": {**m, **{f"gap_{k}": gap_closed(m[k], same[k], full[k]) if known[k] else None for k in GAPS}}}


def mean_row(variant: str, name: str, each: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds with its standard error."""
    rows = [row for row in each if row["variant"] == variant and row["name"] == name]
    found = {k: mean_se([row["metrics"].get(k) for row in rows]) for k in MEASURES}
    return {
        **{k: v for k, v in rows[0].items() if k != "metrics"},
        "seed": "mean",
        "metrics": {k: mean for k, (mean, _) in found.items()},
        "se": {k: se for k, (_, se) in found.items()},
    }


def difference(a: str, b: str, name: str, each: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of `a` minus `b` at the same seed."""
    values = {(row["variant"], row["seed"]): row["metrics"] for row in each if row["name"] == name}
    seeds = sorted({seed for _, seed in values})

    def minus(key: str) -> list[float | None]:
        pairs = [(values[a, s].get(key), values[b, s].get(key)) for s in seeds]
        return [None if x is None or y is None else x - y for x, y in pairs]

    found = {k: mean_se(minus(k)) for k in MEASURES}
    return {
        **{"variant": a, "against": b, "name": name, "seeds": len(seeds)},
        "metrics": {k: mean for k, (mean, _) in found.items()},
        "se": {k: se for k, (_, se) in found.items()},
    }


def targets(method: str, teachers: dict[int, dict[str, Any]], shipped: dict[str, dict[str, Any]]) -> list[Target]:
    """What the shipped config of `method` must reach."""
    if not shipped:
        return []
    by_method = {"lcm": _lcm_targets, "pd": _pd_targets, "dmd2": _dmd2_targets}
    return by_method[method]({steps: row["metrics"] for steps, row in teachers.items()}, shipped)


def _lcm_targets(teacher: dict[int, dict[str, Any]], student: dict[str, dict[str, Any]]) -> list[Target]:
    made = [
        target("Fréchet distance, 4 steps against the teacher's 32", student["student@4"]["frechet"], teacher[32]["frechet"], at_most=True)
    ]
    return [*made, *_accuracy(teacher, student), *_gaps(student, 2, 0.85), *_gaps(student, 1, 0.70)]


def _pd_targets(teacher: dict[int, dict[str, Any]], student: dict[str, dict[str, Any]]) -> list[Target]:
    two = student["student@2"]["frechet"]
    made = [target("Fréchet distance, 2 steps against the teacher's 4", two, teacher[4]["frechet"], at_most=True)]
    return [*_accuracy(teacher, student), *made, *_gaps(student, 2, 0.85)]


def _dmd2_targets(teacher: dict[int, dict[str, Any]], student: dict[str, dict[str, Any]]) -> list[Target]:
    made = []
    for k in STUDENT_STEPS["dmd2"]:
        mine, same = student[f"student@{k}"], teacher[k]
        made.append(target(f"Fréchet distance, {k} steps against the teacher's {k}", mine["frechet"], same["frechet"], at_most=True))
        made.append(target(f"coverage, {k} steps against the teacher's {k} less 0.05", mine["coverage"], same["coverage"] - 0.05))
    return made


def _accuracy(teacher: dict[int, dict[str, Any]], student: dict[str, dict[str, Any]]) -> list[Target]:
    mine, full = student["student@4"]["attribute_accuracy"], teacher[32]["attribute_accuracy"]
    return [] if full is None else [target("attributes right, 4 steps against the teacher's 32 less 0.03", mine, full - 0.03)]


def _gaps(student: dict[str, dict[str, Any]], steps: int, limit: float) -> list[Target]:
    return [target(f"gap closed in {k}, {steps} step(s)", student[f"student@{steps}"][f"gap_{k}"], limit) for k in GAPS]
