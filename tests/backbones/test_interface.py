"""The contracts at the doors: what is missing is named, what is left out is refused, and what is promised is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import commandline
import suite
from backbones import LatentsAlone
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.network import Network
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policies, Policy
from ddil_lightning.diffusion.schedule import NoiseSchedule
from ddil_lightning.diffusion.transitions import Posterior, ddim
from ddil_lightning.records import Context
from ddil_lightning.training.method import Distillation

SCHEDULE = NoiseSchedule.scaled_linear()


class Half(Network):
    """A network that says half of its input, and nothing else."""

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return x_t / 2


class HalfAFamily(Family):
    """The same as a family."""

    latent_shape = (1, 2, 2)

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        return self.model(x_t) / 2


class Latents(LatentsAlone):
    """The backbone of Half."""

    def network(self) -> Network:
        return Half()


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


# What is missing is named ---------------------------------------------------------------------------------------------------------------


def test_what_a_backbone_lacks_is_named() -> None:
    class Mine(LatentsAlone):
        """`network` is missing."""

    class Bare(Backbone):
        """All is."""

    with pytest.raises(TypeError, match=r"Mine .*\bnetwork\b"):
        Mine("mine", SCHEDULE, "eps", (1, 2, 2))  # type: ignore[abstract]
    with pytest.raises(TypeError) as refused:
        Bare("bare", SCHEDULE, "eps", (1, 2, 2))  # type: ignore[abstract]
    for name in ("network", "trainable", "parts", "to", "device", "encode_text", "check_length", "encoders", "encode_images", "decode"):
        assert re.search(rf"\b{name}\b", str(refused.value)), name
    assert Latents("latents", SCHEDULE, "eps", (1, 2, 2)).latent_shape == (1, 2, 2)


def test_what_a_network_or_a_family_lacks_is_named() -> None:
    class Silent(Network):
        pass

    class Shapeless(Family):
        def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
            return x_t

    with pytest.raises(TypeError, match=r"Silent .*\bforward\b"):
        Silent()  # type: ignore[abstract]
    with pytest.raises(TypeError, match=r"Shapeless .*\blatent_shape\b"):
        Shapeless(torch.nn.Identity())  # type: ignore[abstract]


class Unfinished(Distillation):
    """A method of which some parts may be left out."""

    def __init__(self, lacks: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        roles = {name: self.backbone.role(name) for name in ("student", "teacher") if name != lacks}
        self.cast(**roles)
        if lacks != "policies":
            self.policies = Policies(Policy(next(iter(roles.values()))))
        if lacks != "grid":
            self.grid = Grid.named("trailing", 4)

    def training_step(self, b: Any, i: int) -> None:
        raise AssertionError("it should not come to that")


class Deployed(Unfinished):
    """One that also says how it is used."""

    deploy = suite.DMD2.deploy


@pytest.mark.parametrize("lacks", ["student", "teacher", "policies", "grid", "deploy"])
def test_what_a_method_lacks_is_named_when_it_is_fitted(lacks: str, tiny: Path) -> None:
    kind = Unfinished if lacks == "deploy" else Deployed
    with pytest.raises(TypeError) as refused:
        suite.train(suite.Entry(lacks, kind, {"lacks": lacks}), tiny, ema=0.0)
    said = {
        "student": "student (cast it in the constructor)",
        "teacher": "teacher (cast it in the constructor)",
        "deploy": "deploy(student)",
    }
    assert str(refused.value) == f"{kind.__name__} lacks {said.get(lacks, lacks)}: see Distillation and CONTRIBUTING.md"


@pytest.mark.parametrize("lacks", ["student", "grid"])
def test_the_command_says_it_in_a_line(lacks: str, tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """It is known before a folder is made; `deployment`, which would need it, must not be what is said to be missing."""
    monkeypatch.chdir(tmp_path)
    model = f"{{class_path: test_interface.Deployed, init_args: {{lacks: {lacks}, pipeline: '{tiny}'}}}}"
    assert commandline.refused(capsys, f"--config={{model: {model}}}").startswith(f"Deployed lacks {lacks}")


# What is left out is refused by name ------------------------------------------------------------------------------------------------------


def test_what_a_network_does_not_give_is_refused_by_name() -> None:
    x, t, c = torch.ones(1, 1, 2, 2), torch.zeros(1).long(), Context(torch.zeros(1, 1, 1))
    made = Latents("latents", SCHEDULE, "eps", (1, 2, 2))
    for ask in (Half().features, Half().with_features, made.role("teacher").features, made.role("teacher").with_features):
        with pytest.raises(NotImplementedError, match="^Half gives no features, which a discriminator reads"):
            ask(x, t, c)
    for head in (Half().head, made.head):
        with pytest.raises(NotImplementedError, match="^Half has no discriminator's head"):
            head()
    with pytest.raises(ValueError, match=r"^HalfAFamily cannot be told the guidance: set model\.w_conditioned to false$"):
        HalfAFamily(torch.nn.Identity()).told()
    assert list(Half().blocks()) == [] and Half().recompute() is None and not Half().w_conditioned


def test_what_a_backbone_does_not_do_is_refused_by_name() -> None:
    made = Latents("my latents", SCHEDULE, "eps", (1, 2, 2))
    assert (made.holds_students, made.size, made.guidance, made.baked) == (False, None, 7.5, False)
    with pytest.raises(ValueError, match="^no pipeline can hold a student of my latents, so it has no scheduler$"):
        made.scheduler(ddim, "eps", "trailing", 4)
    with pytest.raises(ValueError, match="^my latents has weights of its own$"):
        made.stands_in(Half())


def test_a_scheduler_for_a_transition_that_nobody_knows_is_refused_by_name(backbone: Pipeline) -> None:
    with pytest.raises(
        ValueError,
        match=r"step by Posterior\(eta=0.5\): known are DDIM\(\), Renoise\(\), TCD\(gamma=0.3\) and Posterior\(eta=1.0\)",
    ):
        backbone.scheduler(Posterior(0.5), "v", "trailing", 4)
    made = backbone.scheduler(ddim, "x0", "trailing", 4)
    assert type(made).__name__ == "DDIMScheduler" and made.config.prediction_type == "sample"


# What is promised -------------------------------------------------------------------------------------------------------------------------


def test_decoding_gives_gradients_and_then_does_not_clamp(backbone: Pipeline) -> None:
    """The gradient is that of the autoencoder by central differences, and its weights get none."""
    generator = torch.Generator().manual_seed(0)
    z = 6 * torch.randn(2, *backbone.latent_shape, generator=generator)
    z.requires_grad_()
    image = backbone.decode(z, gradients=True)
    assert image.abs().max() > 1  # which a clamp would hide
    direction = torch.randn(image.shape, generator=generator)
    (image * direction).sum().backward()
    v, h = torch.randn(z.shape, generator=generator), 1e-2
    there, back = (backbone.decode(z.detach() + side * h * v, gradients=True).detach() for side in (1, -1))
    expected = float(((there - back).double() * direction / (2 * h)).sum())
    assert z.grad is not None and float((z.grad * v).sum()) == pytest.approx(expected, rel=1e-2) and abs(expected) > 0.1
    assert all(p.grad is None for p in backbone.pipe.vae.parameters())
    plain = backbone.decode(z)
    assert not plain.requires_grad and torch.equal(plain, image.detach().clamp(-1, 1))
