"""Captions and images after the frozen encoders, and the cache file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_lightning.backbones import Backbone
from ddil_lightning.captions import Captions
from ddil_lightning.encoded import Encoded, encode, encode_batch
from ddil_lightning.types import Context


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Backbone:
    return Backbone(str(tiny))


class Few(Captions):
    """Six pictures in memory; `images=False`: their captions alone."""

    def __init__(self, images: bool = True) -> None:
        noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self._pixels = noise if images else None

    def __len__(self) -> int:
        return 6

    def prompts(self, index: Any) -> list[str]:
        return [f"a {('red', 'blue')[i % 2]} {('circle', 'square', 'digit')[i % 3]}" for i in index]

    def pixels(self, index: Any) -> torch.Tensor | None:
        return None if self._pixels is None else self._pixels[list(index)]


def test_encoding_at_once_is_encoding_batch_by_batch(backbone: Backbone) -> None:
    few = Few()
    whole = encode(few, backbone, chunk=4)  # an uneven last chunk
    assert len(whole) == 6 and whole.latents is not None
    rows = [5, 0, 3]
    batch, direct = whole[rows], encode_batch(few[rows], backbone)
    assert batch.latent is not None and direct.latent is not None
    torch.testing.assert_close(batch.latent, direct.latent, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.c.text, direct.c.text, rtol=0, atol=1e-5)
    assert batch.rows.tolist() == direct.rows.tolist() == rows


def test_captions_alone_have_no_latents(backbone: Backbone) -> None:
    whole = encode(Few(images=False), backbone)
    assert whole.latents is None and whole[[1, 2]].latent is None
    assert encode_batch(Few(images=False)[[0]], backbone).latent is None


@pytest.mark.parametrize("images", [True, False])
def test_a_cache_file_gives_back_every_bit(images: bool, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    c = Context(torch.randn(6, 5, 3, generator=g), pooled=torch.randn(6, 7, generator=g), ids=torch.arange(36.0).view(6, 6))
    made = Encoded(torch.randn(6, 4, 8, 8, generator=g) if images else None, c)
    made.save(tmp_path / "deep" / "cache.safetensors")
    again = Encoded.load(tmp_path / "deep" / "cache.safetensors")
    assert len(again) == 6
    batch, other = made[[4, 1]], again[[4, 1]]
    assert (batch.latent is None) == (other.latent is None) == (not images)
    assert batch.latent is None or torch.equal(batch.latent, other.latent)
    assert other.c.mask is other.c.w is None
    assert all(torch.equal(a, b) for a, b in zip(batch.c, other.c, strict=True) if a is not None)


def test_a_cache_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """Of safetensors itself, which raises no OSError: files may not grow here, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError) as error:
            Encoded(None, Context(torch.zeros(6, 5, 300))).save(tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(tmp_path / "cache")) and list(tmp_path.iterdir()) == []


def test_a_damaged_cache_says_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "cache"
    Encoded(None, Context(torch.zeros(6, 5, 300))).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"the cache {path} is damaged or none of ours .*: delete it, or give another data.cache"):
        Encoded.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="damaged or none of ours"):
        Encoded.load(path)


def test_long_captions_are_refused_or_cut(backbone: Backbone) -> None:
    class Long(Few):
        def prompts(self, index: Any) -> list[str]:
            return ["blue " * 30 for _ in index]

    with pytest.raises(ValueError, match="has 32 tokens and the text encoder reads 16"):
        encode(Long(), backbone)
    assert len(encode(Long(), backbone, truncate=True)) == 6
