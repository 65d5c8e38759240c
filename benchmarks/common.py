"""What the benchmarks share: the shipped configs as trainer, method and data, a random pipeline, means over seeds, a report's table."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch

T, R = TypeVar("T"), TypeVar("R")
Report = dict[str, Any]
"""What a benchmark writes as JSON and prints: `rows`, `columns` (key, heading) of its table, `targets`, `notes`, `settings`, `machine`."""


def parser(doc: str | None, pipeline: bool = True) -> argparse.ArgumentParser:
    """The options of every benchmark; `pipeline`: whether it can be given one."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, the numbers mean nothing")
    made.add_argument("--json", type=Path, help="write the table as JSON")
    if pipeline:
        made.add_argument("--pipeline", default="builtin", help="a pipeline folder, hub id, builtin, or `random`: untrained")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the config, as on ddil-fit's command line"
    )
    return made


def speed_parser(doc: str | None, config: str) -> argparse.ArgumentParser:
    """The options of a benchmark of speed."""
    made = parser(doc)
    made.add_argument("--config", default=config)
    made.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    made.add_argument("--cpu_time", action="store_true", help="read the CPU clock of this process: for a busy machine, with --threads 1")
    return made


def clock(args: argparse.Namespace) -> Callable[[], float]:
    """The clock that --cpu_time asks for, in seconds; sets the threads, too."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return time.process_time if args.cpu_time else time.perf_counter


def quiet() -> None:
    """Only the benchmark speaks."""
    from ddil_lightning.messages import quiet as silence

    silence()
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def build(config: str, *, pipeline: str | None, seed: int, overrides: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """(trainer, method, data) of a shipped config, parsed as ddil-fit does, without what a run writes and shows.

    `pipeline`: None for the config's own. `overrides`: "model.init_args.ema=0.9" and the like. The trainer keeps the callbacks that decide
    what is trained on.
    """
    from ddil_lightning.callbacks import Checkpoints, Previews, Progress
    from ddil_lightning.commands.configs import FIT_SHORT, expand
    from ddil_lightning.commands.fit_cli import FitCLI

    chosen = [] if pipeline is None else [f"model.init_args.pipeline={pipeline}"]
    words = ["--config", config, *chosen, "--seed", str(seed), *overrides]
    made = FitCLI(expand(words, FIT_SHORT), rebuild=True)
    kept = [c for c in made.trainer.callbacks if not isinstance(c, (Checkpoints, Previews, Progress))]  # type: ignore[attr-defined]
    made.trainer.callbacks = kept  # type: ignore[attr-defined]
    return made.trainer, made.model, made.datamodule


def pipeline_at(name: str) -> str:
    """`name`, or the folder of a fresh random pipeline for `random`."""
    return str(random_pipeline(Path(tempfile.mkdtemp()) / "random")) if name == "random" else name


def random_pipeline(folder: Path) -> Path:
    """An untrained pipeline with the networks of the built-in one: what a step costs does not depend on the weights."""
    from ddil_lightning.miniature import networks, shapes

    torch.manual_seed(0)
    sizes = networks.SIZES["shapes"]
    tokenizer = networks.build_tokenizer(shapes.WORDS, sizes.tokens)
    text = networks.build_text_encoder(len(tokenizer), sizes)
    networks.assemble(networks.build_autoencoder(sizes), text, tokenizer, networks.build_unet(sizes)).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"guidance": 3.0, "dataset": "shapes"}))
    return folder


def few_captions(method: Any, n: int = 512) -> Any:
    """A small built-in set, for benchmarks of speed."""
    from ddil_lightning.data.captions import Shapes, builtin

    dataset = method.backbone.about.get("dataset", "shapes")
    return Shapes(n=n) if dataset == "shapes" else builtin(dataset)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock reads what was computed and not what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parallel(work: Callable[[T], R], todo: Sequence[T], jobs: int) -> Iterator[R]:
    """The results of `work` on all of `todo` as they become ready, by `jobs` processes (1: this one)."""
    if jobs == 1:
        yield from map(work, todo)
        return
    context = multiprocessing.get_context("spawn")  # not forked: the parent has threads by now
    with ProcessPoolExecutor(min(jobs, len(todo)), context, initializer=follow, initargs=(os.getpid(),)) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in todo]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what is finished is kept; what has not begun need not begin
            raise


def follow(parent: int) -> None:
    """End this process once its parent is gone: one that is killed cannot say so, and its workers would go on for hours."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def mean_se(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and its standard error (None for one value); both None where a value is missing."""
    if not values or any(v is None for v in values):
        return None, None
    known = [float(v) for v in values if v is not None]
    return statistics.fmean(known), (statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None)


def target(name: str, value: float | None, limit: float, at_most: bool = False) -> dict[str, Any]:
    """One line of a report's `targets`; `met` is None where there is no value."""
    met = None if value is None else bool(value <= limit if at_most else value >= limit)
    return {"name": name, "value": value, "limit": limit, "at_most": at_most, "met": met}


def cell(value: Any, se: float | None = None) -> str:
    """A value of a table, with its standard error if it has one."""
    from ddil_lightning.evaluation.table import cell as plain

    if isinstance(value, Mapping):  # a measured mean, or a paired difference: {mean, se, paired: {mean, t, p}}
        t = (value.get("paired") or value).get("t")
        return cell(value["mean"], value.get("se")) + ("" if t is None else f" [{t:+.1f}]")
    text = plain(value)
    if value is None or se is None:
        return text
    if "e" in text:
        return f"{text} ± {plain(se)}"
    decimals = len(text.partition(".")[2])  # those of the value: an error of 6e-07 behind 0.032 says no more than 0.000
    return f"{text} ± {se:.{decimals}f}"


def markdown(report: Report) -> str:
    """The report as text: its tables, whether the targets are met, the notes. It shows nothing that the JSON does not hold."""
    tables = [grid(report["columns"], report["rows"])]
    tables += [f"{part['title']}\n\n{grid(part['columns'], part['rows'])}" for part in report.get("parts", [])]
    lines = []
    for t in report.get("targets", []):
        sign, word = "<=" if t["at_most"] else ">=", {True: "met", False: "missed", None: "not measured"}[t["met"]]
        lines.append(f"- {t['name']}: {cell(t['value'])} (target {sign} {cell(t['limit'])}): {word}")
    notes = [f"- {note}" for note in report.get("notes", [])]
    return "\n\n".join(filter(None, [*tables, "\n".join(lines), "\n".join(notes)]))


def grid(columns: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of (key, heading) columns. Values are a row's own or among its `metrics`; errors are in its `se`."""

    from ddil_lightning.evaluation.table import tabulate

    def show(row: Mapping[str, Any], key: str) -> str:
        value = row[key] if key in row else row.get("metrics", {}).get(key)
        return cell(value, (row.get("se") or {}).get(key))

    return tabulate(rows, columns, show).markdown()


def publish(report: Report, args: argparse.Namespace) -> Report:
    """Print the report and write it to --json."""
    from ddil_lightning.evaluation.table import write_rows
    from ddil_lightning.runs.finish import machine

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json",)}
    report = {"settings": settings, "machine": {**machine(), "threads": torch.get_num_threads()}, **report}
    if args.json:
        write_rows(args.json, report)  # type: ignore[arg-type]
    print(markdown(report))
    return report


def main(measure: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> Report:
    """Run a benchmark: quiet, measured, published."""
    quiet()
    return publish(measure(args), args)
