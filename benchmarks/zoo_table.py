"""The tables and the page of benchmarks/zoo.py: a method a row, its variants as paired differences to the published loss."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common import ANEW
from tables import Part, Report, mean_se
from toy2d_table import paired

from ddil_lightning.evaluation.registry import column

VARIANTS = {"base": "as published", "reflected": "+ Reflected", "ddil": "+ DDIL", "both": "+ both"}
REMEDIED = "remedied"
"""The variant that is the published student, sampled with each of REMEDIES."""
SAME_TIMES = "same_times"
"""The control of DDIL: its config, whose roll-outs are replaced by data noised to their times."""
REMEDIES = ("es0.99", "es1.01", "es1.02", "es1.05", "ts20", "ts50")
"""By the names of `diffusion.remedies`. All are shown, so that none is chosen on the seeds that it is judged by."""
MEASURES = ("energy_distance", "coverage", "mode_kl", "high_quality")
PICTURES = ("frechet", "patch_frechet", "coverage", "mode_coverage", "all_right", "attribute_accuracy", "lpips_diversity")
"""The measures of the built-in pipeline's tables."""
NEAR = 0.05
"""How far from its budget, in shares of it, a training may come to lie."""

BUDGETS = {"updates": "each at its config's updates", "evaluations": "at equal network evaluations"}


def keeps_to(given: int | None, spent: int, updates: int) -> bool:
    """Whether a training of so many `updates` has spent what it was `given`, to NEAR or to four of them: stages and roll-outs are whole."""
    return given is None or abs(spent - given) <= max(NEAR * given, 4 * spent / updates)


def report(cells: Sequence[dict[str, Any]], evaluations: int) -> Report:
    """One table per budget and measure; a method counts with the seeds that all its variants have."""
    parts: list[Part] = []
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        found = joined([cell for cell in cells if cell["budget"] == budget and cell["variant"] in VARIANTS])
        these = [row(method, variants) for method, variants in found.items() if set(variants) == set(VARIANTS)]
        rows += [{**r, "budget": budget} for r in these]
        for key in MEASURES:
            columns = [("method", "method"), ("seeds", "seeds"), ("counted", "updates" if budget == "evaluations" else "evaluations")]
            columns += [(f"{key}/{variant}", label) for variant, label in VARIANTS.items()]
            parts.append({"title": f"{column(key).heading}, {BUDGETS[budget]}", "columns": columns, "rows": counted(these, budget)})
    parts.append(nearest(rows))
    parts += [controlled(cells, key) for key in ("energy_distance", "mode_kl")]
    parts += [remedied(cells, key) for key in ("energy_distance", "coverage")]
    shifts = "shifted times read the time off the variance of one latent, six numbers here where an image's has thousands"
    return {
        "benchmark": "zoo",
        "columns": [("method", "method"), ("budget", ""), *((f"energy_distance/{v}", label) for v, label in VARIANTS.items())],
        "rows": rows,
        "parts": [part for part in parts if part["rows"]],
        "notes": [
            "as published: mean and its standard error over seeds; the others: mean of the paired difference to it and [Student's t], "
            "not corrected for the number of comparisons",
            f"equal evaluations: {evaluations:,} of all networks together, a sample each; at equal updates each method has its config's",
            f"trained with {ANEW}: the teacher is asked whenever a state is drawn, as the algorithm is counted in the published tables; "
            "the shipped configs keep its answers and are cheaper",
            *([f"without training: the published student, sampled otherwise ({shifts})"] if parts[-1]["rows"] else []),
        ],
    }


def nearest(rows: Sequence[Mapping[str, Any]]) -> Part:
    """Which loss wins: of each at equal evaluations the variant with the least energy distance, the nearest loss first."""
    found = []
    for row in (row for row in rows if row["budget"] == "evaluations" and row["seeds"]):
        means = {v: {k: row[f"{k}/base"]["mean"] + (row[f"{k}/{v}"]["mean"] if v != "base" else 0) for k in MEASURES} for v in VARIANTS}
        best = min(VARIANTS, key=lambda v: means[v]["energy_distance"])
        found.append({"method": row["method"], "variant": VARIANTS[best], "updates": row[f"updates/{best}"], **means[best]})
    columns = [("method", "method"), ("variant", "variant"), ("updates", "updates"), *((k, column(k).heading) for k in MEASURES)]
    title = f"Which loss wins, {BUDGETS['evaluations']}: the nearest variant of each"
    return {"title": title, "columns": columns, "rows": sorted(found, key=lambda row: row["energy_distance"])}


def controlled(cells: Sequence[dict[str, Any]], key: str) -> Part:
    """Is it the latents, or the times that are trained at? Paired differences to the published loss, and of DDIL to the control."""
    rows = []
    for method, variants in joined([cell for cell in cells if cell["budget"] == "updates"]).items():
        found = [variants.get(variant, {}) for variant in ("base", "ddil", SAME_TIMES)]
        groups = sorted(set.intersection(*map(set, found)))
        base, ddil, same = ([x for g in groups for x in of[g]["scores"][key]] for of in found)
        if not groups:
            continue
        mean, se = mean_se(base)
        row: dict[str, Any] = {"method": method, "seeds": len(base), "base": {"mean": mean, "se": se}, "same": paired(same, base)}
        rows.append({**row, "ddil": paired(ddil, base), "latents": paired(ddil, same)})
    columns = [("method", "method"), ("seeds", "seeds"), ("base", VARIANTS["base"]), ("same", "data at the roll-outs' times")]
    columns += [("ddil", VARIANTS["ddil"]), ("latents", "DDIL minus that control")]
    return {"title": f"{column(key).heading}, DDIL beside data at the same times", "columns": columns, "rows": rows}


def remedied(cells: Sequence[dict[str, Any]], key: str) -> Part:
    """What costs nothing beside DDIL: paired differences of a measure to the same published student, sampled plainly."""
    rows = []
    for method, variants in joined([cell for cell in cells if cell["budget"] == "updates"]).items():
        sampled, ddil = variants.get(REMEDIED, {}), variants.get("ddil", {})
        groups = sorted(set(sampled) & set(ddil))
        if not groups:
            continue
        base = [x for g in groups for x in sampled[g]["scores"][key]]
        mean, se = mean_se(base)
        row: dict[str, Any] = {"method": method, "seeds": len(base), "base": {"mean": mean, "se": se}}
        for name in REMEDIES:
            row[name] = paired([x for g in groups for x in sampled[g]["remedied"][name][key]], base)
        rows.append({**row, "ddil": paired([x for g in groups for x in ddil[g]["scores"][key]], base)})
    columns = [("method", "method"), ("seeds", "seeds"), ("base", VARIANTS["base"]), *((name, remedy_label(name)) for name in REMEDIES)]
    return {"title": f"{column(key).heading}, without training", "columns": [*columns, ("ddil", VARIANTS["ddil"])], "rows": rows}


def remedy_label(name: str) -> str:
    """A remedy as a sampler's name has it: with the word of the variance, where it is told one."""
    return f"{name}-tv" if name.startswith("ts") else name


def built_in(cells: Sequence[dict[str, Any]], evaluations: int) -> list[Part]:
    """One table per budget: a row for a method as published, and one for the paired difference that DDIL makes."""
    parts: list[Part] = []
    for budget, said in BUDGETS.items():
        found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
        for cell in (c for c in cells if c["budget"] == budget):
            found.setdefault(cell["method"], {}).setdefault(cell["variant"], {})[cell["seed"]] = cell
        rows = [r for method, variants in sorted(found.items()) if set(variants) >= {"base", "ddil"} for r in pictured(method, variants)]
        shown = [("name", "method"), ("seeds", "seeds"), ("updates", "updates"), ("evaluations", "evaluations")]
        of = f" ({evaluations:,} of all networks together)" if budget == "evaluations" else ""
        title = f"On the built-in pipeline, 4 steps, {said}{of}"
        parts += [{"title": title, "columns": [*shown, *((k, column(k).heading) for k in PICTURES)], "rows": rows}] if rows else []
    return parts


def pictured(method: str, variants: Mapping[str, Mapping[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The two rows of a method, on the seeds that both variants have."""
    seeds = sorted(set(variants["base"]) & set(variants["ddil"]))
    rows = []
    for variant, label in (("base", method), ("ddil", "+ DDIL")):
        its = [variants[variant][seed] for seed in seeds]
        row: dict[str, Any] = {"name": label, "seeds": len(seeds)}
        row["updates"] = round(statistics.fmean(cell["updates"] for cell in its))
        row["evaluations"] = round(statistics.fmean(sum(cell["network_evaluations"].values()) for cell in its))
        for key in PICTURES:
            scores = {v: [score(variants[v][seed], key) for seed in seeds] for v in ("base", "ddil")}
            mean, se = mean_se(scores[variant])
            row[key] = {"mean": mean, "se": se, "paired": paired(scores["ddil"], scores["base"]) if variant == "ddil" else None}
        rows.append(row)
    return rows if seeds else []


def score(cell: Mapping[str, Any], key: str) -> float:
    """A measure of a student in four steps."""
    return next(float(row["metrics"][key]) for row in cell["rows"] if row["steps"] == 4)


def counted(rows: Sequence[Mapping[str, Any]], budget: str) -> list[dict[str, Any]]:
    """Rows with what the other budget counts, of the published loss and of both."""
    other = "updates" if budget == "evaluations" else "evaluations"
    return [{**r, "counted": f"{r[f'{other}/base']:,} to {r[f'{other}/both']:,}"} for r in rows]


def joined(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """Cells by method, variant and first seed."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["method"], cell["seeds"][0])):
        found.setdefault(cell["method"], {}).setdefault(cell["variant"], {})[cell["seeds"][0]] = cell
    return found


def row(method: str, variants: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, Any]:
    """Every measure of every variant, on the seeds that all of them have."""
    groups = sorted(set.intersection(*(set(found) for found in variants.values())))
    out: dict[str, Any] = {"method": method, "seeds": sum(len(variants["base"][g]["seeds"]) for g in groups)}
    for variant in VARIANTS:
        for count in ("updates", "evaluations"):
            out[f"{count}/{variant}"] = round(statistics.fmean(variants[variant][g][count] for g in groups)) if groups else 0
    for key in MEASURES:
        values = {v: [x for g in groups for x in variants[v][g]["scores"][key]] for v in VARIANTS}
        mean, se = mean_se(values["base"])
        out[f"{key}/base"] = {"mean": mean, "se": se}
        for variant in list(VARIANTS)[1:]:
            out[f"{key}/{variant}"] = paired(values[variant], values["base"]) if values["base"] else {"mean": None, "t": None, "p": None}
    return out


def page(told: Report, markdown: Callable[[Report], str]) -> str:
    """docs/zoo.md: all tables but the summary."""
    machines = "2 CPU cores" if "machine" not in told else told["machine"].get("device", "")
    head = (
        "# Every method, with and without DDIL\n\n"
        "Each loss of the library on the analytic toy, without DDIL's mixture (as published), with thresholded estimates (+ Reflected), "
        "on DDIL's mixture (+ DDIL), and with both. As published, most are trained on the latents that their papers train on. Not so EMD, "
        "SiD, Diff-Instruct and DMD, whose papers make students of one step: here they have four nodes, reached by backward simulation "
        "(DMD with half of its latents); emd_one_step is EMD as its paper has it, where every source is noise and the prior decides "
        "nothing. LADD's real latents are the data here (`real: data`), its paper's are the teacher's samples. "
        "Parts of a loss that need a discriminator of pictures are left out of DMD2, CTM (its denoising part, too) and PCM, and half of "
        "SnapFusion's samples are guided where the paper has a tenth; its student is sampled guided, two evaluations a step where others "
        "take one. BOOT and emd_one_step are made for one step and scored in it, the "
        "others in four. Between variants of a method the updates of the first tables are equal; between methods they are not, so those "
        "say whether DDIL helps a loss, and the tables at equal evaluations which loss wins. The evaluations of EMD's seeds 2003 to 2005 "
        "are those of a code that asked its student again for every latent along a chain, where today's asks only for those that a step "
        "moves; its samples are the same. CTM's target is asked, and TCD's was, where the answer is not needed, at the last node: a few "
        "updates less at equal evaluations. Shifted times (ts) are told the variance of a sample (`-tv`), which their authors leave "
        "out: without it all times are moved upwards here, and that was not measured. The control has data at the times of the roll-outs, "
        "UFOGen's with labels, so that what DDIL adds to it is of the latents alone. What the tables show stands in "
        "[results](results.md#every-method).\n\n"
        "```bash\npython benchmarks/zoo.py --page docs/zoo.md\n```\n\n"
        "Seeds from 2000 on, which no setting was chosen on, in groups of three, which are trained in one process and share the plans of "
        "their roll-outs: they are not independent, and t says less than it seems; "
        f"{machines}; a cell's date and versions stand in its "
        "file, `benchmarks/zoo/`.\n\n"
    )
    return head + markdown({**told, "rows": []}) + "\n"
