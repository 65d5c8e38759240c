"""The tables and the page of benchmarks/reproduce.py: means, paired differences, the paper's numbers, what a measure can tell."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from builtin_table import OWN
from common import ANEW
from tables import Columns, Part, Report, grid, mean_se
from toy2d_table import paired

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.registry import columns

ON_U_NETS: dict[str, tuple[int, ...]] = {"pd": (4, 2), "lcm": (4, 2, 1), "dmd2": (4, 2)}
REPORTED = ON_U_NETS | {f"{name}_flow": steps for name, steps in ON_U_NETS.items()}
"""The step counts that a method's students are reported in."""
TITLES = {name: name.removesuffix("_flow").upper() for name in REPORTED}
LABELS = {"base": "base", "reflected": "+ Reflected", "ddil": "+ DDIL", "both": "+ both"}
CAS = Column("cas", "Taught ↑", "higher", "share of real scenes that a classifier taught by its images reads all right")
SHOWN = (
    "frechet",
    "kid",
    "patch_frechet",
    "clip",
    "attribute_accuracy",
    "all_right",
    "coverage",
    "mode_coverage",
    "lpips_diversity",
    "cas",
)
HEADINGS = {c.key: c.heading for c in (*columns(), *OWN)} | {"cas": CAS.label}
TELLING = (
    "frechet",
    "kid",
    "cmmd",
    "patch_frechet",
    "clip",
    "attribute_accuracy",
    "all_right",
    "coverage",
    "mode_coverage",
    "blur",
    "paired",
)
"""The measures whose spread is looked into."""

APART = ("frechet", "all_right", "mode_coverage", "lpips_diversity", "cas")
"""The measures of each training by itself."""

PAPER: dict[tuple[str, int], dict[str, tuple[float, float, float]]] = {
    ("pd", 4): {"base": (23.34, 0.302, 0.60), "ddil": (22.42, 0.302, 0.60)},
    ("pd", 2): {"base": (26.43, 0.288, 0.58), "ddil": (24.13, 0.291, 0.58)},
    ("lcm", 4): {
        "base": (24.39, 0.305, 0.61),
        "reflected": (24.25, 0.306, 0.59),
        "ddil": (23.44, 0.308, 0.59),
        "both": (22.86, 0.309, 0.59),
    },
    ("dmd2", 4): {"base": (31.77, 0.320, 0.52), "reflected": (29.32, 0.323, 0.51), "both": (27.72, 0.326, 0.51)},
}
"""The paper's FID, CLIP score and LPIPS-diversity, COCO-2017 5k: SD1.5 (PD, LCM), SSD-1B with a batch of 7 (DMD2)."""


SETS = {
    1: (
        "again: with the prompts and pictures of the training data's first scenes, which the students have seen, and the noise of the "
        "first set one place further on; that of the probes, of which mode coverage and LPIPS diversity are, is nearly the same",
        "; its captions are those of half of these scenes, and the real pictures of the first row these scenes themselves",
    ),
    2: ("again: with other prompts, noise and real images", ""),
}
"""What the second set and the lesson of a cell are, by its `sets`, in words."""


def sets(cells: Sequence[Mapping[str, Any]]) -> int:
    """Those that the most cells have: of others neither the second set nor the lesson can be compared with theirs."""
    return statistics.mode([cell.get("sets", 1) for cell in cells] or [2])


def values(cells: Sequence[Mapping[str, Any]], rows: str = "rows") -> dict[tuple[str, int, str, int], dict[str, float | None]]:
    """All numbers by (method, steps, variant, seed)."""
    found, alike = {}, sets(cells)
    for cell in cells:
        same = cell.get("sets", 1) == alike
        for row in cell[rows] if same or rows == "rows" else ():
            numbers = {k: v for k, v in row["metrics"].items() if v is None or isinstance(v, int | float)}
            taught = cell["downstream"].get(str(row["steps"]), {}) if rows == "rows" and same else {}
            found[cell["method"], row["steps"], cell["variant"], cell["seed"]] = {**numbers, **taught}
    return found


def report(cells: Sequence[dict[str, Any]], teacher: Mapping[str, Any]) -> Report:
    """A table of every method and step count, beside the paper's; and which measure tells a difference from chance."""
    found = values(cells)
    parts = [part for method in REPORTED for k in REPORTED[method] if (part := table(method, k, found, cells))]
    again = values(cells, "again")
    if (each := seeds_apart(found, again)) is not None:
        parts.append(each)
    telling = spread(found, again)
    if telling:
        parts.append(telling)
    shown: Columns = (("name", ""), *((key, HEADINGS[key]) for key in SHOWN))
    return {
        "benchmark": "reproduction",
        "columns": shown,
        "rows": teachers(teacher),
        "parts": parts,
        "each": [
            {k: cell[k] for k in ("method", "variant", "seed", "updates", "network_evaluations", "seconds_training")} for cell in cells
        ],
        "seconds_training": {f"{c['method']}/{c['variant']}/{c['seed']}": c["seconds_training"] for c in cells},
        "notes": notes(cells),
    }


def teachers(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The teacher's rows, and what there is to reach by teaching with real pictures."""
    rows = [{"name": row["name"], "metrics": {**row["metrics"], **told["downstream"].get(str(row["steps"]), {})}} for row in told["rows"]]
    return [*rows, {"name": "real images", "metrics": {**dict.fromkeys(SHOWN), **told["downstream"]["real"]}}]


def table(method: str, steps: int, found: Mapping[Any, Mapping[str, float | None]], cells: Sequence[Mapping[str, Any]]) -> Part | None:
    """A row for each variant: means, standard errors, t of the paired difference to base; evaluations; the paper's three numbers."""
    rows = []
    for variant, label in LABELS.items():
        seeds = sorted(s for m, k, v, s in found if (m, k, v) == (method, steps, variant))
        if not seeds:
            continue
        row: dict[str, Any] = {"name": label, "seeds": len(seeds), "evaluations": evaluations(method, variant, cells)}
        for key in SHOWN:
            row[key] = compared(found, (method, steps), variant, seeds, key)
        fid, clip, diversity = PAPER.get((method, steps), {}).get(variant, (None, None, None))
        rows.append({**row, "paper_fid": fid, "paper_clip": clip, "paper_diversity": diversity})
    if not rows:
        return None
    own = [(key, HEADINGS[key]) for key in SHOWN]
    theirs = [("paper_fid", "paper: FID ↓"), ("paper_clip", "paper: CLIP ↑"), ("paper_diversity", "paper: LPIPS div.")]
    shown = [("name", ""), ("seeds", "seeds"), *own, ("evaluations", "evaluations"), *(theirs if (method, steps) in PAPER else [])]
    return {"title": f"{TITLES[method]}, {steps} step{'s' * (steps > 1)}", "columns": shown, "rows": rows}


def compared(found: Mapping[Any, Mapping[str, float | None]], where: tuple[str, int], variant: str, seeds: Sequence[int], key: str) -> Any:
    """The mean of a variant with its standard error, and the paired difference to base on the seeds that both have."""
    method, steps = where
    mine = {s: found[method, steps, variant, s].get(key) for s in seeds}
    mean, se = mean_se(list(mine.values()))
    if mean is None:
        return None
    base = {s: found[method, steps, "base", s].get(key) for s in seeds if (method, steps, "base", s) in found}
    both = [(mine[s], base[s]) for s in seeds if variant != "base" and base.get(s) is not None]
    told = paired([a for a, _ in both], [b for _, b in both]) if both else None  # type: ignore[misc]
    return {"mean": mean, "se": se, "paired": told}


def seeds_apart(found: Mapping[Any, Mapping[str, float | None]], again: Mapping[Any, Mapping[str, float | None]]) -> Part | None:
    """Both minus base for each training by itself, and the same on the second set of prompts, noise and real images."""
    rows = []
    for method in REPORTED:
        for k in REPORTED[method]:
            for seed in sorted(s for m, n, v, s in found if (m, n, v) == (method, k, "both") and (m, n, "base", s) in found):
                row: dict[str, Any] = {"name": f"{TITLES[method]}, seed {seed}, {k} step{'s' * (k > 1)}"}
                for key, told, ending in ((key, told, ending) for key in APART for told, ending in ((found, ""), (again, "_again"))):
                    mine, base = (told.get((method, k, variant, seed), {}).get(key) for variant in ("both", "base"))
                    row[key + ending] = None if mine is None or base is None else mine - base
                rows.append(row)
    if not rows:
        return None
    shown = [
        (key + end, HEADINGS[key] + more) for key in APART for end, more in (("", ""), ("_again", ", again")) if key + end != "cas_again"
    ]
    return {"title": "Both minus base, training by training", "columns": [("name", ""), *shown], "rows": rows}


def evaluations(method: str, variant: str, cells: Sequence[Mapping[str, Any]]) -> float:
    """Network evaluations of one sample each that a training of the variant spends, all roles together."""
    spent = [sum(c["network_evaluations"].values()) for c in cells if (c["method"], c["variant"]) == (method, variant)]
    return round(statistics.fmean(spent))


def spread(found: Mapping[Any, Mapping[str, float | None]], again: Mapping[Any, Mapping[str, float | None]]) -> Part | None:
    """How far every measure moves with prompts and noise, of one student, and how far with the training's seed, by method."""
    rows, there = [], {method: steps for method, steps in REPORTED.items() if any(at[0] == method for at in found)}
    for key in TELLING:
        row: dict[str, Any] = {"name": HEADINGS[key]}
        for method, steps in there.items():
            twice = [(found[at].get(key), again[at].get(key)) for at in found if at[:2] == (method, steps[0]) and at in again]
            # What all students have in common, such as other real images, is no part of the spread between them.
            moved = [a - b for a, b in twice if a is not None and b is not None]
            row[f"{method}_within"] = root([statistics.variance(moved) / 2]) if len(moved) > 1 else None
            row[f"{method}_between"] = root(variances(found, method, steps[0], key))
        rows.append(row)
    if all(value is None for row in rows for key, value in row.items() if key != "name"):
        return None
    shown = [("name", "")]
    for method, steps in there.items():
        at = f"{TITLES[method]}, {steps[0]} steps"
        shown += [(f"{method}_within", f"{at}: same student"), (f"{method}_between", f"{at}: other seed")]
    return {"title": "What a measure can tell: standard deviations", "columns": shown, "rows": rows}


def variances(found: Mapping[Any, Mapping[str, float | None]], method: str, steps: int, key: str) -> list[float]:
    """The variance over seeds of each variant that has several."""
    made = []
    for variant in LABELS:
        rows = [v for (m, k, name, _), v in found.items() if (m, k, name) == (method, steps, variant)]
        each = [value for row in rows if (value := row.get(key)) is not None]
        if len(each) > 1:
            made.append(statistics.variance(each))
    return made


def root(squares: Sequence[float]) -> float | None:
    """The root of the mean; None of nothing."""
    return statistics.fmean(squares) ** 0.5 if squares else None


def notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """By what and when the cells were made."""
    made: dict[str, list[str]] = {}
    for cell in cells:
        m = cell["machine"]
        made.setdefault(f"{m['device']}, torch {m['torch']}", []).append(m["date"])
    where = "; ".join(f"{len(d)} on {name} ({' to '.join(dict.fromkeys((min(d), max(d))))})" for name, d in made.items())
    prompts = cells[0]["protocol"]["n"] if cells else 0
    return [
        f"{len(cells)} cells: {where}; {prompts} held-out prompts",
        "± is the standard error of the mean over seeds, [t] that of the paired difference to base; no p is corrected for the number of "
        "comparisons; evaluations: of all networks, one sample each, of one training",
        "Taught: the share of real scenes in which a small classifier that was taught by 1000 images of the sampler alone reads everything "
        f"right (benchmarks/downstream.py){SETS[sets(cells)][1]}",
        f"trained with {ANEW}: the teacher is asked whenever a state is drawn, as the algorithm is counted in the published tables; the "
        "shipped configs keep its answers and are cheaper",
        SETS[sets(cells)][0],
        "same student: between two sets of prompts, noise and real images; other seed: between trainings of one variant, of which the "
        "former is a part",
    ]


def page(told: Report, head: str) -> str:
    """docs/reproduction.md, or docs/flow.md."""
    parts = [f"## {part['title']}\n\n{grid(part['columns'], part['rows'])}" for part in told["parts"]]
    lines = "\n".join(f"* {note}" for note in told["notes"])
    return "\n\n".join([head, grid(told["columns"], told["rows"]), *parts, lines]) + "\n"


HEADS = (
    """# The reproduction table

<!-- made by benchmarks/reproduce.py: change it there -->

```bash
make reproduce
```

trains every method on the built-in pipeline with and without DDIL and reflection, on seeds from 100 on, which no setting was chosen on, at
equal updates; every cell is a file in `benchmarks/reproduced/`, and what is there is not made again. The paper's numbers (COCO-2017 5k; PD
and LCM: SD1.5, DMD2: SSD-1B with a batch of 7) stand beside for their order, not for their size. What the tables show is said in
[results](results.md#on-fresh-seeds).

## The teacher""",
    """# A flow transformer

<!-- made by benchmarks/reproduce.py: change it there -->

```bash
make reproduce ARGS="--pipeline builtin/flow --page docs/flow.md"
```

is [the reproduction](reproduction.md) once more with the other built-in teacher, a Stable Diffusion 3 in miniature, which was taught by
flow matching: the same data, texts, autoencoder and judge, another network on another path. Its cells are in `benchmarks/reproduced_flow/`.
What the tables show is said in [results](results.md#a-flow-transformer). The teacher walks its students' nodes here, not those of its own
scheduler, whose 4 steps are fewer.

## The teacher""",
)
"""The beginnings of the pages: of the built-in pipeline, and of its flow."""
