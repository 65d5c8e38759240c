"""ddil-test --compare: pipelines of any origin side by side, from the same prompts and noise, row by row, so that it can go on."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddil_lightning.commands import generating, protocols, teaching
from ddil_lightning.commands.arguments import check_prompts, guidance_scale
from ddil_lightning.commands.entries import FORM, Entry, read_entries
from ddil_lightning.commands.launched import together
from ddil_lightning.commands.rack import Rack, ready
from ddil_lightning.errors import Refusal, one_line
from ddil_lightning.files import check_writable
from ddil_lightning.processes import Elsewhere
from ddil_lightning.signals import Stopped

if TYPE_CHECKING:
    from torch import Tensor

    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.commands.teaching import Teacher
    from ddil_lightning.evaluation.generation import Generation
    from ddil_lightning.evaluation.metrics.base import Metric
    from ddil_lightning.evaluation.suite import Suite
    from ddil_lightning.runs.comparison import Comparison

PICTURES = 6
"""Prompts whose images the page shows."""


class Job(NamedTuple):
    """A row that is to be measured: an entry in so many steps, called with a guidance_scale. `about`: what it is, for its row."""

    entry: Entry
    steps: int
    scale: float
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """As its row is called."""
        return f"{self.entry.name}@{self.steps}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ddil-test that set pipelines side by side."""
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="PIPELINE",
        help=f"several pipelines or runs side by side, each {FORM}, or a YAML file of a list of them",
    )
    parser.add_argument("--fresh", action="store_true", help="with --compare: measure rows anew that the file has already")


def compare(args: argparse.Namespace) -> int:
    """All rows of --compare, as tables, JSON, Markdown and a page."""
    if args.run or args.ckpt_path or args.pipeline or args.dpm:
        raise Refusal(f"--compare takes all pipelines itself, each {FORM}: leave a run, --ckpt_path, --pipeline and --dpm out")
    entries = read_entries(args.compare)
    out = args.out or Path("compare.json")
    if out.suffix.lower() != ".json":
        raise Refusal(f"--out {out}: give a file's name that ends in .json; beside it come .md, .html and the folder .rows")
    for file in (out, out.with_suffix(".md"), out.with_suffix(".html"), out.with_suffix(".rows") / "x"):
        check_writable(file)
    args.data = _data(args, entries)
    args.plan = protocols.planned(args)
    processes, where = together()
    from ddil_lightning.runs.compared import text, write_compared
    from ddil_lightning.runs.comparison import Comparison

    comparison = Comparison(out, [entry.name for entry in entries], args.fresh)
    rack, how = Rack(where, generating.precision(args)), generating.generation(args, processes)
    teacher = _teacher(args, entries, rack)
    suite, jobs = _checked(args, entries, rack, comparison, how, teacher)
    _measured(args, rack, suite, jobs, comparison, how, teacher)
    if not processes.first:
        return 0
    print(text(comparison), end="", flush=True)
    pages = write_compared(comparison)
    print(f"written to {out}, {' and '.join(map(str, pages))}")
    return 0


def _data(args: argparse.Namespace, entries: Sequence[Entry]) -> str | None:
    """The data that all are measured by: as given, else those that the cards name. Raises Refusal where these differ or name none."""
    from ddil_lightning.backbones.loading import recommended

    if args.data is not None or args.protocol is not None:
        given: str | None = args.data
        return given
    named = {entry.name: recommended(entry.at().path).get("dataset") for entry in entries}
    found = {data for data in named.values() if data is not None}
    if len(found) != 1:
        said = ", ".join(f"{name}: {data}" for name, data in named.items() if data) or "none of them names a data set"
        raise Refusal(f"--compare measures all by the same prompts ({said}): say --data shapes, --data CAPTIONS or --protocol NAME")
    return str(found.pop())


def _teacher(args: argparse.Namespace, entries: Sequence[Entry], rack: Rack) -> Teacher | None:
    """Whose images of the prompts are a second reference of all rows; None for nobody's."""
    from ddil_lightning.backbones.loading import recommended

    asked = teaching.named(args, args.plan and args.plan.protocol, [recommended(entry.at().path) for entry in entries])
    return teaching.teacher_of(args, asked, rack.take)


def _checked(
    args: argparse.Namespace, entries: Sequence[Entry], rack: Rack, comparison: Comparison, how: Generation, teacher: Teacher | None
) -> tuple[Suite, list[Job]]:
    """The suite and every row that is to be measured, after each pipeline was loaded and drew an image in each of its step counts.

    They are loaded from the last to the first, which is then at hand. Raises Refusal, naming the entry, for one that cannot be measured.
    """
    suite = _suite(args, entries[-1], rack, how, teacher)
    comparison.prompts = list(suite.passes()[0].asked[:PICTURES])
    found = []
    for entry in reversed(entries):
        with _named(entry):
            counts = entry.steps or args.steps or entry.own_steps(rack.take(entry.at()).about)
            mine = []
            for n in sorted(set(counts)):
                mine += _tried(args, entry, n, rack, suite, comparison)
            if not mine:
                why = next(why for name, why in comparison.left_out.items() if name.rpartition("@")[0] == entry.name)
                raise Refusal(f"cannot be sampled in {', '.join(map(str, counts))} steps: {why}")
        found.append(mine)
    jobs = [job for mine in reversed(found) for job in mine]
    _check_own(comparison, jobs, suite)
    for line in list(_notes(comparison, jobs)) if how.processes.first else ():
        print(line, flush=True)
    return suite, jobs


def _check_own(comparison: Comparison, jobs: Sequence[Job], suite: Suite) -> None:
    """Raises Refusal where rows that are asked for are there by another protocol, whose numbers would be lost."""
    from ddil_lightning.evaluation.stamps import called, protocols

    found = comparison.otherwise([job.name for job in jobs], suite.protocol)
    if found:
        names = ", ".join(row["name"] for row in found)
        said = f"{names} by {', '.join(map(called, protocols(found))) or 'no protocol'}, and not by {called(suite.protocol)}"
        raise Refusal(f"{comparison.out} has {said}: give another --out, or --fresh to replace what it has")


def _suite(args: argparse.Namespace, entry: Entry, rack: Rack, how: Generation, teacher: Teacher | None) -> Suite:
    """What all are measured by. An entry's pipeline says on what device."""
    with _named(entry):
        backbone = rack.take(entry.at())
    return protocols.suite_of(args, args.plan, backbone, how.processes, teacher)


@contextmanager
def _named(entry: Entry) -> Iterator[None]:
    """Inside, what is refused is a Refusal that begins with the name of the entry."""
    try:
        yield
    except (Refusal, ValueError, OSError) as error:
        raise Refusal(f"{entry.name}: {one_line(error)}") from error


def _notes(comparison: Comparison, jobs: Sequence[Job]) -> Iterator[str]:
    """What is left out, what stays of an older comparison, and where images are not of the same noise, a line each."""
    for name, why in comparison.left_out.items():
        yield f"left out: {name}, {why}"
    others = comparison.others([*(job.name for job in jobs), *comparison.left_out])
    if others:
        yield f"{comparison.out} also has rows that are not asked for, which stay (--fresh leaves them out): {', '.join(others)}"
    shapes = {job.entry.name: tuple(job.about["latents"]) for job in jobs}
    other = [name for name, shape in shapes.items() if shape != shapes[jobs[0].entry.name]]
    if other:
        comparison.notes = [f"Not from the same noise as {jobs[0].entry.name}, for their latents have another shape: {', '.join(other)}."]
    yield from comparison.notes


def _tried(args: argparse.Namespace, entry: Entry, n: int, rack: Rack, suite: Suite, comparison: Comparison) -> list[Job]:
    """The row of an entry in `n` steps; nothing where it cannot be sampled so, which the comparison then says.

    An image is drawn unless the row is there already: some schedulers fail in few steps only, some for what a network predicts. Raises
    ValueError for pictures that the suite cannot read, and for prompts that are too long.
    """
    from ddil_lightning.backbones import sampling
    from ddil_lightning.evaluation.rows import provenance

    backbone = ready(entry, rack.take(entry.at(n)))
    suite.for_pipeline(backbone)
    check_prompts(args.truncate, suite, backbone)
    given = entry.guidance if entry.guidance is not None or backbone.baked else args.guidance
    scale = guidance_scale(backbone, given)
    job = Job(entry, n, scale, provenance(backbone, n, scale))
    try:
        backbone.check_steps(n)
        if not comparison.kept(job.name, suite.protocol, job.about["digest"]):
            sampling.check_finite(backbone, sampling.pipeline_latents(backbone, suite.prompts[:1], n, job.scale, suite.seed), n)
    except ValueError as why:
        comparison.left_out[job.name] = one_line(why)
        return []
    return [job]


def _measured(
    args: argparse.Namespace,
    rack: Rack,
    suite: Suite,
    jobs: Sequence[Job],
    comparison: Comparison,
    how: Generation,
    teacher: Teacher | None,
) -> None:
    """Measure the rows that are not there yet, each written when it is done. One that fails is left out by all, and said to be."""
    processes, protocol = how.processes, suite.protocol
    missing = processes.by_first(lambda: [job.name for job in jobs if not comparison.kept(job.name, protocol, job.about["digest"])])
    kept = [job.name for job in jobs if job.name not in missing]
    if kept and processes.first:
        print(f"{comparison.out} has {len(kept)} of {len(jobs)} rows already: {', '.join(kept)}", flush=True)
    with _going_on(args, comparison):
        suite = teacher.taught(suite, how) if teacher and missing else suite
        for job in (job for job in jobs if job.name in missing):
            try:
                row, seen = _row(rack, suite, job, how)
            except (ValueError, Elsewhere) as error:
                if isinstance(error, Elsewhere) and not error.foreseen:
                    raise
                comparison.left_out[job.name] = one_line(error).removeprefix(f"{job.name}: ")
                if processes.first:
                    print(f"left out: {job.name}, {comparison.left_out[job.name]}", flush=True)
                continue
            processes.by_first(lambda row=row, seen=seen: comparison.add(row, seen))  # type: ignore[misc]
    processes.by_first(lambda: _finish(comparison))


def _finish(comparison: Comparison) -> None:
    """Write what was left out, and the order of the entries, also where nothing was missing. Raises Refusal without a row."""
    if not comparison.rows:
        raise Refusal(f"no row could be measured: {next(iter(comparison.left_out.values()))}")
    comparison.write()


def _row(rack: Rack, suite: Suite, job: Job, how: Generation) -> tuple[dict[str, Any], Any]:
    """A row, and what is seen of its images: those of the first prompts, and every image's values."""
    from ddil_lightning.backbones import sampling
    from ddil_lightning.evaluation.paired import each, grouped
    from ddil_lightning.evaluation.rows import pipeline_row
    from ddil_lightning.runs.comparison import Seen, small

    def begun() -> tuple[Pipeline, Tensor]:
        backbone, first = ready(job.entry, rack.take(job.entry.at(job.steps))), list(suite.passes()[0].asked[:PICTURES])
        drawn = sampling.pipeline_latents(backbone, first, job.steps, job.scale, suite.seed, how.batch)
        return backbone, small(sampling.decoded(backbone, drawn))

    backbone, pictures = how.processes.alike(begun)
    values: dict[str, Any] = {}
    groups: list[Tensor | None] = []

    def look(metrics: Sequence[Metric]) -> None:
        values.update(each(metrics))
        groups.append(grouped(metrics))

    how = replace(how, look=look)
    row = pipeline_row(suite, backbone, job.steps, job.scale, how=how, name=job.name)
    return row, Seen(pictures, values, groups[0] if groups else None)


@contextmanager
def _going_on(args: argparse.Namespace, comparison: Comparison) -> Iterator[None]:
    """Inside, a signal that stops the command also says that the same command goes on with the rows that are missing."""
    try:
        with generating.resumable(args):
            yield
    except KeyboardInterrupt as stop:
        said = f"stopped; {comparison.out} has {len(comparison.rows)} rows, and the same command goes on"
        raise Stopped(getattr(stop, "number", signal.SIGINT), said) from stop
