"""Two processes against one, for every method of suite.METHODS: gloo, on the CPU."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import distributed

from ddil_lightning import processes
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.processes import PATIENCE, Elsewhere, Processes, wait_at_most
from ddil_lightning.training.clock import Clock
from ddil_lightning.training.sharding import be_patient
from pair import WORLD, Pair, ddp, together
from suite import BATCH, BY_NAME, FORWARD, METHODS, MIXED, PER_METHOD, Entry, Gradients, Run, build, captions, equal, fit, state

UPDATES = 4
TOGETHER = ("ctm-denoising", "f-distill")
"""Whose loss weighs by a statistic of the batches of all processes (test_batch_statistics): no process has its gradient alone."""


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


class Pretend(SingleDeviceStrategy):
    """One process that takes itself for rank `rank` of WORLD: the same data, noise and plan, and nobody to average with."""

    def __init__(self, rank: int) -> None:
        super().__init__("cpu")
        self.global_rank, self.world_size = rank, WORLD


def settings(entry: Entry, folder: Path, **kwargs: Any) -> tuple[Any, Any]:
    return build(entry, folder, updates=UPDATES, **kwargs), captions(folder, MIXED)


def report(run: Run, gradients: Gradients) -> dict[str, Any]:
    return {"state": state(run), "steps": gradients.steps, "done": run.data.done, "mine": run.data.buffer.state_dict()}


def straight_and_resumed(rank: int, entry: Entry, tiny: Path, folder: Path) -> list[dict[str, Any]]:
    """What a process reports of a run, and of the same run resumed from its middle."""
    seen = Gradients()
    save = Checkpoints(every=2, keep=9, folder=str(folder))
    straight = report(fit(*settings(entry, tiny, optimizer={"clip": 0.0}), seen, save, **ddp(entry)), seen)
    resumed = fit(*settings(entry, tiny, optimizer={"clip": 0.0}), ckpt=folder / "updates=2.ckpt", **ddp(entry))
    return [straight, report(resumed, Gradients())]


@pytest.fixture(scope="module", **{"params": PER_METHOD["argvalues"], "ids": PER_METHOD["ids"]})
def ranks(request: pytest.FixtureRequest, pair: Pair, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Entry, Any, Any]:
    """(method, what the ranks of a run report, what they report when the run is resumed from its middle)."""
    entry, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    straight, resumed = zip(*pair.run(straight_and_resumed, entry, tiny, folder), strict=True)
    return entry, straight, resumed


def test_ranks_stay_equal(ranks: Any) -> None:
    _, (a, b), _ = ranks
    assert a["state"]["clock"] == UPDATES and a["done"] == b["done"]
    assert equal(a["state"]["weights"], b["state"]["weights"]) and equal(a["state"]["optimizers"], b["state"]["optimizers"])


def test_ranks_make_the_same_calls_on_their_own_samples(ranks: Any) -> None:
    """The plan is shared (times, actors, number of network calls), noise and captions are not."""
    entry, (a, b), _ = ranks
    # Of a frozen network each asks for the states that it has no answer to; EMD's student is asked for the latents of node 0 along a chain.
    own = ("teacher", "former", *(("student",) if entry.name == "emd" else ()))
    counts = [{k: n for k, n in x["state"]["evaluations"].items() if k not in own} for x in (a, b)]
    assert counts[0] == counts[1]
    mine, theirs = a["mine"]["chunks"], b["mine"]["chunks"]
    assert len(mine) == len(theirs) > 0
    for x, y in zip(mine, theirs, strict=True):
        assert all(torch.equal(x["states"][name], y["states"][name]) for name in ("t", "source", "actors"))
        assert x["at"] == y["at"] and not torch.equal(x["states"]["x_t"], y["states"]["x_t"])


def test_the_gradient_is_the_mean_over_the_ranks(ranks: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first averaged gradient against two single processes, each of which takes itself for one of the ranks."""
    entry, (a, b), _ = ranks
    alone = []
    monkeypatch.setattr(Processes, "by_first", lambda self, job: job())  # there is nobody to hear it of
    for rank in range(WORLD):
        seen = Gradients()
        fit(*settings(entry, tiny, optimizer={"clip": 0.0}), seen, limit_train_batches=1, max_epochs=1, strategy=Pretend(rank))
        alone.append(seen.steps[0])
    scale = max(float(x.abs().max()) for x in alone[0].values())
    for name, grad in a["steps"][0].items():
        assert torch.equal(grad, b["steps"][0][name])
        if entry.name in TOGETHER:
            continue
        torch.testing.assert_close(grad, (alone[0][name] + alone[1][name]) / WORLD, rtol=1e-5, atol=1e-5 * scale)
    assert any(not torch.allclose(alone[0][name], alone[1][name], atol=1e-3 * scale) for name in alone[0])


def test_resuming_is_exact_on_every_rank(ranks: Any) -> None:
    """All but the count of evaluations: that of the first process is in the checkpoint."""
    _, straight, resumed = ranks
    for rank, (a, b) in enumerate(zip(straight, resumed, strict=True)):
        mine, theirs = ({k: v for k, v in x["state"].items() if k != "evaluations" or not rank} for x in (a, b))
        assert equal(mine, theirs) and equal(a["mine"], b["mine"]) and a["done"] == b["done"]


def test_both_ranks_buffers_are_in_the_checkpoint(ranks: Any) -> None:
    _, straight, _ = ranks
    kept = straight[0]["state"]["data"]["buffers"]
    assert len(kept) == WORLD and all(equal(kept[rank], straight[rank]["mine"]) for rank in range(WORLD))


class Deaf(distributed.ProcessGroup):
    """A process group that can do nothing together, in the place of NCCL's: what is gathered by it would be on a GPU."""


def gathered_over_the_host(rank: int, meet: str) -> list[Any]:
    """What the first process collects of all, by the group of a run whose own is deaf."""
    distributed.Backend.register_backend("deaf", lambda store, rank, size, timeout: Deaf(rank, size), devices=["cpu"])
    distributed.init_process_group("deaf", init_method=f"file://{meet}", rank=rank, world_size=WORLD)
    us: Any = Processes(SimpleNamespace(global_rank=rank, world_size=WORLD, strategy=object()))
    found = us.collected({"buffer": torch.full((3,), float(rank))}, us.host())
    distributed.destroy_process_group()
    return found


def test_buffers_are_collected_over_the_host(pair: Pair, tmp_path: Path) -> None:
    """By gloo, whatever the run's own group is: NCCL puts the buffers of all ranks on the first GPU, beside what trains there."""
    first, other = pair.workers.run(gathered_over_the_host, str(tmp_path / "meet"), timeout=60)
    assert other == [] and [entry["buffer"].tolist() for entry in first] == [[0.0] * 3, [1.0] * 3]


def group_of_the_run(rank: int, tiny: Path) -> Any:
    data = captions(tiny, MIXED)
    fit(build(METHODS[0], tiny, updates=1), data, **ddp(METHODS[0]))
    return data._host


def test_on_cpus_the_group_of_the_run_is_taken(pair: Pair, tiny: Path) -> None:
    assert pair.run(group_of_the_run, tiny, timeout=60) == [None, None]


def on_eight_bits(rank: int, tiny: Path) -> dict[str, Any]:
    entry = BY_NAME["lcm-lora"]
    return state(fit(*settings(entry, tiny, pipeline=Pipeline(str(tiny), torch.bfloat16, quantize="int8")), **ddp(entry)))


@pytest.mark.slow
def test_a_quantised_base_is_each_process_own(pair: Pair, tiny: Path) -> None:
    """DDP would send it around, and cannot."""
    pytest.importorskip("torchao")
    a, b = pair.run(on_eight_bits, tiny)
    assert equal(a["weights"], b["weights"]) and equal(a["optimizers"], b["optimizers"])


@pytest.mark.parametrize(
    ("name", "given", "looks"), [("dmd2", {}, True), ("dmd2", {"find_unused_parameters": False}, False), ("lcm", {}, None)]
)
def test_a_method_with_turns_has_ddp_look_for_unused_parameters(name: str, given: dict[str, bool], looks: bool | None, tiny: Path) -> None:
    """Else it stops at the first batch, of which the student has no gradient."""
    method, strategy = build(BY_NAME[name], tiny), DDPStrategy(**given)
    method.trainer = SimpleNamespace(strategy=strategy, precision="32-true", callbacks=[Clock()])
    method.setup("fit")
    assert strategy._ddp_kwargs.get("find_unused_parameters") is looks


def test_ddp_sends_no_shared_weights_around(tiny: Path) -> None:
    method = build(BY_NAME["lcm-lora"], tiny)
    fit(method, captions(tiny), max_steps=1)
    left, shared = set(method._ddp_params_and_buffers_to_ignore), {id(p) for role in method.roles.values() for p in role.shared}
    assert {id(p) for name, p in method.named_parameters(remove_duplicate=False) if name in left} == shared
    assert not any(p.requires_grad for name, p in method.named_parameters(remove_duplicate=False) if name in left)


def begun_or_gone_on(rank: int, tiny: Path, folder: Path, ckpt: Path | None, among: dict[str, Any]) -> dict[str, Any]:
    """What a process reports of a run of six updates, from its beginning or from a checkpoint. One is written after four."""
    entry, save = BY_NAME["lcm"], Checkpoints(every=4, keep=9, folder=str(folder))
    run = fit(build(entry, tiny, updates=6), captions(tiny, MIXED, rollouts={"every": 3}), save, ckpt=ckpt, **among)
    found = {"clock": run.method.student_updates, "place": run.data._place(), "done": run.data.done, "weights": state(run)["weights"]}
    return found | {"calls": run.method.evaluations["student"], "at": [chunk["at"] for chunk in run.data.buffer.state_dict()["chunks"]]}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    strategy: str, pair: Pair, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From two to one, and from one to two: with everything but the roll-outs that a process has none of, and at the same row of 30."""
    two = ddp(BY_NAME["lcm"]) if strategy == "ddp" else {"strategy": "fsdp2", "devices": WORLD, "num_nodes": 1}
    pair.run(begun_or_gone_on, tiny, tmp_path / "two", None, two, timeout=120)
    middle = tmp_path / "two" / "updates=4.ckpt"
    one = begun_or_gone_on(0, tiny, tmp_path / "one", middle, {})
    # Four batches of 8, of three an epoch, are 8 rows into the second: two of 4, of seven an epoch, and two more until update 6.
    assert (one["clock"], one["done"], one["place"]) == (6, 6, 7 + 2 + 2)
    assert one["at"][0] == torch.load(middle, weights_only=True)["DDILDataModule"]["buffers"][0]["chunks"][0]["at"]
    assert "goes on with 1 process with batches of 4 in place of 2 processes with batches of 4" in caplog.text
    if strategy == "fsdp2":
        return  # which refuses a checkpoint of whole networks
    begun_or_gone_on(0, tiny, tmp_path / "alone", None, {})
    a, b = pair.run(begun_or_gone_on, tiny, tmp_path / "both", tmp_path / "alone" / "updates=4.ckpt", two, timeout=120)
    # Four batches of 4 are 16 rows: two of 8.
    assert (a["clock"], a["done"], a["place"]) == (6, 6, 2 + 2) and equal(a["weights"], b["weights"])
    # What was rolled out before is gone from both, and both have asked their students as often since.
    assert a["calls"] == b["calls"] and a["at"] == b["at"] and a["at"] and all(clock >= 4 for clock, *_ in a["at"])


def test_ranks_share_out_an_epoch(tiny: Path) -> None:
    """Two processes with half the batch see the rows of one process, batch by batch."""
    rows: list[list[list[int]]] = []
    for rank, world, size in ((0, 1, BATCH), (0, 2, BATCH // 2), (1, 2, BATCH // 2)):
        made = captions(tiny, batch_size=size)
        fit(build(METHODS[0], tiny, updates=1), made, strategy=Pretend(rank) if world > 1 else "auto")
        made.done = 0
        rows.append([batch.rows.tolist() for batch in made.train_dataloader()])
    assert rows[0] == [a + b for a, b in zip(rows[1], rows[2], strict=True)]


class Heard(Callback):
    """The losses by source that a gated schedule would hear after every update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(pl_module.measures.source_losses)


def hearing(rank: int, tiny: Path) -> list[dict[str, float]]:
    heard = Heard()
    fit(build(METHODS[0], tiny, updates=UPDATES), captions(tiny, MIXED, buffer={"capacity": 0}), heard, **ddp(METHODS[0]))
    return heard.seen


def test_all_processes_hear_the_same_losses(pair: Pair, tiny: Path) -> None:
    """Their mean: else a gated prior would change on one process and not on the other, and the two would wait for each other."""
    one, other = pair.run(hearing, tiny, timeout=60)
    assert one == other and len(one) == UPDATES and all(len(found) > 1 for found in one)


class Broadcasts(Callback):
    """How many values the first process has sent to the others since training began."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.seen = patch, 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        send = distributed.broadcast
        self.patch.setattr(
            distributed, "broadcast", lambda *given, **kwargs: (setattr(self, "seen", self.seen + 1), send(*given, **kwargs))
        )


def sent_around(rank: int, tiny: Path, folder: Path, saves: bool) -> int:
    with pytest.MonkeyPatch.context() as patch:
        counted, more = Broadcasts(patch), [Checkpoints(every=0, folder=str(folder))] if saves else []
        fit(build(METHODS[0], tiny, updates=UPDATES), captions(tiny), *more, counted, limit_train_batches=UPDATES + 1, **ddp(METHODS[0]))
        return counted.seen


def test_no_batch_waits_for_word_of_a_signal_that_lightning_does_not_hear(pair: Pair, tiny: Path, tmp_path: Path) -> None:
    """Which it sends around before every batch; where nobody else listens for signals it does."""
    assert pair.run(sent_around, tiny, tmp_path / "ours", True, timeout=60) == [0, 0]
    assert pair.run(sent_around, tiny, tmp_path / "lightning", False, timeout=60) == [UPDATES, UPDATES]


class Patient(Callback):
    """How long this process would wait for the other, in hours: in the first batch, in the second, and after the last."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        group: Any = distributed.group.WORLD
        self.seen.append(group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600)

    on_fit_end = on_train_batch_start


def waited_for(rank: int, tiny: Path, days: int | None) -> list[float]:
    patient = Patient()
    wait_at_most(PATIENCE if days is None else timedelta(days=days))  # as a launcher would have it
    own = {} if days is None else {"timeout": timedelta(days=days)}
    among = {**ddp(METHODS[0]), "strategy": DDPStrategy(process_group_backend="gloo", **own)}
    be_patient(among["strategy"])
    fit(build(METHODS[0], tiny, updates=2), captions(tiny), patient, **among)
    return patient.seen


def test_processes_in_training_wait_for_hours_and_no_longer_for_days(pair: Pair, tiny: Path) -> None:
    """From the first batch to the last; not where a config gives a time of its own."""
    assert pair.run(waited_for, tiny, None, timeout=60) == [[168, 2, 168]] * 2
    assert pair.run(waited_for, tiny, 7, timeout=60) == [[168, 168, 168]] * 2


def failing(rank: int) -> tuple[str, float]:
    """What a process says, and after how many seconds, of a share of which the second one fails at once and the first has for long."""
    us, begun = together(rank), time.monotonic()

    def share() -> None:
        for _ in us.watching(range(600)):
            if rank == 1:
                raise ValueError("row 7 of the data: not a readable image")
            time.sleep(0.1)

    with pytest.raises((ValueError, Elsewhere)) as raised:
        us.by_all(share)
    assert us.by_all(lambda: rank) == rank and list(us.watching(range(3))) == [0, 1, 2]  # it is no failure of the next job
    return f"{type(raised.value).__name__}: {raised.value}", time.monotonic() - begun


def test_what_fails_in_one_process_soon_ends_the_share_of_the_others(pair: Pair) -> None:
    """It was known when the last share was done, which may be days later."""
    said = "row 7 of the data: not a readable image"
    (first, seconds), (second, _) = pair.run(failing, timeout=60)
    assert (first, second) == (f"Elsewhere: {said}", f"ValueError: {said}") and seconds < 20


@pytest.mark.parametrize("how", ["by_all", "alike"])
def test_what_has_failed_is_told_while_the_others_go_on(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One whose share cannot be ended from outside is waited for, but not in silence."""
    told = threading.Event()
    wait = lambda answer: (told.wait(10), answer)[1]  # noqa: E731
    strategy = SimpleNamespace(reduce_boolean_decision=lambda fine: wait(False))
    us = Processes(SimpleNamespace(global_rank=1, world_size=2, strategy=strategy))
    monkeypatch.setattr(us, "gathered", lambda mine: wait([None, mine]))
    monkeypatch.setattr(processes, "SILENCE", 0.05)
    monkeypatch.setattr(processes, "print", lambda *given, **kwargs: (print(*given, **kwargs), told.set()), raising=False)

    def broken() -> None:
        raise ValueError("row 7 of the data: not a readable image")

    with pytest.raises(ValueError, match="row 7"):
        getattr(us, how)(broken)
    assert told.is_set()
    assert capsys.readouterr().err == "process 1 of 2: row 7 of the data: not a readable image (it waits for the others to end)\n"


class PoisonOne(Callback):
    """Breaks the student of the second process, before an update or before a roll-out."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_rank == 1 and pl_module.student_updates == self.update:
            next(pl_module.student.parameters()).data.fill_(float("nan"))


def stopped(rank: int, tiny: Path, prior: SamplingPrior) -> str:
    """What a process says of the number that the second one has met."""
    with pytest.raises(FloatingPointError) as raised:
        fit(build(METHODS[0], tiny, updates=UPDATES), captions(tiny, prior, rollouts={"every": 1}), PoisonOne(2), **ddp(METHODS[0]))
    return str(raised.value)


@pytest.mark.parametrize(
    ("prior", "words"), [(FORWARD, ("the loss is not finite on another", "the loss is nan")), (MIXED, ("of another", "policy"))]
)
def test_all_processes_stop_when_one_meets_a_number_that_is_not_finite(
    prior: SamplingPrior, words: tuple[str, str], pair: Pair, tiny: Path
) -> None:
    for said, expected in zip(pair.run(stopped, tiny, prior, timeout=60), words, strict=True):
        assert expected in said
