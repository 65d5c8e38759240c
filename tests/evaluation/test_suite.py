"""The benchmark: samplers of known quality, the user's own folders, and the rows of a results table."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.evaluation.captioned import read_set
from ddil_lightning.evaluation.drawing import Timed
from ddil_lightning.evaluation.given import Given, Judge, Reference, View
from ddil_lightning.evaluation.metrics.pairs import choose, load_images, resize
from ddil_lightning.evaluation.networks import Networks, lpips_distance
from ddil_lightning.evaluation.presence import as_made
from ddil_lightning.evaluation.protocols import PromptSource
from ddil_lightning.evaluation.registry import ROW, columns, keys
from ddil_lightning.evaluation.rows import pipeline_row
from ddil_lightning.evaluation.stamps import notes, protocols, stamp
from ddil_lightning.evaluation.suite import Probes, Suite, make_row
from ddil_lightning.evaluation.table import table, write_rows
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.streams import apart as seed_apart

Image = pytest.importorskip("PIL.Image")


# a data set in closed form: constant images whose level follows the prompt's digit plus noise


class Verdict(NamedTuple):
    correct: dict[str, Tensor]
    residual: Tensor


def levels(prompts: list[str]) -> Tensor:
    return torch.tensor([int(p[-1]) / 10 - 0.5 for p in prompts])


def sampler(spread: float = 0.2, shift: float = 0.0):
    def sample(prompts: list[str], seed: int) -> Tensor:
        noise = torch.randn(len(prompts), 3, generator=torch.Generator().manual_seed(seed))
        return (levels(prompts)[:, None] + shift + spread * noise).clamp(-1, 1)[..., None, None].expand(-1, 3, 4, 4)

    return sample


def judge(images: Tensor, prompts: list[str]) -> Verdict:
    level = images.mean((1, 2, 3))
    near = ((level - levels(prompts)).abs() < 0.2).float()
    return Verdict({"level": near, "never": torch.full_like(near, math.nan)}, images.flatten(1).std(1))


def colours(images: Tensor) -> Tensor:
    return images.mean((2, 3))


PROBES = Probes(["level 3", "level 7", "level 5"], 10)


def suite(**changes) -> Suite:
    prompts = [f"level {i % 10}" for i in range(300)]
    base = {
        "features": colours,
        "clip": lambda x, p: 1 - (x.mean((1, 2, 3)) - levels(list(p))).abs(),
        "distance": lambda a, b: (a - b).square().mean((1, 2, 3)),
        "text": None,
        "real": {"features": colours(sampler()(prompts, 12345))},
        "verdict": judge,
        "modes": lambda x, p: float((x.mean((1, 2, 3)) > levels(list(p))).float().mean()),
    }
    own = base | {k: changes.pop(k) for k in list(changes) if k in base}
    nets = Networks(**{k: own[k] for k in ("features", "clip", "distance", "text")})
    has = Given(nets, Reference(own["real"], "more of the same"), Judge(own["verdict"], own["modes"]))
    return Suite(**{"name": "levels", "prompts": prompts, "given": has, "probes": PROBES, **changes})


def test_the_true_law_scores_as_it_should():
    out = suite().score(sampler())
    assert list(out) == [*keys(), "per_attribute", "intervals"]
    assert 0 <= out["frechet"] < 0.02
    assert out["density"] == pytest.approx(1, abs=0.15) and out["coverage"] == pytest.approx(1 - 2**-5, abs=0.04)
    spread = 0.2 / 3**0.5  # of an image's mean over three channels
    assert out["clip"] == pytest.approx(1 - spread * (2 / math.pi) ** 0.5, abs=0.02)
    assert out["lpips_diversity"] == pytest.approx(2 * 0.2**2, rel=0.4)  # E (a - b)^2 = 2 sigma^2
    assert out["attribute_accuracy"] == out["all_right"] == out["per_attribute"]["level"]
    assert out["attribute_accuracy"] == pytest.approx(math.erf(0.2 / spread / 2**0.5), abs=0.06) and out["per_attribute"]["never"] is None
    assert out["mode_coverage"] == pytest.approx(0.5, abs=0.3) and out["blur"] > 0


def test_worse_samplers_score_worse():
    good, collapsed, shifted = (suite().score(s) for s in (sampler(), sampler(spread=0.0), sampler(shift=0.3)))
    assert collapsed["coverage"] < 0.5 * good["coverage"] and collapsed["lpips_diversity"] == 0
    assert shifted["frechet"] > 10 * good["frechet"] and shifted["clip"] < good["clip"] - 0.1
    assert shifted["attribute_accuracy"] < good["attribute_accuracy"] - 0.3


def test_same_calls_for_every_sampler_and_order_of_seeds():
    calls: list[list[tuple[int, int]]] = [[], []]
    for log in calls:

        def sample(prompts, seed, log=log):
            log.append((len(prompts), seed))
            return sampler()(prompts, seed)

        suite(batch=128).score(sample)
    assert calls[0] == calls[1] == [(128, 0), (128, 128), (44, 256), (30, 300)]
    assert len({seed for _, seed in calls[0]}) == 4


def test_probe_groups_hold_whole_prompts():
    sizes = []

    def sample(prompts, seed):
        sizes.append(len(prompts))
        return sampler()(prompts, seed)

    suite(batch=12, prompts=["level 1"] * 12, real={}).score(sample)
    assert sizes == [12, 10, 10, 10]


def test_undefined_metrics_are_none():
    out = suite(verdict=None, modes=None, clip=None, features=None, distance=None).score(sampler())
    tones = {"saturation", "contrast"}  # which need nothing; of these images all contrasts are 0
    assert (
        all((out[k] is None) == (k not in tones) for k in keys()) and out["per_attribute"] == {} and set(out["intervals"]) == {"saturation"}
    )


def test_images_are_scored_as_saved():
    seen = []
    suite(features=lambda x: seen.append(x) or colours(x), probes=Probes()).score(lambda p, s: 3 * sampler()(p, s))
    x = torch.cat(seen)
    assert x.abs().max() <= 1 and torch.equal(((x + 1) * 127.5).round(), ((x + 1) * 127.5 + 1e-3).floor())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda p, s: sampler()(p, s)[:-1], "127 images for 128 prompts"),
        (lambda p, s: sampler()(p, s) * math.nan, "128 of 128 hold NaN"),
        (lambda p, s: sampler()(p, s).byte(), "uint8"),
    ],
)
def test_broken_samplers_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        suite().score(sample)


def test_score_needs_no_gradients_and_leaves_none():
    weight = torch.ones((), requires_grad=True)
    out = suite().score(lambda p, s: sampler()(p, s) * weight)
    assert all(isinstance(out[c.key], float) for c in columns() if c.shown) and weight.grad is None


def test_several_samplers_are_scored_call_by_call_as_each_alone():
    asked, seen = [], []

    def named(name, make):
        def sample(prompts, seed):
            asked.append((name, seed))
            return make(prompts, seed)

        return sample

    a, b = sampler(), lambda prompts, seed: -sampler()(prompts, seed)
    both = suite().score_all([named("a", a), named("b", b)], look=lambda metrics: seen.append(len(metrics)))
    assert both == [suite().score(a), suite().score(b)] and both[0] != both[1] and len(seen) == 2
    seeds = [seed for name, seed in asked if name == "a"]
    assert asked == [(name, seed) for seed in seeds for name in "ab"] and len(seeds) > 2


def test_timed():
    """An image's time is that of calls whose size has been seen: of 128, 128, 44 and 30 images, of the second alone."""
    timed = Timed(sampler())
    assert timed.seconds_per_image is None
    timed.repeat()
    timed(["level 1"] * 3, 0)
    timed(["level 1"] * 2, 3)
    assert timed.seconds_per_image is None  # both were cold
    timed.repeat()
    assert (timed.images, timed.cost.warm_images) == (5, 3) and timed.seconds_per_image == timed.cost.warm_seconds / 3 > 0
    timed = Timed(sampler())
    suite().score(timed)
    cost = timed.cost
    assert (timed.images, cost.warm_images) == (330, 128) and 0 < cost.warm_seconds < cost.seconds
    assert timed.seconds_per_image == cost.warm_seconds / 128


# the user's own data


@pytest.fixture
def folder(tmp_path):
    """Twelve images of several sizes with a caption file each."""
    for i in range(12):
        pixels = torch.randint(0, 256, (20 + i, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(f" picture number {i}\n")
    return tmp_path


def test_a_set_that_cannot_be_read_is_named(folder):
    for name, text, said in (
        ("gone.jsonl", '{"file_name": "gone.png", "text": "fine"}\n', "1 of 1 images are missing"),
        ("x.json", "[]", "not a COCO captions file"),
        ("nothing.csv", None, "nothing.csv: no such folder or file; give a folder of images"),
    ):
        if text is not None:
            (folder / name).write_text(text)
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            read_set(PromptSource(str(folder / name)))


def test_choose_is_fixed_by_its_seed():
    pairs = list("abcdefghijkl")
    assert choose(pairs, 5, seed=1) == choose(pairs, 5, seed=1) != choose(pairs, 5, seed=2)
    assert choose(pairs, 5, seed=1) == sorted(choose(pairs, 5, seed=1)) and choose(pairs, None, 0) == pairs
    with pytest.raises(ValueError, match="choose 2 to 12"):
        choose(pairs, 13, seed=0)


def test_load_images_crops_the_long_edge(tmp_path):
    pixels = torch.zeros(10, 30, 3, dtype=torch.uint8)
    pixels[:, 10:20] = torch.tensor([255, 0, 127], dtype=torch.uint8)  # the middle third is what remains
    Image.fromarray(pixels.numpy()).save(tmp_path / "wide.png")
    got = load_images([tmp_path / "wide.png"], 8)
    assert got.shape == (1, 3, 8, 8)
    torch.testing.assert_close(got.amin((2, 3)), got.amax((2, 3)))
    assert got[0, :, 0, 0].tolist() == pytest.approx([1, -1, 127 / 127.5 - 1])
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match="not a readable image"):
        load_images([tmp_path / "broken.png"], 8)


def test_resize_is_the_reference_s_own(folder):
    """A real image loaded large and resized like a generated one equals the one that was loaded small."""
    paths = [folder / "10.png"]  # 30 x 30: the crop takes nothing
    torch.testing.assert_close(resize(load_images(paths, 30), 16), load_images(paths, 16))
    wide = torch.rand(1, 3, 8, 12) * 2 - 1
    torch.testing.assert_close(resize(wide, 8), (wide[..., 2:10] + 1).mul(127.5).round() / 127.5 - 1)


def tiny(d: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, d, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_suite_from_folder(folder):
    """The real images themselves as a sampler: distance 0, everything covered; only where generated and real sizes agree."""
    s = Suite.from_folder(folder, size=16, networks=Networks(tiny(), distance=lpips_distance(random_trunk=True)), probes=(2, 3))
    real = load_images(sorted(folder.glob("*.png")), 16)
    number = [int(p.split()[-1]) for p in s.prompts]

    def sample(prompts, seed):
        return torch.nn.functional.interpolate(real[[int(p.split()[-1]) for p in prompts]], scale_factor=4, mode="nearest")

    assert number == list(range(12)) and s.protocol["n"] == 12
    out = s.score(sample)
    assert out["lpips_diversity"] == 0 and out["coverage"] > 0.8 and out["frechet"] < 1e-2
    assert out["clip"] is out["mode_coverage"] is out["attribute_accuracy"] is None
    without = Suite.from_folder(folder, size=16, networks=Networks(tiny(), embed=tiny(6)), crops=Crops(8, 16))
    exact = without.score(lambda prompts, seed: real[[int(p.split()[-1]) for p in prompts]])
    assert exact["frechet"] == pytest.approx(0, abs=1e-6) and {exact[k] for k in ("density", "coverage", "precision", "recall")} == {1}
    zero = ("cmmd", "patch_frechet", "saturation_drift", "contrast_drift")
    assert [exact[k] for k in zero] == pytest.approx([0] * 4, abs=1e-6) and out["patch_frechet"] is out["cmmd"] is None
    assert without.protocol["crops"] == "the centre, 8 of 16 pixels" and out["contrast_drift"] < 1e-3
    with pytest.raises(ValueError, match="no network 'dinov9'"):
        Suite.from_folder(folder, networks=Networks("dinov9"))


# rows


def colour(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


def test_rows_of_different_sizes_are_told(light: Path) -> None:
    """Where a number sees images as large as they are made; where it does not, and of one size, there is nothing to tell."""
    made = Given(Networks(colour, distance=apart), view=View(8, Crops(8, None)))
    mine = Suite("mine", ["a handwritten one"] * 2, made, Probes(["a handwritten one"], 2), batch=4, asked=["lpips_diversity", "contrast"])
    small, large = (pipeline_row(mine, Pipeline(Source(str(light), size=s)), 1, 2.0, name=f"of {s}") for s in (16, 24))
    assert (small["generation"]["size"], large["generation"]["size"]) == ([16, 16], [24, 24])
    said = "Images as large as they are made are seen by lpips_diversity: compare these only among rows of one size. "
    said += "16 x 16: of 16; 24 x 24: of 24."
    assert small["protocol"]["stamp"] == large["protocol"]["stamp"] and notes([small, large]) == [said] and notes([small, small]) == []
    assert said in table([small, large]) and as_made(["patch_frechet"], made) == ["patch_frechet", "patch_frechet_teacher"]
    assert as_made(["contrast"], made) == [] != as_made(["contrast"], Given()) and as_made(["clip"], Given()) == []


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused_by_key_and_image(number):
    """It made the mean none, which a row writes as if it had not been measured. Verdicts may be NaN, where a prompt says nothing."""

    def score(images, prompts):
        return torch.where(images.flatten(1)[:, 0] == images.flatten(1)[:, 0].max(), number, 0.5)

    def sample(prompts, seed):
        return torch.stack([torch.full((3, 4, 4), float(p) / 20) for p in prompts])

    suite = Suite("s", [str(i) for i in (*range(13), 19, *range(13))], Given(Networks(hps=score)), batch=27)
    with pytest.raises(ValueError, match=rf"^hps: value 13 \(from 0\) of 27, an image's or a prompt's, is {number}"):
        suite.score(sample)
    with pytest.raises(ValueError, match="frechet|kid"):
        features = Networks(features=lambda x: x.flatten(1)[:, :2] * number)
        Suite("s", ["a"] * 30, Given(features, Reference({"features": torch.rand(30, 2)})), asked=["kid"]).score(
            lambda p, seed: torch.rand(len(p), 3, 4, 4)
        )


def test_rows_are_complete_json_without_nan(tmp_path):
    metrics = {"frechet": 1.5, "clip": math.nan, "density": None, "per_attribute": {"a": math.inf, "b": torch.tensor(0.5)}}
    row = make_row("lcm@4", 4, 7.5, 4, 0.01, metrics, {"n": 512})
    assert list(row) == list(ROW) and row["n"] == 512
    path = tmp_path / "new" / "metrics.json"
    write_rows(path, [row])
    assert json.loads(path.read_text()) == [
        row | {"metrics": {"frechet": 1.5, "clip": None, "density": None, "per_attribute": {"a": None, "b": 0.5}}}
    ]
    before = path.read_text()
    with pytest.raises(TypeError):
        write_rows(path, [row | {"name": object()}])
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == ["metrics.json"]


def test_table_shows_what_there_is():
    rows = [make_row("teacher@32", 32, 3.0, 64, 0.5, {"frechet": 1.25, "clip": None}, {"n": 512})]
    rows.append(make_row("lcm@4", 4, 3.0, 4, None, {"frechet": 2.5}, {"n": 512}))
    text = table(rows).splitlines()
    assert "NFE" in text[0] and "chet" in text[0] and "CLIP" not in text[0]
    assert "teacher@32" in text[1] and "1.250" in text[1] and "64" in text[1] and "lcm@4" in text[2]


def test_a_row_says_what_it_was_measured_by(folder):
    features = tiny()
    s = Suite.from_folder(folder, size=16, networks=Networks(features, distance=lpips_distance(random_trunk=True)), probes=(2, 3))
    told = dict(s.protocol)
    assert set(told.pop("digests")) == {"prompts", "probes", "reference"} and len(told.pop("stamp")) == 12
    assert told == {
        "name": folder.name,
        "n": 12,
        "prompts": f"{folder}, all",
        "reference": {"source": "the images of these prompts", "images": 12, "teacher": None},
        "resize": "centre crop, Lanczos 16",
        "crops": None,
        "networks": {
            "features": Networks(features).about()["features"],
            "clip": None,
            "distance": "LPIPS 0.1 alex with a random trunk",
            "text": None,
            "embed": None,
            "judge": None,
            "modes": None,
        },
        "seeds": {"first": 0, "probes": 2, "per_probe": 3},
        "metrics": None,
    }
    assert json.loads(json.dumps(s.protocol)) == s.protocol
    assert Suite.from_folder(folder, n=5, seed=2, networks=Networks()).protocol["prompts"] == f"{folder}, 5 of 12 chosen by seed 2"
    same, other = suite().protocol, [suite(seed=1), suite(real={}), suite(verdict=None), suite(probes=Probes(["level 3"], 10))]
    assert suite().protocol == same and len({stamp(x.protocol) for x in other} | {same["stamp"]}) == 5
    assert protocols([{"protocol": same}, {"protocol": dict(same)}, {"name": "old"}, {"protocol": other[0].protocol}]) == [
        same,
        other[0].protocol,
    ]


# the built-in data


def truth(data: str):
    """A sampler that draws from the law of the data: fresh scenes that agree with the prompt, or other writers' digits."""
    from ddil_lightning.miniature import digits, shapes

    if data == "digits":
        images, labels = digits.split("train")

        def sample(prompts: list[str], seed: int) -> Tensor:
            rng = torch.Generator().manual_seed(seed)
            said = [digits.parse(p).get("digit", i % 10) for i, p in enumerate(prompts)]
            rows = [torch.nonzero(labels == k)[:, 0] for k in range(10)]
            return images[[int(rows[k][torch.randint(len(rows[k]), (1,), generator=rng)]) for k in said]]
    else:

        def sample(prompts: list[str], seed: int) -> Tensor:
            pool = shapes.draw_scenes(2000, seed)
            said = shapes.encode(prompts)
            drawn = []
            for i in range(len(prompts)):
                # geometry is matched; shape, colour and background are independent of it and set, colours never equal
                geometry = [(getattr(said, k)[i], getattr(pool, k)) for k in ("count", "relation", "position", "size")]
                fits = [((have == want) | (want < 0)).reshape(len(have), -1).all(1) for want, have in geometry]
                free = {k: (getattr(said, k)[i], getattr(pool, k)) for k in ("shape", "colour", "background")}
                given = {k: torch.where(want < 0, have, want) for k, (want, have) in free.items()}
                fits.append(given["colour"][:, 0] != given["colour"][:, 1])
                rows = torch.nonzero(torch.stack(fits).all(0))[:, 0]
                row = rows[i % len(rows)]
                drawn.append([field[row] for field in pool._replace(**given)])
            return shapes.render(shapes.Scenes(*(torch.stack(f) for f in zip(*drawn, strict=True))))

    return sample


@pytest.fixture
def untrained(monkeypatch):
    """A fresh evaluator in place of the one that ships: enough for everything but what its features mean."""
    from ddil_lightning.miniature import evaluator

    torch.manual_seed(0)
    monkeypatch.setattr(evaluator, "load_evaluator", lambda: evaluator.Evaluator().requires_grad_(False).eval())


@pytest.mark.parametrize("data", ["shapes", pytest.param("digits", marks=pytest.mark.slow)])
def test_builtin_suite(untrained, data):
    s = Suite.builtin(data, n=32, extra=60)
    assert len(s.prompts) == 32 and s.probes.seeds * len(s.probes.prompts) == 60
    true, constant = s.score(truth(data)), s.score(lambda p, seed: truth(data)(p[:1], 0).expand(len(p), -1, -1, -1))
    assert set(true) == {*keys(), "per_attribute", "intervals"}
    unasked = {"frechet_teacher", "patch_frechet_teacher"}  # as no teacher is
    assert {k for k in keys() if not isinstance(true[k], float)} == unasked | {"hps", "pickscore", "image_reward"}
    assert true["attribute_accuracy"] > 0.97 and true["all_right"] > 0.9 and true["blur"] < 0.05
    assert true["mode_coverage"] > 0.6 and constant["mode_coverage"] < 0.1
    assert constant["lpips_diversity"] == pytest.approx(0, abs=1e-6) and true["lpips_diversity"] > 0.01
    assert constant["coverage"] < 0.5 * true["coverage"] and constant["frechet"] > 3 * true["frechet"]


def test_what_is_held_out_is_in_no_training_data():
    """Torch's generator reads 32 bits of a seed: an offset of 2^50 was none, and a suite of seed 1 had the training set's scenes."""
    from ddil_lightning.data.captions import Shapes
    from ddil_lightning.miniature import shapes
    from ddil_lightning.miniature.sources import held_out

    trained = {draw for seed in range(1, 9) for draw in drawn(shapes.draw_scenes(64, seed))}
    held = [drawn(shapes.draw_scenes(64, held_out(seed))) for seed in range(9)]
    assert len({*trained, *(draw for each in held for draw in each)}) == 64 * 17
    with pytest.raises(ValueError, match="seed is 0: give a number from 1 to"):
        Shapes(seed=0)


def drawn(scenes):
    return [tuple(centre) for centre in scenes.centre.flatten(1).tolist()]


def test_no_noise_of_a_suite_is_in_one_of_another_seed():
    """Of neighbouring seeds all but one were the same: seed i was that of image i, and the next suite's began at i + 1."""
    first = sorted(seed_apart(seed) for seed in range(200))
    assert seed_apart(0) == 0 and min(b - a for a, b in pairwise(first)) > 10**6 and max(first) < 2**32
    noises = [Suite.builtin("shapes", n=16, seed=seed).part(over) for seed in range(4) for over in ("prompts", "probes", "teacher")]
    seeds = [part.seed + i for part in noises for i in range(len(part.asked))]
    assert len(set(seeds)) == len(seeds)


def test_builtin_prompts_and_images_are_one_held_out_set(untrained):
    """The reference's own captions say what its images show, and another seed is other data."""
    from ddil_lightning.miniature import judge, shapes
    from ddil_lightning.miniature.sources import held_out

    s = Suite.builtin("shapes", n=48, seed=3)
    reference = shapes.render(shapes.draw_scenes(48, held_out(3)))
    assert float(judge.judge(reference, s.prompts).all_right.mean()) == 1
    out = Suite.builtin("shapes", n=48, seed=3, batch=48).score(lambda p, seed: reference.repeat(9, 1, 1, 1)[: len(p)])
    assert out["frechet"] == pytest.approx(0, abs=1e-6) and (out["density"], out["coverage"]) == (1, 1)
    assert Suite.builtin("shapes", n=48).prompts != s.prompts
    with pytest.raises(ValueError, match="choose shapes or digits"):
        Suite.builtin("faces")
    with pytest.raises(ValueError, match="at least 16"):
        Suite.builtin("shapes", n=4)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["shapes", "digits"])
def test_the_evaluator_that_ships_tells_right_from_wrong(data):
    s = Suite.builtin(data, n=48, extra=30)
    true = s.score(truth(data))
    swapped = s.score(lambda p, seed: truth(data)(p, seed).roll(1, 0))
    noise = s.score(
        lambda p, seed: truth(data)(p, seed) * 0.3 + 0.3 * torch.randn(len(p), 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    )
    assert true["clip"] > swapped["clip"] + 0.1
    assert noise["frechet"] > 3 * true["frechet"] and noise["coverage"] < true["coverage"]


def test_text_needs_features():
    with pytest.raises(ValueError, match="give both"):
        suite(features=None, text=lambda p: torch.zeros(len(p), 3))
    out = suite(text=lambda p: levels(list(p))[:, None].expand(-1, 3), probes=Probes(), prompts=["level 9"] * 20).score(sampler())
    by_hand = torch.cosine_similarity(colours(sampler()(["level 9"] * 20, 0)), torch.full((20, 3), 0.4))
    assert out["clip"] == pytest.approx(float(by_hand.mean()), abs=0.01)
