"""Captioned images: the built-in sets, Hugging Face datasets and folders, and prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


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

    The image column holds pictures, their bytes, or the paths of files, which are relative to the folder of the json or parquet file.
    `size`: side in pixels; images are resized by their short side and cropped at the centre. `image`, `caption`: the columns.
    """

    def __init__(
        self, path: str, size: int = 512, image: str = "image", caption: str = "text", split: str = "train", limit: int | None = None
    ) -> None:
        self.size, self._image, self._caption, self._path = size, image, caption, path
        self._rows = _load_dataset(path, split)
        missing = {image, caption} - set(self._rows.column_names)
        if missing:
            raise ValueError(
                f"the data set {path} has no column {' or '.join(sorted(missing))}: it has {', '.join(self._rows.column_names)}; "
                "name them with image= and caption="
            )
        self._rows = _undecoded(self._rows, image, path)
        if limit is not None:
            self._rows = self._rows.select(range(min(limit, len(self._rows))))

    def __len__(self) -> int:
        return len(self._rows)

    def prompts(self, index: Sequence[int]) -> list[str]:
        """The captions of the rows `index`; of several captions for an image the first. Raises ValueError for a row without one."""
        values = self._rows.select_columns([self._caption])[list(index)][self._caption]
        texts = [value[0] if isinstance(value, list) and value else value for value in values]
        for row, text in zip(index, texts, strict=True):
            if not isinstance(text, str):
                where = f"the data set {self._path}, row {row} (from 0)"
                raise ValueError(f"{where}: {self._caption} is {text!r} and no caption; remove the row")
        return texts

    def pixels(self, index: Sequence[int]) -> Tensor:
        """The images of the rows `index`. Raises ValueError for one that cannot be read."""
        values = self._rows.select_columns([self._image])[list(index)][self._image]
        return torch.stack([square(self._picture(value, row), self.size) for row, value in zip(index, values, strict=True)])

    def _picture(self, value: dict[str, Any] | None, row: int) -> Any:
        """A PIL image of {bytes, path}."""
        from datasets import Image

        data, file = (value or {}).get("bytes"), (value or {}).get("path")
        if data is None and file and "://" not in file:
            folder = Path(self._path).expanduser()
            file = str((folder if folder.is_dir() else folder.parent) / file)
        try:
            return Image().decode_example({"bytes": data, "path": file})
        except (OSError, ValueError) as error:
            reason = f"no file {file}" if isinstance(error, FileNotFoundError) else str(error)
            raise ValueError(f"the data set {self._path}, row {row} (from 0): {self._image} cannot be read: {reason}") from error


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


def square(image: Any, size: int) -> Tensor:
    """A PIL image as [3, size, size] in [-1, 1]: short side resized (Lanczos), centre cropped, converted to RGB."""
    from PIL import Image
    from torchvision.transforms.functional import center_crop, pil_to_tensor

    image = image.convert("RGB")
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.LANCZOS)
    return pil_to_tensor(center_crop(image, [size, size])).float() / 127.5 - 1


def _undecoded(rows: Any, column: str, path: str) -> Any:
    """The set with `column` as {bytes, path}, whether it holds pictures, bytes or paths. Raises ValueError for anything else."""
    from datasets import Image

    feature = rows.features[column]
    try:
        return rows.cast_column(column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"the data set {path}: column {column} holds {feature} and no images; name another with image=") from error


def _load_dataset(path: str, split: str) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

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
    except DatasetGenerationError as error:  # says no more than that there was another
        raise ValueError(f"the data set {path} could not be read: {' '.join(str(error.__cause__ or error).split())}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"the data set {path} could not be read: {str(error).splitlines()[0]}") from error


def builtin(name: str) -> Captions:
    """The built-in set called `name` (shapes or digits)."""
    sets: dict[str, type[Captions]] = {"shapes": Shapes, "digits": Digits}
    if name not in sets:
        raise ValueError(f"no built-in data set is called {name!r}: known are {', '.join(sets)}; or give `captions` your own")
    return sets[name]()
