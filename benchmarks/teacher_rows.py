"""The rows of the built-in teachers that ship: what a run's table says of a teacher that is the same for everybody.

Measured as a run measures them, on its default number of prompts, and written into the package. To be run again where a teacher, a metric
or the prompts have changed; rows of before go, but where some pipelines alone are measured.

    python benchmarks/teacher_rows.py [--pipelines builtin builtin/digits builtin/flow] [--folder DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import common
import tables
from builtin_runs import FLOW

from ddil_lightning import assemble
from ddil_lightning.evaluation import known
from ddil_lightning.evaluation.rows import teacher_row
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.runs.finish import Test

CONFIGS = {name: ("lcm.yaml", "pd.yaml") for name in ("builtin", "builtin/digits")} | {FLOW: ("lcm_flow.yaml", "pd_flow.yaml")}
"""Of each pipeline two configs, which ask for it at different guidances."""
COLUMNS = [("name", ""), ("guidance", "g"), ("frechet", "Fréchet distance"), ("all_right", "all right"), ("mode_coverage", "mode coverage")]


def measure(args: argparse.Namespace) -> tables.Report:
    """All rows, each written when it is measured."""
    folder = args.folder or (Path(tempfile.mkdtemp()) if args.quick else known.folders()[0])  # what ships is not for a quick run to replace
    for file in folder.glob("*.json") if set(args.pipelines) == set(CONFIGS) else ():
        file.unlink()
    rows, test = [], Test(n=16, teacher_steps=[2, 1]) if args.quick else Test()
    for pipeline in args.pipelines:
        for config in CONFIGS[pipeline]:
            _, method, _ = assemble(config, f"model.init_args.pipeline={pipeline}", *args.set)
            suite = Suite.builtin(method.backbone.about["dataset"], n=test.n, seed=test.seed)
            for n in test.teacher_steps:
                row = teacher_row(suite, method.eval(), n, fresh=True, folder=folder)
                rows.append({**row["metrics"], "name": f"{pipeline} {row['name']}", "guidance": row["guidance"]})
    notes = [f"{test.n} prompts, written to {folder}"]
    return {"benchmark": "teacher_rows", "columns": COLUMNS, "rows": rows, "targets": [], "notes": notes}


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__, pipeline=False)
    parser.add_argument("--pipelines", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument(
        "--folder", type=Path, help="where they are written, by default into the package, and those of --quick nowhere that lasts"
    )
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
