"""The stage plan and the Stages callback: faults in one line, the boundary, priors of parts, exact resuming, the pipelines of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from commandline import fit as command
from commandline import refused
from ddil_lightning.callbacks import AnnealPrior, Stages
from ddil_lightning.data.captions import Prompts
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.evaluation.rows import folder_sampler
from ddil_lightning.imitation.prior import Constant, GatedBy, Linear, SamplingPrior
from ddil_lightning.methods import PD
from ddil_lightning.runs.folder import stage_pipelines
from ddil_lightning.training.plan import Part, Stage
from suite import MIXED, PLAN, Entry, LateRestoring, Run, StopAt, build, captions, equal, fit, state

FIRST, SECOND = Part(2, 0.5, 0.1, 0.4), Part(1, 0.4, 0.4, 0.2)
PARTS = [Stage(kind="guidance", updates=2), Stage(steps=4, parts=[FIRST, SECOND], lr=5e-4), Stage(steps=2, updates=3, warmup=2)]
PD_2 = Entry("pd", PD, {"stages": PLAN, "teacher_steps": 16})
PD_3 = Entry("pd-parts", PD, {"stages": PARTS, "teacher_steps": 8, "updates": None})


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


# Plans ----------------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "not halving": ([{"steps": 4, "updates": 1}, {"steps": 1, "updates": 1}], r"stage 2 of .* \(halve to 1\) .* so write steps: 2"),
    "not from the teacher": ([{"steps": 2, "updates": 1}], r"stage 1 .* does not halve: its teacher has 8 steps, so write steps: 4"),
    "no steps": ([{"updates": 1}], r"does not say its student's steps: the teacher has 8, so write steps: 4"),
    "no updates": ([{"steps": 4, "updates": 0}], r"stage 1 .* has 0 updates: every stage"),
    "left out": ([{"steps": 4}], r"stage 1 .* has 0 updates: every stage"),
    "an empty part": ([{"steps": 4, "parts": [{"updates": 2}, {"updates": 0}]}], r"has 2 updates in 2 parts: .* needs at least 1"),
    "both": ([{"steps": 4, "updates": 5, "parts": [{"updates": 2}]}], r"has 5 updates and its parts have 2: leave out updates"),
    "v already": ([{"kind": "eps_to_v", "updates": 1}], r"begins with eps_to_v, but the teacher predicts v already: leave"),
    "too late": ([{"steps": 4, "updates": 1}, {"kind": "guidance", "updates": 1}], r"stage 2 of the plan \(guidance\) comes too late"),
    "steps of all": ([{"kind": "guidance", "steps": 8, "updates": 1}], r"trains on all times: leave out its steps"),
    "nothing": ([], r"the plan has no stages"),
    "negative": ([{"steps": 4, "updates": 1, "warmup": -1}], r"warmup of stage 1 of the plan .* is -1: give a number of at least 0"),
}  # fmt: skip


def plan(rows: list[dict[str, Any]]) -> list[Stage]:
    return [Stage(**{**row, "parts": [Part(**part) for part in row.get("parts", [])]}) for row in rows]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_plan(fault: str, tiny: Path) -> None:
    rows, words = FAULTS[fault]
    with pytest.raises(ValueError, match=words) as error:
        build(PD_2, tiny, stages=plan(rows), teacher_steps=8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "words"), [(96, "does not nest: .* 'trailing' .* power of two"), (7, "cannot be halved: change teacher_steps")]
)
def test_faults_of_the_teachers_grid(steps: int, words: str, tiny: Path) -> None:
    """By the trailing rule 96 steps do not contain 48: rounding takes the one to 937 and the other to 936."""
    with pytest.raises(ValueError, match=words):
        build(PD_2, tiny, stages=[Stage(steps=steps // 2, updates=1)], teacher_steps=steps)
    with pytest.raises(ValueError, match=r"rule is trailing or linspace, not 'leading'"):
        build(PD_2, tiny, rule="leading")


def test_an_eps_teacher_is_converted_first(tiny_eps: Path) -> None:
    with pytest.raises(ValueError, match=r"predicts eps and the student .* v: begin the plan with a stage \{kind: eps_to_v"):
        build(PD_2, tiny_eps)
    method = build(PD_2, tiny_eps, stages=[Stage(kind="eps_to_v", updates=1), *PLAN])
    assert method.student.predicts == "v" and method.teacher.predicts == "eps" and method.deployment.steps == (16,)


def test_nothing_would_carry_out_the_plan(tiny: Path) -> None:
    trainer = Trainer(max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"give the Trainer the callback Stages\(\)"):
        trainer.fit(build(PD_2, tiny), captions(tiny))


# The boundary ---------------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """What every batch is trained on, and the weights on both sides of every boundary."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, SamplingPrior, Tensor]] = []
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []
        self.stored: list[set[int]] = []
        self.moments: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if len(self.after) < len(self.before):
            self.after.append([p.detach().clone() for d in (pl_module.student, pl_module.expert) for p in d.parameters()])
            self.moments.append(len(trainer.optimizers[0].state))
        self.seen.append((pl_module.stage, pl_module.stage_updates, trainer.datamodule.prior, batch.t.clone()))
        chunks = trainer.datamodule.buffer.state_dict()["chunks"]
        self.stored.append({t for chunk in chunks for t in chunk["states"]["t"].tolist()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.stage_is_over:  # Stages comes after this callback
            self.before.append([p.detach().clone() for p in pl_module.deployment.network.parameters()])


def watched(entry: Entry, folder: Path, prior: SamplingPrior = MIXED, **kwargs: Any) -> tuple[Run, Watch]:
    """A run whose watcher stands before Stages."""
    method, watch = build(entry, folder, **kwargs), Watch()
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch, Stages(pipelines=False)],
    )  # fmt: skip
    data = captions(folder, prior)
    trainer.fit(method, data)
    return Run(method, data, trainer, []), watch


def test_parts_and_stages_have_their_priors_and_grids(tiny: Path) -> None:
    """Guidance on forward latents of all times, then two parts with their own priors, then a halving under the DataModule's."""
    run, watch = watched(PD_3, tiny)
    assert run.method.updates == run.method.student_updates == 2 + 3 + 3
    assert [(stage, clock) for stage, clock, *_ in watch.seen] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    priors = [SamplingPrior()] * 2 + [SamplingPrior(0.5, 0.1, 0.4)] * 2 + [SamplingPrior(0.4, 0.4, 0.2)] + [MIXED] * 3
    assert [prior for _, _, prior, _ in watch.seen] == priors
    grids = [set(range(1000)), {999, 749, 499, 249}, {999, 499}]
    assert all(set(t.tolist()) <= grids[stage] for stage, _, _, t in watch.seen)
    assert run.method.grid.times.tolist() == [999, 499, -1] and run.method.deployment.steps == (2,)
    stages = [stage for stage, *_ in watch.seen]
    assert all(times <= grids[stage] for times, stage in zip(watch.stored, stages, strict=True))  # nothing of an older stage is left
    assert watch.stored[0] == set() and watch.stored[2] and watch.stored[5]


@pytest.mark.slow
def test_the_level_of_a_gate_begins_anew_at_a_stage(tiny: Path, tmp_path: Path) -> None:
    """As the clock of a schedule does, also where a run goes on from a stage's end; every published number passes here."""
    seen: list[tuple[int, float]] = []

    class Publish(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.stage, pl_module.feed.prior.student))

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.measures.publish(pl_module.student_updates, {"passes": 0.0})

    def run(*more: Callback, **kwargs: Any) -> None:
        gate = AnnealPrior(GatedBy(SamplingPrior(), SamplingPrior(0.0, 1.0), "passes", below=1.0, steps=4))
        stages = [Stage(steps=8, updates=2), Stage(steps=4, updates=3)]
        method = build(PD_2, tiny, stages=stages, teacher_steps=16, updates=None)
        fit(method, captions(tiny, SamplingPrior()), gate, Publish(), *more, **kwargs)

    run(StopAt(2, tmp_path / "2.ckpt"))
    run(ckpt=tmp_path / "2.ckpt")
    expected = [(0, 0.0), (0, 0.25), (1, 0.0), (1, 0.25), (1, 0.5)]
    assert seen == expected
    seen.clear()
    run()
    assert seen == expected


@pytest.mark.parametrize("ema", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_the_deployed_student_is_the_next_teacher_and_the_next_student(ema: float, tiny: Path) -> None:
    """In place, bit by bit, with an optimiser that remembers nothing."""
    run, watch = watched(PD_2, tiny, ema=ema)
    n = len(watch.before[0])
    assert len(watch.before) == len(watch.after) == 1 and watch.moments == [0]
    assert equal(watch.after[0][:n], watch.before[0]) and equal(watch.after[0][n:], watch.before[0])
    former = run.method.former
    assert equal([p.detach() for p in former.parameters()], watch.before[0]) and not any(p.requires_grad for p in former.parameters())
    assert not equal([p.detach() for p in run.method.student.parameters()], watch.before[0])


def test_the_learning_rate_and_the_optimiser_start_anew(tiny: Path) -> None:
    run = fit(build(PD_3, tiny, optimizer={"lr": 1e-3, "warmup": 0, "final_lr": 0.0}), captions(tiny))
    lrs = [row["lr"] for row in run.rows]  # of the stage's next update; at its end, what it has fallen to
    assert lrs[1:4] == pytest.approx([0.0, 5e-4 * 2 / 3, 5e-4 / 3]) and lrs[4:] == pytest.approx([0.0, 1e-3, 1e-3, 0.0])
    moments = run.trainer.optimizers[0].state
    assert {float(s["step"]) for s in moments.values()} == {3.0}
    assert [row["student_updates"] for row in run.rows] == list(range(1, 9))


def test_annealing_runs_in_every_stage_anew(tiny: Path) -> None:
    class Priors(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.stage_updates, trainer.datamodule.prior.student))

    seen: list[tuple[int, float]] = []
    anneal = AnnealPrior(Linear(SamplingPrior(), SamplingPrior(0.2, 0.8, 0.0), end=4))
    fit(build(PD_2, tiny, updates=5), captions(tiny), anneal, Priors())
    assert seen == [(0, 0.0), (1, 0.2), (2, pytest.approx(0.4)), (0, 0.0), (1, 0.2)]
    with pytest.raises(ValueError, match="the plan's parts and AnnealPrior both set the prior"):
        fit(build(PD_3, tiny), captions(tiny), anneal)


@pytest.mark.parametrize("last", [pytest.param(True, marks=pytest.mark.slow), False])
def test_annealing_leaves_a_preliminary_stage_on_forward_latents(last: bool, tiny: Path) -> None:
    class Priors(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.stage, trainer.datamodule.prior.forward))

    seen: list[tuple[int, float]] = []
    method = build(PD_2, tiny, stages=[Stage(kind="guidance", updates=2), Stage(steps=8, updates=2)], updates=4)
    anneal = AnnealPrior(Constant(SamplingPrior(0.2, 0.8, 0.0)))
    trainer = Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*([] if last else [anneal]), Stages(pipelines=False), *([anneal] if last else []), Priors()],
    )  # fmt: skip
    trainer.fit(method, captions(tiny))
    assert seen == [(0, 1.0), (0, 1.0), (1, 0.2), (1, 0.2)]


def test_a_share_without_a_target_is_found_before_training(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PD, "sources", ("forward", "student"))
    with pytest.raises(ValueError, match=r"gives 0\.4 to teacher latents, on which PD has no target"):
        fit(build(PD_3, tiny), captions(tiny, SamplingPrior()))


def test_a_forward_share_without_images_is_found_before_training(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    prompts, roll = Prompts(str(tmp_path / "p.txt")), SamplingPrior(0.0, 0.5, 0.5)
    with pytest.raises(ValueError, match="the plan's stage halve to 8 has a forward share but the data set has no images"):
        fit(build(PD_2, tiny, stages=[Stage(steps=8, parts=[Part(1, 0.5, 0.5)])]), DDILDataModule(prompts, roll, batch_size=2))
    run = fit(build(PD_2, tiny, updates=4, reflect="off"), DDILDataModule(prompts, roll, batch_size=2))  # a plan needs no images
    assert run.method.stage == 1 and run.method.student_updates == 4


# Resuming -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tiny: Path) -> Run:
    return fit(build(PD_3, tiny), captions(tiny))


def same(a: Run, b: Run) -> None:
    mine, theirs = state(a), state(b)
    for part in mine:
        assert equal(mine[part], theirs[part]), part
    assert a.method.grid.times.tolist() == b.method.grid.times.tolist() and a.data.prior == b.data.prior
    assert a.method.policies.teacher.denoiser is a.method.expert and b.method.policies.teacher.denoiser is b.method.expert


@pytest.mark.parametrize("cut", [*(pytest.param(cut, marks=pytest.mark.slow) for cut in (2, 4)), 5])
def test_resuming_is_exact_in_every_stage_and_at_every_boundary(cut: int, tiny: Path, tmp_path: Path, straight: Run) -> None:
    fit(build(PD_3, tiny), captions(tiny), StopAt(cut, tmp_path / "cut.ckpt"))
    resumed = fit(build(PD_3, tiny), captions(tiny), ckpt=tmp_path / "cut.ckpt")
    same(straight, resumed)
    assert resumed.rows == straight.rows[cut:]


@pytest.mark.parametrize(("updates", "stage", "lengths"), [(2, 0, [2]), (5, 1, [3, 2]), (7, 1, [3, 4]), (9, 1, [3, 6])])
def test_the_stage_in_which_a_run_ends_is_annealed_to_that_end(updates: int, stage: int, lengths: list[int], tiny: Path) -> None:
    """One that was cut short had kept the rate of its middle, and the replay's importance weights theirs."""
    method = build(PD_2, tiny, updates=updates, optimizer={"final_lr": 0.1})
    for method.stage in range(stage + 1):
        method.stage_start = sum(lengths[: method.stage])
        assert method.stage_length == lengths[method.stage]
    method.student_updates, method.descent.warmup = updates, 0
    assert method.descent.factor(method.stage_updates, method.stage_length) == pytest.approx(0.1) and method.progress == 1


def test_a_stage_has_its_learning_rate_where_the_optimiser_is_made_before_the_checkpoint_is_restored(tiny: Path, tmp_path: Path) -> None:
    """As fsdp2 does: the optimiser was made at the first stage's rate, and kept it."""
    own = {"stages": [Stage(steps=8, updates=2, lr=1e-3), Stage(steps=4, updates=4, lr=1e-5)], "updates": 6}
    whole = fit(build(PD_2, tiny, **own), captions(tiny), StopAt(4, tmp_path / "cut.ckpt"))
    for kind in (SingleDeviceStrategy, LateRestoring):
        resumed = fit(build(PD_2, tiny, **own), captions(tiny), ckpt=tmp_path / "cut.ckpt", strategy=kind("cpu"))
        for run in (whole, resumed):
            (group,) = run.trainer.optimizers[0].param_groups
            assert group["base_lr"] == 1e-5 and group["lr"] <= 1e-5


@pytest.mark.slow
def test_a_run_that_was_cut_at_a_boundary_goes_on_exactly(tiny: Path, tmp_path: Path, straight: Run) -> None:
    """--updates ends the run with the stage: its student is the run's, and the next stage begins only when the run is made longer."""
    short = fit(build(PD_3, tiny, updates=5), captions(tiny))
    assert short.method.stage == 1 and short.method.deployment.steps == (4,) and short.method.student_updates == 5
    short.trainer.save_checkpoint(tmp_path / "short.ckpt")
    longer = fit(build(PD_3, tiny), captions(tiny), ckpt=tmp_path / "short.ckpt")
    same(straight, longer)
    assert longer.rows == straight.rows[5:]
    more = build(PD_3, tiny, updates=10)
    assert more.stage_length == 2 and more.updates == 10
    more.stage, more.stage_start = 2, 5
    assert more.stage_length == 5  # the last stage lasts to the end of the run


def test_a_checkpoint_of_another_plan_is_refused(tiny: Path, tmp_path: Path) -> None:
    fit(build(PD_3, tiny), captions(tiny), StopAt(4, tmp_path / "cut.ckpt"))
    other = [Stage(kind="guidance", updates=1), *PARTS[1:]]
    with pytest.raises(ValueError, match="has followed the plan 8 trailing steps, guidance in 2 updates, halve to 4; this config's is 8"):
        fit(build(PD_3, tiny, stages=other), captions(tiny), ckpt=tmp_path / "cut.ckpt")


def test_a_stage_that_a_resumed_run_cuts_short_leaves_its_pipeline(tiny: Path, tmp_path: Path) -> None:
    """Its updates are lowered below those that it has had: the next one begins at once."""
    fit(build(PD_3, tiny), captions(tiny), StopAt(4, tmp_path / "cut.ckpt"))
    shorter = [PARTS[0], Stage(steps=4, updates=1), PARTS[2]]
    method, written = build(PD_3, tiny, stages=shorter), []
    stages = Stages(folder=str(tmp_path / "stages"))
    stages.deliver = lambda method, root, examples: written.append((stages.place(method, root).name, method.student_updates))
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    Trainer(callbacks=[stages], max_epochs=-1, accelerator="cpu", **quiet).fit(method, captions(tiny), ckpt_path=tmp_path / "cut.ckpt")
    assert written == [("02-4-steps", 4)] and (method.stage, method.stage_start, method.student_updates) == (2, 4, 6)
    method.student_updates = 9  # the last one goes on past the plan's updates, and its pipeline is that of their end
    assert stages.owed(method, tmp_path) is None


# A run of the command line --------------------------------------------------------------------------------------------------------

RUN = """
model:
  class_path: PD
  init_args:
    pipeline: {pipeline}
    guidance: 2.0
    teacher_steps: 8
    stages:
      - {{kind: guidance, updates: 1}}
      - {{steps: 4, parts: [{{updates: 1}}, {{updates: 1, forward: 0.5, student: 0.5}}]}}
      - {{steps: 2, updates: 2}}
    ema: 0.5
    reflect: static
data: {{batch_size: 4, captions: {{class_path: Digits}}, prior: {{forward: 0.5, student: 0.25, teacher: 0.25}}}}
test: {{n: 16, teacher_steps: [4], dpm: true}}
previews: {{every: 3, count: 1, teacher_steps: [2]}}
"""


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run."""
    from ddil_lightning.commands.fitting import fit as ddil_fit

    folder = tmp_path_factory.mktemp("pd")
    (folder / "pd.yaml").write_text(RUN.format(pipeline=tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ddil_fit(["--config", "pd.yaml", "--run_dir", "r"]) == 0
    return folder / "r"


def test_every_stage_leaves_its_pipeline(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "stages").iterdir()) == ["01-guidance", "02-4-steps", "03-2-steps"]
    assert {n: p.name for n, p in stage_pipelines(finished).items()} == {4: "02-4-steps", 2: "03-2-steps"}
    for n, clock in ((4, 3), (2, 5)):
        about = json.loads((stage_pipelines(finished)[n] / "ddil.json").read_text())
        assert about["timesteps"] == Grid.named("trailing", n).nodes.tolist() and about["student_updates"] == clock
        assert about["steps"] == n and about["made_for"] == [n]
    last, whole = (_weights(finished / name) for name in ("stages/03-2-steps", "pipeline"))
    assert equal(last, whole) and not equal(last, _weights(finished / "stages" / "02-4-steps"))
    assert json.loads((finished / "pipeline" / "ddil.json").read_text())["steps"] == 2


def _weights(pipeline: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")


def test_every_row_is_of_the_student_that_was_made_for_it(finished: Path, tiny: Path) -> None:
    rows = {row["name"]: row for row in json.loads((finished / "summary.json").read_text())["rows"]}
    assert list(rows) == ["teacher@4", "student@4", "student@4 dpm++", "student@2", "student@2 dpm++"]
    assert [row["nfe"] for row in rows.values()] == [8, 4, 4, 2, 2]
    assert rows["student@4"]["metrics"] != rows["student@4 dpm++"]["metrics"]
    assert rows["student@2"]["metrics"] == rows["student@2 dpm++"]["metrics"]  # two first-order steps are DDIM
    policy, grid = folder_sampler(stage_pipelines(finished)[4], torch.device("cpu"))
    assert equal(dict(policy.denoiser.network.unet.state_dict()), _weights(finished / "stages" / "02-4-steps")) and len(grid) == 4


def test_pipelines_of_another_run_are_not_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "01-4-steps").mkdir()
    stages = Stages(folder=str(tmp_path))
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[stages])
    with pytest.raises(ValueError, match=r"stages.folder .* holds 01-4-steps of another run, which would be replaced: give another"):
        trainer.fit(build(PD_2, tiny), captions(tiny))


@pytest.mark.slow
def test_ddil_test_of_the_run(finished: Path, tmp_path: Path) -> None:
    """The pipelines as their users call them give the rows of the run."""
    from ddil_lightning.commands.test import test

    assert test([str(finished), "--n", "16", "--dpm", "--out", str(tmp_path / "m.json")]) == 0
    mine = {row["name"]: row for row in json.loads((tmp_path / "m.json").read_text())["rows"]}
    theirs = {row["name"]: row for row in json.loads((finished / "summary.json").read_text())["rows"]}
    assert list(mine) == ["student@4", "student@4 dpm++", "student@2", "student@2 dpm++"]
    for name, row in mine.items():
        assert row["metrics"]["frechet"] == pytest.approx(theirs[name]["metrics"]["frechet"], rel=1e-2), name
        assert row["nfe"] == theirs[name]["nfe"]


@pytest.mark.slow
def test_faults_on_the_command_line(tiny_eps: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(finished.parent / "pd.yaml")
    line = refused(capsys, "--config", config, "model.stages=[{steps: 4, updates: 1}, {steps: 3, updates: 1}]")
    assert line.startswith("stage 2 of the plan (halve to 3) does not halve")
    line = refused(capsys, "--config", config, "model.stages=[{steps: 4, updates: 0}]")
    assert "has 0 updates" in line
    line = refused(capsys, "--config", config, f"model.pipeline={tiny_eps}")
    assert "begin the plan with a stage {kind: eps_to_v" in line
    line = refused(capsys, "--config", config, "model.stages=[{steps: 4, parts: [{updates: 1, forward: 0.5, student: 0.6}]}]")
    assert line == "the prior's shares sum to 1.1, not 1: forward 0.5 + student 0.6 + teacher 0"
    line = refused(capsys, "--config", config, "model.stages=[{stepz: 4, updates: 1}]")
    assert line == "unknown key model.stages.stepz: did you mean model.stages.steps?"
    code, _, err = command(capsys, "--config", config, "--ckpt_path", str(finished))
    assert code == 2 and "is complete, with all its 5 updates" in err
