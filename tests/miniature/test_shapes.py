"""Shapes: the law of the data, the grammar of its captions, and the exact judge."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddil_lightning.miniature import judge as J
from ddil_lightning.miniature import shapes as S
from ddil_lightning.miniature.judge import ATTRIBUTES

N = 3000


@pytest.fixture(scope="module")
def scenes() -> S.Scenes:
    return S.draw_scenes(N, 5)


@pytest.fixture(scope="module")
def images(scenes: S.Scenes) -> Tensor:
    return S.render(scenes)


@pytest.fixture(scope="module")
def full(scenes: S.Scenes) -> list[str]:
    return S.captions(scenes, 5, full=True)


def test_scene_i_of_a_seed_does_not_depend_on_n(scenes: S.Scenes, images: Tensor) -> None:
    few = S.draw_scenes(70, 5)
    assert all(torch.equal(a, b[:70]) for a, b in zip(few, scenes, strict=True))
    assert torch.equal(S.render(few), images[:70])
    assert S.captions(few, 9) == S.captions(scenes, 9)[:70]
    assert not torch.equal(S.draw_scenes(70, 6).centre, few.centre)


def test_law_of_the_scenes(scenes: S.Scenes) -> None:
    two = scenes.count == 2
    assert abs(two.float().mean() - 0.35) < 0.03
    assert (scenes.colour[two, 0] != scenes.colour[two, 1]).all()
    for field, values in (("shape", 4), ("colour", 6), ("size", 2)):
        share = torch.bincount(getattr(scenes, field)[:, 0], minlength=values) / N
        assert (share - 1 / values).abs().max() < 0.04
    assert (torch.bincount(scenes.position[~two], minlength=9) / (~two).sum() - 1 / 9).abs().max() < 0.03
    small = scenes.size[:, 0] == 0
    assert scenes.radius[small, 0].min() >= 3.9 and scenes.radius[small, 0].max() <= 4.8
    assert scenes.radius[~small, 0].min() >= 6.1 and scenes.radius[~small, 0].max() <= 7.0
    assert (scenes.position[two] == -1).all() and (scenes.relation[~two] == -1).all()


def test_objects_stay_inside_and_apart(scenes: S.Scenes) -> None:
    there = scenes.shape >= 0
    low = (scenes.centre - scenes.radius[..., None])[there]
    high = (scenes.centre + scenes.radius[..., None])[there]
    assert low.min() >= 0.49 and high.max() <= 31.51
    two = scenes.count == 2
    step = (scenes.centre[:, 1] - scenes.centre[:, 0])[two]
    along = step.gather(1, scenes.relation[two][:, None])[:, 0]
    across = step.gather(1, 1 - scenes.relation[two][:, None])[:, 0]
    assert (along >= scenes.radius[two].sum(1) + 0.99).all()
    assert (along > across.abs()).all()


def test_images_are_anti_aliased_in_range(images: Tensor) -> None:
    assert images.shape == (N, 3, 32, 32) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    area = torch.pi * 5.0**2
    drawn = S.coverage(0, torch.tensor([[16.3, 15.8]]), torch.tensor([5.0]))
    assert abs(float(drawn.sum()) - area) < 0.5
    assert ((drawn > 0) & (drawn < 1)).sum() > 20


def test_vocabulary_and_length(scenes: S.Scenes, full: list[str]) -> None:
    assert len(S.WORDS) == 29
    texts = full + S.captions(scenes, 1)
    assert {w for text in texts for w in text.split()} == set(S.WORDS)
    assert max(len(text.split()) for text in texts) + 2 <= 16


def test_full_captions_say_everything(scenes: S.Scenes, full: list[str]) -> None:
    said = S.encode(full)
    for name in ATTRIBUTES:
        assert torch.equal(getattr(said, name), getattr(scenes, name)), name


def test_captions_drop_attributes_now_and_then(scenes: S.Scenes) -> None:
    said = S.encode(S.captions(scenes, 3))
    for name in ("colour", "size", "shape", "relation", "position", "background"):
        mentioned, true = getattr(said, name), getattr(scenes, name)
        dropped = ((mentioned < 0) & (true >= 0)).sum() / (true >= 0).sum()
        assert 0.07 < dropped < 0.19, name
        assert (mentioned[mentioned >= 0] == true[mentioned >= 0]).all()


def test_parse() -> None:
    assert S.parse("a small red circle left of a blue shape on a grey background") == {
        "count": 2,
        "shape": ("circle", None),
        "colour": ("red", "blue"),
        "size": ("small", None),
        "relation": "left of",
        "background": "grey",
    }
    assert S.parse("A shape at the top left.") == {"count": 1, "position": "top left"}
    assert S.parse("a cross and a cross") == {"count": 2, "shape": ("cross", "cross")}
    with pytest.raises(ValueError, match="unknown word 'house'"):
        S.parse("a red house")
    with pytest.raises(ValueError, match="not of the form"):
        S.parse("a circle red")


def test_judge_is_exact_on_real_images(images: Tensor, full: list[str], scenes: S.Scenes) -> None:
    images, full, scenes = images[:1000], full[:1000], S.Scenes(*(field[:1000] for field in scenes))
    found = J.judge(images, full)
    assert float(found.all_right.mean()) == 1.0 and float(found.attribute_accuracy.min()) == 1.0
    assert found.residual.max() < 0.01
    two = scenes.count == 2
    assert found.correct["position"][two].isnan().all() and not found.correct["position"][~two].isnan().any()
    seen = J.read_scene(images)
    assert (seen.radius - scenes.radius).abs().max() < 0.15 and (seen.centre - scenes.centre).abs().max() < 0.2


def test_judge_stands_noise_and_degrades_with_blur(images: Tensor, full: list[str]) -> None:
    part, texts = images[:800], full[:800]
    noisy = J.judge(part + 0.1 * torch.randn(part.shape, generator=torch.Generator().manual_seed(0)), texts)
    assert noisy.all_right.mean() > 0.995

    def blurred(k: int) -> J.Judgement:
        return J.judge(F.avg_pool2d(F.pad(part, (k // 2,) * 4, mode="replicate"), k, 1), texts)

    found = [blurred(k) for k in (3, 5, 7)]
    right = [float(one.all_right.mean()) for one in found]
    assert 1.0 > right[0] > right[1] > right[2]
    assert found[0].residual.mean() > 0.02 < found[1].residual.mean()


@pytest.mark.parametrize(
    ("caption", "wrong", "attribute"),
    [
        ("a small red circle left of a large blue square", "a small green circle left of a large blue square", "colour"),
        ("a small red circle left of a large blue square", "a large blue square left of a small red circle", "relation"),
        ("a small red circle left of a large blue square", "a small red circle above a large blue square", "relation"),
        ("a small red circle left of a large blue square", "a large red circle left of a large blue square", "size"),
        ("a small red circle at the top", "a small red square at the top", "shape"),
        ("a small red circle at the top", "a small red circle at the top right", "position"),
        ("a small red circle at the top", "a small red circle and a cross", "count"),
        ("a circle on a white background", "a circle on a grey background", "background"),
    ],
)  # fmt: skip
def test_judge_detects_what_is_wrong(caption: str, wrong: str, attribute: str) -> None:
    rendered = matching(caption, 8)
    assert J.judge(rendered, [caption] * len(rendered)).all_right.min() == 1.0
    found = J.judge(rendered, [wrong] * len(rendered))
    assert found.all_right.max() == 0.0
    assert found.correct[attribute].max() < 1.0
    for name, value in found.correct.items():
        if name != attribute and attribute != "count":
            assert value.nan_to_num(1.0).min() == 1.0, name


def test_judge_gives_half_for_one_of_two_objects() -> None:
    rendered = matching("a red circle left of a blue square", 4)
    found = J.judge(rendered, ["a red circle left of a yellow square"] * 4)
    assert found.correct["colour"].tolist() == [0.5] * 4


def test_judge_sees_nothing_in_noise_and_in_a_plain_image() -> None:
    noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert J.judge(noise, ["a red circle at the top"] * 64).all_right.max() == 0.0
    plain = J.read_scene(torch.zeros(2, 3, 32, 32))
    assert plain.count.tolist() == [0, 0] and (plain.shape == -1).all() and plain.background.tolist() == [1, 1]


def test_judge_errors() -> None:
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        J.judge(torch.zeros(2, 3, 32, 32), ["a circle"])
    with pytest.raises(ValueError, match=r"needs images \[N, 3, 32, 32\]"):
        J.judge(torch.zeros(1, 3, 16, 16), ["a circle"])


def matching(caption: str, n: int, pool: int = 60_000) -> Tensor:
    """Real images of a partial caption: those of a large draw that show it."""
    said, drawn = S.encode([caption]), S.draw_scenes(pool, 11)
    fits = drawn.count == said.count
    for name in ("shape", "colour", "size", "relation", "position", "background"):
        asked, true = getattr(said, name), getattr(drawn, name)
        fits &= ((asked < 0) | (asked == true)).reshape(pool, -1).all(1)
    rows = fits.nonzero()[:n, 0]
    assert len(rows) == n, f"only {len(rows)} scenes show {caption!r}"
    return S.render(S.Scenes(*(field[rows] for field in drawn)))


PROMPTS = ["a circle", "a red shape", "a green shape on a white background", "a yellow shape above a purple shape"]


def test_mode_coverage_of_real_and_collapsed_images() -> None:
    assert set(PROMPTS) < set(J.partial_prompts())
    parts = [matching(p, 60) for p in PROMPTS]
    texts = [p for p in PROMPTS for _ in range(60)]
    real = J.mode_coverage(torch.cat(parts), texts)
    few = J.mode_coverage(torch.cat([part[:3].repeat(20, 1, 1, 1) for part in parts]), texts)
    one = J.mode_coverage(torch.cat([part[:1].repeat(60, 1, 1, 1) for part in parts]), texts)
    assert real > 0.93
    assert one < 0.01
    assert one < few < 0.6


def test_mode_coverage_of_a_perfect_sampler_depends_on_the_number_of_images() -> None:
    """Chance above 1 is cut and chance below is not, so that even draws are below 1, and the nearer to it the more there are."""
    rng = torch.Generator().manual_seed(0)
    few, many = (sum(J.evenness(torch.randint(9, (n,), generator=rng), 9) for _ in range(200)) / 200 for n in (8, 64))
    assert 0.85 < few < 0.95 < 0.97 < many < 0.995


def test_mode_coverage_counts_unreadable_images_as_lost_mass() -> None:
    good, texts = matching("a red shape", 64), ["a red shape"] * 64
    bad = good.clone()
    bad[::2] = 0.0
    assert J.mode_coverage(bad, texts) < J.mode_coverage(good, texts) - 0.3


def test_mode_coverage_needs_something_open() -> None:
    with pytest.raises(ValueError, match="leaves? an attribute open"):
        text = "a small red circle at the top on a grey background"
        J.mode_coverage(matching(text, 1), [text])


def test_partial_prompts_are_captions_that_leave_something_open() -> None:
    for prompt in J.partial_prompts():
        said = S.parse(prompt)
        full_keys = {"count", "shape", "colour", "size", "background", "relation" if said["count"] == 2 else "position"}
        assert set(said) < full_keys or any(None in v for v in said.values() if isinstance(v, tuple))


@pytest.mark.slow
def test_importing_shapes_is_light() -> None:
    heavy = "lightning torchvision diffusers transformers open_clip sklearn numpy.testing".split()
    code = (
        "import sys, ddil_lightning.miniature.shapes; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
