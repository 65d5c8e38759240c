"""Networks sharded over two processes (fsdp2) against whole ones (ddp), for every method: gloo, on the CPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor

from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.commands.fitting import fit as ddil_fit
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.methods import DMD2
from ddil_lightning.training.clock import Clock
from ddil_lightning.training.sharding import Sharded
from pair import WORLD, Pair, ddp
from pixarts import make_pixart
from suite import ALL, BY_NAME, FORWARD, METHODS, MIXED, Entry, Gradients, Run, backbone, build, captions, equal, fit, pictures

UPDATES = 4
ONE_EACH = [next(entry for entry in METHODS if entry.method is method) for method in dict.fromkeys(entry.method for entry in METHODS)]
TWO = {"devices": WORLD, "num_nodes": 1}


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


def local(x: Any) -> Any:
    """A process's own share, in dicts and lists too."""
    if isinstance(x, dict):
        return {k: local(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [local(v) for v in x]
    return x.to_local() if hasattr(x, "to_local") else x


def report(run: Run, seen: Gradients) -> dict[str, Any]:
    """What a process has at the end of a run: its shares, and on rank 0 the whole student."""
    gradients = [{n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in step.items()} for step in seen.steps]
    method = run.method
    found = {"mine": local(method.state_dict()), "optimizers": [local(o.state_dict()) for o in run.trainer.optimizers]}
    found |= {"gradients": gradients, "evaluations": method.evaluations, "rows": run.rows, "buffer": run.data.buffer.state_dict()}
    return found | {"deployed": method.deployment.network.state_dict() if run.trainer.is_global_zero else None}


def length(entry: Entry) -> int:
    """How many updates a run has, which is cut in its middle: the second stage of a plan begins after three."""
    return UPDATES if "stages" in entry.kwargs else 2


def every_way(rank: int, entry: Entry, tiny: Path, folder: Path) -> dict[str, Any]:
    """What a process reports of a run under ddp and under fsdp2, and of runs that go on from the sharded checkpoint of its middle."""
    n = length(entry)
    middle = f"updates={n // 2}.ckpt"

    def run(*callbacks: Any, **kwargs: Any) -> dict[str, Any]:
        seen = Gradients()
        data = captions(tiny, MIXED, rollouts={"every": 1})
        return report(fit(build(entry, tiny, updates=n), data, seen, *callbacks, **kwargs), seen)

    sharded: Any = {"strategy": "fsdp2", **TWO}
    save = {kind: Checkpoints(every=n // 2, keep=9, folder=str(folder / kind)) for kind in ("ddp", "fsdp2")}
    found = {"ddp": run(save["ddp"], **ddp(entry)), "fsdp2": run(save["fsdp2"], **sharded)}
    found["resumed"] = run(ckpt=folder / "fsdp2" / middle, **sharded)
    found["whole"] = run(ckpt=folder / "fsdp2" / middle, **ddp(entry))
    with pytest.raises(ValueError) as raised:
        run(ckpt=folder / "ddp" / middle, **sharded)
    return found | {"refused": str(raised.value)}


# The ordinary tests shard a method with two optimisers, the slow ones the others too.
MARKED = [pytest.param(entry, marks=() if entry.name == "dmd2" else pytest.mark.slow, id=entry.name) for entry in ONE_EACH]


@pytest.fixture(scope="module", params=MARKED)
def runs(request: pytest.FixtureRequest, pair: Pair, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the processes report, by the kind of run, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp(request.param.name)
    found = pair.run(every_way, request.param, tiny, folder)
    about = {"folder": folder, "name": request.param.name, "updates": length(request.param)}
    return about | {kind: [reported[kind] for reported in found] for kind in found[0]}


def test_training_is_that_of_whole_networks(runs: Any) -> None:
    """Clipped gradients of every optimiser step, and losses, to rounding. Adam makes that rounding visible where a gradient is next to
    nothing, so the weights at the end are compared by their norm."""
    whole, sharded = runs["ddp"][0], runs["fsdp2"][0]
    asked, there = dict(whole["evaluations"]), dict(sharded["evaluations"])
    if runs["name"] == "emd":  # whose student is asked for all rows where it is split, for every process must ask as often (EMD.moving)
        assert asked.pop("student") < there.pop("student")
    assert asked == there and len(whole["rows"]) == len(sharded["rows"]) == runs["updates"]
    for a, b in zip(whole["rows"], sharded["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    for n, (mine, theirs) in enumerate(zip(sharded["gradients"], whole["gradients"], strict=True)):
        moved = [{name for name, grad in found.items() if grad.any()} for found in (mine, theirs)]
        assert (
            moved[0] == moved[1]
        )  # what a step does not use has a gradient of zero under ddp, and here none, or zero where that is asked for
        size = max(float(grad.norm()) for grad in theirs.values())
        for name, grad in mine.items():
            assert float((grad - theirs[name]).norm()) < (3e-2 if n else 1e-3) * (float(theirs[name].norm()) + 1e-2 * size), (n, name)
    a, b = (torch.cat([x.flatten() for x in run["deployed"].values()]) for run in (whole, sharded))
    assert whole["deployed"].keys() == sharded["deployed"].keys() and float((a - b).norm()) < 1e-3 * float(a.norm())


def test_a_process_holds_its_share_alone(runs: Any) -> None:
    """Of weights, averages and optimiser states."""

    def numbers(x: Any) -> int:
        values = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
        return x.numel() if isinstance(x, Tensor) else sum(map(numbers, values))

    for kind in ("mine", "optimizers"):
        whole = numbers(runs["ddp"][0][kind])
        shares = [numbers(runs["fsdp2"][rank][kind]) for rank in range(WORLD)]
        assert max(shares) < 0.6 * whole and sum(shares) < 1.1 * whole


def test_resuming_is_exact(runs: Any) -> None:
    assert runs["fsdp2"][0]["evaluations"] == runs["resumed"][0]["evaluations"]  # the first process's are in the checkpoint
    for a, b in zip(runs["fsdp2"], runs["resumed"], strict=True):
        assert all(equal(a[name], b[name]) for name in ("mine", "optimizers", "buffer", "deployed"))
        assert a["rows"][runs["updates"] // 2 :] == b["rows"]


def test_a_sharded_checkpoint_is_a_checkpoint(runs: Any) -> None:
    """Whole networks go on from it; the other way round is refused, because the optimisers' states are numbered otherwise."""
    middle = f"updates={runs['updates'] // 2}.ckpt"
    for straight, resumed in zip(runs["ddp"], runs["whole"], strict=True):
        assert resumed["rows"][0]["student_updates"] == runs["updates"] // 2 + 1 and straight["mine"].keys() == resumed["mine"].keys()
        a, b = (torch.cat([x.flatten().double() for x in run["mine"].values()]) for run in (straight, resumed))
        assert float((a - b).norm()) < 1e-2 * float(a.norm())
    for said in runs["refused"]:
        assert f"{middle} was written with whole networks: go on without trainer.strategy=fsdp2" in said
    kept = [torch.load(runs["folder"] / kind / middle, weights_only=True)["optimizer_states"] for kind in ("ddp", "fsdp2")]
    for whole, sharded in zip(*kept, strict=True):
        assert len(whole["state"]) == len(sharded["state"]) > 0
        a, b = ([(s["step"], s["exp_avg"]) for s in found["state"].values()] for found in (whole, sharded))
        assert [step for step, _ in a] == [step for step, _ in b]
        a, b = (torch.cat([x.flatten() for _, x in found]) for found in (a, b))
        assert float((a - b).norm()) < 1e-2 * float(a.norm())


def on_a_flow(rank: int, folder: Path) -> dict[str, Any]:
    """Rows of DMD2 on Stable Diffusion 3's or Flux's transformer, a GAN at two depths and a critic that is pulled, whole and sharded."""
    gan = {"weight": 5e-3, "critic_weight": 1e-2, "layers": ("block1", "block2")}
    entry = Entry("dmd2", DMD2, {"guidance": 3.0, "critic": {"steps": 2, "pull": 0.02}, "gan": gan}, unused=True)
    ways: dict[str, Any] = {"ddp": ddp(entry), "fsdp2": {"strategy": "fsdp2", **TWO}}
    return {name: fit(build(entry, folder, updates=2), captions(folder, MIXED), **way).rows for name, way in ways.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_transformer_of_a_flow_is_sharded_by_its_blocks(name: str, pair: Pair, request: pytest.FixtureRequest) -> None:
    for found in pair.run(on_a_flow, request.getfixturevalue(name)):
        assert len(found["ddp"]) == len(found["fsdp2"]) == 2
        for a, b in zip(found["ddp"], found["fsdp2"], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def config(tiny: Path, folder: Path) -> Path:
    """A run in stages with everything that looks at the student on its way."""
    path = folder / "staged.yaml"
    path.write_text(f"""
model:
  class_path: PD
  init_args:
    pipeline: {tiny}
    guidance: 2.0
    w_conditioned: false
    teacher_steps: 8
    stages: [{{steps: 4, updates: 3}}, {{steps: 2, updates: 3}}]
    ema: 0.9
    reflect: static
    memory: {{gradient_checkpointing: true}}
    log_every: 1
data: {{batch_size: 4, prior: {{forward: 0.5, student: 0.25, teacher: 0.25}}, rollouts: {{every: 2}}}}
test: {{n: 0}}
previews: {{every: 3, count: 2, teacher_steps: [4]}}
checkpoints: {{every: 3}}
trainer:
  strategy: fsdp2
  precision: bf16-mixed
  devices: {WORLD}
  callbacks+:
    - class_path: ShiftProbe
      init_args: {{every: 3, count: 8, steps: 2, teacher_steps: 4}}
""")
    return path


def by_the_command_line(rank: int, *words: str) -> int:
    return ddil_fit(list(words))


@pytest.mark.slow
def test_a_run_by_the_command_line(pair: Pair, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Previews, probe, stages, checkpoints, the export and its check, in bf16 and with gradient checkpointing."""
    monkeypatch.chdir(tmp_path)
    assert pair.run(by_the_command_line, "--config", str(config(tiny, tmp_path)), "--run_dir", "run") == [0] * WORLD
    run = tmp_path / "run"
    assert {p.name for p in (run / "stages").iterdir()} == {"01-4-steps", "02-2-steps"}
    assert [p.stem for p in sorted((run / "samples").glob("*.png"))] == ["000000", "000003", "000006"]
    assert "shift/teacher" in (run / "metrics.csv").read_text().splitlines()[0]
    assert json.loads((run / "summary.json").read_text())["export_difference"] < 1e-3
    # The first stage's student has become the teacher; what was exported last is what the last checkpoint holds.
    unets = [load_file(p / "unet" / "diffusion_pytorch_model.safetensors") for p in (run / "stages" / "02-2-steps", run / "pipeline")]
    kept = torch.load(run / "checkpoints" / "updates=6.ckpt", weights_only=True)["state_dict"]
    for name, weight in unets[0].items():
        assert torch.equal(weight, unets[1][name]) and torch.equal(weight, kept[f"average.unet.{name}"])


class Poisoned(DDILDataModule):
    """Its second process draws latents that are not finite."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        drawn: Any = super().on_after_batch_transfer(batch, dataloader_idx)
        return drawn._replace(x_t=drawn.x_t * float("nan")) if self.trainer and self.trainer.global_rank else drawn


def stopped(rank: int, tiny: Path) -> str:
    """What a process says of the number that the second one has met."""
    with pytest.raises(FloatingPointError) as raised:
        fit(build(METHODS[0], tiny, updates=UPDATES), Poisoned(pictures(tiny), FORWARD, batch_size=4), strategy="fsdp2", **TWO)
    return str(raised.value)


def test_all_processes_stop_when_one_meets_a_number_that_is_not_finite(pair: Pair, tiny: Path) -> None:
    """The search for the network to blame asks sharded networks too, and must not leave one process waiting for the other."""
    first, second = pair.run(stopped, tiny, timeout=150)
    assert "the loss is not finite on another" in first
    assert re.search("the loss is nan.*the latents themselves are not finite", second)


@pytest.mark.parametrize("strategy", [ModelParallelStrategy, FSDPStrategy])
@pytest.mark.parametrize("entry", **ALL)
def test_another_strategy_that_splits_networks_is_refused(entry: Entry, strategy: Any, tiny: Path) -> None:
    """Before anything is sharded: in setup, which comes before the strategy's own."""
    method = build(entry, tiny)
    method.trainer = SimpleNamespace(strategy=strategy(), precision="32-true", callbacks=[Clock()])
    with pytest.raises(ValueError, match=f"trainer.strategy {strategy.__name__} splits the networks .* not supported: take fsdp2"):
        method.setup("fit")


def test_adapters_on_one_network_are_refused_over_shards(tiny: Path) -> None:
    method = build(BY_NAME["lcm-lora"], tiny)
    method.trainer = SimpleNamespace(strategy=Sharded(), precision="32-true", callbacks=[Clock()])
    with pytest.raises(ValueError, match=r"model.adapter puts all roles on one frozen network.* take trainer.strategy ddp"):
        method.setup("fit")


def test_a_gradient_scaler_is_refused_over_shards(tiny: Path) -> None:
    method = build(METHODS[0], tiny)
    method.trainer = SimpleNamespace(strategy=Sharded(), precision="16-mixed", callbacks=[Clock()])
    with pytest.raises(ValueError, match="16-mixed scales gradients, which is not supported under fsdp2: take bf16-mixed"):
        method.setup("fit")


def loaded_before(rank: int, entry: Entry, folder: Path, out: Path) -> dict[str, Any]:
    """As `every_way`, after the pipeline is there: T5 draws numbers as it is loaded, and the first run's head would begin with others."""
    backbone(folder)
    return every_way(rank, entry, folder, out)


@pytest.mark.slow
def test_a_transformer_is_sharded(pair: Pair, tmp_path: Path) -> None:
    """PixArt's blocks, whose discriminator reads what leaves them, train and resume as whole networks do."""
    entry = Entry("dmd2", DMD2, {"guidance": 4.5, "critic": {"steps": 2}, "gan": {"layers": ["block0", "block1"]}}, unused=True)
    found = pair.run(loaded_before, entry, make_pixart(tmp_path / "pixart"), tmp_path)
    runs = {"name": entry.name, "updates": length(entry)} | {kind: [reported[kind] for reported in found] for kind in found[0]}
    test_training_is_that_of_whole_networks(runs)
    test_a_process_holds_its_share_alone(runs)
    assert equal(runs["fsdp2"][0]["deployed"], runs["resumed"][0]["deployed"])
