"""The promises of a method, each a function of a `Subject` that raises Broken where it is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.data.pairs import stored
from ddil_lightning.data.sampler import CounterSampler
from ddil_lightning.feed import Feed
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import forward
from ddil_lightning.messages import quiet
from ddil_lightning.runs import export
from ddil_lightning.streams import Streams
from ddil_lightning.testing.fitting import Run, difference, digest, fit, frozen, state
from ddil_lightning.testing.subject import BATCH, Subject, mixed, pictures
from ddil_lightning.training.method import Distillation

TOTAL, CUT = 9, 5
"""Updates of a run that is cut in two, and those before the cut: the middle of an epoch and of whatever goes in turns."""
BOX = [[-0.2] * 4, [0.2] * 4]
PROMPTS = ["a handwritten one", "", "a small red circle"]


class Broken(AssertionError):
    """A promise that a method does not keep, in one line: which, how that shows, and what it mostly comes from."""


def _hold(kept: bool, said: str) -> None:
    if not kept:
        raise Broken(said)


def fits(subject: Subject, updates: int = 6) -> Run:
    """It trains on forward latents and roll-outs; its clock counts, its student moves, and the pipeline that it was made of does not."""
    method: Any = subject.build(updates=updates)
    before, start = digest(*frozen(method)), {name: p.detach().clone() for name, p in method.student.named_parameters() if p.requires_grad}
    run = fit(method, subject.data(mixed(method)))
    _hold(
        [row.get("student_updates") for row in run.rows] == list(range(1, updates + 1)),
        f"fits: {updates} updates were asked for, and the curves have rows of {[row.get('student_updates') for row in run.rows]}",
    )
    lost = next((row for row in run.rows if not math.isfinite(row.get("loss", math.nan))), None)
    _hold(lost is None, f"fits: the student's loss is not there, or not finite, in {lost}: descend(optimizer, loss) records it as 'loss'")
    _hold(
        digest(*frozen(method)) == before, "fits: the frozen pipeline has moved: something writes into the teacher's network, or trains it"
    )
    moved = {name for name, p in method.student.named_parameters() if name in start and not torch.equal(p, start[name])}
    _hold(bool(moved), "fits: no weight of the student has moved: its loss does not hang on self.student, or its optimiser has others")
    return run


def follows_its_seed(subject: Subject) -> None:
    """One seed is one run, to the bit, and another seed another one."""
    first, again, other = (state(subject.run(seed=seed, updates=2)) for seed in (0, 0, 1))
    found = difference(first, again)
    _hold(
        found is None,
        f"follows_its_seed: two runs of one seed differ in {found}: numbers come from a generator that no seed of the run has set, such as "
        "numpy's or Python's; in training_step torch's own is set, and streams.Streams makes others by the clocks",
    )
    _hold(difference(first["weights"], other["weights"]) is not None, "follows_its_seed: runs of two seeds are the same")


def resumes(subject: Subject) -> None:
    """A run that goes on from a checkpoint ends, and is told in its curves, as one in one piece."""
    with TemporaryDirectory() as folder:
        run = subject.run(Checkpoints(every=CUT, keep=9, folder=folder), updates=TOTAL)
        check_same(run, subject.run(ckpt=Path(folder) / f"updates={CUT}.ckpt", updates=TOTAL))


def check_same(run: Run, resumed: Run, cut: int = CUT) -> None:
    """`resumed` ends as `run` does, and logged the updates after `cut` alone: not only where it ends, but every loss on the way.

    Without the second, a checkpoint that is ignored would pass: training again from the start ends in the same state.
    """
    found = difference(state(run), state(resumed))
    _hold(
        found is None and len(run.rows) == run.method.updates and resumed.rows == run.rows[cut:],
        f"resumes: a run that was cut after {cut} updates goes on otherwise than one in one piece, in {found or 'its curves'}: a counter "
        "that no checkpoint has (on_save_checkpoint, on_load_checkpoint), or a generator that goes on from batch to batch",
    )


class Plain(LightningDataModule, Feed):
    """The underlying method's own training: noised data, no prior, no buffer, no roll-outs."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.rows, self.done = pictures(subject.pipeline), 0

    def setup(self, stage: str) -> None:
        """Hand itself to the method."""
        method: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        method.feed = self
        self.pairs = stored(method, self.rows, self.rows.groups(), lambda rows: self.rows[rows.tolist()], BATCH, self.trainer)

    def train_dataloader(self) -> DataLoader:
        """The rows in the order of DDIL's own data."""
        return DataLoader(self.rows, batch_size=None, sampler=CounterSampler(len(self.rows), BATCH, 0, 1, 0, lambda: self.done))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Noise them."""
        batch, streams = batch if self.pairs is None else self.pairs.joined(batch), Streams(0, self.done)
        self.dropout = streams.number("dropout")
        return forward(batch, self.trainer.lightning_module, streams)  # type: ignore[arg-type,union-attr]

    def commit(self) -> None:
        """One batch more is done."""
        self.done += 1


def is_itself_without_rollouts(subject: Subject) -> None:
    """With the prior (1, 0, 0) it is the published method, to the bit: neither buffer nor prior is in its way."""
    plain = fit(subject.build(box=BOX, updates=3), Plain(subject))
    data = subject.data(SamplingPrior(), rollouts=Rollouts(every=1), buffer=Buffer(priority=0.6))
    ddil = fit(subject.build(box=BOX, updates=3), data)
    mine, theirs = ({key: value for key, value in state(run).items() if key != "data"} for run in (plain, ddil))
    found = difference(mine, theirs) or difference([row["loss"] for row in plain.rows], [row["loss"] for row in ddil.rows], "losses")
    _hold(
        found is None,
        f"is_itself_without_rollouts: on forward latents alone it is not the same with DDIL's data as without them, in {found}: the step "
        "hangs on something of the data besides the batch",
    )


def exports(subject: Subject, run: Run | None = None) -> None:
    """Its student is sampled at times that it was trained at, and the pipeline that it leaves, called by diffusers, makes its samples.

    Nothing is asked of a student that no pipeline of diffusers can hold, but that it is refused. `run`: one that is there already.
    """
    method = (subject.run(updates=2) if run is None else run).method
    deployment = method.deployment
    for steps in deployment.steps:
        said = export.untrained(method, deployment, steps)
        _hold(said is None, f"exports: {said}: the grid of deploy(student) has other times than self.grid")
    with TemporaryDirectory() as folder:
        if why := export.unheld(method):
            _hold(_refused(method, Path(folder)), f"exports: {why}, and the student was exported all the same")
            return
        try:
            found = export.deliver(method, Path(folder) / "student", PROMPTS, deployment.steps[0])
        except export.NotAsTrained as error:
            raise Broken(f"exports: {error}: deploy(student) names a scheduler that steps otherwise than its policy") from error
        _hold(found < export.LEAST, f"exports: the latents of its pipeline differ by {found:.1e} from the trainer's")


def _refused(method: Distillation, folder: Path) -> bool:
    try:
        export.deliver(method, folder / "student", PROMPTS, method.deployment.steps[0])
    except ValueError:
        return not (folder / "student").exists()
    return False


CHECKS: Sequence[Callable[[Subject], Any]] = (fits, follows_its_seed, resumes, is_itself_without_rollouts, exports)
"""All of them, for whoever wants a test each."""


def check_method(method: Callable[..., Distillation], folder: str | Path, **settings: Any) -> None:
    """Every promise of a `method`, a class of Distillation, with its own `settings`, in an empty or earlier `folder`: some seconds.

    Raises Broken for the first that it does not keep.
    """
    quiet()
    subject = Subject(method, folder, **settings)
    for check in CHECKS:
        check(subject)
