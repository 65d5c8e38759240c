"""Images of other sizes than a pipeline's own: which can be, what SDXL is told, and a discriminator's head on them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.sizes import check, pair
from ddil_lightning.backbones.source import Source
from ddil_lightning.diffusion.denoiser import Denoiser
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import ddim
from ddil_lightning.records import Context

PROMPTS = ["a handwritten seven", "a red circle"]
TOLD = torch.tensor([[30, 20, 4, 0, 16, 24], [24, 40, 0, 3, 16, 24]])


@pytest.fixture(scope="module")
def backbone(xl: Path) -> Pipeline:
    return Pipeline(str(xl))


def test_sizes_that_the_network_does_not_divide_are_refused_with_the_nearest() -> None:
    """Stable Diffusion 1.5: eight pixels to a place of the latents, which three blocks halve."""
    network: Any = SimpleNamespace(latent_shape=(4, 64, 64), divisor=8, largest=None)
    check((512, 768), network, 8, "sd15"), check((64, 1024), network, 8, "sd15")
    for size, near in (((500, 700), "512 x 704"), ((512, 8), "512 x 64"), ((520, 512), "512 x 512")):
        with pytest.raises(
            ValueError, match=f"^sd15 makes images whose sides are multiples of 64 pixels, not of .*: the nearest is {near}$"
        ):
            check(size, network, 8, "sd15")
    check((520, 520), SimpleNamespace(latent_shape=(4, 65, 65), divisor=8, largest=9), 8, "x")  # type: ignore[arg-type] # its own size always can be
    with pytest.raises(ValueError, match="^pixart makes images of 512 x 512 pixels alone, not of 512 x 768$"):
        check((512, 768), SimpleNamespace(latent_shape=(4, 64, 64), divisor=None), 8, "pixart")  # type: ignore[arg-type]
    assert pair(512) == (512, 512) and pair([512, 768]) == (512, 768)
    for wrong in ([512], [512, 0], 0):
        with pytest.raises(ValueError, match="^size is "):
            pair(wrong)


def test_a_pipeline_samples_at_its_size(backbone: Pipeline, xl: Path) -> None:
    assert (backbone.size, backbone.latent_shape, backbone.resized) == ((16, 16), (4, 8, 8), False)
    made = Pipeline(Source(str(xl), size=(16, 24)))
    assert (made.size, made.latent_shape, made.resized) == ((16, 24), (4, 8, 12), True) and made.encoders() != backbone.encoders()
    assert made.encode_text(PROMPTS).ids.tolist() == [[16, 24, 0, 0, 16, 24]] * 2  # type: ignore[union-attr]
    assert backbone.null().ids.tolist() == [[16, 16, 0, 0, 16, 16]]  # type: ignore[union-attr]
    teacher = Policy(Denoiser(made.network(), made.schedule, made.predicts, null=made.null()), ddim)
    mine = sampling.latents(made, teacher, Grid.named("trailing", 4), PROMPTS, 3.0)
    theirs = sampling.pipeline_latents(made, PROMPTS, 4, 3.0)
    assert mine.shape == (2, 4, 8, 12) and sampling.decoded(made, mine).shape == (2, 3, 16, 24)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="denoises"):
        made.check_latents((3, 6, 10))
    with pytest.raises(ValueError, match="multiples of 8 pixels, not of 10 x 20"):
        made.check_latents((4, 5, 10))


def test_guidance_tells_each_sample_its_own_sizes_in_both_branches(backbone: Pipeline) -> None:
    """As diffusers' pipeline does by default; the sizes of the first sample, or the pipeline's own, would be wrong for the others."""
    c, seen = backbone.encode_text(PROMPTS, sizes=TOLD), []
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    handle = backbone.pipe.unet.register_forward_pre_hook(
        lambda *args: seen.append(args[2]["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    try:
        teacher = Policy(Denoiser(backbone.network(), backbone.schedule, backbone.predicts, null=backbone.null()), ddim)
        got = teacher.sample(x, Grid.named("trailing", 2), c.guided(2.0))
    finally:
        handle.remove()
    own = []
    for row in TOLD.tolist():
        original, crop, target = (tuple(row[i : i + 2]) for i in (0, 2, 4))
        own.append(
            backbone.pipe._get_add_time_ids(original, crop, target, torch.float32, backbone.pipe.text_encoder_2.config.projection_dim)
        )
    assert len(seen) == 2 and all(torch.equal(ids, torch.cat(own + own)) for ids in seen)
    for i, row in enumerate(TOLD.tolist()):
        told = {"original_size": tuple(row[:2]), "crops_coords_top_left": tuple(row[2:4]), "target_size": tuple(row[4:])}
        kwargs: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent"}
        made = backbone.pipe(prompt=PROMPTS[i], latents=x[i : i + 1].clone(), **kwargs, **told).images
        torch.testing.assert_close(got[i : i + 1], made, rtol=1e-3, atol=1e-4)


def test_a_null_context_without_sizes_takes_those_of_each_sample() -> None:
    seen: list[Context] = []

    class Listens(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, c: Context) -> torch.Tensor:
            seen.append(c)
            return x

    for ids in (None, torch.zeros(1, 6)):
        null = Context(torch.zeros(1, 3, 2), ids=ids)
        denoiser = Denoiser(Listens(), NoiseSchedule.scaled_linear(), "eps", null=null)
        denoiser(torch.zeros(2, 1, 2, 2), torch.tensor([5, 9]), Context(torch.ones(2, 3, 2), ids=TOLD.float()).guided(1.0))
        assert torch.equal(seen[-1].ids, torch.cat([TOLD, TOLD]).float()) and seen[-1].text[2:].eq(0).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [(), ("down0", "mid", "up1")])
def test_a_head_answers_at_every_size(backbone: Pipeline, layers: tuple[str, ...]) -> None:
    """At its own size it is the plain convolutions; elsewhere each layer still has one voice a sample."""
    torch.manual_seed(0)
    head, network, c = backbone.head(layers), backbone.network(), backbone.encode_text(PROMPTS)
    heads = list(head) if layers else [head]
    for h, w in ((8, 8), (6, 10), (16, 16), (12, 4), (2, 2)):
        x = torch.randn(2, 4, h, w, generator=torch.Generator().manual_seed(h))
        with torch.no_grad():
            features = network.features(x, torch.tensor([5, 900]), c, layers)
            logits = head(*features).flatten(1)
            assert logits.shape == (2, len(heads)) and logits.isfinite().all()
            if (h, w) == (8, 8):
                assert torch.equal(
                    logits, torch.cat([nn.Sequential.forward(one, f).flatten(1) for one, f in zip(heads, features, strict=True)], 1)
                )
            if (h, w) == (16, 16):
                places = [nn.Sequential.forward(one, f) for one, f in zip(heads, features, strict=True)]
                assert all(p.shape[2:] == (2, 2) for p in places)
                torch.testing.assert_close(logits, torch.cat([p.mean((1, 2, 3))[:, None] for p in places], 1))
    assert next(iter(heads[0].state_dict())) == "0.weight"  # as checkpoints of before have it


def test_sides_of_a_configuration_may_differ(backbone: Pipeline) -> None:
    model = type(backbone.pipe.unet).from_config({**backbone.pipe.unet.config, "sample_size": [6, 10]})
    assert type(backbone.network())(model).latent_shape == (4, 6, 10)
