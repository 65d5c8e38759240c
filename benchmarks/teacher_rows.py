"""The rows of the built-in teachers that ship: what a run's table says of a teacher that is the same for everybody.

Measured as a run measures them, by its default number of prompts, and written to the package. To be run again where a teacher, a metric or
the prompts have changed; rows of before go.

    python benchmarks/teacher_rows.py [--configs lcm.yaml pd.yaml] [--folder DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ddil_lightning import assemble
from ddil_lightning.evaluation import known
from ddil_lightning.evaluation.rows import teacher_row
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.table import table
from ddil_lightning.runs.finish import Test

CONFIGS = ("lcm.yaml", "pd.yaml")  # which ask for the teacher at two guidances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--pipelines", nargs="+", default=["builtin", "builtin/digits"])
    parser.add_argument("--folder", type=Path, default=known.folders()[0])
    parser.add_argument("--n", type=int, default=Test().n)
    args = parser.parse_args()
    for file in args.folder.glob("*.json"):
        file.unlink()
    rows = []
    for pipeline in args.pipelines:
        for config in args.configs:
            _, method, _ = assemble(config, f"model.init_args.pipeline={pipeline}")
            suite = Suite.builtin(method.backbone.about["dataset"], n=args.n, seed=Test().seed)
            for n in Test().teacher_steps:
                rows.append(teacher_row(suite, method.eval(), n, fresh=True, folder=args.folder))
    print(table(rows))


if __name__ == "__main__":
    main()
