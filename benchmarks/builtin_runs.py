"""What benchmarks/builtin.py is to do, and under which names what is done is kept: by all that it depends on but the code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
import yaml

from ddil_lightning import Pipeline
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.packaged import find_config

FLOW = "builtin/flow"
OFF, STATIC = "model.init_args.reflect=off", "model.init_args.reflect=static"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "base": ("{}.yaml", (OFF,)),
    "reflected": ("{}.yaml", (STATIC,)),
    "ddil": ("{}_ddil.yaml", (OFF,)),
    "both": ("{}_ddil.yaml", (STATIC,)),
    "both_critic": ("{}_ddil.yaml", (STATIC, "model.init_args.reflects.critic=true")),  # of DMD2 alone
    "same_times": ("{}_ddil.yaml", (OFF, "data.rollouts.control=true")),
    "same_times_reflected": ("{}_ddil.yaml", (STATIC, "data.rollouts.control=true")),
}


@dataclass(frozen=True)
class Teacher:
    """The pipeline that is distilled, with the hash of its `weights`, on `n` held-out prompts. Its rows are the same for all methods."""

    pipeline: str
    weights: str
    n: int
    cache: Path

    @property
    def config(self) -> str:
        """The config by which it is asked: a flow has no place for an embedding of the guidance."""
        return "lcm_flow.yaml" if self.pipeline == FLOW else "lcm.yaml"

    @property
    def file(self) -> Path:
        """Where its rows are kept."""
        return self.cache / f"teacher-{digest(self.weights, self.n, keys())}.json"

    @property
    def reference(self) -> Path:
        """Its images in 32 steps, which every paired distance is taken to."""
        return self.file.with_suffix(".pt")


@dataclass(frozen=True)
class Run:
    """A variant of a method at one seed: a training, and its students' rows.

    `words`: what is changed of the config, as on ddil-fit's command line. `captions`: train on so many only.
    """

    teacher: Teacher
    method: str
    variant: str
    seed: int
    config: str
    words: tuple[str, ...]
    captions: int | None

    @property
    def depends(self) -> tuple[Any, ...]:
        """All that the training depends on, but for the code."""
        return self.teacher.weights, self.method, self.variant, self.seed, trains(self.config), self.words, self.captions

    @property
    def file(self) -> Path:
        """Its record, which depends on the prompts and the metrics too."""
        return self.teacher.cache / f"{self.name}-{digest(*self.depends, self.teacher.n, keys())}.json"

    @property
    def students(self) -> Path:
        """What the training leaves, which serves any prompts."""
        return self.teacher.cache / "students" / f"{self.name}-{digest(*self.depends)}"

    @property
    def name(self) -> str:
        """What a reader of the folder knows it by."""
        return f"{self.method}-{self.variant}-{self.seed}"

    @property
    def told(self) -> tuple[str, ...]:
        """All words of its command line beside the config."""
        return f"model.init_args.pipeline={self.teacher.pipeline}", "--seed", str(self.seed), common.ANEW, *self.words


def trains(config: str) -> dict[str, Any]:
    """What a config says of a training: not its comments, nor what is looked at meanwhile (previews, alerts, the test)."""
    told = yaml.safe_load(find_config(config).read_text(encoding="utf-8"))
    return {part: told[part] for part in ("model", "data", "trainer") if part in told}


def digest(*depends: Any) -> str:
    """A short name of all that something depends on."""
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(pipeline: str) -> str:
    """A hash of all weights of a pipeline."""
    found = hashlib.sha256()
    for name, part in sorted(Pipeline(pipeline).pipe.components.items()):
        for key, value in (part.state_dict() if isinstance(part, torch.nn.Module) else {}).items():
            found.update(f"{name}.{key}".encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
