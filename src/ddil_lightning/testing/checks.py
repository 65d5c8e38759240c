"""The promises of a method, each a function of a `Subject` that raises Broken where it is not kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

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
from ddil_lightning.records import SOURCES
from ddil_lightning.runs import export
from ddil_lightning.streams import Streams
from ddil_lightning.testing.fitting import Inside, Run, difference, fit, state
from ddil_lightning.testing.subject import BATCH, Subject, mixed, pictures
from ddil_lightning.testing.witness import Broken, Witness, hold, promise
from ddil_lightning.texts import reason
from ddil_lightning.training.method import Distillation

TOTAL, CUT = 9, 5
"""Updates of a run that is cut in two, and those before the cut: the middle of an epoch and of whatever goes in turns."""
BOX = [[-0.2] * 4, [0.2] * 4]
PROMPTS = ["a handwritten one", "", "a small red circle"]


@promise
def fits(subject: Subject, updates: int = 6) -> Run:
    """It trains on forward latents and roll-outs and its clock counts; gradients arrive, all of its student moves, and nothing that is
    frozen does, least of all the pipeline that it was made of."""
    method = subject.build(updates=updates)
    witness = Witness(method)
    run = fit(method, subject.data(mixed(method)), witness)
    counted = [row.get("student_updates") for row in run.rows]
    hold(counted == list(range(1, updates + 1)), f"{updates} updates were asked for, and the curves have rows of {counted}")
    lost = next((row for row in run.rows if not math.isfinite(row.get("loss", math.nan))), None)
    hold(lost is None, f"the student's loss is not there, or not finite, in {lost}: descend(optimizer, loss) records it as 'loss'")
    witness.check(method)
    return run


@promise
def follows_its_seed(subject: Subject) -> None:
    """One seed is one run, to the bit, and another seed another one."""
    first, again, other = (state(subject.run(seed=seed, updates=2)) for seed in (0, 0, 1))
    found = difference(first, again)
    hold(
        found is None,
        f"two runs of one seed differ in {found}: numbers come from a generator that no seed of the run has set, such as numpy's, "
        "Python's, or torch's own outside training_step, where it is set; streams.Streams makes others by the clocks",
    )
    hold(difference(first["weights"], other["weights"]) is not None, "runs of two seeds are the same")


@promise
def resumes(subject: Subject) -> None:
    """A run that goes on from a checkpoint ends, and is told in its curves, as one in one piece.

    From a checkpoint after an odd update in the middle of an epoch, and, of a method that takes turns, from one within them.
    """
    with TemporaryDirectory() as folder:
        inside = Path(folder) / "inside.ckpt"
        run = subject.run(Checkpoints(every=CUT, keep=9, folder=folder), Inside(CUT, inside), updates=TOTAL)
        check_same(run, subject.run(ckpt=Path(folder) / f"updates={CUT}.ckpt", updates=TOTAL))
        if inside.exists():
            check_same(run, subject.run(ckpt=inside, updates=TOTAL), within=True)


def check_same(run: Run, resumed: Run, cut: int = CUT, within: bool = False) -> None:
    """`resumed` ends as `run` does, and logged the updates after `cut` alone: not only where it ends, but every loss on the way.

    Without the second, a checkpoint that is ignored would pass: training again from the start ends in the same state. `within`: it was
    cut between `cut` and the next update, so that the means of its first row are of fewer batches. Raises Broken.
    """
    found, rows = difference(state(run), state(resumed)), run.rows[cut:]
    same = resumed.rows[within:] == rows[within:] and len(resumed.rows) == len(rows)
    hold(
        found is None and len(run.rows) == run.method.updates and same,
        f"a run that was cut after {cut} updates{', within its turns,' if within else ''} goes on otherwise than one in one piece, in "
        f"{found or 'its curves'}: a counter that no checkpoint has (on_save_checkpoint, on_load_checkpoint), or a generator that goes on "
        "from batch to batch",
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


@promise
def is_itself_without_rollouts(subject: Subject) -> None:
    """With the prior (1, 0, 0) it is the published method, to the bit: neither buffer nor prior is in its way."""
    plain = fit(subject.build(box=BOX, updates=3), Plain(subject))
    data = subject.data(SamplingPrior(), rollouts=Rollouts(every=1), buffer=Buffer(priority=0.6))
    ddil = fit(subject.build(box=BOX, updates=3), data)
    mine, theirs = ({key: value for key, value in state(run).items() if key != "data"} for run in (plain, ddil))
    found = difference(mine, theirs) or difference([row["loss"] for row in plain.rows], [row["loss"] for row in ddil.rows], "losses")
    hold(
        found is None,
        f"on forward latents alone it is not the same with DDIL's data as without them, in {found}: the step hangs on something of the "
        "data besides the batch",
    )


@promise
def refuses_other_sources(subject: Subject) -> None:
    """A prior that gives a share to latents on which it has no target is refused before the first update, and both are named.

    A method that has a target on all of them is asked without those of the teacher.
    """
    method, known = subject.build(updates=1), SOURCES[:3]
    all_of_them = set(known) <= set(method.sources)
    # Of its class and for this long: a class of its own would have the name of one that configs know, as long as anything holds it.
    with patch.object(type(method), "sources", ("forward", "student")) if all_of_them else nullcontext():
        other, mine = next(name for name in known if name not in method.sources), ", ".join(method.sources)
        forward, student, teacher = (0.25 * (name == other) + 0.75 * (name == method.sources[0]) for name in known)
        try:
            fit(method, subject.data(SamplingPrior(forward, student, teacher)))
        except ValueError as error:
            words = f"gives 0.25 to {other} latents, on which {type(method).__name__} has no target: its sources are {mine}"
            hold(words in str(error), f"a prior of {other} latents, on which it has no target, ends in another refusal: {reason(error)}")
            hold(method.student_updates == 0, f"a prior of {other} latents is refused after {method.student_updates} updates")
            return
    raise Broken(f"its sources are {mine}, and it trained on {other} latents: setup or check_prior is replaced, or sources move")


@promise
def exports(subject: Subject, run: Run | None = None) -> None:
    """Its student is sampled at times that it was trained at, and the pipeline that it leaves, called by diffusers, makes its samples.

    Nothing is asked of a student that no pipeline of diffusers can hold, but that it is refused. `run`: one that is there already.
    """
    method = (subject.run(updates=2) if run is None else run).method
    deployment = method.deployment
    for steps in deployment.steps:
        said = export.untrained(method, deployment, steps)
        hold(said is None, f"{said}: the grid of deploy(student) has other times than self.grid")
    with TemporaryDirectory() as folder:
        if why := export.unheld(method):
            hold(_refused(method, Path(folder)), f"{why}, and the student was exported all the same")
            return
        try:
            found = export.deliver(method, Path(folder) / "student", PROMPTS, deployment.steps[0])
        except export.NotAsTrained as error:
            raise Broken(f"{error}: deploy(student) names a scheduler that steps otherwise than its policy") from error
        hold(found < export.LEAST, f"the latents of its pipeline differ by {found:.1e} from the trainer's")


def _refused(method: Distillation, folder: Path) -> bool:
    try:
        export.deliver(method, folder / "student", PROMPTS, method.deployment.steps[0])
    except ValueError:
        return not (folder / "student").exists()
    return False


CHECKS: Sequence[Callable[[Subject], Any]] = (
    fits,
    follows_its_seed,
    resumes,
    is_itself_without_rollouts,
    refuses_other_sources,
    exports,
)
"""All of them, for whoever wants a test each."""


def check_method(method: Callable[..., Distillation], folder: str | Path, *, skip: Sequence[str] = (), **settings: Any) -> None:
    """Every promise of a `method`, a class of Distillation, with its own `settings`, in an empty or earlier `folder`: some seconds.

    `skip`: names of CHECKS that are left out. Raises Broken with a line of each promise that it does not keep; of a method that does not
    fit nothing else is asked. Raises ValueError for a name that no check has.
    """
    quiet()
    names, left_out = [check.__name__ for check in CHECKS], [skip] if isinstance(skip, str) else skip
    if unknown := [name for name in left_out if name not in names]:
        raise ValueError(f"skip has {unknown[0]!r}, and the checks are {', '.join(names)}")
    subject, broken = Subject(method, folder, **settings), list[Broken]()
    for check in CHECKS:
        if check.__name__ in left_out or (broken and broken[0].args[0].startswith(f"{fits.__name__}: ")):
            continue
        try:
            check(subject)
        except Broken as error:
            broken.append(error)
    if broken:
        raise Broken("\n".join(map(str, broken))) from broken[0]
