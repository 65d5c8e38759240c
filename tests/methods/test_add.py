"""ADD against METHODS 5.3: the teacher's term in closed form, what the discriminator sees, and where gradients go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ddil_lightning.diffusion.analytic import Gaussian, PointMass
from ddil_lightning.methods import ADD
from ddil_lightning.records import Context, LatentBatch
from ddil_lightning.training.gan import leaves, slope
from ddil_lightning.training.vision import BuiltinVision, Dino, ToldHead, ToldHeads, Vision, embedding
from known import SD, Affine, Known, latents, noise, whitened
from options import options
from suite import Entry, backbone, build, train
from visions import Patches

ENTRY = Entry("add", ADD, {"guidance": 2.0, "vision": Patches()})


class Whole(Affine):
    """A network that is its own layer."""

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Any = ()) -> tuple[Tensor, ...]:
        assert int(t.max()) == 0
        return (2 * x_t,)


class Sum(nn.Module):
    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, f: Tensor) -> Tensor:
        return self.w * f


class TwoMaps(Vision):
    """A large map and a small one."""

    widths = (3, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return adaptive_avg_pool2d(images, 8), adaptive_avg_pool2d(images, 2) ** 2


def exact(teacher: Any = None, student: Any = None, w: float = 0.5, **kwargs: Any) -> ADD:
    parts = {"student": student or Whole(0.2, 0.8), "head": Sum(w)}
    return ADD(pipeline=Known(teacher or Gaussian(0.5, 0.7, SD), **parts), **options(ADD, {"guidance": 1.0}, kwargs))


def term(method: ADD, mu: float, t: int, n: int = 512) -> tuple[Tensor, Tensor]:
    """The teacher's term at one time, with noise of exact moments, and its gradient in xS."""
    z, eps = whitened(n, 2).split(1, 1)
    times = torch.full((n,), t)
    method.adversary.diffuse = lambda x, *args, **kwargs: (SD.add_noise(x, eps, times), times, eps)  # type: ignore[method-assign]
    x = (mu + 0.8 * z).requires_grad_()
    loss = method.teaching(x, latents(z, 999)).mean()
    return loss.detach(), torch.autograd.grad(loss, x)[0] * n


# The teacher's term -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [100, 500, 900])
def test_the_teachers_term_on_a_gaussian(t: int) -> None:
    """xT - mu = g (alpha (xS - mu) + sigma eps): alpha E|xS - xT|^2 = alpha ((1 - g alpha)^2 E|xS - mu|^2 + g^2 sigma^2)."""
    alpha, sigma = float(SD.alphas[t]), float(SD.sigmas[t])
    gain = alpha * 0.49 / ((0.7 * alpha) ** 2 + sigma**2)
    expected = alpha * ((1 - gain * alpha) ** 2 * (0.8**2 + 0.3**2) + (gain * sigma) ** 2)
    assert float(term(exact(), 0.8, t)[0]) == pytest.approx(expected, rel=1e-6)


def test_no_gradient_flows_through_the_noised_sample() -> None:
    """On a point mass the gradient is 2 alpha (xS - mu); through y nothing would change, so on a Gaussian it must not shrink either."""
    alpha = float(SD.alphas[500])
    _, gradient = term(exact(PointMass(0.5, SD)), 0.8, 500)
    z, eps = whitened(512, 2).split(1, 1)
    torch.testing.assert_close(gradient, 2 * alpha * (0.3 + 0.8 * z))
    method = exact()
    _, gradient = term(method, 0.8, 500)
    x = 0.8 + 0.8 * z
    target = method.teacher(SD.add_noise(x, eps, torch.full((512,), 500)), torch.full((512,), 500), latents(z, 999).c).x0
    torch.testing.assert_close(gradient, 2 * alpha * (x - target))


def test_points_are_seen_through_the_student_as_it_starts_and_without_noise() -> None:
    method = exact(w=0.5)
    b = latents(noise(8), 999, noise(8, seed=5))
    x = noise(8, seed=6).requires_grad_()
    with method.adversary.still():
        loss: Any = method.adversary.realism(x, b)
        loss.mean().backward()
    torch.testing.assert_close(x.grad, torch.full((8, 1), -0.5 * 2 / 8, dtype=torch.float64))
    assert "initial" in method.roles and not method.roles["initial"].weights()


# What the discriminator sees ------------------------------------------------------------------------------------------------------------


def prepared(tiny: Path, **kwargs: Any) -> tuple[ADD, LatentBatch, Tensor]:
    method = build(ENTRY, tiny, reflect="off", **kwargs)
    c = backbone(tiny).encode_text(["a red circle", "a zero"])
    x, real = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.2
    t = torch.tensor([999, 499])
    return method, LatentBatch(x, t, t, t, c.guided(1.0), real, t * 0 + 1, torch.ones(2), t, c), x.clone()


def test_the_losses_by_hand_from_decoded_images(tiny: Path) -> None:
    method, b, x = prepared(tiny, gan={"r1": 0.5})
    see, head, told = Patches(), method.head, embedding(b.c)
    decode = backbone(tiny).decode
    fake, real = (see(decode(z, gradients=True))[0] for z in (x, b.real))
    logits = [head(f, told)[0] for f in (fake, real)]
    found = method.adversary.following(x, b)
    (at,) = leaves([real])
    penalty = slope(head(at, told), [at])
    expected = (1 + logits[0]).relu().mean() + (1 - logits[1]).relu().mean() + 0.5 * penalty.mean()
    torch.testing.assert_close(found, expected)
    assert float(penalty.min()) > 0
    torch.testing.assert_close(method.adversary.realism(x, b), -logits[0].mean(1))


def test_the_losses_of_several_heads_are_added_and_each_is_the_mean_of_its_places(tiny: Path) -> None:
    """L = -sum_k D_k (METHODS 5.3): a large map says no more than a small one, and two heads twice as much as one."""
    method, b, x = prepared(tiny, gan={"r1": 0.0}, vision=TwoMaps())
    told, decode = embedding(b.c), backbone(tiny).decode
    fake, real = ([head(f, told) for head, f in zip(method.head, TwoMaps()(decode(z, gradients=True)), strict=True)] for z in (x, b.real))
    assert [d.shape[1] for d in fake] == [64, 4]
    torch.testing.assert_close(method.adversary.realism(x, b), -fake[0].mean(1) - fake[1].mean(1))
    expected = sum((1 + d).relu().mean() + (1 - e).relu().mean() for d, e in zip(fake, real, strict=True))
    torch.testing.assert_close(method.adversary.following(x, b), expected)


def test_gradients_pass_decoder_and_vision_to_the_sample_and_stay_out_of_them(tiny: Path) -> None:
    method, b, x = prepared(tiny)
    x.requires_grad_()
    with method.adversary.still():
        loss: Any = method.adversary.realism(x, b)
        loss.mean().backward()
    assert x.grad is not None and float(x.grad.abs().min()) > 0
    frozen = [*backbone(tiny).pipe.vae.parameters(), *method.adversary.vision.parameters(), *method.head.parameters()]
    assert all(p.grad is None for p in frozen)
    assert not any("vision" in name for name in method.state_dict()) and all(p.requires_grad for p in method.head.parameters())


def test_what_is_told_changes_the_verdict_and_a_head_without_weights_is_flat() -> None:
    torch.manual_seed(0)
    heads, c = ToldHeads([8, 16], 5), Context(torch.randn(3, 4, 5))
    maps = [torch.randn(3, 8, 4, 4), torch.randn(3, 16, 2, 2)]
    one, other = heads(*maps, embedding(c)), heads(*maps, embedding(c) + 1)
    assert [x.shape for x in one] == [(3, 16), (3, 4)]
    assert not any(torch.allclose(a, b) for a, b in zip(one, other, strict=True))
    head = ToldHead(8, 5)
    nn.init.zeros_(head.psi.weight), nn.init.zeros_(head.v.weight), nn.init.zeros_(head.v.bias)
    (at,) = leaves(maps[:1])
    assert float(slope(head(at, embedding(c)), [at]).abs().max()) == 0


def test_the_embedding_is_the_pooled_text_or_the_mean_of_what_the_mask_leaves() -> None:
    text, mask = torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])
    assert float(embedding(Context(text))) == pytest.approx(13 / 3) and float(embedding(Context(text, mask))) == 2
    assert float(embedding(Context(text, pooled=torch.tensor([[7.0]])))) == 7


def test_a_run_trains_student_and_heads(tiny: Path) -> None:
    run, start = train(ENTRY, tiny, updates=2), build(ENTRY, tiny)
    assert run.method.student_updates == 2 and run.rows[-1]["distillation"] > 0 and run.rows[-1]["r1"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(run.method.head.parameters(), start.head.parameters(), strict=True)]
    assert all(moved) and run.method.deployment.steps == (4, 2, 1)


# Networks of images ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_dinos_maps_are_its_blocks_patch_tokens(kind: str, tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**sizes, intermediate_size=32)) if kind == "vit" else Dinov2Model(Dinov2Config(**sizes))
    model.eval().save_pretrained(tmp_path)
    see, images = Dino(str(tmp_path), (0, 2), size=16), (torch.rand(2, 3, 16, 16) * 2 - 1).requires_grad_()
    maps = see(images)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (Dino.MEAN, Dino.STD))
    states = model(((images + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), states[3][:, 1:])
    torch.testing.assert_close(maps[0][:, :, 0, 1], states[1][:, 2])
    assert [tuple(m.shape) for m in Dino(str(tmp_path), (1,), size=32)(images)] == [(2, 16, 4, 4)] and see.widths == [16, 16]
    maps[0].sum().backward()
    assert images.grad is not None and float(images.grad.abs().sum()) > 0 and not any(p.requires_grad for p in see.parameters())


def test_the_built_in_visions_maps() -> None:
    see, images = BuiltinVision(), (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    maps = see(images)
    assert [m.shape[1] for m in maps] == see.widths and all(m.shape[2:] == (8, 8) for m in maps)
    torch.autograd.grad(maps[-1][:, 0].sum(), images)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"gan": {"weight": 0.0, "critic_weight": 0.0}}, "ADD is its discriminator, and gan.weight is 0"),
        ({"vision": Patches()}, "the samples of known are no images, which model.vision would look at: leave it out"),
        ({"gan": {"features": "teacher"}}, "leave gan.features out"),
        ({"distillation": -1.0}, "distillation is -1.0: give a number from 0"),
    ],
)
def test_bad_options_are_refused_in_a_line(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        exact(**kwargs)
    assert "\n" not in str(refused.value)


def test_images_without_a_vision_and_a_gan_without_images_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^ADD's discriminator looks at the images of .* give model.vision, such as .class_path: Dino"
    ) as no:
        build(ENTRY._replace(kwargs={"guidance": 2.0}), tiny)
    assert "\n" not in str(no.value)
    with pytest.raises(ValueError, match=r"^ADD's heads read model.vision: leave gan.layers and gan.features out"):
        build(ENTRY, tiny, gan={"layers": ("mid",)})
    with pytest.raises(ValueError, match=r"^model.vision.path .* holds no vision transformer"):
        Dino(str(tmp_path))
    method = build(ENTRY, tiny)
    with pytest.raises(
        ValueError, match=r"^ADD's GAN compares with data, but the data set has no images: give images, or take a method without"
    ):
        method.adversary.check_data(False, "take a method without a discriminator")
