"""The tables of benchmarks/lcm.py: means over seeds, the gaps that a student closes, paired differences between variants, targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common

from ddil_lightning.results import METRICS, gap_closed

SHIPPED = "lcm_ddil+R"  # what `ddil-fit --config lcm_ddil.yaml` trains, and the targets are about
AGAINST = [(name, "lcm") for name in ("lcm+R", "lcm_ddil", "lcm_ddil+R", "same_times", "same_times+R")] + [
    ("lcm_ddil+R", "lcm+R"),
    ("lcm_ddil", "same_times"),
    ("lcm_ddil+R", "same_times+R"),
]
TEACHER_STEPS, STUDENT_STEPS = (32, 4, 2, 1), (4, 2, 1)
GAPS = ("frechet", "all_right")
MEASURES = (*(m.key for m in METRICS), "paired", *(f"gap_{k}" for k in GAPS))
HEADINGS = ("Fréchet ↓", "CLIP ↑", "density", "coverage ↑", "LPIPS div.", "attributes ↑", "all right ↑", "modes ↑", "paired ↓")
COLUMNS = (("variant", ""), ("name", ""), *zip(MEASURES, (*HEADINGS, "gap Fréchet ↑", "gap all right ↑"), strict=True))


def report(baseline: dict[str, Any], records: list[dict[str, Any]], variants: Sequence[str], size: dict[str, int]) -> common.Report:
    """Rows of the teacher, means over seeds (shown), every run (in the JSON), and the paired differences."""
    order = {name: i for i, name in enumerate(variants)}
    records = sorted(records, key=lambda r: (order[r["variant"]], r["seed"]))
    teachers = {row["steps"]: row for row in baseline["rows"]}
    each = [{"variant": r["variant"], "seed": r["seed"], **with_gaps(row, teachers)} for r in records for row in r["rows"]]
    means = [mean_row(name, f"student@{k}", each) for name in order for k in STUDENT_STEPS]
    top = [{"variant": "teacher", "seed": None, **row} for row in baseline["rows"]]
    differences = [difference(a, b, f"student@{k}", each) for a, b in AGAINST if a in order and b in order for k in STUDENT_STEPS]
    shown = [("variant", ""), ("against", "minus"), *COLUMNS[1:]]
    return {
        "benchmark": "lcm",
        "columns": COLUMNS,
        "rows": top + means,
        "parts": [{"title": "Paired differences over seeds", "columns": shown, "rows": differences}] if differences else [],
        "runs": each,
        "seconds_training": {f"{r['variant']}/{r['seed']}": r["seconds"] for r in records},
        "targets": targets(teachers, {row["name"]: row["metrics"] for row in means if row["variant"] == SHIPPED}),
        "notes": [
            f"{size['seeds']} seed(s), ± is the standard error of their mean; {size['prompts']} prompts; {records[0]['updates']} updates",
            "paired: mean squared difference to the teacher's images in 32 steps from the same noise; gap: share of the way from the "
            "teacher at the same steps to the teacher at 32",
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
    found = {k: common.mean_se([row["metrics"].get(k) for row in rows]) for k in MEASURES}
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

    found = {k: common.mean_se(minus(k)) for k in MEASURES}
    return {
        **{"variant": a, "against": b, "name": name, "seeds": len(seeds)},
        "metrics": {k: mean for k, (mean, _) in found.items()},
        "se": {k: se for k, (_, se) in found.items()},
    }


def targets(teachers: dict[int, dict[str, Any]], shipped: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the shipped config must reach."""
    if not shipped:
        return []
    full, four = teachers[TEACHER_STEPS[0]]["metrics"], shipped["student@4"]
    made = [common.target("Fréchet distance, 4 steps against the teacher's 32", four["frechet"], full["frechet"], at_most=True)]
    if full["attribute_accuracy"] is not None:
        limit = full["attribute_accuracy"] - 0.03
        made.append(common.target("attributes right, 4 steps against the teacher's 32 less 0.03", four["attribute_accuracy"], limit))
    for steps, limit in ((2, 0.85), (1, 0.70)):
        made += [common.target(f"gap closed in {k}, {steps} step(s)", shipped[f"student@{steps}"][f"gap_{k}"], limit) for k in GAPS]
    return made
