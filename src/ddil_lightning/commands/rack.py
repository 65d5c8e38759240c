"""The one pipeline that is on the device while several are compared, with the sampler of its entry."""

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
        self._digest = ""

    def take(self, source: Source) -> Pipeline:
        """The pipeline of a source. Raises as `Pipeline` does."""
        from ddil_lightning.backbones.pipeline import Pipeline

        if self._backbone is None or source != self._source:
            self._backbone, self._digest = None, ""
            gc.collect()  # before the next one is loaded: what is left of the last one would stand beside it
            if self.where.type == "cuda":
                import torch

                torch.cuda.empty_cache()
            self._backbone, self._source = Pipeline(source, **self.kind).to(self.where), source
        return self._backbone

    def digest(self) -> str:
        """A digest of the weights of what was taken last, by which its rows are known again."""
        from ddil_lightning.backbones.digests import weights

        if not self._digest and self._backbone is not None:
            self._digest = f"{weights(self._backbone.network())} {self._backbone.encoders()}"
        return self._digest


def ready(entry: Entry, backbone: Pipeline) -> Pipeline:
    """The pipeline with the entry's sampler. Raises ValueError where its scheduler's settings do not make one."""
    from ddil_lightning.backbones.samplers import named

    if entry.sampler is None:
        return backbone
    try:
        return backbone.with_solver(True) if entry.sampler == "dpm" else named(backbone, entry.sampler)
    except Exception as error:  # whatever a scheduler of diffusers makes of another one's settings
        kind = type(backbone.pipe.scheduler).__name__
        raise ValueError(f"the sampler {entry.sampler} cannot be made of the {kind} of {backbone.path}: {one_line(error)}") from error


def about(entry: Entry, backbone: Pipeline, rack: Rack) -> dict[str, Any]:
    """What a row says of its entry."""
    loras = [f"{lora.path} * {lora.scale:g}" for lora in entry.source.lora]
    sampler = f"{type(backbone.pipe.scheduler).__name__} {backbone.remedy or ''}".strip()
    return {
        "pipeline": entry.source.path,
        "lora": loras,
        "sampler": sampler,
        "latents": list(backbone.latent_shape),
        "digest": rack.digest(),
        **backbone.called_with,
    }
