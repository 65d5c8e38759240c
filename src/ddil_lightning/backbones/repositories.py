"""Where pipelines are stored: folders, repositories of the hub, single files; and what is wrong with their files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.weights import WEIGHTS, chosen_variant, keys_of, variants
from ddil_lightning.servers import no_hub
from ddil_lightning.texts import from_json, place, reason

BUILTIN = {"builtin": "shapes", "builtin/shapes": "shapes", "builtin/digits": "digits", "builtin/flow": "flow"}
"""Folders of `miniature/weights/` by the names that stand for them."""
DENOISERS = ("unet", "transformer")
"""Where a pipeline keeps the network that denoises."""
SPARED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that distillation does not use: neither loaded nor exported unless somebody asks (1.2 GB in Stable Diffusion 1.5)."""
UNWEIGHED = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor")
"""Ends of the names of classes without weights."""


class Stored(NamedTuple):
    """A pipeline's files: `folder` with its model_index.json and settings, and in it its weights, of a `variant`, or else in one `file`."""

    folder: Path
    variant: str | None = None
    file: Path | None = None

    @property
    def listed(self) -> dict[str, Any]:
        """The content of its model_index.json."""
        return read_json(self.folder / "model_index.json")

    def variant_of(self, name: str) -> str | None:
        """The variant that the component `name` has; None where it has the plain files alone."""
        return self.variant if self.variant in variants(file.name for file in (self.folder / name).glob("*")) else None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming it, for anything else."""
    try:
        value = from_json(file.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file, or only half of one ({error}): write it again or copy it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__} where an object with names is expected: copy it anew")
    return value


# Places ---------------------------------------------------------------------------------------------------------------------------------


def single_file(path: str | Path) -> Path | None:
    """The checkpoint behind `path` where it is a .safetensors file."""
    file = place(path)
    return file if file.suffix == ".safetensors" and str(path).isprintable() and file.is_file() else None


def called(path: str | Path) -> str:
    """What a pipeline is called: a built-in name or hub id as it is, else the last name of folder or file, whose place is one's own."""
    file = single_file(path)
    if file is not None:
        return file.resolve().stem
    return str(path) if str(path) in BUILTIN or pipeline_folder(path) is None else place(path).resolve().name


def pipeline_folder(path: str | Path) -> Path | None:
    """The folder behind `path`: a built-in name, or a local pipeline folder; None where it can only be a hub id.

    Raises ValueError for a folder that holds no network that denoises, for a file, and for a path that looks local but does not exist.
    """
    folder = local_folder(path)
    if folder is None:
        return None
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    if not any(name in index and (folder / name).is_dir() for name in DENOISERS):
        raise ValueError(f"the pipeline {folder} has no U-Net (folder unet/) and no transformer: a text-to-image pipeline is needed")
    return folder


def listed(path: str) -> dict[str, Any]:
    """The content of a pipeline's model_index.json, which is all that is fetched of a hub id.

    Empty for a single file, and where it cannot be had, which is told when the rest is asked for. Raises ValueError for a damaged one.
    """
    from huggingface_hub import hf_hub_download

    if single_file(path) is not None:
        return {}
    folder = pipeline_folder(path)
    try:
        if folder is None:
            why = no_hub()
            folder = Path(hf_hub_download(path, "model_index.json")).parent if why is None else cached(path, "model_index.json", why)
    except Exception:  # whatever the hub's client raises
        return {}
    libraries(index := read_json(folder / "model_index.json"), folder / "model_index.json")
    return {name: value for name, value in index.items() if isinstance(value, list)}


def is_pipeline(path: str) -> bool:
    """Whether a folder or hub id is a whole pipeline and not a network alone."""
    folder = local_folder(path)
    return bool(listed(path)) if folder is None else (folder / "model_index.json").is_file()


def local_folder(path: str | Path, kind: str = "pipeline") -> Path | None:
    """The folder of a built-in name or a local path; None where it can only be a hub id. Raises ValueError for a file and for no path."""
    if str(path) in BUILTIN:
        return Path(str(resources.files("ddil_lightning"))) / "miniature" / "weights" / BUILTIN[str(path)]
    folder = place(path)
    if folder.is_file():
        raise ValueError(_no_folder(folder))
    if not folder.exists():
        if str(path).startswith((".", "/", "~", "builtin/")) or str(path).count("/") != 1 or not str(path).isprintable():
            known = f", or one of {', '.join(BUILTIN)}" if kind == "pipeline" else ""
            raise ValueError(f"no {kind} at {path!s:.200}: give a diffusers folder, a hub id such as owner/name{known}")
        return None
    return folder


def _no_folder(path: Path) -> str:
    if path.suffix == ".safetensors":
        return f"{path} is a file: a folder or a hub id is needed here"
    if path.suffix not in (".ckpt", ".pt", ".bin", ".pth"):
        return f"{path} is a file and no pipeline: give a folder that holds model_index.json, or a checkpoint of one .safetensors file"
    return f"{path} is a pickled file, which may run code when it is read: give a .safetensors checkpoint, or a diffusers folder of them"


def fetched(source: Source, given: Collection[str]) -> Stored:
    """The folder in the hub's cache of a hub id, with everything of it that is needed; see `stored`."""
    from diffusers import DiffusionPipeline

    names, why = listing(source.path)
    if names is None:
        try:
            folder = cached(source.path, "model_index.json", why)
        except ValueError as error:
            raise ValueError(f"the pipeline {error}") from error
        files = stored_files(folder, given, f"{why}, and the hub's cache lacks it")
        check_files(folder, given)
        return Stored(folder, chosen_variant(f"the pipeline {source.path}", files, source.variant))
    parts: dict[str, list[str]] = {}
    for name in names:
        part, _, file = name.rpartition("/")
        if part and "/" not in part and part not in {*SPARED, *given} and WEIGHTS.fullmatch(file):
            parts.setdefault(part, []).append(file)
    variant = chosen_variant(f"the pipeline {source.path}", parts, source.variant)
    spared = dict.fromkeys((*SPARED, *given))
    try:
        folder = Path(DiffusionPipeline.download(source.path, variant=variant, use_safetensors=True, **spared))
    except Exception as error:  # whatever the hub's client raises
        raise ValueError(f"the pipeline {source.path} could not be loaded: {reason(error)}") from error
    return Stored(folder, variant)


def listing(repository: str) -> tuple[list[str] | None, str]:
    """The names of a hub repository's files; None, and why, where the hub cannot be asked. Raises ValueError where it has no such one."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import RepositoryNotFoundError

    why = no_hub()
    if why is not None:
        return None, why
    try:
        return list_repo_files(repository), ""
    except RepositoryNotFoundError as error:
        raise ValueError(f"the pipeline {repository} could not be loaded: {reason(error)}") from error
    except Exception as error:  # a network that is not there has many names
        return None, f"the hub cannot be reached ({type(error).__name__})"


def part_folder(path: str, name: str) -> Path:
    """The folder of a component `name` alone: that of a pipeline, or one of its own; of a hub id, in the hub's cache, fetched if needed."""
    folder = local_folder(path, name)
    if folder is None:
        folder = _fetched_part(path, name)
    if (folder / "model_index.json").is_file():
        folder = folder / name
    if not (folder / "config.json").is_file():
        raise ValueError(f"it has no {'' if folder.name != name else name + '/'}config.json: give a pipeline, or the folder of a {name}")
    return folder


def _fetched_part(repository: str, name: str) -> Path:
    from huggingface_hub import snapshot_download

    names, why = listing(repository)
    if names is None:
        try:
            return cached(repository, "model_index.json", why)
        except ValueError:
            return cached(repository, "config.json", why)
    within = f"{name}/" if "model_index.json" in names else ""
    own = [file.removeprefix(within) for file in names if file.startswith(within) and "/" not in file.removeprefix(within)]
    variant = chosen_variant(f"the {name} {repository}", {name: own})
    wanted = [within + file for file in own if variants([file]) == {variant} or file.endswith(".json")]
    return Path(snapshot_download(repository, allow_patterns=["model_index.json", *wanted]))


def cached(repository: str, file: str, why: str) -> Path:
    """The folder of a repository in the hub's cache, by a `file` at its top. Raises ValueError, with `why` nothing is fetched, for none."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    if isinstance(found, str):
        return Path(found).parent
    raise ValueError(
        f"{repository} could not be loaded: {why}, and the hub's cache {constants.HF_HUB_CACHE} has no {file} of it: "
        f"fetch it where there is a network (hf download {repository}), or give a folder"
    )


# Files ----------------------------------------------------------------------------------------------------------------------------------


def libraries(index: Mapping[str, Any], where: str | Path) -> dict[str, str | None]:
    """The library of every component that a model_index.json lists, None for one that is not there. Raises ValueError, naming the file."""
    listed = {name: value for name, value in index.items() if isinstance(value, list)}
    for name, value in listed.items():
        if len(value) != 2 or not (value == [None, None] or all(isinstance(part, str) for part in value)):
            raise ValueError(f'{where}: {name} is {value!r:.80}, not ["library", "class"] or [null, null]: copy it anew')
    return {name: library for name, (library, _) in listed.items()}


def stored_files(folder: Path, given: Collection[str] = (), why: str = "") -> dict[str, list[str]]:
    """The names of the files of every component with weights. Raises ValueError for one without a folder."""
    index = read_json(folder / "model_index.json")
    there = [name for name, library in libraries(index, folder / "model_index.json").items() if library is not None and name not in given]
    for name in there:
        if name not in SPARED and not (folder / name).is_dir():
            said = f"{why}: fetch it where there is a network" if why else "which its model_index.json names: copy it anew"
            raise ValueError(f"the pipeline {folder} has no folder {name}/, {said}")
    weighed = [name for name in there if name not in SPARED and not index[name][1].endswith(UNWEIGHED)]
    return {name: [file.name for file in (folder / name).iterdir()] for name in weighed}


def check_files(folder: Path, given: Collection[str] = ()) -> None:
    """Raises ValueError, naming the file, for weights or settings of a component that are cut short, and for a LoRA left in the weights."""
    index = folder / "model_index.json"
    names = [name for name, library in libraries(read_json(index), index).items() if library is not None and name not in given]
    for part in (folder / name for name in names if name not in SPARED):
        if not part.is_dir():
            raise ValueError(f"the pipeline {folder} has no folder {part.name}/, which its model_index.json names: copy it anew")
        for file in sorted(part.glob("*.json")):
            read_json(file)
        for file in sorted(part.glob("*.safetensors")):
            lora = [key for key in keys_of(file) if ".lora_" in key or ".base_layer." in key]
            if lora:
                raise ValueError(
                    f"the weights {file} still have a LoRA in them ({lora[0]}): fuse it by pipe.fuse_lora() and "
                    "pipe.unload_lora_weights(), and save the pipeline again"
                )
