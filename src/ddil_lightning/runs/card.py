"""The model card of a released student: what it is, how it was made and measured, and how it is called, as the Hugging Face hub has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ddil_lightning.backbones.repositories import called, pipeline_folder
from ddil_lightning.backbones.source import Source
from ddil_lightning.evaluation.stamps import protocols
from ddil_lightning.evaluation.table import results_table
from ddil_lightning.runs.calls import Called, anonymous
from ddil_lightning.texts import by

ADAPTERS = ("lora", "kohya", "comfy")
"""The formats that hold a student's adapters alone."""


@dataclass(frozen=True)
class Card(Called):
    """Everything that a card is made from: how its student is called (`Called`), and besides:

    `run`: the config and the summary of the run that made it, as far as they are known. `licence`: by default the teacher's.
    """

    run: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None

    def text(self) -> str:
        """The card in Markdown, with its header."""
        about = self.about
        parts = [
            f"---\n{self._header()}\n---",
            f"# A {about['steps']}-step student of `{self.teacher}`",
            f"Distilled with {about['method']} by ddil-lightning, {about['student_updates']} student updates.",
            "\n".join(("| | |", "|---|---|", *(f"| {name} | {said} |" for name, said in self._facts()))),
            *self.of_diffusers(),
            *self.of_comfy(),
            *self._results(),
        ]
        return "\n\n".join(parts) + "\n"

    @cached_property
    def teacher(self) -> str:
        """What the teacher is called: its hub id, or the name of its folder, whose place is nobody else's business."""
        return called(str(self.about["teacher"]))

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        found = {"license": self.licence} if self.licence else licence_of(self.about["teacher"])
        licence: Mapping[str, Any] = found or {"license": "other"}
        whole = any(name not in ADAPTERS for name in self.files)
        tags = ["text-to-image", "ddil", "distillation", "few-step", str(self.about["method"]).lower(), *(() if whole else ("lora",))]
        return ModelCardData(
            base_model=self.teacher,
            base_model_relation="finetune" if whole else "adapter",
            **licence,
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=tags,
        ).to_yaml()

    # What it is ----------------------------------------------------------------------------------------------------------------------

    def _facts(self) -> Iterator[tuple[str, str]]:
        about, config, summary = self.about, self.run.get("config") or {}, self.run.get("summary") or {}
        data = config.get("data") or {}
        prior = data.get("prior")
        if self._besides:
            yield "teacher", f"`{self.teacher}` with {', '.join(self._besides)}"
        yield "method", str(about["method"])
        if isinstance(prior, Mapping):
            shares = ((name, prior.get(name)) for name in ("forward", "student", "teacher"))
            yield "latents trained on", ", ".join(f"{share:g} {name}" for name, share in shares if share is not None)
        yield "steps", f"{about['steps']}; made for {', '.join(map(str, about['made_for']))}"
        yield "nodes", f"{self.nodes} at {about['steps']} steps"
        if about.get("sampler"):
            yield "sampler", str(about["sampler"])
        yield "guidance", self._guidance
        if self.adapter:
            rank, alpha = self.adapter
            yield "adapters", f"rank {rank}, alpha {alpha:g}; strength 1, others are not tested"
        yield "resolution", f"{by(self.size)} pixels"
        yield "data", _data(data.get("captions"), about.get("dataset"))
        yield "compute", ", ".join(_compute(about, data, config, summary))

    @property
    def _besides(self) -> list[str]:
        """What the teacher is made of besides its pipeline."""
        source = self.source or Source("builtin")
        loras = [f"the LoRA `{anonymous(one.path)}` at {one.scale:g}" for one in source.lora]
        return [*loras, *([f"the autoencoder `{anonymous(source.vae)}`"] if source.vae else [])]

    @property
    def _guidance(self) -> str:
        g, (low, high), name = self.about["guidance_scale"], self.about["guidance_range"], self.asked_by
        if self.told:
            span = f"{low:g} to {high:g}" if low != high else f"{low:g} alone"
            return (
                f"`{name}` {g:g} is within the trained range ({span}). The network is told it, in one evaluation a step; 1 tells "
                "it that there is none, and 0 something that it was never trained on"
            )
        if g > 1:
            return f"`{name}` {self.scale:g} guides it as it guides its teacher, in two evaluations a step, and negative prompts work"
        same = "0 means the same to diffusers, and " if self.scale else ""
        return (
            f"`{name}` {self.scale:g} is right because guidance {low:g} is part of the weights; {same}anything above "
            f"{self.scale:g} guides once more"
        )

    # How good it is ------------------------------------------------------------------------------------------------------------------

    def _results(self) -> Iterator[str]:
        rows: Sequence[Mapping[str, Any]] = (self.run.get("summary") or {}).get("rows") or ()
        if not rows:
            return
        yield "## Measured"
        yield results_table(rows)
        for protocol in protocols(rows):
            yield "Protocol: " + "; ".join(_flat(protocol)) + "."


def licence_of(teacher: str) -> dict[str, str]:
    """What the card of a pipeline says of its licence, in the words of the hub's header; empty where it says nothing, or cannot be had.

    `license`, and of one that is `other` its `license_name` and `license_link`, which may be a file beside the card: it is named on the
    hub, and left out of a folder here. The card of a hub id is fetched where the cache lacks it, unless HF_HUB_OFFLINE is set or the hub
    does not answer within five seconds.
    """
    from huggingface_hub import metadata_load

    from ddil_lightning.evaluation.networks.weights import hub_file  # with the networks of metrics, which no first update waits for

    try:
        folder = pipeline_folder(teacher)
        card = hub_file(teacher, "README.md") if folder is None else folder / "README.md"
        said = (metadata_load(card) or {}) if card.is_file() else {}
    except Exception:  # a card that nobody can read names no licence
        return {}
    found = {key: said[key] for key in ("license", "license_name", "license_link") if said.get(key) and isinstance(said[key], str)}
    link = found.get("license_link", "")
    if link and "://" not in link:
        found.pop("license_link")
        found |= {"license_link": f"https://huggingface.co/{teacher}/blob/main/{link}"} if folder is None else {}
    return found if "license" in found else {}


def unlicensed(card: Path) -> bool:
    """Whether a card's header names no licence: `other`, and not which."""
    from huggingface_hub import metadata_load

    about = metadata_load(card) or {}
    return about.get("license", "other") == "other" and "license_name" not in about


def _data(captions: Any, dataset: Any) -> str:
    """Which data, by name: where they lay on somebody's machine is left out."""
    if not captions:
        return f"what the built-in data set {dataset} draws" if dataset else "not stated"
    if isinstance(captions, str):
        return f"`{captions}`"
    given = captions.get("init_args") or {}
    path = next((given[key] for key in ("path", "dataset", "name", "urls") if isinstance(given.get(key), str)), None)
    kind = str(captions.get("class_path", "")).rpartition(".")[2]
    return f"{kind} `{Path(path).name if path.startswith(('/', '.', '~')) else path}`" if path else kind


def _compute(about: Mapping[str, Any], data: Mapping[str, Any], config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{about['student_updates']} updates"
    if data.get("batch_size"):
        optimizer = ((config.get("model") or {}).get("init_args") or {}).get("optimizer") or {}
        more = f" x {optimizer['accumulate']}" if optimizer.get("accumulate", 1) != 1 else ""
        yield f"batch {data['batch_size']}{more} a device"
    machine = summary.get("machine") or {}
    if machine.get("device"):
        yield f"{machine['device']} ({machine.get('date', 'undated')})"
    if summary.get("seconds_training"):
        yield f"{summary['seconds_training'] / 3600:.2g} hours of training"


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key} ")
        elif value is not None:
            yield f"{above}{key} {value}".replace("_", " ") if not isinstance(value, str) else f"{above}{key}: {value}"
