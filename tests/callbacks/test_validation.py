"""The student's numbers while it is trained, and the checkpoint of the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from lightning.pytorch import Callback

from ddil_lightning import assemble
from ddil_lightning.callbacks import Checkpoints, Validation
from ddil_lightning.callbacks.best import Best
from ddil_lightning.callbacks.validation import told
from ddil_lightning.errors import Refusal
from ddil_lightning.evaluation.placing import named_protocol, placed
from ddil_lightning.evaluation.rows import policy_row
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.runs.checkpoint import clock_of, sorted_checkpoints
from ddil_lightning.runs.finish import Test
from ddil_lightning.testing.subject import WORDS
from suite import BY_NAME, METHODS, build, captions, equal, fit, state

if TYPE_CHECKING:
    from pair import Pair

LCM = METHODS[0]
TONES = ("saturation", "contrast")


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    return light


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """A protocol of prompts alone, which no network looks at."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"{size} {word}" for size in ("small", "large") for word in WORDS[:20]))
    path = tmp_path / "own.yaml"
    path.write_text(f"{{prompts: {{source: prompts.txt}}, references: {{source: null}}, size: null, metrics: [{', '.join(TONES)}]}}")
    return path


def validation(own: Path, **kwargs: Any) -> Validation:
    return Validation(**{"every": 2, "n": 16, "steps": [2, 1], "protocol": str(own), "data": str(own.parent)} | kwargs)


class Heard(Callback):
    """What is published of the validation, by its clock."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.measures.listen(self.hear)

    def hear(self, clock: int, values: Mapping[str, float]) -> None:
        found = {name: value for name, value in values.items() if name.startswith("validation/")}
        if found:
            self.rows.append((clock, found))


def test_the_numbers_are_those_of_a_table_and_training_is_as_without(tiny: Path, protocol: Path, tmp_path: Path, capsys: Any) -> None:
    """At every second update and the last; the run that goes on from its middle makes those that are left."""
    heard, save = Heard(), Checkpoints(every=2, keep=9, folder=str(tmp_path / "of"))
    run = fit(build(LCM, tiny, updates=5), captions(tiny), heard, validation(protocol), save)
    assert [clock for clock, _ in heard.rows] == [2, 4, 5]
    assert "validation after 5 updates, " in capsys.readouterr().out
    method, row = run.method.eval(), heard.rows[-1][1]
    assert set(row) == {f"validation/{key}_{n}" for key in TONES for n in (2, 1)}
    made, _ = placed(named_protocol(str(protocol)), str(tmp_path), None).differing(16, 1)
    suite = Suite.of(made)
    for n in (2, 1):
        table = policy_row(suite, method.backbone, "student", *method.deployment.sampler(n), method.deployment.quoted)["metrics"]
        for key in TONES:
            assert row[f"validation/{key}_{n}"] == pytest.approx(table[key], abs=1e-6)
    assert heard.rows[0][1] != row  # another student

    plain = fit(build(LCM, tiny, updates=5), captions(tiny))
    assert equal(state(run)["weights"], state(plain)["weights"])
    again = Heard()
    fit(build(LCM, tiny, updates=5), captions(tiny), again, validation(protocol), ckpt=tmp_path / "of" / "updates=2.ckpt")
    assert again.rows == heard.rows[1:]


def test_a_stage_is_measured_in_its_own_steps(tiny: Path, protocol: Path) -> None:
    heard = Heard()
    fit(build(BY_NAME["pd"], tiny), captions(tiny), heard, validation(protocol, every=3, steps=None, metrics=["contrast"]))
    assert [(clock, sorted(row)) for clock, row in heard.rows] == [(3, ["validation/contrast_8"]), (6, ["validation/contrast_4"])]


def share(rank: int, tiny: Path, protocol: Path, strategy: str) -> tuple[list[Any], int]:
    from pair import WORLD, ddp

    heard, asked = Heard(), validation(protocol)
    drawn: list[int] = []
    how = ddp(LCM) if strategy == "ddp" else {"strategy": strategy, "devices": WORLD, "num_nodes": 1}
    method = build(LCM, tiny, updates=2, optimizer={"lr": 0.0})
    decode = method.backbone.decode
    method.backbone.decode = lambda latents: (drawn.append(len(latents)), decode(latents))[1]
    fit(method, captions(tiny), heard, asked, **how)
    return heard.rows, sum(drawn)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_find_what_one_does(strategy: str, pair: Pair, tiny: Path, protocol: Path) -> None:
    """And share the images, unless the student is split: then it answers all of them together."""
    alone = Heard()
    fit(build(LCM, tiny, updates=2, optimizer={"lr": 0.0}), captions(tiny), alone, validation(protocol))
    (first, mine), (second, theirs) = pair.run(share, tiny, protocol, strategy)
    assert first == second and [clock for clock, _ in first] == [2]
    assert first[0][1] == pytest.approx(alone.rows[0][1], abs=1e-5)
    assert (mine, theirs) == ((16, 16) if strategy == "ddp" else (32, 32))


def test_points_are_measured_by_their_own_law() -> None:
    small = ("--model.pipeline.init_args.width=8", "--model.pipeline.init_args.members=1", "--updates=2")
    heard, asked = Heard(), Validation(every=1, n=64, steps=[4], metrics=["coverage", "energy_distance"])
    trainer, method, data = assemble("toy2d/lcm_ddil.yaml", *small, callbacks=[heard, asked])
    trainer.fit(method, datamodule=data)
    assert [clock for clock, _ in heard.rows] == [1, 2]
    (row,) = method.backbone.measured(method, Test(64, [], [4], 1), lambda name: None)
    expected = {f"validation/{key}_4": row["metrics"][key] for key in ("coverage", "energy_distance")}
    assert heard.rows[1][1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every is 0"),
        ({"n": 15}, "n is 15"),
        ({"steps": []}, "steps is .*: give at least one"),
        ({"protocol": None}, "Validation: data and images are where a protocol's files lie: give the protocol, too"),
        ({"protocol": "shapes"}, "Validation: shapes has its own images: leave data and images out"),
        ({"protocol": "shapes", "data": None}, "shapes are pictures of 32 pixels and the pipeline"),
        ({"n": 41}, "41"),
        ({"protocol": "coco2017_5k"}, "give data DIR that holds what the protocol names, or data FILE and images DIR"),
        ({"protocol": "coco2017"}, "no config protocols/coco2017: .*did you mean protocols/coco2017_5k.yaml"),
        ({"metrics": ["contrst"]}, "no metric 'contrst': did you mean contrast"),
        ({"metrics": ["frechet"]}, "own asks for what cannot be measured: frechet, for"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_update(options: Any, said: str, tiny: Path, protocol: Path) -> None:
    method = None
    with pytest.raises((ValueError, Refusal), match=said):
        asked = validation(protocol, **options)
        method = build(LCM, tiny)
        fit(method, captions(tiny), asked)
    assert method is None or method.student_updates == 0


def test_prompts_are_looked_at_before_data_are_encoded(tiny: Path, protocol: Path) -> None:
    method = build(LCM, tiny)
    (protocol.parent / "prompts.txt").write_text("a small circle\n" * 15)
    with pytest.raises(ValueError, match="Validation: the protocol own has 15 prompts, and 16 are the least"):
        validation(protocol, n=None).setup(None, method, "fit")
    (protocol.parent / "prompts.txt").write_text("a small circle\n" * 15 + "circle " * 90)
    with pytest.raises(ValueError, match="tokens"):
        validation(protocol, n=None).setup(None, method, "fit")
    method.feed.truncate = True
    validation(protocol, n=None).setup(None, method, "fit")


def test_a_pipeline_that_names_no_data_needs_a_protocol(tiny: Path) -> None:
    method = build(LCM, tiny)
    method.backbone.about.pop("dataset")
    with pytest.raises(ValueError, match="Validation: the pipeline .* names no data set: give a protocol, a packaged one or a YAML file"):
        fit(method, captions(tiny), Validation())


def test_what_is_told_are_the_numbers_that_say_most() -> None:
    found = {4: {"density": 1.0, "frechet": 0.6123, "all_right": 0.95}, 1: {"contrast": 0.5, "saturation": 0.25, "vendi": 3.0}}
    assert told(found) == "4 steps: Fréchet 0.6123, all-right 0.95; 1 step: contrast 0.5, saturation 0.25"
    assert told({2: {"energy_distance": 0.03, "coverage": 0.6}}) == "2 steps: Energy distance 0.03"


# The best -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("validation/frechet_4", 2),
        ("validation/all_right_4", 3),
        ("shift/coverage", 3),
        ("shift/teacher", 2),
        ("loss", 2),
        ("mine/own_1", 2),
    ],
)
def test_what_is_better_is_said_by_the_metric(name: str, best: int) -> None:
    heard = Best(name)
    for clock, value in enumerate([0.5, 0.5, 0.25, 0.75, math.nan, math.inf, -math.inf, 0.5]):
        heard.hear(clock, {name: value, "other": 0.0})
        assert heard.due == (clock in (0, best, *((2, 3) if best == clock else ())))
        heard.due = False
    assert heard.clock == best


class Says(Callback):
    """Publishes a number at every update."""

    def __init__(self, values: list[float], name: str = "mine/distance") -> None:
        self.values, self.name = values, name

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        clock = pl_module.student_updates
        pl_module.measures.publish(clock, {self.name: self.values[clock - 1]})


def clocks(folder: Path) -> list[int | None]:
    return [clock_of(path) for path in sorted_checkpoints(folder)]


def test_the_checkpoint_of_the_best_stays(tiny: Path, tmp_path: Path) -> None:
    values = [0.9, 0.3, 0.5, 0.4, 0.6, 0.2]
    save = Checkpoints(every=2, keep=1, folder=str(tmp_path), best="mine/distance")
    fit(build(LCM, tiny, updates=5), captions(tiny), Says(values), save)
    assert clocks(tmp_path) == [2, 5] and save.of_best() == tmp_path / "updates=2.ckpt"

    onwards = Checkpoints(every=9, keep=1, folder=str(tmp_path), best="mine/distance")
    fit(build(LCM, tiny, updates=6), captions(tiny), Says([9.0] * 5 + [0.31]), onwards, ckpt=tmp_path / "updates=5.ckpt")
    assert clocks(tmp_path) == [2, 6] and onwards.of_best() == tmp_path / "updates=2.ckpt"  # 0.31 is held against 0.3
    fit(build(LCM, tiny, updates=7), captions(tiny), Says([9.0] * 6 + [0.1]), onwards, ckpt=tmp_path / "updates=6.ckpt")
    assert clocks(tmp_path) == [7] and onwards.of_best() == tmp_path / "updates=7.ckpt"


def local(rank: int, tiny: Path, folder: Path) -> Any:
    """The number of each process is its own: falling in the first, rising in the second."""
    from pair import ddp

    values = [0.9, 0.8, 0.7, 0.6] if rank == 0 else [0.1, 0.2, 0.3, 0.4]
    save = Checkpoints(every=9, keep=1, folder=str(folder), best="mine/distance")
    fit(build(LCM, tiny, updates=4), captions(tiny), Says(values), save, **ddp(LCM))
    return save.best.state()


def test_the_first_process_says_which_is_the_best(pair: Pair, tiny: Path, tmp_path: Path) -> None:
    """A loss is of the batches of one process: where each went by its own, one would save while another trains on."""
    first, second = pair.run(local, tiny, tmp_path)
    assert first == second and (first["value"], first["clock"]) == (0.6, 4) and clocks(tmp_path) == [4]


def test_a_best_of_another_measurement_is_no_rival() -> None:
    first, second = Best("validation/frechet_4"), Best("validation/frechet_4")
    first.measured_on("a, n 1000")
    first.hear(1, {"validation/frechet_4": 9.0})
    second.remember(first.state())
    second.measured_on("a, n 1000")
    assert (second.value, second.clock) == (9.0, 1)
    second.measured_on("a, n 256")  # whose distances are all larger
    second.hear(2, {"validation/frechet_4": 14.0})
    assert second.due and second.state() == {"name": "validation/frechet_4", "of": "a, n 256", "value": 14.0, "clock": 2}


def test_a_best_that_nobody_can_tell_is_refused_or_told(tiny: Path, tmp_path: Path, caplog: Any) -> None:
    for name, said in (
        ("validation/frechet_4", "validation/frechet_4 is published by the callback Validation: give trainer.callbacks one"),
        ("mine/contrast_4", "of contrast neither more nor less is better"),
    ):
        with pytest.raises(ValueError, match=f"checkpoints.best {name}.*{said}|{said}"):
            fit(build(LCM, tiny), captions(tiny), Checkpoints(folder=str(tmp_path), best=name))
    fit(build(LCM, tiny, updates=1), captions(tiny), Checkpoints(folder=str(tmp_path), best="mine/distanc"))
    assert "checkpoints.best: mine/distanc was never published, so that no checkpoint is the best" in caplog.text
