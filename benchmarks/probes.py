"""Where the built-in students leave their teacher: ddil-probe of the reproduction's students, and whether the paper's trends show in them.

Every student is trained as reproduce.py trains its cell, or read from its --cache, exported, and probed with 256 prompts. A finished probe
is a JSON file in --cells, which belongs to the repository and is not made again unless its student is; --only_page prints what is there.

    python benchmarks/probes.py [--methods lcm pd dmd2] [--variants base both] [--seed 100] [--cells benchmarks/probed] [--only_page]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import builtin
import common
import reproduce
from builtin_runs import VARIANTS, Run, Teacher, digest, fingerprint
from reproduce_table import LABELS, TITLES
from tables import Part, Report

from ddil_lightning.commands.probe import probe
from ddil_lightning.evaluation.registry import column
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.runs.export import export
from ddil_lightning.runs.finish import machine
from ddil_lightning.runs.folder import stage_pipelines
from ddil_lightning.runs.trends import trends

CELLS = Path(__file__).parent / "probed"
METHODS = ("lcm", "pd", "dmd2")
STEPS = 4
SWEPT = ("frechet", "clip", "all_right")
"""What the paper's tables of the sweeps have, and the judge's own word beside it."""


def file_of(run: Run, cells: Path) -> Path:
    """Where the probe of a student is kept."""
    return cells / f"{run.name}.json"


def known(run: Run, cells: Path) -> dict[str, Any] | None:
    """A finished probe; None where there is none, or its student was trained otherwise."""
    file = file_of(run, cells)
    found = json.loads(file.read_text()) if file.is_file() else None
    return found if found is not None and found["depends"] == depends(run) else None


def depends(run: Run) -> str:
    """A digest of all that a probe depends on but for the machine, which it names.

    What its student is, beyond what its training was told, is said by the rows of the reproduction's cell, where there is one: they are
    other ones once the code of the training is.
    """
    cell = reproduce.file_of(run, reproduce.CELLS)
    return digest(*run.depends, run.teacher.n, json.loads(cell.read_text())["rows"] if cell.is_file() else None)


def probed(run: Run, cells: Path) -> dict[str, Any]:
    """The student of a run in four steps, probed."""
    method, _ = builtin.trained(run)
    with tempfile.TemporaryDirectory() as place:
        folder, out = stage_pipelines(run.students).get(STEPS), Path(place) / "probe.json"
        if folder is None:
            folder = export(method, Path(place) / "student", STEPS)
        asked = ["--student", str(folder), "--teacher", run.teacher.pipeline, "--n", str(run.teacher.n), "--steps", str(STEPS)]
        probe([*asked, "--out", str(out)])
        found = json.loads(out.read_text())
    found["protocol"]["student"] = folder.name  # where it lay on this machine says nothing elsewhere
    made = {"method": run.method, "variant": run.variant, "seed": run.seed, "depends": depends(run), "machine": machine(), **found}
    write_rows(file_of(run, cells), made)  # type: ignore[arg-type]
    return made


def report(found: Sequence[Mapping[str, Any]]) -> Report:
    """The nodes of every student, its sweeps by their ends, and what is said of the trends."""
    columns = [("name", "student"), ("t", "t"), ("shift", "energy distance to the teacher's latents"), ("auc", "probe AUC")]
    columns += [("forward", "to forward latents"), ("ratio", "loss on its own latents / on the teacher's"), ("injected", "recovery")]
    columns += [("plain", "without an error")]
    return {
        "benchmark": "probes",
        "columns": columns,
        "rows": [row for one in found for row in nodes(one)],
        "parts": [part for sweep in ("mixing", "switch") if (part := swept(found, sweep))["rows"]],
        "notes": [*notes(found), *(f"{named(one)}: {text}" for one in found for text in said(one))],
    }


def named(one: Mapping[str, Any]) -> str:
    """A student in words."""
    return f"{TITLES[one['method']]} {LABELS.get(one['variant'], one['variant'])}, seed {one['seed']}"


def nodes(one: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every node below the first, at which all latents are noise."""
    for row in one["nodes"][1:]:
        shift, back = row["shift"], row["recovery"]
        made = {"name": named(one), "t": row["t"], "shift": shift["teacher"]["energy_distance"], "auc": shift["teacher"]["auc"]}
        made |= {"forward": shift["forward"]["energy_distance"] if "forward" in shift else None, "ratio": row["ratio"]["teacher"]}
        yield {**made, "injected": back.get("injected"), "plain": back.get("plain")}


def swept(found: Sequence[Mapping[str, Any]], sweep: str) -> Part:
    """The rows of one sweep of all students."""
    rows = []
    for one in found:
        for row in one[sweep]:
            at = f"p = {row['p_teacher']:g}" if sweep == "mixing" else f"{row['first']} first, down to t = {row['at']}"
            rows.append({"name": named(one), "at": at, "nfe": row["nfe"], **{key: row["metrics"].get(key) for key in SWEPT}})
    title = {"mixing": "Every interval the teacher's with probability p", "switch": "One first, the other from the time t on"}[sweep]
    heads = [(key, column(key).heading) for key in SWEPT]
    return {"title": title, "columns": [("name", "student"), ("at", ""), ("nfe", "NFE"), *heads], "rows": rows}


def said(one: Mapping[str, Any]) -> Iterator[str]:
    """What the probe says of its trends. Cells of before have a mixture's of the student alone and the teacher alone, and judged a number
    without a spread by its ends alone: what is said of it today is said."""
    today = {(sweep, trend["key"]): trend["text"] for sweep, told in judged(one).items() for trend in told}
    for sweep, told in one["trends"].items():
        for trend in told:
            known = trend["difference"] is not None or "by its interval at" in trend["text"]
            text = trend["text"] if known else today[sweep, trend["key"]]
            yield f"{sweep}{'' if sweep != 'mixing' or ' at p = ' in text else ', p = 0 against 1'}: {text}"


def judged(one: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What can be said of a cell's sweeps by their rows alone."""
    rows = [*one["mixing"], *one["switch"]]
    return trends(rows, [{}] * len(rows))


def notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers are of."""
    made = sorted({f"{one['machine']['device']}, torch {one['machine']['torch']}, {one['machine']['date']}" for one in found})
    return [f"{one} prompts" for one in sorted({one["protocol"]["n"] for one in found})] + made


def measure(args: argparse.Namespace) -> Report:
    """Probe what is not probed yet, and report all that is there."""
    if args.quick:
        args.updates, args.n, args.captions = args.updates or 2, min(args.n, 16), 64
        args.cells = args.cache / "probes" if args.cells == CELLS else args.cells
    args.cells.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    pipeline = common.pipeline_at(args.pipeline)
    teacher = Teacher(pipeline, fingerprint(pipeline), args.n, args.cache)
    if not args.only_page:
        every = [argparse.Namespace(**{**vars(args), "method": method}) for method in args.methods]
        return report([known(run, args.cells) or probed(run, args.cells) for one in every for run in builtin.runs(one, teacher)])
    cells = [json.loads(file.read_text()) for file in sorted(args.cells.glob("*-*.json"))]
    told = report(cells)
    told["notes"] += [f"{named(one)}: its student is another today" for one in cells if one["depends"] != depends(of(one, teacher, args))]
    return told


def of(cell: Mapping[str, Any], teacher: Teacher, args: argparse.Namespace) -> Run:
    """The run of a cell as these options ask for it."""
    one = {"method": cell["method"], "variants": [cell["variant"]], "seed": cell["seed"], "seeds": 1}
    return builtin.runs(argparse.Namespace(**{**vars(args), **one}), teacher)[0]


def main(argv: Sequence[str] | None = None) -> Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__)
    parser.set_defaults(seed=100)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["base", "both"])
    parser.add_argument("--seeds", type=int, default=1, help="students of every variant, from --seed on")
    parser.add_argument("--updates", type=int, help="student updates (default: the config's)")
    parser.add_argument("--n", type=int, default=256, help="prompts")
    parser.add_argument("--captions", type=int, help="train on so many captions only (default: the whole built-in set)")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmarks/reproduce"), help="where trained students are kept")
    parser.add_argument("--cells", type=Path, default=CELLS, help="the finished probes")
    parser.add_argument("--only_page", action="store_true", help="measure nothing, show what is there")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
