"""What a CUDA device alone can show: `make test ARGS="-m gpu"` where there is one. One case runs everywhere, so that it stays true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import main
from ddil_lightning.commands.fit import fit as ddil_fit
from ddil_lightning.runs import export
from suite import BY_NAME, METHODS, captions, fit, options


class Places(Callback):
    """Where everything that a step needs is while it is trained, and the encoders, which nobody asks once the data are encoded."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        backbone = pl_module.backbone
        idle = [p for part in backbone.encoder_parts() for p in part.parameters()]
        parts = [p for part in (pl_module, *backbone.parts()) for p in part.parameters() if not any(p is q for q in idle)]
        self.found = {batch.x_t.device.type, backbone.device.type, *(p.device.type for p in parts)}
        self.idle = {p.device.type for p in idle}


GPU = [pytest.param(entry, precision, "gpu", marks=pytest.mark.gpu) for entry in METHODS for precision in ("32-true", "bf16-mixed")]


@pytest.mark.parametrize(("entry", "precision", "accelerator"), [(BY_NAME["dmd2"], "32-true", "cpu"), *GPU])
def test_a_method_trains_there_and_its_export_samples_as_it_does(
    entry: Any, precision: Any, accelerator: str, tiny: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made = {"updates": 2, "guidance": [1.0, 4.0], "ema": 0.9, "reflect": "static", "memory": {"gradient_checkpointing": True}}
    method = entry.method(pipeline=Pipeline(str(tiny)), **options(entry.method, made, entry.kwargs))  # not the shared one: it moves
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    seen = Places()
    run = fit(method, captions(tiny), seen, accelerator=accelerator, devices=1, precision=precision)
    assert method.student_updates == 2 and seen.found == {device.type} and seen.idle == {"cpu"}
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in run.rows)
    method = method.to(device).eval()
    assert export.deliver(method, tmp_path / "out", ["a handwritten one", ""], method.deployment.steps[0]) < export.LEAST


@pytest.mark.parametrize("name", ["lcm_ddil", "pd_ddil", "dmd2_ddil"])
@pytest.mark.gpu
def test_the_toy_trains_and_is_tested_on_the_gpu(name: str, tmp_path: Path) -> None:
    """Its law lives where its teacher does, and its points and scores on the CPU."""
    words = ["--config", f"toy2d/{name}", "--updates", "12", "--run_dir", str(tmp_path / "r"), "test.n=64", "trainer.accelerator=gpu"]
    words += ["model.stages=[{steps: 16, updates: 12}]"] if name == "pd_ddil" else []
    with pytest.raises(SystemExit) as stop:
        main.run(ddil_fit, "ddil-fit", words)
    rows = json.loads((tmp_path / "r" / "summary.json").read_text())["rows"]
    assert not stop.value.code and {row["name"].split("@")[0] for row in rows} == {"teacher", "student"}


class NoWaits(Callback):
    """From the third update on, a step in which the host waits for the device fails (tests/training/test_waits.py says it without one):
    from before its batch is sent, which is before Lightning's first hook of a step, to its end, where what is logged is read."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        data = trainer.datamodule
        send = data.transfer_batch_to_device

        def watched(*args: Any) -> Any:
            if pl_module.student_updates >= 2:
                torch.cuda.set_sync_debug_mode("error")
            return send(*args)

        data.transfer_batch_to_device = watched

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lcm", "pd", "dmd2", "emd", "lcm-lora"])
def test_no_step_has_the_host_wait(name: str, tiny: Path) -> None:
    entry = BY_NAME[name]
    method = entry.method(pipeline=Pipeline(str(tiny)), **options(entry.method, {"updates": 5, "ema": 0.9}, entry.kwargs))
    try:
        fit(method, captions(tiny), NoWaits(), accelerator="gpu", devices=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert method.student_updates == 5
