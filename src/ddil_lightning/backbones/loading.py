"""Loading diffusers pipelines from a `Source`, with every fault of what is stored in one line that names its file."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddil_lightning.backbones import loras, quantising, singlefile
from ddil_lightning.backbones.repositories import (
    DENOISERS,
    SPARED,
    Stored,
    check_files,
    fetched,
    libraries,
    part_folder,
    pipeline_folder,
    read_json,
    single_file,
    stored_files,
)
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.weights import Weights, chosen_variant, keys_of, stored_weights, weight_files
from ddil_lightning.bounds import is_number
from ddil_lightning.texts import reason

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

REQUIRED = ("vae", "text_encoder", "tokenizer", "scheduler")
"""Components that a pipeline must have besides its network."""
PICTURED = re.compile("ControlNet|Control(?=Inpaint|Img2Img|Pipeline)|Img2Img|Inpaint|Edit(Plus)?(?=Pipeline|Inpaint)")
"""What diffusers adds to the name of a pipeline's class for one that is given a picture besides the prompt."""
RENAMED = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that older pipelines name and transformers has no more."""


def stored(source: Source, given: Collection[str] = ()) -> Stored:
    """Where a source's files are, after those of a hub id were fetched. `given`: components that are not needed.

    Nothing is fetched where HF_HUB_OFFLINE is set. Raises ValueError, in one line, for what is missing or damaged.
    """
    file = single_file(source.path)
    if file is not None:
        if source.variant is not None:
            raise ValueError(f"model.pipeline.variant is {source.variant!r}, and {file} is a single file: leave it out")
        return Stored(singlefile.settings(source, file), None, file)
    if source.config is not None:
        raise ValueError(f"model.pipeline.config is for single files, and {source.path} has settings of its own: leave it out")
    folder = pipeline_folder(source.path)
    if folder is None:
        return fetched(source, given)
    check_files(folder, given)
    return Stored(folder, chosen_variant(f"the pipeline {folder}", stored_files(folder, given), source.variant))


def settled(source: Source, given: Collection[str] = ()) -> Source:
    """The source with the variant that is read of it, which need not have been said. Raises as `stored` does."""
    return replace(source, variant=stored(source, (*given, *(["vae"] if source.vae else []))).variant)


def load_pipeline(
    source: str | Path | Source, dtype: Any = torch.float32, spare: bool = True, quantize: str | None = None, **kwargs: Any
) -> DiffusionPipeline:
    """A diffusers pipeline from its source; safetensors only, quiet, in float32 if not asked otherwise.

    `dtype`: one for all, or by component as diffusers takes it. `spare`: without SPARED. `quantize`: the denoising network in fewer bits
    (`quantising`). `kwargs`: components to take instead of the stored ones, which are not touched. Raises ValueError, naming the file.
    """
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    source, dtypes = Source.of(source), dtype if isinstance(dtype, dict) else {"default": dtype}
    given = dict(kwargs)
    if source.vae is not None and "vae" not in given:
        given["vae"] = load_part(source.vae, "vae", dtypes["vae" if "vae" in dtypes else "default"], "model.pipeline.vae")
    place = stored(source, given)
    _check_kind(source.path, str(place.listed.get("_class_name")))
    name = next((name for name in DENOISERS if name in place.listed and name not in given), None) if quantize else None
    now = quantize if name is not None and place.file is None and not source.lora else None
    try:
        pipe = _read(place, dtypes, spare, given, now)
    except Exception as error:  # whatever a library makes of a file that is not as it expects
        raise ValueError(f"the pipeline {source.path} could not be loaded: {reason(error)}") from error
    missing = [] if any(getattr(pipe, name, None) is not None for name in DENOISERS) else ["U-Net and no transformer"]
    missing += [name for name in REQUIRED if getattr(pipe, name, None) is None]
    if missing or not hasattr(pipe, "encode_prompt"):
        what = f"has no {missing[0]}" if missing else f"is a {type(pipe).__name__}"
        raise ValueError(f"the pipeline {source.path} {what}: only text-to-image pipelines in latents are distilled")
    loras.fuse(pipe, source.lora, tuple(kwargs))
    if name is not None and quantize is not None and now is None:
        setattr(pipe, name, quantising.quantised(getattr(pipe, name), dtypes["default"], quantize))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_kind(path: str, kind: str) -> None:
    """Raises ValueError for the class of a pipeline that is given a picture, which says what is to be given instead."""
    import diffusers

    plain = PICTURED.sub("", kind)
    if plain != kind:
        known = hasattr(diffusers, plain)
        other = f": give the {plain} of this model" if known else ""
        raise ValueError(
            f"the pipeline {path} is a {kind}, which is given a picture besides the prompt, and only text-to-image pipelines are "
            f"distilled{other}"
        )


def _read(place: Stored, dtypes: dict[str, Any], spare: bool, given: dict[str, Any], quantize: str | None) -> Any:
    """The pipeline of `place`, by diffusers."""
    import transformers

    index = place.listed
    # Components that a folder stores as null must be passed as None, or loading raises.
    absent = {name: None for name, library in libraries(index, place.folder).items() if library is None or (spare and name in SPARED)}
    if not spare:
        for name in SPARED:
            kind = RENAMED.get((index.get(name) or [None, None])[1])
            if kind is not None and name not in given:
                given = {**given, name: getattr(transformers, kind).from_pretrained(place.folder / name)}
    extra = {"requires_safety_checker": False} if "safety_checker" in absent else {}
    own = {**absent, **extra, **given}
    if place.file is not None:
        return singlefile.load(place, dtypes, **{name: part for name, part in own.items() if name not in SPARED or part is not None})
    for part in (name for name in DENOISERS if index.get(name, [None])[0] is not None and name not in given):
        network = _network(place, part, dtypes[part if part in dtypes else "default"], quantize)
        own |= {} if network is None else {part: network}
    files = {"variant": place.variant, "use_safetensors": True}
    return _sparing(list(absent)).from_pretrained(str(place.folder), dtype=dtypes if len(dtypes) > 1 else dtypes["default"], **files, **own)


def exact_weights(source: Source, pipe: Any, name: str) -> Weights:
    """The tensors of a pipeline's network `name` in the precision in which they are stored, with the source's LoRAs in them."""
    place = stored(source, [part for part in pipe.components if part != name])
    if place.file is None and not source.lora:
        return stored_weights(weight_files(place.folder / name, place.variant_of(name)))
    kind = type(getattr(pipe, name))
    if place.file is not None:
        model = singlefile.component(place, name, torch.float32)
    else:
        files = {"variant": place.variant_of(name), "use_safetensors": True}
        model = kind.from_pretrained(str(place.folder / name), dtype=torch.float32, **files)
    other = copy.copy(pipe)
    setattr(other, name, model)
    loras.fuse(other, source.lora, [part for part in pipe.components if part != name])
    return model.state_dict().items()  # type: ignore[no-any-return]


def _network(place: Stored, name: str, dtype: torch.dtype, quantize: str | None) -> nn.Module | None:
    """A network with memory of its own for its weights, once, which diffusers would leave mapped from a file that may change.

    None where there is more to it than tensors by their names, for diffusers to read it.
    """
    import diffusers

    folder, kind = place.folder / name, getattr(diffusers, str(place.listed[name][1]), None)
    if kind is not None and quantize is not None:
        return quantising.read(kind, folder, place.variant_of(name), dtype, quantize)
    if kind is None or getattr(kind, "_keep_in_fp32_modules", None) or "quantization_config" in read_json(folder / "config.json"):
        return None
    with without_weights():
        model = kind.from_config(kind.load_config(str(folder)))
    files = weight_files(folder, place.variant_of(name))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    if sorted(shapes) != sorted(key for file in files for key in keys_of(file)):
        return None
    state = {}
    for key, value in stored_weights(files):
        if shapes[key] != value.shape or not value.is_floating_point():
            return None
        state[key] = value.to(dtype, copy=True)
    model.load_state_dict(state, assign=True)
    model.register_to_config(_name_or_path=str(folder))
    return model.eval()  # type: ignore[no-any-return]


def _sparing(absent: list[str]) -> Any:
    """diffusers' DiffusionPipeline, which does not read the components `absent`: given as None, it reads those that are optional."""
    from diffusers import DiffusionPipeline

    def load_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = super(made, cls).load_config(*args, **kwargs)  # type: ignore[arg-type]
        return {**config, **{name: [None, None] for name in absent if name in config}} if isinstance(config, dict) else config

    # By the names of class and module diffusers knows that the index says which pipeline it is.
    names = {"__module__": DiffusionPipeline.__module__, "load_config": classmethod(load_config)}
    made = type("DiffusionPipeline", (DiffusionPipeline,), names)
    return made


def load_part(path: str, name: str, dtype: torch.dtype, option: str) -> nn.Module:
    """A pipeline's component `name` alone, from a pipeline or from a folder or hub id of its own. Raises ValueError with its `option`."""
    import diffusers

    try:
        folder = part_folder(path, name)
        variant = chosen_variant(f"the {name} {path}", {name: [file.name for file in folder.iterdir()]})
        kind = getattr(diffusers, read_json(folder / "config.json")["_class_name"])
        made: nn.Module = kind.from_pretrained(str(folder), variant=variant, use_safetensors=True, dtype=dtype)
    except Exception as error:  # whatever a library makes of a file that is not as it expects
        raise ValueError(f"{option}: {path} could not be loaded: {reason(error)}") from error
    return made


def recommended(path: str | Path) -> dict[str, Any]:
    """What a pipeline folder says of itself in ddil.json (guidance, dataset, steps, ...); empty without that file.

    Raises ValueError, naming the file, for one that is damaged or says what cannot be.
    """
    folder = None if single_file(path) else pipeline_folder(path)
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
    "eta": (lambda x: is_number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    "dataset": (lambda x: isinstance(x, str), "a name"),
    "method": (lambda x: isinstance(x, str), "a name"),
    "steps": (lambda x: _counts([x]) and x > 0, "a step count from 1 to 1000"),
    "made_for": (lambda x: _counts(x) and 0 not in x, "a list of step counts from 1 to 1000"),
    "timesteps": (_counts, "a list of times from 0 to 1000"),
    "size": (lambda x: isinstance(x, list) and len(x) == 2 and all(type(n) is int and n > 0 for n in x), "height and width in pixels"),
    "shift": (lambda x: is_number(x) and x > 0, "a number above 0"),
    "sigmas": (lambda x: isinstance(x, list) and x != [] and all(is_number(s) and 0 < s <= 1 for s in x), "a list of numbers from 0 to 1"),
    "previews": (lambda x: isinstance(x, list) and all(isinstance(p, str) for p in x), "a list of prompts"),
}
"""What ddil.json may say: whether a value fits, and what it should be."""
OPEN = ("dataset",)
"""Where null is an answer: a student of pictures of one's own has no built-in data set to be tested on."""


def empty_network(source: Source) -> dict[str, Any]:
    """The network that denoises in a pipeline, by its component's name, without memory for its weights.

    Raises ValueError, with diffusers' reason, where it cannot be made from the stored configuration.
    """
    import diffusers

    place = stored(source, DENOISERS)
    try:
        index = place.listed
        name = next(name for name in DENOISERS if name in index)
        kind = getattr(diffusers, index[name][1])
        with without_weights():
            return {name: kind.from_config(kind.load_config(str(place.folder), subfolder=name))}
    except Exception as error:
        raise ValueError(f"the network of the pipeline {source.path} could not be made: {reason(error)}") from error


def without_weights() -> Any:
    """Inside, networks are made without memory for their weights. Their buffers are there: no checkpoint brings those that are computed."""
    from accelerate import init_empty_weights

    return init_empty_weights(include_buffers=False)


def check_weights(pipe: Any, source: Source, given: Collection[str] = ()) -> None:
    """Raises ValueError, naming component and tensor, for weights that are missing or not finite: a student would only repeat them.

    `given`: components that did not come from there.
    """
    path = source.path
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or name in given:
            continue
        weights = part.state_dict()
        missing = [key for key, value in weights.items() if value.is_meta]
        if missing or _made_up(part, weights, source.variant):
            what = f" ({missing[0]})" if missing else ""
            raise ValueError(f"the pipeline {path}: the file of its {name} lacks some of the weights{what}: take another copy of it")
        for key, value in weights.items():
            plain = value if type(value) is torch.Tensor else value.dequantize()  # a quantised one
            if plain.is_floating_point() and not bool(plain.isfinite().all()):
                raise ValueError(f"the pipeline {path} has NaN or infinite weights in its {name} ({key}): take another copy of it")


def _made_up(part: nn.Module, weights: dict[str, torch.Tensor], variant: str | None) -> bool:
    """Whether transformers has drawn weights that the file does not hold, which it only mentions. By number: names change with versions."""
    from safetensors import safe_open

    folder = Path(getattr(part, "name_or_path", "") or "/nowhere")
    files = [file for file in weight_files(folder, variant) or weight_files(folder, None) if file.name.startswith("model")]
    if not files:
        return False
    count = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            count += len(opened.keys())
    return count < len({value.data_ptr() for value in weights.values() if value.numel()})  # tied weights are stored once
