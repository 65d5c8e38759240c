"""SnapFusion against its equations: both sides guided or neither, the original loss, and a student that begins in its teacher's blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from test_reflow import loss
from torch import Tensor

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.methods import SnapFusion
from ddil_lightning.records import FORWARD, STUDENT, LatentBatch
from ddil_lightning.runs import export
from ddil_lightning.training.randomness import numbers_of
from suite import Entry, backbone, build, captions, fit

SD = NoiseSchedule.scaled_linear()
ENTRY = Entry("snapfusion", SnapFusion, {"guidance": [1.0, 4.0], "steps": 4, "reflect": "off"})


def drawn(method: Any, tiny: Path) -> LatentBatch:
    g = torch.Generator().manual_seed(0)
    real, eps = torch.randn(2, 4, 4, 8, 8, generator=g)
    node = torch.arange(4)
    t, s = method.grid.times[node], method.grid.times[node + 1]
    c = backbone(tiny).encode_text(["a red circle", "a", "a small zero", "a blue one"]).guided(None)
    c = c._replace(w=torch.tensor([0.0, 1.0, 2.0, 3.0]))
    source = torch.tensor([FORWARD, FORWARD, STUDENT, STUDENT])
    return LatentBatch(SD.add_noise(real, eps, t), t, s, node, c, real, source, torch.ones(4), t * 0 - 1, c.guided(None), eps)


@pytest.mark.parametrize("guided", [0.0, 1.0])
def test_the_loss_by_hand(guided: float, tiny: Path) -> None:
    """From the networks' raw outputs: x~ = x(0) + g (x(c) - x(0)) on both sides, max(SNR, 1) |dx0|^2, and |v - v*|^2 of forward latents."""
    method = build(ENTRY, tiny, guided=guided, denoising=0.5)
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    b = drawn(method, tiny)
    got = loss(method, b)

    def table(t: Tensor) -> tuple[Tensor, Tensor]:
        return SD.alphas[t].view(-1, 1, 1, 1), SD.sigmas[t].view(-1, 1, 1, 1)

    null = method.backbone.null().expand(4)

    def x0_of(net: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, sg = table(t)
        v = net(x.float(), t, b.c.guided(None)).double()
        if guided:
            free = net(x.float(), t, null).double()
            v = free + (1 + b.c.w.view(-1, 1, 1, 1)) * (v - free)
        return a * x - sg * v, sg * x + a * v

    with torch.no_grad():
        fine = Grid.named("trailing", 8)
        m = fine.times[2 * b.node + 1]
        x0, eps = x0_of(method.teacher.network, b.x_t.double(), b.t)
        a, sg = table(m)
        x_m = a * x0 + sg * eps
        x0, eps = x0_of(method.teacher.network, x_m, m)
        (a, sg), (at, st) = table(b.s), table(b.t)
        x_s = a * x0 + sg * eps
        target = (x_s - sg / st * b.x_t) / (a - sg / st * at)
        mine, _ = x0_of(method.student.network, b.x_t.double(), b.t)
        expected = ((at / st).square().clamp(min=1) * (mine - target).square()).mean((1, 2, 3))
        v = method.student.network(b.x_t, b.t, b.c.guided(None)).double()
        original = (v - (at * b.noise - st * b.real)).square().mean((1, 2, 3))
        expected += 0.5 * original * torch.tensor([1, 1, 0, 0])
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=1e-5)
    kept = loss(method, b._replace(slot=torch.tensor([-1, 0, -1, -1])))  # a control's latents, whose data are not the batch's
    torch.testing.assert_close((got - kept).double(), 0.5 * original * torch.tensor([0, 1, 0, 0]), rtol=2e-3, atol=1e-5)


def test_the_coin_is_one_for_a_batch_and_falls_as_often_as_asked(tiny: Path) -> None:
    method = build(ENTRY, tiny, guided=0.3)
    fell = []
    for update in range(400):
        method.student_updates = update
        fell.append(numbers_of(method).shared("guided").random() < method.guided)
        assert fell[-1] == (numbers_of(method).shared("guided").random() < method.guided)
    assert abs(sum(fell) / 400 - 0.3) < 0.08


@pytest.mark.slow
def test_a_student_is_guided_as_its_teacher_is_and_exported_so(tiny: Path, tmp_path: Path) -> None:
    """Without its middle block: the pipeline holds the smaller network, and two evaluations a step make what the trainer makes."""
    source = Pipeline(Source(str(tiny), networks={"student": {"mid_block_type": None}}))
    method = build(ENTRY, tiny, pipeline=source, updates=2, ema=0.5)
    own = method.student.network.state_dict()
    theirs = method.teacher.network.state_dict()
    assert 0 < len(own) < len(theirs) and all(torch.equal(value, theirs[key]) for key, value in own.items())
    run = fit(method, captions(tiny))
    assert run.method.student_updates == 2
    made = method.deployment
    assert made.guided and not made.told and made.guidance_scale == method.eval_guidance == 2.0 and made.network is method.average
    assert export.deliver(method.eval(), tmp_path / "student", ["a handwritten one", "a red circle"], 4) < 1e-3
    again = DiffusionPipeline.from_pretrained(tmp_path / "student", safety_checker=None, feature_extractor=None, image_encoder=None)
    assert again.unet.mid_block is None
    student = Pipeline(str(tmp_path / "student"))
    assert not student.baked and student.about["guidance_range"] == [1.0, 4.0] and student.about["guidance_scale"] == 2.0
    assert "guides it as it guides its teacher" in (tmp_path / "student" / "README.md").read_text()
    c = backbone(tiny).encode_text(["a"]).guided(1.5)
    before = made.denoiser.evaluations
    Policy(made.denoiser, ddim).step(torch.randn(1, 4, 8, 8), 999, 749, c)
    assert made.denoiser.evaluations == before + 2


def test_blocks_of_fewer_layers_begin_as_their_teachers_first_and_last() -> None:
    """On the way up the last layer reads the skip of the level before, so that it is the last one of the teacher's that fits."""
    kinds: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"sample_size": 8, "cross_attention_dim": 4, "attention_head_dim": 4, "norm_num_groups": 4, "block_out_channels": (8, 16)}
    teacher = UNet(UNet2DConditionModel(layers_per_block=3, **kinds, **sizes))
    names = UNet2DConditionModel(layers_per_block=1, **kinds, **sizes).state_dict()
    handed = dict(teacher.handed(teacher.model.state_dict().items(), names))
    assert all(handed[name].shape == value.shape for name, value in names.items())
    whole = teacher.model.state_dict()
    for block in (0, 1):
        assert handed[f"up_blocks.{block}.resnets.1.conv1.weight"] is not None
        assert torch.equal(handed[f"up_blocks.{block}.resnets.1.conv1.weight"], whole[f"up_blocks.{block}.resnets.3.conv1.weight"])
        assert torch.equal(handed[f"up_blocks.{block}.resnets.0.conv1.weight"], whole[f"up_blocks.{block}.resnets.0.conv1.weight"])
    assert dict(teacher.handed(whole.items(), whole)).keys() == whole.keys()


def test_steps_whose_nodes_the_teacher_does_not_share_are_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match="the trailing nodes of 48 steps are not those of 96"):
        build(ENTRY, tiny, steps=48)
