"""Statistics of real images: what a Fréchet distance needs of them, what is kept for the next time, and the files that hold them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddil_lightning.commands.protocols import notes
from ddil_lightning.evaluation import references
from ddil_lightning.evaluation.batches import as_saved
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.given import Given, Reference, View
from ddil_lightning.evaluation.networks import Named, Networks
from ddil_lightning.evaluation.suite import Suite
from ddil_lightning.evaluation.views import Crops


class Look:
    """A network of five features with a name, which counts the images that it sees."""

    def __init__(self, about: str = "five", resizing: str | None = "clean-fid", d: int = 5) -> None:
        self.seen = 0
        self.mix = torch.randn(3 * 16, d, generator=torch.Generator().manual_seed(1))
        self.net = Named(about, self.look, resizing)

    def look(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.mix


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DDIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "real").mkdir()
    for i in range(9):
        pixels = torch.randint(0, 256, (20 + i, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(tmp_path / "real" / f"{i}.png")
    return tmp_path / "real"


def given(look: Look, size: int = 16, crops: Crops | None = None) -> Given:
    return Given(Networks(look.net), view=View(size, crops))


def images(n: int = 12, seed: int = 5) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def scored(made: Given, reference: Reference) -> dict[str, Any]:
    whole = Given(made.networks, reference, view=made.view)
    return Suite("mine", ["x"] * 12, whole).score(lambda prompts, seed: images(len(prompts)))


def scipy_distance(mean: np.ndarray, covariance: np.ndarray, rows: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), by scipy's root of a matrix and numpy's covariance."""
    from scipy.linalg import sqrtm

    root = sqrtm(covariance @ np.cov(rows, rowvar=False))
    return float(np.square(mean - rows.mean(0)).sum() + np.trace(covariance) + np.cov(rows, rowvar=False).trace() - 2 * np.trace(root).real)


def test_a_frechet_distance_of_mean_and_covariance_is_that_of_the_rows(folder: Path, tmp_path: Path) -> None:
    """And scipy's, from a file as clean-fid and pytorch-fid write it; without rows there is nothing for the others."""
    made = given(look := Look())
    rows = references.gathered(made, Gallery.of_folder(folder), "real")
    features = rows.rows["features"].double().numpy()
    np.savez(tmp_path / "theirs.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    theirs, whole = scored(made, references.load(tmp_path / "theirs.npz", made)), scored(made, rows)
    expected = scipy_distance(features.mean(0), np.cov(features, rowvar=False), look.look(as_saved(images())).double().numpy())
    assert theirs["frechet"] == pytest.approx(whole["frechet"], rel=1e-9) == pytest.approx(expected, rel=1e-6)
    assert whole["kid"] is not None and whole["density"] is not None
    assert theirs["kid"] is theirs["density"] is theirs["coverage"] is None


def test_statistics_that_do_not_say_what_made_them_are_marked(folder: Path, tmp_path: Path) -> None:
    """In the row and its stamp, also where they were written again: nobody knows more of them then."""
    made, suites = given(Look()), {}
    rows = references.gathered(made, Gallery.of_folder(folder), "real")
    mean, covariance = rows.moments("features")
    np.savez(tmp_path / "theirs.npz", mu=mean.numpy(), sigma=covariance.numpy())
    references.save(tmp_path / "again.npz", references.load(tmp_path / "theirs.npz", made), made)
    references.save(tmp_path / "ours.npz", rows, made)
    for name in ("theirs", "again", "ours"):
        suites[name] = Suite("mine", ["x"] * 12, Given(made.networks, references.load(tmp_path / f"{name}.npz", made), view=made.view))
    told = {name: suite.protocol["reference"].get("unverified") for name, suite in suites.items()}
    assert told == {"theirs": True, "again": True, "ours": None}
    said = "left unchecked: theirs.npz does not say which network, size and resizing"
    assert said in notes(suites["theirs"]) and not any("unchecked" in line for line in notes(suites["ours"]))


def test_statistics_are_computed_once(folder: Path, cache: Path, tmp_path: Path) -> None:
    def count(look: Look, place: Path = folder, **view: Any) -> tuple[int, Reference]:
        found = references.gathered(given(look, **view), Gallery.of_folder(place), "real")
        return look.seen, found

    first, second = count(Look()), count(Look())
    assert (first[0], second[0]) == (9, 0)
    assert all(torch.equal(first[1].rows[s], second[1].rows[s]) for s in ("features", "tones")) and first[1].digest == second[1].digest
    other = tmp_path / "other"
    other.mkdir()
    for i, file in enumerate(sorted(folder.iterdir(), reverse=True)):
        (other / f"renamed{i}.png").write_bytes(file.read_bytes())
    assert count(Look(), other)[0] == 0  # the same pictures elsewhere
    assert count(Look("six"))[0] == count(Look(resizing="torch-fidelity"))[0] == count(Look(), size=12)[0] == 9
    assert count(Look(), crops=Crops(8, 16))[0] == 9  # the crops alone are new
    next(cache.glob("features-*")).write_bytes(b"damaged")
    assert sum(count(look)[0] for look in (Look(), Look("six"), Look(resizing="torch-fidelity"))) == 9
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    assert count(Look())[0] == 9


def test_a_network_without_a_name_is_asked_each_time(folder: Path, cache: Path) -> None:
    """Two callables may be called alike and see different things."""
    for _ in range(2):
        look = Look()
        references.gathered(Given(Networks(look.look), view=View(16)), Gallery.of_folder(folder), "real")
        assert look.seen == 9
    assert [file.name.split("-")[0] for file in cache.iterdir()] == ["tones"]


def test_a_cache_that_cannot_be_written_is_told_and_gone_without(folder: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("DDIL_CACHE", str(folder / "0.png"))
    with caplog.at_level(logging.WARNING):
        assert references.gathered(given(Look()), Gallery.of_folder(folder), "real").images == 9
    assert "statistics of the reference's images are not kept for the next time" in caplog.text


def test_images_that_cannot_be_read_are_named_or_counted(folder: Path, caplog: Any) -> None:
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"3.png: not a readable image .*; repair or remove it, or leave such pictures out by --skip_unreadable "
    ):
        references.gathered(given(Look()), Gallery.of_folder(folder), "real")
    for _ in range(2):  # from the cache the second time
        found = references.gathered(given(Look()), Gallery.of_folder(folder, skip=True), "real")
        assert (found.images, found.unreadable) == (8, 1)
        suite = Suite("mine", ["a"], Given(Networks(Look().net), found, view=View(16)))
        assert suite.protocol["reference"]["unreadable"] == 1
    assert "1 of 9 pictures cannot be read and are left out, first" in caplog.text and "3.png" in caplog.text
    with pytest.raises(ValueError, match="not a readable image"):
        references.gathered(given(Look()), Gallery.of_folder(folder), "real")
    (folder / "0.png").write_bytes((folder / "1.png").read_bytes())
    references.gathered(given(Look()), Gallery.of_folder(folder, skip=True), "real")
    assert "1 of 9 real images are copies of others, byte for byte" in caplog.text


@pytest.mark.parametrize("name", ["kept.safetensors", "kept.npz"])
def test_files_of_statistics_give_the_same_numbers(name: str, folder: Path, tmp_path: Path) -> None:
    made = given(Look(), crops=Crops(8, 16))
    whole = references.gathered(made, Gallery.of_folder(folder), "real")
    references.save(tmp_path / name, whole, made)
    again = references.load(tmp_path / name, made)
    assert (again.images, again.digest, again.about) == (9, whole.digest, "real")
    mine, theirs = scored(made, whole), scored(made, again)
    assert theirs["frechet"] == mine["frechet"]
    if name.endswith(".safetensors"):
        assert all(theirs[key] == mine[key] for key in ("kid", "density", "recall", "patch_frechet", "saturation_drift"))
    for other, said in (
        (given(Look("six"), crops=Crops(8, 16)), "its features were made with network five where this protocol has six"),
        (given(Look(resizing="torch-fidelity")), "resizing clean-fid where this protocol has torch-fidelity: they cannot be compared"),
        (given(Look(), size=12), "its features were made with size 16 where this protocol has 12"),
    ):
        with pytest.raises(ValueError, match=said):
            references.load(tmp_path / name, other)


def test_files_that_hold_no_statistics(folder: Path, tmp_path: Path) -> None:
    made, eye = given(Look()), np.eye(5)
    files = {
        "wide.npz": ({"mu": np.zeros(7), "sigma": np.eye(7)}, "features of 7 numbers, and this protocol's network makes 5"),
        "less.npz": ({"mu": np.zeros(5)}, "it has no `mu` and `sigma`"),
        "nan.npz": ({"mu": np.full(5, np.nan), "sigma": eye}, "they must be finite"),
        "skew.npz": ({"mu": np.zeros(5), "sigma": eye + np.triu(np.ones((5, 5)), 1)}, "sigma is not symmetric"),
    }
    for name, (arrays, said) in files.items():
        np.savez(tmp_path / name, **arrays)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            references.load(tmp_path / name, made)
    (tmp_path / "no.npz").write_text("no")
    (tmp_path / "no.safetensors").write_text(json.dumps({}))
    for name, said in (("no.npz", "cannot be read as .npz"), ("no.safetensors", "is no file of statistics"), ("x.npz", "no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            references.load(tmp_path / name, made)
    with pytest.raises(ValueError, match="statistics are written as .safetensors"):
        references.save(tmp_path / "x.pt", Reference(), made)


def test_embeddings_are_of_images_as_large_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Their network alone brings them to its size; what was kept of images at the protocol's `size` is another thing."""
    sides: list[tuple[int, int]] = []

    def look(images: Tensor) -> Tensor:
        sides.append(tuple(images.shape[-2:]))  # type: ignore[arg-type]
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    named = Named("clip", look)
    made, plain = (Given(Networks(Look().net, embed=embed), view=View(16)) for embed in (named, look))
    real = references.gathered(made, Gallery.of_folder(folder), "real")
    assert sorted(sides) == [(side, side) for side in (20, 21, 22, 23, 24)] and len(real.rows["embeddings"]) == 9  # 24 wide, 20 to 28 high
    wide = torch.rand(2, 3, 20, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    rows = made.rows("embeddings", wide)
    assert sides[-1] == (20, 20)
    torch.testing.assert_close(rows, torch.nn.functional.normalize(look(wide[..., 6:26]), dim=1))
    assert plain.rows("embeddings", wide).shape == rows.shape and sides[-1] == (16, 16)  # of a function nobody knows what it takes
    both = Given(Networks(named, embed=named), view=View(16))
    assert not both.shares and Given(Networks(named, embed=named)).shares
    assert Suite("mine", ["x"], made).protocol["embedded"] and "embedded" not in Suite("mine", ["x"], plain).protocol
    # What is kept, in the cache and in files, is of these pixels.
    assert references.made_with(made, "embeddings")["size"] is None
    before = len(sides)
    references.gathered(made, Gallery.of_folder(folder), "real")
    assert len(sides) == before
    references.save(tmp_path / "old.safetensors", real, made)
    _as_before(tmp_path / "old.safetensors")
    with pytest.raises(ValueError, match="its embeddings were made with size 16 where this protocol has None"):
        references.load(tmp_path / "old.safetensors", made)


def _as_before(path: Path) -> None:
    """What a file of statistics said when embeddings were of resized images."""
    from safetensors.torch import load_file, save_file

    found = references._read(path)
    about = dict(found.about) | {"spaces": dict(found.spaces) | {"embeddings": dict(found.spaces["embeddings"]) | {"size": 16}}}
    save_file(load_file(path), path, {references.ABOUT: json.dumps(about)})
