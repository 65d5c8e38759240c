"""What a pipeline is made from: where it is stored, in which files, and what of it comes from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ddil_lightning.bounds import above, within

Record = TypeVar("Record")


@dataclass(frozen=True)
class Lora:
    """A LoRA that becomes a part of the teacher.

    Args:
        path: a folder, a .safetensors file or a hub id, in any format that diffusers reads.
        weight_name: which file of the folder or repository, where there are several.
        scale: its strength.
    """

    path: str
    weight_name: str | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        within(-100, 100, **{"model.pipeline.lora.scale": self.scale})


@dataclass(frozen=True)
class Source:
    """Where a pipeline comes from.

    Args:
        path: built-in name, folder, hub id, or a checkpoint of a single .safetensors file.
        variant: which of several files of one kind, as in model.fp16.safetensors; by default the plain ones, or the only ones there are.
        config: for a single file, the folder or hub id of a pipeline of its architecture, of which the settings are taken.
        vae: another autoencoder, a folder or hub id of its own or of a pipeline that has it.
        lora: LoRAs that are fused into the network and the text encoders after loading.
        networks: the architecture of a role that is not the teacher's, by the role's name (`student`, `critic`): a pipeline or the folder
            of a network, whose weights it starts from, or a configuration as a table. A table without `_class_name` changes the teacher's.
            Where there are no weights, those of the teacher that fit by name and shape are copied; of a block on the way up with fewer
            layers, the last one too.
        shift: of a flow, how its times, and with them the nodes of all grids, are shifted towards noise; by default as its scheduler does.
        size: height and width in pixels of the images that are sampled, or one number for both; by default as its card says, else its own.
    """

    path: str = ""
    variant: str | None = None
    config: str | None = None
    vae: str | None = None
    lora: tuple[Lora, ...] = ()
    networks: dict[str, str | dict[str, Any]] = field(default_factory=dict)
    size: int | tuple[int, int] | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        above(0, **{"model.pipeline.shift": self.shift})
        if not self.path:  # as where an option of the command line has taken the place of a path
            raise ValueError("model.pipeline names no pipeline: give model.pipeline.path as well")
        if self.variant is not None and not self.variant.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"model.pipeline.variant is {self.variant!r}: give the word between the dots of model.fp16.safetensors")
        if "teacher" in self.networks:
            raise ValueError("model.pipeline.networks names the teacher, whose network is that of model.pipeline.path: leave it out")

    @classmethod
    def of(cls, value: Any) -> Source:
        """A source from a path, a record, or a table that was read from a config. Raises ValueError for a key that it does not have."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str | Path):
            return cls(str(value))
        made = _record(cls, value, "model.pipeline")
        loras = tuple(one if isinstance(one, Lora) else _record(Lora, one, "model.pipeline.lora") for one in made.lora)
        return cls(**{**{one.name: getattr(made, one.name) for one in fields(cls)}, "lora": loras})

    @classmethod
    def of_card(cls, card: Mapping[str, Any]) -> Source | None:
        """The teacher that a student's card (`ddil.json`) names, as it was distilled; None where it names none."""
        path, told = card.get("teacher"), dict(card.get("teacher_options") or {})
        if isinstance(told.get("size"), list):
            told["size"] = tuple(told["size"])
        return cls.of({**told, "path": str(path)}) if path else None

    @property
    def options(self) -> dict[str, Any]:
        """What is said of the teacher besides its path, as a card holds it."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("path", "networks")}
        said = {name: value for name, value in own.items() if value not in (None, ())}
        return {name: [asdict(lora) for lora in value] if name == "lora" else value for name, value in said.items()}


def _record(cls: type[Record], value: Any, name: str) -> Record:
    table = value if isinstance(value, Mapping) else vars(value)
    table = table["init_args"] if "class_path" in table else table  # as a parser keeps a record within a list
    table = table if isinstance(table, Mapping) else vars(table)
    known = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    wrong = [key for key in table if key not in known]
    if wrong:
        raise ValueError(f"{name} has no {wrong[0]!r}: it has {', '.join(known)}")
    return cls(**table)
