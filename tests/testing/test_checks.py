"""What a method promises: each way in which authors break it is found by its check, in one line. The sound one is CONTRIBUTING's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import ddil_lightning
from ddil_lightning import LCM, Distillation, SamplingPrior
from ddil_lightning.testing import (
    CHECKS,
    Broken,
    Subject,
    check_method,
    exports,
    fits,
    follows_its_seed,
    is_itself_without_rollouts,
    refuses_other_sources,
    resumes,
)
from ddil_lightning.testing.subject import mixed

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(DIRECT,) = re.findall(r"^```python\n(# direct\.py\n.*?)^```$", PAGE, re.M | re.S)
DESCENDS, ADVANCES = "        if self.descend(self.optimizers(), self.feedback(b, mse(x_s, target))):\n", "            self.advance()\n"
COUNTS, DEPLOYS = "        self.k = teacher_steps // steps\n", "    def deploy(self, student):\n"
CASTS, STUDENT = "        self.cast(\n", '            student=self.role("student"),\n'
SCHEDULER = 'student.predicts, "trailing", n)'
GRID = 'len(self.grid), partial(Grid.named, "trailing"'

Edits = dict[str, str]


def direct(edits: Edits) -> Any:
    """The class of the page's direct.py with every line of `edits` replaced."""
    code = DIRECT
    for old, new in edits.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    made: dict[str, Any] = {"__name__": "direct"}
    exec(compile(code, "direct.py", "exec"), made)
    return made["Direct"]


def told(target: str, before: str = "") -> Edits:
    """Another target of the student's, and a line before its loss."""
    return {DESCENDS: before + DESCENDS.replace("target", target)}


def added(*lines: str) -> Edits:
    """More of the class, before deploy."""
    return {DEPLOYS: "".join(f"    {line}\n" for line in lines) + "\n" + DEPLOYS}


UNSAVED = {COUNTS: COUNTS + "        self.seen = 0\n"} | told("(1 - 0.01 * self.seen) * target", "        self.seen += 1\n")
"""A counter that is in no checkpoint."""
TURNS = {COUNTS: COUNTS + "        self.turn = 0\n"} | told(
    "target", "        self.turn = 1 - self.turn\n        if self.turn:\n            return\n"
)
"""Every second batch is nobody's, by a counter that is in no checkpoint."""
SAVED = added(
    "def on_save_checkpoint(self, checkpoint):",
    "    super().on_save_checkpoint(checkpoint)",
    "    checkpoint['ddil']['turn'] = self.turn",
    "",
    "def on_load_checkpoint(self, checkpoint):",
    "    super().on_load_checkpoint(checkpoint)",
    "    self.turn = checkpoint['ddil']['turn']",
)
OTHER_SCHEDULER = {SCHEDULER: SCHEDULER.replace("trailing", "linspace")}
BROKEN: dict[str, tuple[Edits, Any, str]] = {
    "a counter that no checkpoint has": (UNSAVED, resumes, "goes on otherwise than one in one piece, in weights.student."),
    "a generator that goes on": (
        {COUNTS: COUNTS + "        self.own = torch.Generator().manual_seed(0)\n"}
        | told("target + 0.1 * torch.randn(target.shape, generator=self.own)"),
        resumes,
        "or a generator that goes on from batch to batch",
    ),
    "turns that no checkpoint has": (TURNS, resumes, "cut after 5 updates, within its turns, goes on otherwise"),
    "torch's global generator outside the step": (
        added("def on_train_batch_start(self, batch, i):", "    self.own = torch.rand(())", "    super().on_train_batch_start(batch, i)")
        | told("(1 - 0.1 * self.own) * target"),
        follows_its_seed,
        "two runs of one seed differ in weights.student.",
    ),
    "Python's generator": (
        told("(1 - 0.1 * __import__('random').random()) * target"), follows_its_seed, "two runs of one seed differ in weights.student.",
    ),
    "moves the teacher": (
        {ADVANCES: ADVANCES + "            with torch.no_grad():\n                next(self.teacher.network.parameters()).mul_(0.9)\n"},
        fits,
        "the frozen pipeline has moved",
    ),
    "trains the teacher": (
        {CASTS: CASTS.replace("self.cast", "self.backbone.network().requires_grad_(True)\n        self.cast")},
        fits,
        "the frozen pipeline hears of a loss",
    ),
    "moves a copy by hand": (
        {CASTS: '        student = self.role("student")\n        former = student.copied("former")\n' + CASTS}
        | {STUDENT: "            student=student,\n            former=former,\n"}
        | {ADVANCES: ADVANCES + "            next(self.former.parameters()).data.mul_(0.9)\n"},
        fits,
        "has moved, which nothing trains",
    ),
    "never advances": ({ADVANCES: "            pass\n"}, fits, "never calls advance()"),
    "a student that is not asked": ({DESCENDS: DESCENDS.replace("mse(x_s,", "mse(0 * x_s,")}, fits, "every gradient of an optimiser is 0"),
    "a weight that no optimiser has": (
        added("def configure_optimizers(self):", "    return self.optimizer_of(self.student.weights()[2:], self.lr)"),
        fits,
        "(and 1 more) has not moved",
    ),
    "a weight that no loss hears of": (
        {STUDENT: STUDENT + "            head=torch.nn.Linear(2, 2),\n"}
        | added(
            "def configure_optimizers(self):",
            "    weights = [*self.student.weights(), *self.head.parameters()]",
            "    return self.optimizer_of(weights, self.lr)",
        ),
        fits,
        "no gradient arrives at head.weight (and 1 more)",
    ),
    "looks at who feeds it": (
        told("(0.5 if self.feed.prior is None else 1.0) * target"), is_itself_without_rollouts, "in weights.student.",
    ),
    "takes any latents": (
        added('sources = ("forward",)', "", "def check_prior(self, prior):", "    pass"),
        refuses_other_sources,
        "trained on student latents",
    ),
    "deployed on other nodes": ({GRID: GRID.replace("trailing", "linspace")} | OTHER_SCHEDULER, exports, "has other times than self.grid"),
    "exported with other nodes": (OTHER_SCHEDULER, exports, "names a scheduler that steps otherwise than its policy"),
}  # fmt: skip


@pytest.fixture
def tiny(light: Path) -> Path:
    return light


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_found_by_name(name: str, tmp_path: Path) -> None:
    """On a pipeline of their own, for some of them write into it."""
    edits, check, said = BROKEN[name]
    with pytest.raises(Broken) as error:
        check(Subject(direct(edits), tmp_path, guidance=2.0))
    line = str(error.value)
    assert line.startswith(f"{check.__name__}: ") and said in line and "\n" not in line


def test_sources_may_be_a_property(tiny: Path) -> None:
    edits = added("@property", "def sources(self):", "    return ('forward', 'student', 'teacher')")
    kind = direct(edits)
    refuses_other_sources(Subject(kind, tiny, guidance=2.0))
    assert isinstance(vars(kind)["sources"], property)  # as it was


def test_a_method_is_left_the_only_one_of_its_name(tiny: Path) -> None:
    """Configs know methods by their names: a second class of one, alive as long as anything held it, made its configs ambiguous."""
    refuses_other_sources(Subject(LCM, tiny, guidance=2.0, w_conditioned=False))
    todo, alike = [Distillation], list[type]()
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        alike += [kind] if kind.__name__ == "LCM" else []
    assert alike == [LCM] and "sources" not in vars(LCM) and LCM.sources == Distillation.sources


def test_turns_that_are_in_checkpoints_go_on(tiny: Path) -> None:
    resumes(Subject(direct(TURNS | SAVED), tiny, guidance=2.0))


@pytest.mark.parametrize("check", [follows_its_seed, resumes], ids=lambda check: check.__name__)
def test_torchs_own_numbers_are_set_within_a_step(check: Any, tiny: Path) -> None:
    check(Subject(direct(told("target + 0.1 * torch.randn_like(target)")), tiny, guidance=2.0))


def test_all_checks_in_one_line_name_each_that_fails(tiny: Path) -> None:
    method, others = direct(UNSAVED | OTHER_SCHEDULER), ["fits", "follows_its_seed", "is_itself_without_rollouts", "refuses_other_sources"]
    with pytest.raises(Broken) as error:
        check_method(method, tiny, skip=others, guidance=2.0)
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == ["resumes", "exports"]
    check_method(method, tiny, skip=["resumes", "exports", "follows_its_seed"], guidance=2.0)
    with pytest.raises(ValueError, match="skip has 'export', and the checks are fits, .*, exports"):
        check_method(method, tiny, skip="export")


def test_of_a_method_that_does_not_fit_nothing_else_is_asked(tiny: Path) -> None:
    asked: list[int] = []

    def build(**settings: Any) -> Any:
        asked.append(settings["updates"])
        raise TypeError("no\nsuch thing")

    with pytest.raises(Broken, match="^fits: it ends in TypeError: no such thing$"):
        check_method(build, tiny)
    assert asked == [6]


def test_no_test_runner_is_needed() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(ddil_lightning.__file__).parent.rglob("*.py")]
    assert texts and not [text for text in texts if re.search(r"^\s*(import|from) _?pytest\b", text, re.M)]
    assert issubclass(Broken, AssertionError) and len({check.__name__ for check in CHECKS}) == len(CHECKS)


def test_roll_outs_are_of_whom_a_method_has_a_target_for(tiny: Path) -> None:
    method = Subject(LCM, tiny, guidance=2.0, w_conditioned=False).build()
    assert mixed(method) == SamplingPrior(0.5, 0.25, 0.25)
    method.sources = ("forward", "student")
    assert mixed(method) == SamplingPrior(0.5, 0.5, 0.0)
    method.sources = ("teacher",)
    assert mixed(method) == SamplingPrior(0.0, 0.0, 1.0)
    method.sources = ("forward",)
    assert mixed(method) == SamplingPrior(1.0, 0.0, 0.0)
