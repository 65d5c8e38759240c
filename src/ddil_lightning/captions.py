"""Captioned images: the built-in sets, Hugging Face datasets and folders, prompts alone, and the encoded form that training reads."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .backbones import Backbone
from .types import CaptionBatch, Context, cat, take, to


class RawBatch(NamedTuple):
    """Captions and images before encoding, as a loader hands them over."""

    pixels: Tensor | None  # [B, 3, H, W] in [-1, 1]
    prompts: list[str]
    rows: Tensor  # [B]


class Captions(Dataset[Any]):
    """A map-style set of captioned images. A new one overrides `__len__`, `prompts` and `pixels` (None: a set without images)."""

    def __len__(self) -> int:
        """How many captions there are."""
        raise TypeError(f"{type(self).__name__} does not say its length")

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        raise TypeError(f"{type(self).__name__} has no captions")

    def pixels(self, index: Sequence[int]) -> Tensor | None:
        """The images of the rows `index`, [B, 3, H, W] in [-1, 1]."""
        return None

    def __getitem__(self, index: Sequence[int]) -> RawBatch:
        """A batch: the samplers of this library yield lists of rows."""
        rows = [int(i) for i in index]
        return RawBatch(self.pixels(rows), self.prompts(rows), torch.tensor(rows))


class Shapes(Captions):
    """The built-in coloured shapes: `n` scenes of `seed`, drawn in memory."""

    def __init__(self, n: int = 8192, seed: int = 1) -> None:
        from .miniature import shapes

        scenes = shapes.draw_scenes(n, seed)
        self._captions, self._images = shapes.captions(scenes, seed), shapes.render(scenes)

    def __len__(self) -> int:
        return len(self._captions)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`."""
        return [self._captions[i] for i in index]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`."""
        return self._images[list(index)]


class Digits(Shapes):
    """scikit-learn's handwritten digits with captions ("a handwritten seven"): the training split of real data that needs no download."""

    def __init__(self) -> None:
        from .miniature import digits

        self._images, labels = digits.split("train")
        self._captions = [digits.caption(int(k)) for k in labels]


class Images(Captions):
    """A Hugging Face dataset: a hub id, a folder written by `save_to_disk`, parquet/json files, or an image folder with metadata.

    `size`: side in pixels; images are resized by their short side and cropped at the centre. `image`, `caption`: the columns.
    """

    def __init__(
        self, path: str, size: int = 512, image: str = "image", caption: str = "text", split: str = "train", limit: int | None = None
    ) -> None:
        self.size, self._image, self._caption = size, image, caption
        self._rows = _load_dataset(path, split)
        missing = {image, caption} - set(self._rows.column_names)
        if missing:
            raise ValueError(
                f"the data set {path} has no column {' or '.join(sorted(missing))}: it has {', '.join(self._rows.column_names)}; "
                "name them with image= and caption="
            )
        if limit is not None:
            self._rows = self._rows.select(range(min(limit, len(self._rows))))

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`; of several captions for an image the first."""
        values = self._rows.select_columns([self._caption])[list(index)][self._caption]
        return [value if isinstance(value, str) else value[0] for value in values]

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`."""
        values = self._rows.select_columns([self._image])[list(index)][self._image]
        return torch.stack([square(value, self.size) for value in values])


class Prompts(Captions):
    """Captions without images, one a line of a text file: for data-free training (a prior without a forward share)."""

    def __init__(self, path: str) -> None:
        self._lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not self._lines:
            raise ValueError(f"the prompt file {path} has no line")

    def __len__(self) -> int:
        return len(self._lines)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The lines `index`."""
        return [self._lines[i] for i in index]


class Encoded(Captions):
    """Captions after the frozen encoders: latents [N, C, h, w] (None without images) and a context, in memory or from a cache file."""

    def __init__(self, latents: Tensor | None, c: Context) -> None:
        self.latents, self.c = latents, c

    def __len__(self) -> int:
        return len(self.c.text)

    def __getitem__(self, index: Sequence[int]) -> CaptionBatch:  # type: ignore[override]
        rows = torch.as_tensor(index)
        return CaptionBatch(None if self.latents is None else self.latents[rows], take(self.c, rows), rows)

    def save(self, path: Path) -> None:
        """One safetensors file with the latents and every part of the context."""
        from safetensors.torch import save_file

        parts = {"latents": self.latents, **self.c._asdict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.part")  # half a cache would be read by the next run
        save_file({k: v.contiguous() for k, v in parts.items() if v is not None}, temporary, metadata={"rows": json.dumps(len(self))})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        parts = load_file(path)
        return cls(parts.pop("latents", None), Context(**parts))


@torch.no_grad()
def encode(captions: Captions, backbone: Backbone, chunk: int = 256, truncate: bool = False) -> Encoded:
    """Every caption and image through the frozen encoders once: an image's VAE costs more than a training step's U-Net forward."""
    latents: list[Tensor] = []
    contexts: list[Context] = []
    for start in range(0, len(captions), chunk):
        raw = captions[range(start, min(start + chunk, len(captions)))]
        batch = encode_batch(raw, backbone, truncate)
        contexts.append(to(batch.c, "cpu"))
        if batch.latent is not None:
            latents.append(batch.latent.cpu())
    return Encoded(torch.cat(latents) if latents else None, cat(contexts))


def reread(path: Path, captions: Captions, backbone: Backbone, truncate: bool = False) -> Encoded:
    """The cache file of `captions`. Raises ValueError when it was made from other captions, other images or another pipeline."""
    cached = Encoded.load(path)
    if isinstance(captions, Encoded):
        return cached
    rows = sorted({0, len(captions) // 2, len(captions) - 1})
    same = len(cached) == len(captions)
    if same:
        fresh, kept = encode_batch(captions[rows], backbone, truncate), cached[rows]
        same = _alike(fresh.c.text, kept.c.text) and _alike(fresh.latent, kept.latent)
    if not same:
        raise ValueError(f"the cache {path} was made from another data set or pipeline: delete it, or give another data.cache")
    return cached


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    # Loose enough for encoders in half precision, and for another machine's.
    return a.shape == b.shape and float((a.cpu() - b).abs().mean()) < 0.05


def encode_batch(raw: RawBatch, backbone: Backbone, truncate: bool = False) -> CaptionBatch:
    """One raw batch on the backbone's device."""
    latent = None if raw.pixels is None else backbone.encode_images(raw.pixels)
    return CaptionBatch(latent, backbone.encode_text(raw.prompts, truncate), raw.rows.to(backbone.device))


def square(image: Any, size: int) -> Tensor:
    """A PIL image as [3, size, size] in [-1, 1]: short side resized (Lanczos), centre cropped, converted to RGB."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor

    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS)
    return pil_to_tensor(center_crop(image, [size, size])).float() / 127.5 - 1


def _load_dataset(path: str, split: str) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
                loaded = load_from_disk(str(folder))
                if isinstance(loaded, Dataset):
                    return loaded
                if split not in loaded:
                    raise ValueError(f"it has no split {split!r}, only {', '.join(loaded)}")
                return loaded[split]
            return load_dataset("imagefolder", data_dir=str(folder), split=split)
        if folder.is_file():
            return load_dataset(folder.suffix.lstrip(".").replace("jsonl", "json"), data_files=str(folder), split=split)
        return load_dataset(path, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {str(error).splitlines()[0]}") from error


def builtin(name: str) -> Captions:
    """The built-in set called `name` (shapes or digits)."""
    sets: dict[str, type[Captions]] = {"shapes": Shapes, "digits": Digits}
    if name not in sets:
        raise ValueError(f"no built-in data set is called {name!r}: known are {', '.join(sets)}; or give `captions` your own")
    return sets[name]()
