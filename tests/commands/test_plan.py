"""ddil-fit --plan: what it prints, what it reads, and what a run tells of its own memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import commandline
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import fitting, main, plan
from ddil_lightning.commands.configs import FIT_SHORT, expand
from ddil_lightning.commands.fit import fit
from ddil_lightning.commands.plan import Held, PlanCLI, held, setting_of, table, total
from ddil_lightning.data.captions import Captions
from ddil_lightning.data.writer import Keeping, Writer
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.processes import Processes
from ddil_lightning.records import Context, LatentBatch, Rollout
from ddil_lightning.runs import memory
from ddil_lightning.training.footprint import Footprint, Part, Setting
from qwenimages import make_qwenimage
from sanas import make_sana
from zimages import make_zimage


@pytest.fixture
def bones(light: Path, tmp_path: Path) -> Path:
    """The JSON files of a pipeline, and no weights."""
    folder = tmp_path / "bones"
    shutil.copytree(light, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.txt", "vocab.json"))
    assert not list(folder.rglob("*.safetensors"))
    return folder


def test_a_plan_reads_configurations_alone_and_leaves_nothing(
    bones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [f"model.pipeline={bones}", "data.cache=false", "model.guidance=2", "trainer.accelerator=cpu", "trainer.devices=1"]
    assert fit(["--config", "lcm_ddil.yaml", "--plan", *words]) == 0
    told = capsys.readouterr().out
    lines = told.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) < 160
    assert [line.split()[0] for line in lines[3:9]] == ["teacher", "encoders", "student", "target", "average", "together"]
    assert "most at a time" in told and "it fits" in told and "model.memory.gradient_checkpointing=true" in told
    assert not (tmp_path / "runs").exists()


def test_an_outline_is_the_pipeline_without_values(xl: Path, light: Path, sd3: Path, flux: Path) -> None:
    """Of all classes: tensors by name, shape and type, text states, latents."""
    for folder in (xl, light, sd3, flux):
        real, outline = Pipeline(str(folder), torch.bfloat16), Outline(str(folder), torch.bfloat16, bare=True)
        for name, part in outline.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                mine, theirs = part.state_dict(), getattr(real.pipe, name).state_dict()
                assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
                assert all(p.is_meta for p in part.parameters())
        assert outline.latent_shape == real.latent_shape and outline.size == real.size and outline.predicts == real.predicts
        shapes = [[None if x is None else x.shape for x in backbone.encode_text(["a", "a"], True)] for backbone in (outline, real)]
        assert shapes[0] == shapes[1]


class Four(Captions):
    """Four grey pictures in memory."""

    def __len__(self) -> int:
        return 4

    def prompts(self, index: Any) -> list[str]:
        return ["a small red circle" for _ in index]

    def pixels(self, index: Any) -> torch.Tensor:
        return torch.zeros(len(index), 3, 16, 16)


def test_encoders_stay_where_a_folder_has_no_text(light: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They encode the captions of every batch; a plan took any folder for one that needs no encoder. A file is whole, written or not."""
    rows = {}
    for name, text in (("whole", True), ("bare", False)):
        Writer(tmp_path / name, Four(), Pipeline(str(light)), Keeping(text=text), False, 0, Processes()).write()
    for cache in ("whole", "bare", "new.safetensors"):
        words = [f"model.pipeline={light}", f"data.cache={tmp_path / cache}", "model.guidance=2", "trainer.accelerator=cpu"]
        assert fit(["--config", "lcm_ddil.yaml", "--plan", *words, "trainer.devices=1"]) == 0
        rows[cache] = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:9] if line]
    assert "encoders" in rows["bare"] and "encoders" not in rows["whole"] and rows["whole"] == rows["new.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "side"), [(make_sana, 32), (make_zimage, 16), (make_qwenimage, 16)], ids=["sana", "zimage", "qwen"])
def test_a_plan_of_a_network_that_reads_its_text_under_a_mask(
    make: Any, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Z-Image's is called with lists of texts as long as they are, which without values nobody could know."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (side, side)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a small red circle")
    words = [f"model.pipeline={make(tmp_path / 'p')}", "data.captions.path=pictures", f"data.captions.size={side}", "data.batch_size=4"]
    words += ["trainer.accelerator=cpu", "trainer.devices=1"]
    discriminator = ["model.critic.steps=2", "model.gan.layers=[block0,block1]"]
    roles = {"dmd2": ["student", "critic", "head"], "ladd": ["student", "head"], "lcm": ["student", "target", "average"]}
    for name, own in (("dmd2", discriminator), ("ladd", discriminator), ("lcm", [])):
        assert fit(["--config", f"{name}_lora_sd3.yaml", "--plan", *words, *own]) == 0
        rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:9] if line]
        assert rows[: rows.index("together")] == ["teacher", "encoders", *roles[name]]


def test_a_plan_checks_what_a_run_would_check(light: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step count that the student's grid cannot take: the run was refused, and a plan of it was made."""
    words = [
        "--config",
        "lcm_ddil.yaml",
        "--plan",
        f"model.pipeline={light}",
        "model.guidance=2",
        "data.cache=false",
        "test.student_steps=[60]",
    ]
    said = commandline.refused(capsys, *words)
    assert "60 steps" in said


def test_a_hub_id_that_cannot_be_asked_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stop:
        main.run(fit, "ddil-fit", ["--config", "lcm_ddil_sd15.yaml", "--plan", "model.pipeline=nobody/nothing-at-all"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the configurations of nobody/nothing-at-all could not be fetched" in line


def test_where_a_run_would_take_place() -> None:
    def trainer(**given: Any) -> Any:
        return SimpleNamespace(**{"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": None, **given})

    there = torch.cuda.device_count()
    assert setting_of(trainer(accelerator="cpu"), 3) == Setting(3, "32-true", 1, "", False)
    assert setting_of(trainer(accelerator="gpu", devices=2, precision="bf16-mixed"), 3) == Setting(3, "bf16-mixed", 2, "ddp", True)
    assert setting_of(trainer(accelerator="gpu", devices="0,1,2", strategy="fsdp2", num_nodes=2), 3)[2:5] == (6, "fsdp2", True)
    assert setting_of(trainer(accelerator="gpu", strategy="ddp"), 3)[2:5] == (max(there, 1), "ddp", True)
    assert setting_of(trainer(), 3).cuda is (there > 0)


def test_what_the_host_holds(bones: Path) -> None:
    """Rows in float32, and a buffer as it is when it is full and every state was answered."""
    words = [
        f"model.pipeline={bones}",
        "data.captions=Shapes",
        "data.captions.n=5",
        "data.buffer.capacity=24",
        "data.rollouts.trajectories=6",
        "model.guidance=2",
    ]
    cli = PlanCLI(expand(["--config", "lcm_ddil.yaml", *words], FIT_SHORT))
    latent = torch.Size(cli.model.backbone.latent_shape).numel()
    text = cli.model.backbone.null().text.numel()
    found = held(cli.model, cli.datamodule)
    assert found.cached == 5 * 4 * (latent + text)
    walk = min((walk.nodes for walk in cli.model.walks()), key=len)
    buffer, row = ReplayBuffer(24), torch.arange(24 // len(walk)).repeat(len(walk))
    times = walk.repeat_interleave(24 // len(walk))
    context = Context(torch.zeros(24 // len(walk), *cli.model.backbone.null().text.shape[1:]))
    zeros = torch.zeros(len(times), dtype=torch.long)
    buffer.add(Rollout(torch.randn(len(times), *cli.model.backbone.latent_shape), times, row, zeros, zeros, context), 0, 0)
    (chunk,) = buffer._chunks
    batch = LatentBatch(
        chunk.states.x_t.float(), times, times, zeros, context, None, zeros, torch.ones(len(times)), torch.arange(len(times))
    )
    buffer.answers.of(batch, batch.slot, lambda b: b.x_t)
    kept = [chunk.states.x_t, chunk.c.text, *chunk.answers["unguided"].fields]
    assert found.buffer == sum(x.numel() * x.element_size() for x in kept)
    other = PlanCLI(expand(["--config", "lcm_ddil.yaml", *words, "data.buffer.answers=none"], FIT_SHORT))
    assert held(other.model, other.datamodule).buffer == sum(x.numel() * x.element_size() for x in kept[:2])
    assert PlanCLI(expand(["--config", "lcm.yaml", *words], FIT_SHORT)).datamodule.prior.rollouts == 0


def test_every_process_has_a_copy_of_what_the_host_holds() -> None:
    """Two machines of eight: each holds eight times all rows and eight buffers; a plan printed one of each."""
    method: Any = SimpleNamespace(backbone=SimpleNamespace(path="p", size=None), gradient_checkpointing=False)
    made, host = Footprint((Part("student", 2**30, 0, 0, True),), 0, 0, 0), Held(3 * 2**30, 2**29)
    there = setting_of(SimpleNamespace(accelerator="gpu", devices=8, num_nodes=2, strategy="ddp", precision=None), 4)
    told = table(method, there, made, made, host)
    (line,) = [line for line in told if line.startswith("encoded data")]
    assert (
        line == "encoded data in memory 24.00, a full buffer of roll-outs 4.00, on the host of a machine, whose 8 processes have one each"
    )
    assert "data.cache=FILE" in told[told.index(line) + 1] and max(map(len, told)) < 160 and "most at a time 1.00" in told[-1]
    # On a CPU all of them share the memory that it is held against.
    assert total(made, there._replace(cuda=False), host) == 8 * (2**30 + 3 * 2**30 + 2**29) and total(made, there, host) == 2**30
    (one,) = [line for line in table(method, Setting(4), made, made, host) if line.startswith("encoded data")]
    assert one == "encoded data in memory 3.00, a full buffer of roll-outs 0.50, on the host"


def test_a_run_tells_its_peak(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 <= summary["peak_memory_gib"] < 64 and "planned_memory_gib" not in summary  # too short for a plan
    assert "Peak memory" in (finished / "report.html").read_text()


def test_a_longer_run_tells_its_plan_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cli: Any = SimpleNamespace(meter=SimpleNamespace(peak=3 * 2**30), model=None, datamodule=None, trainer=None)
    monkeypatch.setattr(plan, "expected", lambda *parts: 2**31)
    assert fitting.peak(cli, 599) == {"peak_memory_gib": 3.0}
    assert fitting.peak(cli, 601) == {"peak_memory_gib": 3.0, "planned_memory_gib": 2.0}
    assert fitting.told_of_memory(fitting.peak(cli, 601)) == "peak memory of the training 3.00 GiB, planned 2.00\n"
    monkeypatch.setattr(plan, "expected", lambda *parts: 1 / 0)
    assert fitting.peak(cli, 601) == {"peak_memory_gib": 3.0}
    cli.meter.peak = None
    assert fitting.peak(cli, 601) == {} and fitting.told_of_memory({}) == ""


def test_the_meter_measures_what_is_held_and_mapped(tmp_path: Path) -> None:
    """256 MiB that are held, and let go, are in the peak; weights of a mapped file are counted, the rest of it is not."""
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.ones(2**22), "b": torch.ones(2**25)}, tmp_path / "w.safetensors")
    meter = memory.Meter()
    meter.begin()
    mapped = load_file(tmp_path / "w.safetensors")
    net = torch.nn.Linear(1, 1)
    net.weight = torch.nn.Parameter(mapped["a"])
    float(mapped["b"].sum() + mapped["a"].sum())
    held = torch.ones(2**26)
    del held
    meter.end(torch.device("cpu"), [net])
    assert meter.peak is not None and meter.peak == pytest.approx(2**28 + 2**24, rel=0.1)


def test_words(light: Path) -> None:
    assert expand(["--config", "lcm", "--plan", "updates=3"], {})[2:] == ["--plan", "--updates=3"]
