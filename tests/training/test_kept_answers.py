"""A run that keeps its teacher's answers beside the replayed states against one that asks again: the same losses, weights and plan."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.toy import Toy
from ddil_lightning.training.optimisation import Optimizer
from ddil_lightning.training.question import settings
from pair import Pair, ddp
from suite import BY_NAME, METHODS, MIXED, Entry, Run, build, captions, equal, fit

BATCH, UPDATES = 8, 8
"""Half of every batch is forward latents: networks are asked for four rows at least, which they answer on one thread as they would in a
batch (another kernel multiplies fewer)."""
BOX = [[-1.0] * 4, [1.0] * 4]
ASKING = [entry for entry in METHODS if hasattr(entry.method, "answer")]
MORE = [Entry("ctm-two-steps", BY_NAME["ctm"].method, {"denoising": 0.0, "teacher_steps": 2}, slow=True)]
ORDINARY = ("pd",)


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """Half the time of a call."""
    return light


class Losses(Callback):
    """The per-sample losses of every update."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        hear = pl_module.feedback
        pl_module.feedback = lambda b, loss: (self.seen.append(loss.detach().clone()), hear(b, loss))[1]


def run(entry: Entry, folder: Path, answers: str, **kwargs: Any) -> tuple[Run, list[torch.Tensor]]:
    losses = Losses()
    data = captions(folder, MIXED, batch_size=BATCH, buffer={"answers": answers})
    return fit(build(entry, folder, updates=UPDATES), data, losses, **kwargs), losses.seen


def asked(made: Run) -> int:
    """Evaluations of the frozen networks that a method asks at replayed states."""
    return sum(n for name, n in made.method.evaluations.items() if name in ("teacher", "former"))


MARKED = [pytest.param(e, marks=() if e.name in ORDINARY else pytest.mark.slow, id=e.name) for e in (*ASKING, *MORE)]


@pytest.mark.parametrize("entry", MARKED)
def test_losses_and_weights_are_the_same_bits(entry: Entry, tiny: Path) -> None:
    """PD's plan begins its second stage after three updates: answers of the first teacher would show."""
    (kept, losses), (again, theirs) = (run(entry, tiny, answers) for answers in ("float32", "none"))
    assert len(losses) == UPDATES and equal(losses, theirs)
    assert equal(dict(kept.method.state_dict()), dict(again.method.state_dict()))
    assert equal([o.state_dict() for o in kept.trainer.optimizers], [o.state_dict() for o in again.trainer.optimizers])
    assert kept.rows == again.rows  # what is measured of the teacher's answers, too
    assert asked(kept) < asked(again)
    rest = ({k: v for k, v in made.method.evaluations.items() if k not in ("teacher", "former")} for made in (kept, again))
    assert len({str(one) for one in rest}) == 1


def test_with_the_shipped_shares_and_two_threads(tiny: Path) -> None:
    """LCM as lcm_ddil.yaml has it, where a batch asks for few rows and its kernels may round otherwise than for all: the same to that."""
    from ddil_lightning.packaged import find_config

    shipped = yaml.safe_load(find_config("lcm_ddil.yaml").read_text())
    options = {name: shipped["model"]["init_args"][name] for name in ("guidance", "solver_steps", "rollouts", "distance", "reflect")}
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for answers in ("float32", "none"):
            losses = Losses()
            prior, own = SamplingPrior(**shipped["data"]["prior"]), {"rollouts": {"every": 4}, "buffer": {"answers": answers}}
            data = captions(tiny, prior, batch_size=BATCH, **own)
            found.append((fit(build(BY_NAME["lcm"], tiny, updates=4, **options), data, losses), losses.seen))
    finally:
        torch.set_num_threads(threads)
    (kept, losses), (again, theirs) = found
    torch.testing.assert_close(torch.cat(losses), torch.cat(theirs), rtol=1e-3, atol=1e-5)
    assert asked(kept) < asked(again)


def test_other_weights_at_the_same_path_are_asked_anew(tiny: Path, tmp_path: Path) -> None:
    """A pipeline that was trained on and saved where it was, or is held in another precision, has not answered what was kept."""
    entry, folder = BY_NAME["lcm"], tmp_path / "pipeline"

    def question(**kwargs: Any) -> str:
        made = build(entry, folder, pipeline=Pipeline(str(folder), **kwargs), box=BOX)
        assert made.question == made.question
        return str(made.question)

    shutil.copytree(tiny, folder)
    first, same, half = question(), question(), question(dtype=torch.bfloat16)
    other = Pipeline(str(folder))
    with torch.no_grad():
        next(other.network().parameters())[0].add_(1e-3)
    other.pipe.save_pretrained(folder)
    assert first == same and len({first, half, question()}) == 3


@pytest.mark.parametrize("name", ["pcm", "ctm", "snapfusion", "pd"])
def test_what_alerts_are_told_of_a_loss_is_no_setting(name: str, tiny: Path) -> None:
    """PCM, CTM and SnapFusion say it in their constructor: a run of before they did asked its teacher anew for all that it had kept."""
    made = build(BY_NAME[name], tiny, pipeline=Toy(members=1, width=8, size=64))
    before = settings(made)
    assert before["distance"] and "loss_is_distance" not in before
    if name == "pd":  # whose later stages have grids and rates of their own
        made.stage = 1
        made._begin()
        assert settings(made) == before


@pytest.mark.slow
def test_half_precision_changes_losses_by_its_rounding(tiny: Path) -> None:
    (half, losses), (full, theirs) = (run(BY_NAME["lcm"], tiny, answers) for answers in ("float16", "float32"))
    assert half.method.evaluations == full.method.evaluations and not equal(losses, theirs)
    torch.testing.assert_close(torch.cat(losses), torch.cat(theirs), rtol=5e-3, atol=1e-5)


def of_process(rank: int, entry: Entry, folder: Path) -> list[dict[str, Any]]:
    """What a process has, with its answers kept and without."""
    found = []
    for answers in ("float32", "none"):
        made, losses = run(entry, folder, answers, **ddp(entry))
        found.append({"weights": dict(made.method.state_dict()), "losses": losses, "rows": made.rows, "asked": asked(made)})
    return found


@pytest.mark.slow
def test_two_processes_keep_their_own(pair: Pair, tiny: Path) -> None:
    (kept, again), (others, _) = pair.run(of_process, BY_NAME["pd"], tiny)
    assert all(equal(kept[name], again[name]) for name in ("weights", "losses", "rows")) and kept["asked"] < again["asked"]
    assert equal(kept["weights"], others["weights"]) and not equal(kept["losses"], others["losses"])


@pytest.mark.slow
def test_a_question_is_the_same_in_a_resumed_run_and_another_with_other_settings(tiny: Path) -> None:
    """Clocks, rates and lengths are no part of it; all that moves an answer is."""
    entry = BY_NAME["lcm"]
    made = run(entry, tiny, "float32")[0].method
    plain = made.question
    fixed = [build(entry, tiny, box=BOX, **other).question for other in ({}, {"updates": 99, "optimizer": Optimizer(lr=0.5)})]
    assert fixed[0] == fixed[1] != plain  # whose box is the data's
    made.student_updates, made.updates, made.lr = 77, 999, 0.3
    assert made.question == plain
    seen = {plain}
    for change in ({"solver_steps": 25}, {"reflect": "dynamic"}, {"guidance": [2.0, 2.5]}, {"box": BOX}):
        seen.add(build(entry, tiny, **change).question)
    assert len(seen) == 5
