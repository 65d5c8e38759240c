"""The methods that every family of flow transformers is distilled by, and what is asked of a training and its export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import suite
from ddil_lightning.backbones.family import Family
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.diffusion import transitions
from ddil_lightning.records import Context
from ddil_lightning.runs.export import export, verify
from ddil_lightning.testing.checks import CUT, check_same
from ddil_lightning.training.plan import Stage


def entries(guidance: float) -> dict[str, suite.Entry]:
    """LCM, PD and DMD2 at a `guidance` that becomes a part of the weights, whole and as adapters, by name."""
    baked = {"w_conditioned": False, "guidance": guidance}
    even = {**baked, "solver_steps": 40, "rollouts": (2, 4)}
    plan = [Stage(steps=8, updates=3), Stage(steps=4, updates=6)]
    gan = {"weight": 5e-3, "critic_weight": 1e-2, "layers": ("block0", "block1")}
    matching = {"guidance": guidance, "critic": {"steps": 2, "pull": 0.02}, "gan": gan}
    made = [
        suite.Entry("lcm", suite.LCM, even),
        suite.Entry("pd", suite.PD, {**baked, "stages": plan, "teacher_steps": 16}),
        suite.Entry("dmd2", suite.DMD2, matching, unused=True),
        suite.Entry("lcm-lora", suite.LCM, {**even, "adapter": suite.LORA}),
        suite.Entry("dmd2-lora", suite.DMD2, {**matching, "adapter": suite.LORA}),
    ]
    return {entry.name: entry for entry in made}


def each(given: dict[str, suite.Entry]) -> list[Any]:
    """The parameters of a test of all of them: LCM-LoRA in the ordinary run, the others slow."""
    return [pytest.param(entry, id=name, marks=() if name == "lcm-lora" else pytest.mark.slow) for name, entry in given.items()]


def distilled(objects: Callable[[], tuple[Any, Any]], tmp_path: Path, prompts: Sequence[str]) -> tuple[suite.Run, Path]:
    """A run on forward latents and roll-outs of both, which goes on exactly from its middle, and its export for as many steps as it is made
    for, which samples as the trainer does. `objects`: a new method and its data."""
    run = suite.fit(*objects(), Checkpoints(every=CUT, keep=9, folder=str(tmp_path)))
    check_same(run, suite.fit(*objects(), ckpt=tmp_path / f"updates={CUT}.ckpt"))
    assert all(sum(row[f"drawn/share_{name}"] for row in run.rows) > 0 for name in ("forward", "student", "teacher"))
    steps = run.method.deployment.steps[0]
    folder = export(run.method, tmp_path / "student", steps)
    assert verify(run.method, folder, list(prompts), steps) < 1e-4
    return run, folder


def drawn(method: Any, x_T: Tensor, c: Context) -> Tensor:
    """Latents of a student in 4 steps, whose noise is torch's own numbers from seed 0, in the order in which a pipeline that hands its
    scheduler no generator draws them: packed, where it packs latents."""
    policy, grid = method.deployment.sampler(4)
    family: Family = method.backbone.network()

    def numbers(like: Tensor, generator: Any) -> Tensor:
        return family.unpacked(torch.randn(family.packed(like).shape), like.shape[1:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transitions, "normal", numbers)
        torch.manual_seed(0)
        return policy.sample(x_T, grid, c)
