"""How long a newcomer waits: ddil-fit to its first line, first update, first pictures of a trained student and table; ddil-sample to one
picture; and for what is found out of the student by ddil-test (1000 prompts, every metric of the built-in pipelines, which need nobody
else's weights, at every step count that the student is made for) and by ddil-probe (256 prompts, node by node and both sweeps).

Each command runs in a process of its own, as `make fit` types it after it has installed; the installation is not counted. Rows of the
teacher are the kept ones, as a newcomer has them. On an idle machine: the figures are seconds of its clock.

    python benchmarks/first_result.py [--config lcm_ddil.yaml] [--without test probe] [--json FILE]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import tables

COLUMNS = (("name", ""), ("seconds", "seconds"), ("within", "target"))
PROMPTS = {"test": 1000, "probe": 256}
UPDATE = re.compile(r"^[\d ]+/[\d ]+ updates")
CALL = "import sys; from ddil_lightning.commands import main; sys.argv = sys.argv[1:]; getattr(main, sys.argv[0].removeprefix('ddil-'))()"


def lines(folder: Path, *words: str) -> Iterator[tuple[float, str]]:
    """(seconds since the start, line) of all that a command prints, and at last of its end, which is an empty line.

    It runs in `folder`, so that no link of yours to a newest run leads to one that is deleted here. Raises SystemExit with what it said where it
    fails.
    """
    started, said = time.perf_counter(), []
    command = [sys.executable, "-u", "-c", CALL, *words]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            yield time.perf_counter() - started, line.rstrip("\n")
    if process.returncode:
        raise SystemExit("".join(said[-20:]))
    yield time.perf_counter() - started, ""


def waited(args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """The rows of the table."""
    run = folder / "run"
    few = made_fit() if args.config == "lcm_ddil.yaml" else []
    config = str(Path(args.config).resolve()) if Path(args.config).is_file() else args.config
    words = ["ddil-fit", "--config", config, "--run_dir", str(run), "--seed", str(args.seed), *few, *args.set]
    words += ["--updates", "3", "test.n=16"] if args.quick else []
    seen: dict[str, float] = {}
    started = time.time()
    for at, line in lines(folder, *words):
        seen.setdefault("ddil-fit: first line", at)
        if UPDATE.match(line):
            seen.setdefault("first update", at)
        seen["the table, and the end"] = at
    seen["first pictures"] = first_trained(run / "samples").stat().st_mtime - started
    out = folder / "picture.png"
    *_, (seconds, _) = lines(folder, "ddil-sample", "--pipeline", str(run / "pipeline"), "--prompt", "a small red circle", "--out", str(out))
    within = {"ddil-fit: first line": 1, "first update": 15, "first pictures": 60, "the table, and the end": 180}
    rows: list[dict[str, object]] = [{"name": name, "seconds": seen[name], "within": limit} for name, limit in within.items()]
    return [*rows, {"name": "ddil-sample: one picture", "seconds": seconds, "within": 8}, *looked_into(run, args)]


def made_fit() -> list[str]:
    """What `make fit` adds to the config."""
    makefile = Path(__file__).parents[1] / "Makefile"
    return next(line.partition(":=")[2].split() for line in makefile.read_text().splitlines() if line.startswith("FEW"))


def first_trained(samples: Path) -> Path:
    """The first sheet of a student that was trained: that of update 0 shows one that equals its teacher."""
    return min(sheet for sheet in samples.glob("*.png") if int(sheet.stem) > 0)


def looked_into(run: Path, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """A row for each of the commands that measure a finished run."""
    for name, words in {"test": [str(run)], "probe": ["--student", str(run)]}.items():
        if name not in args.without:
            n = 16 if args.quick else PROMPTS[name]
            *_, (seconds, _) = lines(run.parent, f"ddil-{name}", *words, "--n", str(n))
            yield {"name": f"ddil-{name}: {n} prompts", "seconds": seconds, "within": 180}


def measure(args: argparse.Namespace) -> tables.Report:
    """All commands, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        rows = waited(args, Path(folder))
    targets = [tables.target(str(row["name"]), float(str(row["seconds"])), float(str(row["within"])), at_most=True) for row in rows]
    notes = [f"{args.config}, seed {args.seed}"]
    return {"benchmark": "first_result", "columns": COLUMNS, "rows": rows, "targets": targets, "notes": notes}


def main(argv: list[str] | None = None) -> tables.Report:
    """The command line of this benchmark."""
    parser = common.parser(__doc__, pipeline=False)
    parser.add_argument("--config", default="lcm_ddil.yaml")
    parser.add_argument("--without", nargs="+", choices=tuple(PROMPTS), default=[], help="leave these commands out")
    return common.main(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
