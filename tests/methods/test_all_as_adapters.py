"""Every method of the suite whose student is adapters on the frozen network: trained on roll-outs too, resumed exactly, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.methods import CTM
from ddil_lightning.runs import export
from suite import METHODS, Entry, build, captions, digest, equal, fit, state

PROMPTS = ["a handwritten one", "a handwritten two"]
SMALL = Adapter(2, alpha=16.0)
WHOLE = [entry for entry in METHODS if "adapter" not in entry.kwargs]


@pytest.mark.slow
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in WHOLE])
def test_adapters_train_resume_exactly_and_are_exported(entry: Entry, light: Path, tmp_path: Path) -> None:
    """Merged into the pipeline's network, which they share with the teacher and have not moved."""
    method = build(entry, light, updates=2, adapter=SMALL)
    base = method.backbone.network().model
    before = digest(base), {name: p.detach().clone() for name, p in method.student.network.named_parameters() if p.requires_grad}
    run = fit(method, captions(light), Checkpoints(every=1, keep=9, folder=str(tmp_path)))
    again = fit(build(entry, light, updates=2, adapter=SMALL), captions(light), ckpt=tmp_path / "updates=1.ckpt")
    assert all(equal(part, state(again)[name]) for name, part in state(run).items()) and again.rows == run.rows[1:]
    now = {name: p for name, p in method.student.network.named_parameters() if p.requires_grad}
    assert any(".lora_B." in name for name in now) and all(torch.isfinite(p).all() for p in now.values())
    assert all(not torch.equal(p, before[1][name]) for name, p in now.items() if ".lora_B." in name) and digest(base) == before[0]
    if entry.method is CTM:
        with pytest.raises(ValueError, match="no pipeline of diffusers tells a network the time that it jumps to, as this student is told"):
            export.deliver(method, tmp_path / "p", PROMPTS, 4)
        return
    assert export.deliver(method, tmp_path / "p", PROMPTS, method.deployment.steps[0]) < 1e-4
