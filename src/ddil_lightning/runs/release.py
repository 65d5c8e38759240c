"""Releases: a student in the formats that its users' tools open, each read back and compared before it gets its name, with a model card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ddil_lightning.backbones import comfy, ldm, lora
from ddil_lightning.backbones.loading import load_pipeline
from ddil_lightning.backbones.repositories import BUILTIN, called
from ddil_lightning.errors import one_line
from ddil_lightning.files import replacing_folder, write_text
from ddil_lightning.runs.card import ADAPTERS
from ddil_lightning.runs.export import card, confirm, deliver, export, rounded, unheld
from ddil_lightning.runs.reread import NotAsTrained, beside, check_weights, is_lean, loads
from ddil_lightning.texts import from_json
from ddil_lightning.training.sharing import merged

if TYPE_CHECKING:
    from ddil_lightning.backbones.family import Family
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.training.method import Distillation

FORMATS = ("diffusers", "lora", "kohya", "single-file", "comfy")
U_NETS = ("kohya", "single-file")
"""Formats of Stable Diffusion's U-Nets alone."""


@dataclass(frozen=True)
class Release:
    """What goes out.

    `out`: the folder. `name`: what its files are called, before the step count. `prompts`: by which samples are compared. `run`: the config
    and the summary of the run, for the card. `licence`: by default the teacher's. `hub`: the repository that it will go to.
    """

    out: Path
    formats: Sequence[str]
    name: str
    steps: int
    prompts: Sequence[str]
    dtype: torch.dtype = torch.float32
    safety_checker: bool = False
    run: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    hub: str | None = None

    def file(self, kind: str) -> str:
        """Where a format lies in the folder."""
        stem = f"{self.name}_{self.steps}step"
        return {
            "diffusers": "pipeline",
            "lora": "pytorch_lora_weights.safetensors",
            "kohya": f"{stem}_kohya.safetensors",
            "single-file": f"{stem}.safetensors",
            "comfy": f"{stem}_comfy.safetensors",
        }[kind]


def default_name(config: str | None, teacher: str) -> str:
    """A release's name: that of the config, and the teacher's, in letters that every system and every tool takes."""
    path = BUILTIN.get(teacher) or called(teacher)
    parts = (config or "student", path.rpartition("/")[2])
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_.") for part in parts)


def check_formats(method: Distillation, formats: Sequence[str]) -> None:
    """Raises ValueError, naming formats that do, for one that cannot hold the student of `method`."""
    if why := unheld(method):
        raise ValueError(f"{why}: its weights are in the checkpoint")
    network = cast("Family", method.outgoing.network)
    for kind in formats:
        if kind in U_NETS and network.component != "unet":
            raise ValueError(f"--format {kind} is for U-Nets, and this student is a {type(network).__name__}: choose --format diffusers")
        if kind in ADAPTERS:
            lora.check(network, method.outgoing.shared, method.backbone.told)
            of = type(cast("Pipeline", method.backbone).pipe)
            loads_any = hasattr(of, "save_lora_weights")
            if kind == "comfy":
                others = ["diffusers", *(["lora"] if loads_any else []), *(["kohya"] if network.component == "unet" else [])]
                comfy.check(type(network), lora.layers(network), " or ".join(others))
            if not loads_any:
                raise ValueError(f"--format {kind}: diffusers loads no LoRA into a {of.__name__}; choose diffusers, which has it merged")
        if kind == "single-file":
            ldm.check(network.model)


def release(method: Distillation, given: Release) -> Iterator[tuple[Path, float]]:
    """Write the student of `method` in all formats, and yield each with the relative difference of its latents to the trainer's.

    A card comes last. Raises NotAsTrained for a file that samples otherwise: it is kept as NAME-unverified, and what is written stays.
    """
    check_formats(method, given.formats)
    for kind in FORMATS:
        if kind not in given.formats:
            continue
        path = given.out / given.file(kind)
        if kind == "diffusers":
            yield path, deliver(method, path, given.prompts, given.steps, given.dtype, given.safety_checker)
        else:
            yield path, (_single_file if kind == "single-file" else _adapters)(method, given, kind)
    known = {"run": given.run, "licence": given.licence, "hub": given.hub, "dtype": given.dtype}
    if "diffusers" in given.formats:
        write_text(given.out / given.file("diffusers") / "README.md", card(method, given.steps, **known).text())
    files = {kind: given.file(kind) for kind in FORMATS if kind in given.formats}
    write_text(given.out / "README.md", card(method, given.steps, files=files, **known).text())


def _adapters(method: Distillation, given: Release, kind: str) -> float:
    """Write a file of adapters, and compare the teacher with what diffusers makes of it."""
    backbone, network = cast("Pipeline", method.backbone), cast("Family", method.outgoing.network)
    trained = method.deployment if {given.dtype, backbone.dtype} == {torch.float32} else None
    with _written(given, kind) as file:
        if kind == "lora":
            lora.write(type(backbone.pipe), file, network, given.dtype)
        else:
            (lora.write_kohya if kind == "kohya" else lora.write_comfy)(file, network, given.dtype)
        scheduler = method.deployment.made_scheduler(given.steps)
        pipe = lora.load(load_pipeline(backbone.source, loads(method), scheduler=scheduler, **backbone.frozen()), file)
        try:
            lora.check_equal(getattr(pipe, network.component), network.model, given.dtype)
        except ValueError as error:
            raise NotAsTrained(str(error)) from error
        # Of a lean student the adapters have just been compared, and no merged network is asked.
        with rounded(lora.parameters(network), given.dtype), nullcontext() if is_lean(method) else merged(method):
            return confirm(method, beside(method, pipe, file.name), given.prompts, given.steps, trained)


def _single_file(method: Distillation, given: Release, kind: str) -> float:
    """Write the pipeline as one file, and compare what diffusers makes of it: component by component, and by its samples."""
    from safetensors.torch import save_file

    backbone = cast("Pipeline", method.backbone)
    trained = method.deployment if {given.dtype, backbone.dtype} == {torch.float32} else None
    with (
        _written(given, kind) as file,
        replacing_folder(given.out / "scratch", keep=False) as folder,
        merged(method),
        rounded(method.deployment.network.parameters(), given.dtype),
    ):
        source = load_pipeline(export(method, folder / "pipeline", given.steps, given.dtype), given.dtype)
        save_file(ldm.checkpoint(source, given.dtype), file, metadata={"format": "pt"})
        pipe = ldm.load(type(source), file, folder / "pipeline", loads(method))
        for part in ldm.PARTS:
            if getattr(source, part, None) is not None:
                check_weights(getattr(pipe, part), getattr(source, part), given.dtype, f"the {part} in {file.name}")
        if is_lean(method):
            check_weights(pipe.unet, cast("Family", method.deployment.network).model, given.dtype, f"the unet in {file.name}")
        return confirm(method, beside(method, pipe, file.name), given.prompts, given.steps, trained)


@contextmanager
def _written(given: Release, kind: str) -> Iterator[Path]:
    """Yields a place for the file of a format, which gets its name when the body is through, and another where it is NotAsTrained."""
    target = given.out / given.file(kind)
    with replacing_folder(given.out / kind, keep=False) as folder:
        file = folder / target.name
        try:
            yield file
        except NotAsTrained as error:
            kept = target.with_name(f"{target.stem}-unverified{target.suffix}")
            os.replace(file, kept)
            raise NotAsTrained(f"{error}; it is kept as {kept}") from error
        os.replace(file, target)


# To the hub --------------------------------------------------------------------------------------------------------------------------


class Push:
    """A repository of the Hugging Face hub that a release goes to, with the user's own token, which appears in no text.

    Made before anything is computed: raises ValueError offline, without a token or with one that the hub does not take, for a name that is
    none, and for a repository that everybody can read where `public` was not said.
    """

    def __init__(self, name: str, public: bool = False) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"--push {name} is no name of a repository, such as owner/name ({one_line(error)})") from error
        if name.count("/") != 1:
            raise ValueError(f"--push {name} names no owner: give owner/name")
        if constants.HF_HUB_OFFLINE:
            raise ValueError("--push needs the hub, and HF_HUB_OFFLINE is set: unset it, or leave --push out and upload the folder later")
        self.name, self.public, self._token = name, public, get_token()
        if not self._token:
            raise ValueError("--push needs a token of yours that may write: set HF_TOKEN, or run hf auth login")
        self._api = HfApi(token=self._token)
        with self._masked():
            self._api.whoami()
            seen = self._visible()
        if seen and not public:
            raise ValueError(f"--push {name}: everybody can read this repository; say --public, or give the name of a new one")

    def upload(self, given: Release) -> str:
        """Upload a release's folder and answer where it is: the pipeline to the top, so that its users load it by the repository's name."""
        _anonymise(given.out)
        pipeline = given.file("diffusers")
        with self._masked():
            url = self._api.create_repo(self.name, private=not self.public, exist_ok=True)
            if "diffusers" in given.formats:
                folder = str(given.out / pipeline)
                self._api.upload_folder(repo_id=self.name, folder_path=folder, path_in_repo=".", ignore_patterns=["README.md"])
            self._api.upload_folder(repo_id=self.name, folder_path=str(given.out), path_in_repo=".", ignore_patterns=[f"{pipeline}/**"])
        return str(url)

    def _visible(self) -> bool:
        """Whether the repository is there, for everybody to read."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return not self._api.repo_info(self.name).private
        except RepositoryNotFoundError:
            return False

    @contextmanager
    def _masked(self) -> Iterator[None]:
        """Inside, whatever the hub's client raises is a ValueError of one line, without the token."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {one_line(error)}".replace(str(self._token), "***")
            raise ValueError(f"--push {self.name} failed ({said}): look at the token's rights and the connection") from None


def _anonymise(out: Path) -> None:
    """Take the places of folders on this machine out of a release's JSON files."""
    for file in out.rglob("*.json"):
        table = from_json(file.read_text(encoding="utf-8"))
        named = [key for key in ("_name_or_path", "teacher", "teacher_options") if isinstance(table, dict) and key in table]
        local = {key: _called(table[key]) for key in named}
        if any(table[key] != value for key, value in local.items()):
            write_text(file, json.dumps({**table, **local}, indent=2) + "\n")


def _called(value: Any) -> Any:
    """A value of a table whose places on this machine, at any depth, are their last names."""
    if isinstance(value, dict):
        return {key: _called(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_called(inner) for inner in value]
    is_place = isinstance(value, str) and (os.path.exists(value) or value.startswith(("/", ".")))
    return Path(value).name if is_place else value
