"""The tables and the plot of benchmarks/toy2d.py: means over seeds, paired differences with Student's t, targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tables import Part, Report, Target, mean_se, target

from ddil_lightning.evaluation.registry import column

MEASURES = {
    key: column(key).heading
    for key in (
        "energy_distance",
        "energy_class",
        "energy_teacher",
        "coverage",
        "density",
        "mode_kl",
        "high_quality",
        "teacher_rmse",
        "shift",
        "outside",
    )
}
AGAINST = (
    ("both", "reflected"),
    ("both", "ddil"),
    ("both", "same_times+R"),
    ("ddil", "same_times"),
    ("ddil", "teacher_rollouts"),
    ("ddil", "student_rollouts"),
    ("ddil", "longer_base"),
)
TARGETS = (
    ("pd", "both", "energy_distance", 0.01, -1),
    ("pd", "both", "coverage", 0.01, 1),
    ("lcm", "both", "energy_distance", 0.05, -1),
    ("dmd2", "reflected", "energy_distance", 0.001, -1),
)
NAMES = {"pd": "Progressive distillation", "lcm": "LCM", "dmd2": "DMD2"}


class Remedied(TypedDict, total=False):
    """What some records hold besides: `scores` of their student, sampled with a remedy, by its name."""

    remedied: dict[str, dict[str, list[float]]]


class Record(Remedied):
    """One variant of a method for one group of seeds; `scores` has a value per seed of every measure."""

    method: str
    variant: str
    seeds: list[int]
    seconds: float
    updates: int
    evaluations: int
    scores: dict[str, list[float]]


class Joined(TypedDict):
    """All groups of one method and variant; `groups` says which values belong to which, `counts` holds (updates, evaluations) of each."""

    seeds: list[int]
    counts: list[tuple[int, int]]
    groups: list[slice]
    nodes: dict[str, list[float]]
    scores: dict[str, list[float]]


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float | None]:
    """Mean of a - b, Student's t of the pairs and its two-sided p with n - 1 degrees of freedom.

    t and p are None where there is no spread, and for fewer than three pairs: of two, t is beyond 12 once in twenty times by chance.
    """
    from scipy.stats import t as student

    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = statistics.fmean(d)
    mean = 0.0 if abs(mean) < 1e-12 else mean  # what is left of differences that cancel is rounding
    se = statistics.stdev(d) / len(d) ** 0.5 if len(d) > 2 else 0.0
    if se == 0:
        return {"mean": mean, "t": None, "p": None}
    return {"mean": mean, "t": mean / se, "p": float(2 * student.sf(abs(mean / se), len(d) - 1))}


def report(records: Sequence[Record], size: dict[str, int], quick: bool = False) -> Report:
    """One row per method and variant, paired against base; the other comparisons; targets."""
    joined = join(records)
    rows = [row(joined, method, variant, "base") for method, variant in joined]
    others = [row(joined, m, a, b) for m in NAMES for a, b in AGAINST if (m, a) in joined and (m, b) in joined]
    columns = [("variant", "variant"), ("updates", "updates"), ("evaluations", "evaluations"), *MEASURES.items()]
    parts: list[Part] = [
        {"title": NAMES[m], "columns": columns, "rows": [r for r in rows if r["method"] == m]}
        for m in NAMES
        if any(r["method"] == m for r in rows)
    ]
    parts += [part for m in NAMES if (part := by_node(m, [r for r in rows if r["method"] == m]))]
    shown = [("method", "method"), ("variant", ""), ("against", "minus"), *((f"{k}/paired", head) for k, head in MEASURES.items())]
    flat = [{**{k: r[k] for k in ("method", "variant", "against")}, **{f"{k}/paired": r[k]["paired"] for k in MEASURES}} for r in others]
    if flat:
        parts.append({"title": "Paired differences, mean [t]", "columns": shown, "rows": flat})
    return {
        "benchmark": "toy2d",
        "columns": [("method", "method"), ("variant", ""), *((k, MEASURES[k]) for k in ("energy_distance", "coverage"))],
        "rows": rows,
        "parts": parts,
        "targets": [] if quick else targets(rows),
        "seconds_training": {f"{r['method']}/{r['variant']}/{r['seeds'][0]}": round(r["seconds"], 1) for r in records},
        "each": [{k: r[k] for k in ("method", "variant", "seeds", "scores")} for r in records],
        "notes": [
            f"{size['seeds']} seeds in groups of {size['members']}; ± is the standard error of the mean, [t] of the paired difference to "
            "base; p-values are not corrected for the number of comparisons",
            f"{size['n']} samples per seed in 4 steps, each seed's noise the same for all variants; evaluations: of all networks, per seed",
            "shift: to the 32-step teacher's own latents at the student's nodes, under guidance, from independent noise",
        ],
    }


def by_node(method: str, rows: Sequence[dict[str, Any]]) -> Part | None:
    """The table of the shift at every node of a method's sampler; None without a row that has it."""
    times = sorted({t for r in rows for t in r["shift_at"]}, key=int, reverse=True)
    if not times:
        return None
    shown = [{"variant": r["variant"], **r["shift_at"]} for r in rows]
    return {
        "title": f"{NAMES[method]}: shift by node",
        "columns": [("variant", "variant"), *((t, f"t = {t}") for t in times)],
        "rows": shown,
    }


def join(records: Sequence[Record]) -> dict[tuple[str, str], Joined]:
    """The groups of one method and variant together, in the order of their seeds."""
    found: dict[tuple[str, str], Joined] = {}
    order = {name: i for i, name in enumerate(NAMES)}
    for r in sorted(records, key=lambda r: (order[r["method"]], r["seeds"][0])):
        fresh: Joined = {"seeds": [], "counts": [], "groups": [], "nodes": {}, "scores": {k: [] for k in MEASURES}}
        both = found.setdefault((r["method"], r["variant"]), fresh)
        both["groups"].append(slice(len(both["seeds"]), len(both["seeds"]) + len(r["seeds"])))
        both["seeds"] += r["seeds"]
        both["counts"].append((r["updates"], r["evaluations"]))
        for k in MEASURES:
            both["scores"][k] += r["scores"][k]
        for k in r["scores"]:
            if k.startswith("shift@"):
                both["nodes"].setdefault(k.removeprefix("shift@"), []).extend(r["scores"][k])
    return found


def row(joined: dict[tuple[str, str], Joined], method: str, variant: str, against: str) -> dict[str, Any]:
    """Every measure as {mean, se, paired: {mean, t, p}}; `by_group` are t and p of the groups' means, the most careful count of what is
    independent. `shift_at` is {mean, se} of the shift by the node's time."""
    mine, other = joined[method, variant], joined[method, against]
    assert mine["seeds"] == other["seeds"]
    out: dict[str, Any] = {"method": method, "variant": variant, "against": against, "seeds": len(mine["seeds"])}
    out["updates"], out["evaluations"] = (round(statistics.fmean(c[i] for c in mine["counts"])) for i in (0, 1))
    for key, values in mine["scores"].items():
        mean, se = mean_se(values)
        theirs = other["scores"][key]
        groups = [[statistics.fmean(v[g]) for g in mine["groups"]] for v in (values, theirs)]
        same = variant == against
        pairs = {"paired": None if same else paired(values, theirs), "by_group": None if same else paired(*groups)}
        out[key] = {"mean": mean, "se": se, **pairs}
    out["shift_at"] = {t: dict(zip(("mean", "se"), mean_se(values), strict=True)) for t, values in mine["nodes"].items()}
    return out


def targets(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What must be seen, as one-sided claims with two-sided p: the wrong sign counts as p = 1."""
    found = {(r["method"], r["variant"]): r for r in rows}
    made = []
    for method, variant, key, limit, sign in TARGETS:
        if (method, variant) in found:
            pair = found[method, variant][key]["paired"]
            p = pair["p"] if pair["p"] is not None and pair["mean"] * sign > 0 else 1.0
            made.append(target(f"{method} {variant} better than base in {key.replace('_', ' ')}: p", p, limit, at_most=True))
    return made


# The plot ------------------------------------------------------------------------------------------------------------------------------

COLOURS = {"base": (120, 124, 130), "reflected": (214, 137, 16), "ddil": (31, 119, 180), "both": (24, 140, 92)}
OTHER = (196, 200, 206)
SCALE, LEFT, PANEL, TOP, GAP, HEIGHT = 3, 150, 250, 34, 14, 20


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG: one panel per method, one bar per variant, energy distance to the law with the standard error of its mean."""
    from PIL import Image, ImageDraw, ImageFont

    methods = [m for m in NAMES if any(r["method"] == m for r in rows)]
    lines = max(sum(r["method"] == m for r in rows) for m in methods)
    width, height = (LEFT + PANEL) * len(methods) + GAP, TOP + lines * HEIGHT + 34
    picture = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def font(size: int) -> Any:
        return ImageFont.load_default(size * SCALE)

    def text(x: float, y: float, words: str, size: int = 11, anchor: str = "lm", fill: Any = (40, 42, 46)) -> None:
        draw.text((x * SCALE, y * SCALE), words, fill=fill, font=font(size), anchor=anchor)

    for k, method in enumerate(methods):
        mine, x0 = [r for r in rows if r["method"] == method], k * (LEFT + PANEL) + LEFT
        top = max(r["energy_distance"]["mean"] + (r["energy_distance"]["se"] or 0) for r in mine)
        unit = (PANEL - 50) / max(top, 1e-9)
        text(x0, 16, NAMES[method], 13)
        for i, r in enumerate(mine):
            y, found = TOP + i * HEIGHT, r["energy_distance"]
            mean, se = max(found["mean"], 0.0), found["se"] or 0.0
            text(x0 - 8, y + HEIGHT / 2 - 2, r["variant"].replace("_", " "), 10, "rm")
            box = [x0, y + 2, x0 + mean * unit, y + HEIGHT - 6]
            draw.rectangle([round(v * SCALE) for v in box], fill=COLOURS.get(r["variant"], OTHER))
            ends = [x0 + max(mean - se, 0) * unit, y + HEIGHT / 2 - 2, x0 + (mean + se) * unit, y + HEIGHT / 2 - 2]
            draw.line([round(v * SCALE) for v in ends], fill=(20, 20, 20), width=SCALE)
            text(x0 + (mean + se) * unit + 5, y + HEIGHT / 2 - 2, f"{found['mean']:.4f}", 9)
        draw.line([x0 * SCALE, TOP * SCALE, x0 * SCALE, (TOP + len(mine) * HEIGHT) * SCALE], fill=(120, 120, 120), width=SCALE)
    text(GAP, height - 14, "Energy distance to the true law, mean and its standard error over seeds; lower is better", 10)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
