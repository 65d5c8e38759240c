"""What a family of models is to the rest of the library: `Backbone`, where networks, encoders and schedulers come from.

A third party adds a family of diffusers pipelines by one subclass of `backbones.family.Family` and one entry of `FAMILIES`, and a model
that is no diffusers pipeline by a subclass of `Backbone` (as toy/ does), which a YAML names by `pipeline: {class_path: ...}`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones import digests
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.network import Network
from ddil_lightning.backbones.resting import Resting
from ddil_lightning.backbones.roles import Role
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.reflection import Reflection
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.diffusion.transitions import Transition
from ddil_lightning.files import replacing
from ddil_lightning.records import Context
from ddil_lightning.texts import by

OTHER = "take another method, or a teacher whose guidance is not embedded"

Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""The precision of a pipeline, or, as diffusers takes it, that of its components by name and the `default` of all others."""


def recomputing(network: nn.Module, on: bool) -> None:
    """Gradient checkpointing on or off: the frozen network, of which others are copies, may have it on by another method's wish."""
    if on or isinstance(network, Network):
        network.recompute(on)  # type: ignore[operator]


class Backbone(ABC):
    """A teacher and what a method, the data and an evaluation need of it. Loaded once; its own parts stay frozen, in eval mode.

    A subclass says in its constructor, through this one: `path`, the name that texts call it by; `schedule`; `predicts`, the space of its
    network's outputs; `latent_shape` [C, h, w] of one sample. `about` is what its card recommends (guidance, dataset, previews, steps);
    `dtype` that of the frozen network. The methods without a body must be written, the others have an answer that fits most.
    """

    bare: bool = False
    """Whether its networks are without memory for weights until a checkpoint brings them."""

    captions: Any = None
    """The data set that comes with the backbone itself (the analytic toy's)."""

    at: torch.device | None = None
    """The device that its parts work on while some of them rest elsewhere (`backbones.resting`)."""

    resting: Sequence[Resting] = ()
    """Its encoders at rest (`rest`)."""

    shift: float | None = None
    """Of a flow, how its times are shifted towards noise."""

    samples: str = "prompts"
    """What a test counts, in one word, as it stands in `testing student@4 on 256 prompts`."""

    def __init__(
        self,
        path: str,
        schedule: NoiseSchedule,
        predicts: Predicts,
        latent_shape: Sequence[int],
        about: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.path, self.schedule, self.predicts, self.dtype = path, schedule, predicts, dtype
        self.latent_shape: tuple[int, ...] = tuple(latent_shape)
        self.about = dict(about or {})

    @property
    def told(self) -> bool:
        """Whether its network is told the guidance: it is asked once, and what is made of it is told the guidance as well."""
        return bool(getattr(self.network(), "w_conditioned", False))

    # Networks ------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def network(self) -> Network:
        """The frozen teacher's network itself, shared, not copied."""

    @abstractmethod
    def trainable(self, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Network:
        """A trainable float32 copy for the role `name`. With `w_conditioned` it is told w, and equals its source at every w at first;
        with `s_conditioned` likewise s. Nobody asks for the latter but methods whose networks are told it."""

    def adapted(self, adapter: Adapter, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Network:
        """The frozen network itself below trainable adapters, instead of a copy. Raises ValueError for layers that are not there."""
        raise ValueError(f"{self.path} has no network that adapters could be put on: leave model.adapter out")

    @abstractmethod
    def parts(self) -> list[nn.Module]:
        """The frozen modules: the teacher's network and the encoders."""

    @abstractmethod
    def to(self, device: torch.device) -> Backbone:
        """The backbone itself, after its frozen parts have been moved to `device`."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the frozen parts."""

    def role(
        self,
        name: str,
        *,
        w_conditioned: bool = False,
        s_conditioned: bool = False,
        guided: bool = False,
        recompute: bool | None = None,
        predicts: Predicts | None = None,
        reflection: Reflection | None = None,
        adapter: Adapter = Adapter(),
    ) -> Role:
        """The network in its part: `teacher`, frozen, guided by the empty prompt; any other name (`student`, `critic`) a trainable one.

        A teacher whose network is told the guidance is asked once, and so are all who are made of it. `guided`: the trainable one is guided
        by the empty prompt too, and called twice, as its users will call it: raises ValueError where its network is told the guidance.
        That is a copy or, where `adapter` has a rank, adapters on the frozen network itself. `recompute`: with gradient checkpointing, of
        the frozen network too, through which gradients pass to samples that a discriminator reads by it. Where nothing is said, that one
        is left as it is.
        `predicts`: of its outputs, where that is not the teacher's. `reflection` of its x0.
        A target, an average or a former student is made from a role: `student.copied("target")`.
        """
        space = self.predicts if predicts is None else predicts
        if name == "teacher":
            null, network = None if self.told else self.null(), self.network()
            if recompute is not None:
                recomputing(network, recompute)
            return Role(name, network, self.schedule, space, null=null, reflection=reflection, own=False)
        if guided and self.told:
            raise ValueError(f"the network of {self.path} is told its guidance, and is not guided by the empty prompt besides: {OTHER}")
        shares = adapter.is_for(name)
        more = {"s_conditioned": True} if s_conditioned else {}
        network = self.adapted(adapter, w_conditioned, name, **more) if shares else self.trainable(w_conditioned, name, **more)
        recomputing(network, bool(recompute))
        shared = list(self.network().parameters()) if shares else []
        return Role(name, network, self.schedule, space, null=self.null() if guided else None, reflection=reflection, shared=shared)

    def head(self, layers: Sequence[str] = (), name: str = "teacher") -> nn.Module:
        """A new discriminator's head on the features of the networks of a role. Raises NotImplementedError where they give none."""
        return self.network().head(layers)

    def encoder_parts(self) -> list[nn.Module]:
        """The modules that encode and decode, each of which is called as one: they may rest while nobody does."""
        return []

    def rest(self, home: torch.device) -> None:
        """Its encoders lie on the CPU from now on, and come for their calls on the device `home`, until it is moved (`to`) or woken."""
        self.wake(torch.device("cpu"))
        self.at, self.resting = home, [Resting(part, home=home) for part in self.encoder_parts()]

    def wake(self, place: torch.device | None = None) -> None:
        """Encoders at rest go home, or to another `place`, and stay."""
        for resting in self.resting:
            resting.wake(place)
        self.at, self.resting = None, ()

    def awake(self) -> list[nn.Module]:
        """Its frozen modules but for those at rest."""
        there = {id(resting.module) for resting in self.resting}
        return [part for part in self.parts() if not {id(part), *map(id, part.children())} & there]

    # Encoders ------------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode_text(self, prompts: Sequence[str], truncate: bool = False, sizes: Tensor | None = None) -> Context:
        """The unguided context of `prompts`. Raises ValueError for one that is no prompt here, or is too long without `truncate`.

        `sizes` [B, 6], for networks that are told them: original size, top and left of the crop, target size of the image of each prompt;
        by default those of a whole image of `size`.
        """

    @abstractmethod
    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, naming it, for the first of `prompts` that would be cut."""

    @abstractmethod
    def encoders(self) -> str:
        """A digest of everything that makes latents and text states: a cache is good for one of these alone."""

    def fingerprints(self) -> dict[str, str]:
        """`encoders` by part, so that who has used some of them alone depends on no other: `vae` makes the latents, all others the text."""
        return {"encoders": self.encoders()}

    def fingerprint(self) -> str:
        """A digest of the teacher: of its network's weights, in the precision that they have, of what it predicts and of its schedule."""
        tables = torch.stack([self.schedule.alphas, self.schedule.sigmas]).numpy().tobytes()
        said = f"{digests.weights(self.network())} {self.predicts}".encode()
        return hashlib.sha256(said + tables).hexdigest()

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]."""

    @abstractmethod
    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents; with `gradients` they flow back to the latents, and nothing is clamped."""

    def null(self) -> Context:
        """The context of the empty prompt, one sample: the unconditional branch of guidance."""
        return self.encode_text([""])

    # What its card says --------------------------------------------------------------------------------------------------------------

    @property
    def guidance(self) -> float:
        """The guidance g that it recommends (7.5, Stable Diffusion's, where it says nothing)."""
        return float(self.about.get("guidance", 7.5))

    @property
    def guidance_before(self) -> float:
        """What `guidance` was for a run whose checkpoint does not say its own, which they did not always."""
        return self.guidance

    @property
    def baked(self) -> bool:
        """Whether it is a student with its guidance in the weights, to be called with guidance_scale 1."""
        return "method" in self.about and not self.network().w_conditioned and self.about.get("guidance_scale", 1) == 1

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the images that it samples; None where its samples are no images."""
        return None

    @property
    def resized(self) -> bool:
        """Whether that is another size than the one it was made for, which its users then have to say."""
        return False

    @property
    def says_size(self) -> bool:
        """Whether a student's users have to say that size when they call it."""
        return self.resized

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError for images [height, width] that cannot be trained on; those that it samples can, and no others."""
        if self.size is not None and tuple(size) != self.size:
            raise ValueError(f"{self.path} takes images of {by(self.size)} alone, not of {by(size)}: give images of that size")

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raises ValueError for latents [C, h, w] that it does not denoise."""
        if tuple(shape) != self.latent_shape:
            raise ValueError(
                f"the data's latents are {list(shape)} and the pipeline {self.path} denoises {list(self.latent_shape)}: "
                "give images of the size that the pipeline was trained for"
            )

    # Students --------------------------------------------------------------------------------------------------------------------------

    holds_students: bool = False
    """Whether `save` writes a pipeline that samples by itself, so that an export can be reloaded and compared."""

    def merged(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> Network:
        """A student's network with its adapters merged, in `dtype`: as `save` writes it, and as everybody else calls it."""
        raise ValueError(f"networks of {self.path} have no adapters to be merged")

    def scheduler(
        self,
        transition: Transition,
        predicts: Predicts,
        rule: str,
        steps: int,
        scaling: float | None = None,
        times: int | None = None,
        grid: Grid | None = None,
    ) -> Any:
        """The scheduler that steps as a student does: see `backbones.schedulers`. Raises ValueError where there is none.

        `grid`: of a flow, the nodes that it has to hold (`backbones.flows`).
        """
        raise ValueError(f"no pipeline can hold a student of {self.path}, so it has no scheduler")

    def save(self, folder: Path, network: nn.Module, scheduler: Callable[[], Any] | None, dtype: Dtypes, safety_checker: bool) -> Path:
        """Write a student below `folder` and answer what was written; here `save_weights`."""
        return self.save_weights(folder, network, dtype if isinstance(dtype, torch.dtype) else dtype["default"])

    @staticmethod
    def save_weights(folder: Path, network: nn.Module, dtype: torch.dtype) -> Path:
        """Write a student's weights alone, student.safetensors, and answer where."""
        from safetensors.torch import save_file

        path = folder / "student.safetensors"
        with replacing(path) as temporary:
            save_file({k: v.to(dtype).contiguous() for k, v in network.state_dict().items()}, temporary)
        return path

    def stands_in(self, network: nn.Module) -> None:
        """Put a student's network in the place of a `bare` backbone's own. Raises ValueError for a backbone that has weights."""
        raise ValueError(f"{self.path} has weights of its own")

    def measured(self, method: Any, test: Any, say: Callable[[str], None]) -> list[dict[str, Any]] | None:
        """Rows of results by a law that the backbone itself knows, None where its images are judged by a suite.

        `test`: a runs.finish.Test. `say` hears of each row before it is measured.
        """
        return None
