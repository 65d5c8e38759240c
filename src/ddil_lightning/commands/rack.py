"""The one pipeline that is on the device where several are asked in turn, with the sampler of its entry."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from ddil_lightning.commands.entries import Entry
from ddil_lightning.errors import one_line

if TYPE_CHECKING:
    from ddil_lightning.backbones.pipeline import Pipeline
    from ddil_lightning.backbones.source import Source


class Rack:
    """The one pipeline that is in memory; another one takes its place, and so nobody keeps what he was given. `kind`: arguments of all."""

    def __init__(self, where: Any, kind: dict[str, Any]) -> None:
        self.where, self.kind = where, kind
        self._source: Source | None = None
        self._backbone: Pipeline | None = None

    def take(self, source: Source) -> Pipeline:
        """The pipeline of a source. Raises as `Pipeline` does."""
        from ddil_lightning.backbones.pipeline import Pipeline

        if self._backbone is None or source != self._source:
            self.clear()  # before the next one is loaded: what is left of the last one would stand beside it
            self._backbone, self._source = Pipeline(source, **self.kind).to(self.where), source
        return self._backbone

    def clear(self) -> None:
        """Let go of the pipeline."""
        self._backbone = None
        gc.collect()
        if self.where.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def ready(entry: Entry, backbone: Pipeline) -> Pipeline:
    """The pipeline with the entry's sampler. Raises ValueError where its scheduler's settings do not make one."""
    from ddil_lightning.backbones.samplers import named

    if entry.sampler is None:
        return backbone
    try:
        return backbone.with_solver(True) if entry.sampler == "dpm" else named(backbone, entry.sampler, entry.eta)
    except Exception as error:  # whatever a scheduler of diffusers makes of another one's settings
        kind = type(backbone.pipe.scheduler).__name__
        raise ValueError(f"the sampler {entry.sampler} cannot be made of the {kind} of {backbone.path}: {one_line(error)}") from error
