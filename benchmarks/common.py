"""What the benchmarks share: their options, a random pipeline, processes, and the way from a command line to a report."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

import torch
from tables import Report, markdown

from ddil_lightning.data.captions import Captions, Shapes, builtin
from ddil_lightning.evaluation.table import write_rows
from ddil_lightning.messages import quiet as silence
from ddil_lightning.miniature import networks, shapes
from ddil_lightning.runs.finish import commit, machine
from ddil_lightning.training.method import Distillation

T = TypeVar("T")
R = TypeVar("R")


ANEW = "data.buffer.answers=none"
"""Of comparisons by network evaluations: a replayed state is asked for whenever it is drawn, as the algorithm is counted in the published
tables. Losses and weights are those of a run that keeps the answers, which is cheaper than they say."""


def parser(doc: str | None, pipeline: bool = True, own: bool = False) -> argparse.ArgumentParser:
    """The options of every benchmark; `pipeline`: whether it can be given one, and `own`: its configs' own where it is not."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a few steps only: shows that it runs, the numbers mean nothing")
    made.add_argument("--json", type=Path, help="write the table as JSON")
    if pipeline:
        default = "the configs' own" if own else "builtin"
        words = f"a pipeline folder, hub id, built-in name, or `random`: untrained (default: {default})"
        made.add_argument("--pipeline", default=None if own else "builtin", help=words)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any key of the config, as on ddil-fit's command line"
    )
    return made


def speed_parser(doc: str | None, config: str, own: bool = False) -> argparse.ArgumentParser:
    """The options of a benchmark of speed."""
    made = parser(doc, own=own)
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
    """Silence warnings and logs, so that only the benchmark speaks; and ask now which code this is, for the cell that is made of it."""
    silence()
    commit()
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def pipeline_at(name: str) -> str:
    """`name`, or the folder of a fresh random pipeline for `random`."""
    return str(random_pipeline(Path(tempfile.mkdtemp()) / "random")) if name == "random" else name


def instead(pipeline: str | None) -> list[str]:
    """The override that puts a pipeline in the place of a config's own, whose smaller networks stay; none for None."""
    return [] if pipeline is None else [f"model.pipeline.path={pipeline}"]


def random_pipeline(folder: Path) -> Path:
    """An untrained pipeline with the networks of the built-in one: what a step costs does not depend on the weights."""
    torch.manual_seed(0)
    sizes = networks.SIZES["shapes"]
    tokenizer = networks.build_tokenizer(shapes.WORDS, sizes.tokens)
    text = networks.build_text_encoder(len(tokenizer), sizes)
    networks.assemble(networks.build_autoencoder(sizes), text, tokenizer, networks.build_unet(sizes)).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({"guidance": 3.0, "dataset": "shapes"}))
    return folder


def few_captions(method: Distillation, n: int = 512) -> Captions:
    """A small built-in set, for benchmarks of speed."""
    dataset = method.backbone.about.get("dataset", "shapes")
    return Shapes(n=n) if dataset == "shapes" else builtin(dataset)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock reads what was computed and not what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parallel(work: Callable[[T], R], todo: Sequence[T], jobs: int) -> Iterator[R]:
    """The results of `work` on all of `todo` as they become ready, by `jobs` processes (1: this one)."""
    if jobs == 1 or not todo:
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


def publish(report: Report, args: argparse.Namespace) -> Report:
    """Print the report and write it to --json."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json",)}
    report = {**report, "settings": settings, "machine": {**machine(), "threads": torch.get_num_threads()}}
    if args.json:
        write_rows(args.json, report)  # type: ignore[arg-type]
    print(markdown(report))
    return report


def main(measure: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> Report:
    """Run a benchmark: quiet, measured, published."""
    quiet()
    return publish(measure(args), args)
