"""What all methods inherit: clipping, accumulation, the learning rate, the clock's rows, the average, the box and guidance."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from ddil_lightning.backbones.unet import UNet
from ddil_lightning.callbacks import AnnealPrior
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.imitation.prior import Gated, SamplingPrior
from ddil_lightning.methods import LCM
from suite import BY_NAME, FORWARD, METHODS, MIXED, Gradients, backbone, build, captions, fit, pictures, train

FIRST = METHODS[0]


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


class Multiplies(Callback):
    """How float32 is multiplied in the steps of a run, which ends with an error where `breaks`."""

    def __init__(self, breaks: bool = False) -> None:
        self.breaks, self.seen = breaks, set[str]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seen.add(torch.get_float32_matmul_precision())
        if self.breaks:
            raise OSError("no more")


def test_tensor_float_32_is_of_a_training_that_asks_for_it(tiny: Path) -> None:
    """And of nothing that comes after it, however it ends."""
    asked, broken, plain = Multiplies(), Multiplies(breaks=True), Multiplies()
    train(FIRST, tiny, asked, updates=1, memory={"tf32": True})
    assert asked.seen == {"high"} and torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(OSError, match="no more"):
        train(FIRST, tiny, broken, updates=1, memory={"tf32": True})
    assert broken.seen == {"high"} and torch.get_float32_matmul_precision() == "highest"
    train(FIRST, tiny, plain, updates=1)
    assert plain.seen == {"highest"}


def test_accumulation_averages_the_gradients(tiny: Path) -> None:
    """Two micro-batches at the same weights (a learning rate of zero keeps them) against one update of both."""
    single, double = Gradients(), Gradients()
    train(FIRST, tiny, single, prior=FORWARD, updates=2, optimizer={"lr": 0.0, "clip": 0.0})
    run = train(FIRST, tiny, double, prior=FORWARD, updates=1, optimizer={"lr": 0.0, "clip": 0.0, "accumulate": 2})
    assert run.data.done == 2 and len(double.steps) == 1 and len(run.rows) == 1
    for name, grad in double.steps[0].items():
        torch.testing.assert_close(grad, (single.steps[0][name] + single.steps[1][name]) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow), "16-mixed"])
def test_clipping_bounds_the_norm(precision: str, tiny: Path) -> None:
    """In every precision; a gradient scaler multiplies the limit too, as gradients are clipped before they are unscaled."""
    norms = []
    for clip in (0.0, 1e-3):
        seen, kwargs = Gradients(), {"precision": precision}
        if precision == "16-mixed":  # Lightning would take bf16 on a CPU
            kwargs = {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))}
        fit(build(FIRST, tiny, updates=1, optimizer={"clip": clip}), captions(tiny), seen, **kwargs)
        norms.append(float(torch.cat([x.flatten() for x in seen.steps[0].values()]).norm()))
    assert norms[0] > 1e-2 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_warms_up_and_falls(tiny: Path) -> None:
    method = build(FIRST, tiny, updates=12, optimizer={"warmup": 4, "final_lr": 0.2})
    factors = []
    for method.student_updates in range(13):
        factors.append(method.descent.factor(method.stage_updates, method.stage_length))
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, *(1 - 0.1 * k for k in range(9))])


def test_every_update_is_logged_once_however_many_batches_it_takes(tiny: Path) -> None:
    run = train(FIRST, tiny, updates=5, optimizer={"accumulate": 3}, log_every=2)
    assert [row["student_updates"] for row in run.rows] == [2, 4, 5] and run.data.done == 15


def test_a_second_fit_of_a_method_is_told_to_its_own_logger_alone(tiny: Path) -> None:
    """And neither a schedule of the first one nor what it asked for goes on."""
    half = SamplingPrior(0.5, 0.5)
    data, gate = captions(tiny), Gated(half, half)
    first = fit(build(FIRST, tiny, updates=2), data, AnnealPrior(gate))
    assert len(first.rows) == 2 and data.prior == half
    first.method.updates = 4
    second = fit(first.method, data)
    assert [row["student_updates"] for row in second.rows] == [3, 4] and len(first.rows) == 2
    assert data.prior == MIXED and first.method.measures._close == []


def test_the_average_follows_the_student(tiny: Path) -> None:
    """average <- d average + (1 - d) student with d = min(ema, (1 + n) / (10 + n)) after update n."""
    weights = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weights.append(next(pl_module.student.network.parameters()).detach().clone())

    method = build(FIRST, tiny, ema=0.3, updates=5)
    expected = next(method.student.network.parameters()).detach().clone()
    fit(method, captions(tiny), Keep())
    for n, w in enumerate(weights, 1):
        d = min(0.3, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * w
    torch.testing.assert_close(next(method.average.parameters()), expected)
    assert method.deployment.network is method.average and build(FIRST, tiny, ema=0.0).average is None


def test_the_box_comes_from_the_data_unless_it_is_given(tiny: Path) -> None:
    run = train(FIRST, tiny, updates=1)
    found, box = run.data.box(), run.method.reflection
    assert found is not None and box.lo.tolist() == pytest.approx(found[0]) and box.hi.tolist() == pytest.approx(found[1])
    box = train(FIRST, tiny, updates=1, box=[[-1.0] * 4, [2.0] * 4]).method.reflection
    assert box.lo.tolist() == [-1.0] * 4 and box.hi.tolist() == [2.0] * 4


def test_a_box_that_no_data_gave_is_named(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    for kwargs in ({}, {"box": [[-1.0] * 4, [2.0] * 4]}, {"reflect": "off"}):
        data = captions(tiny, SamplingPrior(0.0, 0.5, 0.5))
        data.captions = Encoded(None, pictures(tiny).c)
        method = fit(build(FIRST, tiny, updates=1, **kwargs), data).method
        assert method.reflection.lo.tolist() == [-1.0 if "box" in kwargs else -4.5] * 4
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("ddil_lightning")]  # only where a box acts and none was given
    assert said == (
        "reflect: static without images to take the box from: it is -4.5 to 4.5 in every channel; "
        "give another by model.box: [[lo, ...], [hi, ...]], a number per channel"
    )


def test_losses_and_shares_of_an_update_are_those_of_all_its_batches(tiny: Path) -> None:
    method = build(FIRST, tiny, optimizer={"accumulate": 2})
    b = SimpleNamespace(source=torch.tensor([0, 0, 0, 1]), weight=torch.ones(4))
    for micro, losses in ((0, [9.0] * 4), (0, [1.0, 2.0, 3.0, 8.0]), (1, [2.0, 2.0, 2.0, 4.0])):
        method.descent.micro["loss"] = micro
        method.feedback(b, torch.tensor(losses))
    assert method.measures.source_losses == {"forward": 2.0, "student": 6.0}
    rows = method.measures.flush()
    shares = {name: rows[f"drawn/share_{name}"] for name in ("forward", "student", "teacher", "mixed")}
    assert shares == {"forward": 0.75, "student": 0.25, "teacher": 0.0, "mixed": 0.0}


def test_a_range_of_guidance_needs_a_student_that_is_told(tiny: Path) -> None:
    for entry in METHODS:
        if entry.kwargs.get("w_conditioned") is False or entry.name == "dmd2":
            with pytest.raises(ValueError, match="'s student is not told the guidance: give one number, not 2.0 to 4.0"):
                build(entry, tiny, guidance=[2.0, 4.0])
    pd = next(entry for entry in METHODS if entry.name == "pd")
    with pytest.raises(ValueError, match="^PD's student is not told the guidance.*or set model.w_conditioned to true$"):
        build(pd, tiny, w_conditioned=False, guidance=[2.0, 4.0])
    assert build(pd, tiny, w_conditioned=False, guidance=[2.0, 2.0]).guidance == (2.0, 2.0)


def test_guidance_is_what_the_pipeline_recommends_unless_it_is_given(tiny: Path) -> None:
    assert build(FIRST, tiny, guidance=None).guidance == (backbone(tiny).guidance,) * 2 == (2.0, 2.0)
    assert build(FIRST, tiny, guidance=5).guidance == (5.0, 5.0) and build(FIRST, tiny, guidance=[1, 3]).guidance == (1.0, 3.0)


@pytest.mark.parametrize("name", ["lcm", "pd", "dmd2"])
def test_a_teacher_at_guidance_1_is_asked_once(name: str, tiny: Path) -> None:
    """For targets and in roll-outs: the empty prompt's share is 0. It is guided at a real score's guidance, and at a checkpoint's."""
    entry, found = BY_NAME[name], []
    for once in (True, False):
        method = build(entry, tiny, guidance=1.0)
        assert method.unguided and method.teacher.unguided and method.teacher.apart().unguided
        method.teacher.unguided = once  # twice: as before
        run = fit(method, captions(tiny, SamplingPrior(0.5, 0.0, 0.5), rollouts={"every": 1}), max_steps=4)
        found.append((method.evaluations["teacher"], [row[entry.falls] for row in run.rows if entry.falls in row]))
    (asked, losses), (twice, before) = found
    assert 2 * asked == twice > 0 and losses == pytest.approx(before, rel=1e-4) and losses
    if name == "dmd2":
        assert not build(entry, tiny, guidance=1.0, scores={"guidance": 3.0}).teacher.unguided
        assert build(entry, tiny, guidance=1.0, scores={"guidance": 1.0}).teacher.unguided
    guided, state = build(entry, tiny, guidance=2.0), dict[str, Any]()
    guided.on_save_checkpoint(state)
    assert not guided.teacher.unguided
    method._recommended = True
    method.on_load_checkpoint(state)
    assert method.guidance == (2.0, 2.0) and not method.teacher.unguided


def test_a_run_that_names_no_guidance_keeps_that_of_its_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pipeline recommends, or diffusers' call of it, may have changed meanwhile: the student has been taught the old one."""
    state: dict[str, Any] = {}
    method = LCM(pipeline=str(tiny), guidance=3.5, w_conditioned=False)
    method.on_save_checkpoint(state)
    unnamed, named = LCM(pipeline=str(tiny), w_conditioned=False), LCM(pipeline=str(tiny), guidance=4.0, w_conditioned=False)
    for other in (unnamed, named):
        other.on_load_checkpoint(state)
    assert (unnamed.guidance, named.guidance) == ((3.5, 3.5), (4.0, 4.0))
    assert unnamed.deployment.quoted == 3.5
    del state["ddil"]["guidance"]  # of before, by a pipeline without a card
    shutil.copytree(tiny, tmp_path / "bare")
    (tmp_path / "bare" / "ddil.json").unlink()
    monkeypatch.setattr(UNet, "usual", lambda self, pipe: 5.0)  # as SDXL's call has it
    older, new = LCM(pipeline=str(tmp_path / "bare"), w_conditioned=False), LCM(pipeline=str(tmp_path / "bare"), w_conditioned=False)
    older.on_load_checkpoint(state)
    assert (older.guidance, older.deployment.quoted, new.guidance) == ((7.5, 7.5), 7.5, (5.0, 5.0))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"updates": 0}, "^updates is 0"),
        ({"optimizer": {"accumulate": 0}}, "^optimizer.accumulate is 0"),
        ({"optimizer": {"lr": -1.0}}, "^optimizer.lr is -1.0"),
        ({"ema": 1.0}, "^ema is 1.0"),
        ({"reflect": "twice"}, "not 'twice'"),
    ],
)
def test_settings_outside_their_range_are_refused(kwargs: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(FIRST, tiny, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{}, {"rank": 2}], ids=["whole", "lora"])
def test_compiling_changes_no_name_and_no_number(adapter: dict[str, Any], light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch.compile without its code generator, which takes many minutes more."""
    made: list[str] = []

    def traced(module: torch.nn.Module, **kwargs: Any) -> None:
        made.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")  # type: ignore[assignment]

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    torch._dynamo.reset()
    runs = []
    for compiles in (False, True):
        torch.manual_seed(3)
        method = build(FIRST, light, updates=2, memory={"compile": compiles, "gradient_checkpointing": True}, adapter=adapter)
        runs.append(fit(method, captions(light)))
    plain, compiled = runs
    blocks = len(compiled.method.backbone.network().blocks())
    assert made.count("BasicTransformerBlock") + made.count("ResnetBlock2D") == len(made) == 3 * blocks  # of student, target and teacher
    assert list(plain.method.state_dict()) == list(compiled.method.state_dict())
    assert [row["loss"] for row in compiled.rows] == pytest.approx([row["loss"] for row in plain.rows], rel=1e-5)


class Halving(torch.optim.Optimizer):
    """Somebody's own: w <- w - lr (w / 2 + gain grad)."""

    def __init__(self, params: Any, lr: float = 0.1, gain: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "gain": gain})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:  # Lightning's hooks before a step
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p / 2 + group["gain"] * p.grad))


def test_any_optimizer_by_its_path_and_with_its_own_options(tiny: Path) -> None:
    kind = f"{Halving.__module__}.{Halving.__qualname__}"
    seen = Gradients()
    method = build(FIRST, tiny, updates=1, optimizer={"kind": kind, "options": {"gain": 3.0}, "lr": 0.1, "clip": 0.0})
    before = {name: p.detach().clone() for name, p in method.student.named_parameters()}
    fit(method, captions(tiny), seen)
    for name, p in method.student.named_parameters():
        torch.testing.assert_close(p, before[name] - 0.1 * (before[name] / 2 + 3 * seen.steps[0][f"student.{name}"]))


class Wrapped(Halving):
    """One that hands on what it is given, as wrappers do."""

    def __init__(self, params: Any, lr: float = 0.1, **more: Any) -> None:
        super().__init__(params, lr, **more)


def test_options_of_an_optimizer_that_hands_them_on(tiny: Path) -> None:
    kind = f"{Wrapped.__module__}.{Wrapped.__qualname__}"
    run = train(FIRST, tiny, updates=1, optimizer={"kind": kind, "options": {"gain": 2.0}})
    assert run.trainer.optimizers[0].param_groups[0]["gain"] == 2.0


@pytest.mark.parametrize(("kind", "options"), [("SGD", {}), ("Adafactor", {}), ("AdamW", {"foreach": True})])
def test_optimizers_of_torch_by_their_name(kind: str, options: dict[str, Any], tiny: Path) -> None:
    run = train(FIRST, tiny, updates=2, optimizer={"kind": kind, "options": options})
    assert type(run.trainer.optimizers[0]).__name__ == kind and run.method.student_updates == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "AdamV"}, "optimizer.kind is 'AdamV', which is no optimiser: did you mean Adam"),
        ({"kind": "torch.nn.Linear"}, "'torch.nn.Linear', which is no optimiser: there is none of that name in torch.nn"),
        ({"kind": "bitsnbytes.optim.AdamW8bit"}, "No module named 'bitsnbytes'; install the package"),
        ({"kind": "SGD", "betas": (0.9, 0.95)}, "optimizer.betas is none of SGD's, which takes lr, momentum"),
        ({"options": {"momentun": 0.9}}, "optimizer.momentun is none of AdamW's"),
        ({"options": {"lr": 0.1}}, "optimizer.options has lr, which is not its to say: set optimizer.lr"),
        ({"kind": "LBFGS"}, "'LBFGS', which asks for the loss several times in a step: take another optimiser"),
        ({"kind": "torch.optim.SparseAdam"}, "SparseAdam', which takes sparse gradients alone"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused(given: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        train(FIRST, tiny, updates=1, optimizer=given)
