"""Files of weights as diffusers and transformers call them: their variants, and which of them are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

Weights = Iterable[tuple[str, Tensor]]
"""Tensors by name, one after the other."""
MAPPED = 2**28
"""How many bytes of a file stay mapped at a time."""

WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<older>[^.]+))?"
    r"\.(?P<kind>safetensors|bin)"
)
"""Files of weights, as diffusers and transformers call them. The variant of shards stands in one of two places."""


def variants(names: Iterable[str], kind: str = "safetensors") -> set[str | None]:
    """The variants of the files of weights among `names`, None for the plain one."""
    found = (WEIGHTS.fullmatch(name) for name in names)
    return {match["variant"] or match["older"] for match in found if match and match["kind"] == kind}


def weight_files(part: Path, variant: str | None) -> list[Path]:
    """The .safetensors files of a component that are read for a variant, in order."""
    return [file for file in sorted(part.glob("*.safetensors")) if variants([file.name]) == {variant}]


def chosen_variant(where: str, parts: Mapping[str, Iterable[str]], asked: str | None = None) -> str | None:
    """The variant to read of components, by their files: the one that is `asked` for, the plain one, or the only one that there is.

    Raises ValueError for one that is not there, naming those that are, and for weights that are pickled files.
    """
    have = {part: variants(names) for part, names in parts.items()}
    for part, found in have.items():
        if not found:
            raise ValueError(f"{where} {_without(part, list(parts[part]))}")
    named = sorted({name for found in have.values() for name in found if name})
    known = f"it has the variant{'s' if len(named) > 1 else ''} {', '.join(named)}" if named else "it has none"
    if asked is not None:
        if have and asked not in named:
            raise ValueError(f"{where} has no files of the variant {asked!r}: {known}")
        lacking = [part for part, found in have.items() if not {asked, None} & found]
        if lacking:
            raise ValueError(f"{where} has neither plain files nor those of the variant {asked!r} for its {lacking[0]}: {known}")
        return asked
    lacking = [part for part, found in have.items() if None not in found]
    if not lacking:
        return None
    common = sorted(name for name in set.intersection(*(have[part] for part in lacking)) if name)
    if len(common) != 1:
        raise ValueError(f"{where} has no plain files for its {lacking[0]}: {known}; say which by model.pipeline.variant")
    logging.getLogger(__name__).info(f"{where} has files of the variant {common[0]} alone, which are read")
    return common[0]


def _without(part: str, names: list[str]) -> str:
    if not variants(names, "bin"):
        return f"has no weights of its {part}: copy its folder {part}/ anew"
    return (
        f"has the weights of its {part} as a pickled .bin file alone, which may run code when it is read: take a copy with .safetensors "
        "files, or, where you trust it, write them by DiffusionPipeline.from_pretrained(..., use_safetensors=False).save_pretrained(FOLDER)"
    )


def keys_of(file: Path) -> list[str]:
    """The names of the tensors in a file. Raises ValueError for one that is cut short or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the weights {file} are cut short or damaged ({error}): copy the file anew") from error


def stored_weights(files: Iterable[Path]) -> Weights:
    """The tensors in files, one after the other, to be copied: a file is closed and opened again on the way.

    What was read of a file that is mapped counts as memory until it is closed.
    """
    from safetensors import safe_open

    for file in files:
        keys = keys_of(file)
        while keys:
            read = 0
            with safe_open(file, "pt") as opened:
                while keys and read < MAPPED:
                    value = opened.get_tensor(keys[0])
                    read += value.nbytes
                    yield keys.pop(0), value
                    del value


@contextmanager
def hushed() -> Iterator[None]:
    """Inside, diffusers says nothing: it warns of what a file does not hold and nobody expects there."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
