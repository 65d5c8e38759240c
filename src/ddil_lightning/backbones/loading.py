"""Loading diffusers pipelines: from a built-in name, a folder or a hub id, with every fault of a folder in one line that names its file."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddil_lightning.bounds import is_number
from ddil_lightning.texts import place, reason

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUILTIN = {"builtin": "shapes", "builtin/shapes": "shapes", "builtin/digits": "digits"}
"""Folders of `miniature/weights/` by the names that stand for them."""
DENOISERS = ("unet", "transformer")
"""Where a pipeline keeps the network that denoises."""
REQUIRED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""Components that a pipeline must have besides its network."""
SPARED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that distillation does not use: neither loaded nor exported unless somebody asks (1.2 GB in Stable Diffusion 1.5)."""


def pipeline_folder(path: str | Path) -> Path | None:
    """The folder behind `path`: a built-in name, or a local pipeline folder; None where it can only be a hub id.

    Raises ValueError for a folder that holds no network that denoises, for a file, and for a path that looks local but does not exist.
    """
    if str(path) in BUILTIN:
        return Path(str(resources.files("ddil_lightning"))) / "miniature" / "weights" / BUILTIN[str(path)]
    folder = place(path)
    if folder.is_file():
        raise ValueError(_single_file(folder))
    if not folder.exists():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1 or not str(path).isprintable():
            raise ValueError(
                f"no pipeline at {path!s:.200}: give a diffusers folder, a hub id such as owner/name, or one of {', '.join(BUILTIN)}"
            )
        return None
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    if not any(name in index and (folder / name).is_dir() for name in DENOISERS):
        raise ValueError(f"the pipeline {folder} has no U-Net (folder unet/) and no transformer: a text-to-image pipeline is needed")
    return folder


def _single_file(path: Path) -> str:
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".bin", ".pth"):
        return f"{path} is a file and no pipeline folder: give the folder that holds model_index.json"
    if path.suffix != ".safetensors":
        return f"{path} is a pickled file, which may run code when it is read: give a diffusers folder with .safetensors weights"
    return (
        f'{path} is a single file: make a pipeline folder of it first, by python -c "from diffusers import StableDiffusionPipeline as P; '
        f"P.from_single_file('{path}').save_pretrained('{path.stem}')\" (StableDiffusionXLPipeline for SDXL's), and give {path.stem}"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming it, for anything else."""
    try:
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON file, or only half of one ({error}): write it again or copy it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__} where an object with names is expected: copy it anew")
    return value


def load_pipeline(path: str | Path, dtype: Any = torch.float32, spare: bool = True, **kwargs: Any) -> DiffusionPipeline:
    """A diffusers pipeline from a built-in name, a folder or a hub id; safetensors only, quiet, in float32 if not asked otherwise.

    `dtype`: one for all, or by component as diffusers takes it. `spare`: without SPARED. `kwargs`: components to take instead of the stored
    ones. Raises ValueError, naming the file where it is known.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = pipeline_folder(path)
    if folder is not None:
        check_files(folder, kwargs)
    try:
        index = index_of(path)
        # Components that a folder stores as null must be passed as None, or loading raises.
        absent = {name: None for name, library in _libraries(index, path).items() if library is None or (spare and name in SPARED)}
        extra = {"requires_safety_checker": False} if "safety_checker" in absent else {}
        pipe = DiffusionPipeline.from_pretrained(str(folder or path), dtype=dtype, use_safetensors=True, **{**absent, **extra, **kwargs})
    except Exception as error:  # whatever a library makes of a file that is not as it expects
        raise ValueError(f"the pipeline {path} could not be loaded: {reason(error)}") from error
    missing = [] if any(getattr(pipe, name, None) is not None for name in DENOISERS) else ["U-Net and no transformer"]
    missing += [name for name in REQUIRED if getattr(pipe, name, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        what = f"has no {missing[0]}" if missing else f"is a {type(pipe).__name__}"
        raise ValueError(f"the pipeline {path} {what}: only text-to-image pipelines in latents are distilled")
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


def recommended(path: str | Path) -> dict[str, Any]:
    """What a pipeline folder says of itself in ddil.json (guidance, dataset, steps, ...); empty without that file.

    Raises ValueError, naming the file, for one that is damaged or says what cannot be.
    """
    folder = pipeline_folder(path)
    file = folder / "ddil.json" if folder else None
    if not file or not file.is_file():
        return {}
    about = read_json(file)
    for name, (fits, said) in CARD.items():
        unsaid = name not in about or (name in OPEN and about[name] is None)
        if not unsaid and not fits(about[name]):
            raise ValueError(f"{file}: {name} is {about[name]!r}, not {said}: mend it or remove the file")
    return about


def _guides(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1000


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 1000 for n in value)


CARD: dict[str, tuple[Any, str]] = {
    "guidance": (_guides, "a number from 0 to 1000"),
    "guidance_scale": (_guides, "a number from 0 to 1000"),
    "dataset": (lambda x: isinstance(x, str), "a name"),
    "method": (lambda x: isinstance(x, str), "a name"),
    "steps": (lambda x: _counts([x]) and x > 0, "a step count from 1 to 1000"),
    "made_for": (lambda x: _counts(x) and 0 not in x, "a list of step counts from 1 to 1000"),
    "timesteps": (_counts, "a list of times from 0 to 1000"),
    "previews": (lambda x: isinstance(x, list) and all(isinstance(p, str) for p in x), "a list of prompts"),
}
"""What ddil.json may say: whether a value fits, and what it should be."""
OPEN = ("dataset",)
"""Where null is an answer: a student of pictures of one's own has no built-in data set to be tested on."""


def _libraries(index: Mapping[str, Any], where: str | Path) -> dict[str, str | None]:
    """The library of every component that a model_index.json lists, None for one that is not there. Raises ValueError, naming the file."""
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in listed.items():
        if len(value) != 2 or not (value == [None, None] or all(isinstance(part, str) for part in value)):
            raise ValueError(f'{where}: {name} is {value!r:.80}, not ["library", "class"] or [null, null]: copy it anew')
    return {name: library for name, (library, _) in listed.items()}


def check_files(folder: Path, given: Collection[str] = ()) -> None:
    """Raises ValueError, naming the file, for weights or settings of a component that are cut short, and for a LoRA left in the weights."""
    from safetensors import SafetensorError, safe_open

    libraries = _libraries(read_json(folder / "model_index.json"), folder / "model_index.json")
    names = [name for name, library in libraries.items() if library is not None and name not in given]
    for part in (folder / name for name in names if name not in SPARED):
        if not part.is_dir():
            raise ValueError(f"the pipeline {folder} has no folder {part.name}/, which its model_index.json names: copy it anew")
        for file in sorted(part.glob("*.json")):
            read_json(file)
        for file in sorted(part.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as opened:
                    lora = [key for key in opened.keys() if ".lora_" in key or ".base_layer." in key]  # noqa: SIM118 (no mapping)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"the weights {file} are cut short or damaged ({error}): copy the file anew") from error
            if lora:
                raise ValueError(
                    f"the weights {file} still have a LoRA in them ({lora[0]}): fuse it by pipe.fuse_lora() and "
                    "pipe.unload_lora_weights(), and save the pipeline again"
                )


def index_of(path: str | Path) -> dict[str, Any]:
    """The components of a pipeline by name, as its model_index.json lists them."""
    from diffusers import DiffusionPipeline

    folder = pipeline_folder(path)
    return read_json(folder / "model_index.json") if folder is not None else dict(DiffusionPipeline.load_config(str(path)))


def empty_network(path: str | Path) -> dict[str, Any]:
    """The network that denoises in a pipeline, by its component's name, without memory for its weights.

    Raises ValueError, with diffusers' reason, where it cannot be made from the stored configuration.
    """
    import diffusers

    folder = pipeline_folder(path)
    try:
        index = index_of(path)
        name = next(name for name in DENOISERS if name in index)
        kind = getattr(diffusers, index[name][1])
        with without_weights():
            return {name: kind.from_config(kind.load_config(str(folder or path), subfolder=name))}
    except Exception as error:
        raise ValueError(f"the network of the pipeline {path} could not be made: {reason(error)}") from error


def without_weights() -> Any:
    """Inside, networks are made without memory for their weights. Their buffers are there: no checkpoint brings those that are computed."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def check_weights(pipe: Any, path: str | Path, given: Collection[str] = ()) -> None:
    """Raises ValueError, naming component and tensor, for weights that are missing or not finite: a student would only repeat them.

    `given`: components that did not come from there.
    """
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or name in given:
            continue
        weights = part.state_dict()
        missing = [key for key, value in weights.items() if value.is_meta]
        if missing or _made_up(part, weights):
            what = f" ({missing[0]})" if missing else ""
            raise ValueError(f"the pipeline {path}: the file of its {name} lacks some of the weights{what}: take another copy of it")
        for key, value in weights.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"the pipeline {path} has NaN or infinite weights in its {name} ({key}): take another copy of it")


def _made_up(part: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether transformers has drawn weights that the file does not hold, which it only mentions. By number: names change with versions."""
    from safetensors import safe_open

    folder = Path(getattr(part, "name_or_path", "") or "/nowhere")
    files = [file for file in folder.glob("model*.safetensors") if file.name.count(".") == 1]  # no variants such as model.fp16.safetensors
    if not files:
        return False
    stored = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            stored += len(opened.keys())
    return stored < len({value.data_ptr() for value in weights.values() if value.numel()})  # tied weights are stored once
