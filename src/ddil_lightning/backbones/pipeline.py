"""diffusers pipelines as backbones: networks, text and image encoders, schedulers.

The built-in miniatures, a local folder and a hub id all come through `Pipeline`: there is no second path for the toy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning.backbones import architectures, autoencoder, flows, loading, quantising, saving, schedulers
from ddil_lightning.backbones.adapters import Adapter, adapt, fill, graft, merged, sharing
from ddil_lightning.backbones.architectures import Architecture
from ddil_lightning.backbones.digests import digest, fingerprints, weights
from ddil_lightning.backbones.families import check_listed, family_of
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.interface import Dtypes
from ddil_lightning.backbones.loading import check_weights, empty_network, load_pipeline, recommended, settled
from ddil_lightning.backbones.prompts import Prompted
from ddil_lightning.backbones.quantising import Quantize
from ddil_lightning.backbones.repositories import DENOISERS
from ddil_lightning.backbones.resting import Resting
from ddil_lightning.backbones.sizes import shaped
from ddil_lightning.backbones.source import Source
from ddil_lightning.backbones.weights import Weights
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.remedies import Remedy
from ddil_lightning.diffusion.schedule import Predicts
from ddil_lightning.diffusion.transitions import TCD, Transition
from ddil_lightning.texts import by


class Pipeline(Prompted):
    """A teacher pipeline of diffusers.

    Args:
        path: built-in name, folder, hub id or a checkpoint of a single .safetensors file, or a Source, which says more.
        dtype: of the frozen network and of the text encoders; the student is always made in float32.
        vae_dtype: of the autoencoder, whose latents are what training takes for data.
        quantize: the frozen network in fewer bits (`backbones.quantising`); students are made of the weights as they are stored.
        bare: networks, the teacher's too, are without memory for weights; the one that is wanted gets them from a checkpoint.
    """

    holds_students = True

    remedy: Remedy | None = None
    """What its sampler does against exposure bias (`samplers.named`); with one it is not diffusers that samples."""

    def __init__(
        self,
        path: str | Source = "builtin",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        bare: bool = False,
        quantize: Quantize | None = None,
    ) -> None:
        source = Source.of(path)
        path, self.quantize = source.path, quantize
        about = recommended(path)
        self._others: dict[str, Architecture] = {}
        self.pipe: Any = self.load(source, dtype, vae_dtype, bare)
        self._network = family_of(self.pipe, path)
        for part in self.parts():
            part.requires_grad_(False).eval()
        for part in (self._network.model, self.pipe.vae):
            if all(p.ndim < 5 for p in part.parameters()):  # torch has no such layout for convolutions of films
                part.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPUs and on tensor cores
        self._network.check(path, autoencoder.channels(self.pipe.vae))
        said = next((said for said in (source.size, about.get("size")) if said is not None), None)
        shape = shaped(said, self._network, self.pipe.vae_scale_factor, path)
        shift = about.get("shift") if source.shift is None else source.shift
        schedule, predicts, self.shift = schedulers.process(self.pipe.scheduler, path, self._network, shape, shift)
        super().__init__(path, schedule, predicts, shape, about, dtype)
        self.bare = bare
        self._asked: Mapping[str, float] = {"eta": about["eta"]} if "eta" in about else {}
        self._contents: list[str] = []

    def load(self, source: Source, dtype: torch.dtype, vae_dtype: torch.dtype, bare: bool) -> Any:
        """The pipeline of diffusers, checked; its network without memory for weights where it is `bare`. Sets `source`, all of it said."""
        check_listed(source.path)
        self.source = settled(source, DENOISERS if bare else ())
        empty = empty_network(self.source) if bare else {}
        pipe = load_pipeline(self.source, {"default": dtype, "vae": vae_dtype}, quantize=None if bare else self.quantize, **empty)
        check_weights(pipe, self.source, empty)
        return pipe

    def parts(self) -> list[nn.Module]:
        """Every component that is a module, frozen: the network, the autoencoder, the text encoders."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> Pipeline:
        """The pipeline itself, after its encoders and the teacher have been moved to `device`."""
        self.wake(device)
        self.pipe.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the frozen parts."""
        return next(self.pipe.vae.parameters()).device if self.at is None else self.at

    def encoder_parts(self) -> list[nn.Module]:
        """The text encoders, and the halves of the autoencoder, which is called by other ways in than its forward."""
        others = [part for part in self.parts() if part is not self._network.model and part is not self.pipe.vae]
        return [*others, *self.pipe.vae.children()]

    # Networks ------------------------------------------------------------------------------------------------------------------------

    def network(self) -> Family:
        """The frozen network itself, shared, not copied."""
        return self._network

    def stands_in(self, network: nn.Module) -> None:
        """Put a student's network in the place of a `bare` pipeline's own, which has no weights."""
        self._network, self._contents = cast(Family, network), []
        setattr(self.pipe, self._network.component, self._network.model)

    def trainable(self, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Family:
        """A trainable float32 network for the role `name`: a copy, or one of the architecture that the source says.

        With `w_conditioned` (`s_conditioned`) it has an embedding of w (s) whose layer starts at zero: at every w it equals its source.
        """
        source = self._like(name)
        extra = source.telling(w_conditioned, s_conditioned)
        architecture, kind = self._architecture(name), type(source.model)
        if self.bare:
            model = architectures.bare(kind, {**architecture.config, **extra})
        else:
            model = architectures.made(kind, architecture, extra, name if architecture.partial else self.path)
        network = type(source)(model.to(memory_format=torch.channels_last).requires_grad_(True).train())
        for part in network.idle():
            part.requires_grad_(False)
        return network

    def adapted(self, adapter: Adapter, w_conditioned: bool = False, name: str = "student", s_conditioned: bool = False) -> Family:
        """The frozen network below trainable adapters. An embedding of w or s it has besides, trained whole, zero first."""
        if name in self.source.networks:
            raise ValueError(f"model.pipeline.networks.{name} has another base than the adapters: add {name} to model.adapter.whole")
        source = self._network
        quantising.check_exact(source.model.config, self.path, self.quantize)  # now, and not when they are merged
        model: Any = sharing(source.model, source.model.parameters())
        new: list[str] = []
        if extra := source.telling(w_conditioned, s_conditioned):
            with loading.without_weights():
                told = type(model).from_config({**architectures.own_config(model), **extra})
            new = graft(model, told)
            model.register_to_config(**extra)
        whole = adapt(model, adapter, source.adapts, new)
        if whole and self.dtype != torch.float32:  # they begin as they are stored, not as half precision has rounded them
            fill(model, whole, self._weights())
        made = type(source)(model.train())
        made.typical = next(name for name, p in model.named_parameters() if not p.requires_grad and p.dtype == self.dtype)
        return made

    def merged(self, network: nn.Module, dtype: torch.dtype = torch.float32) -> Family:
        """A network in `dtype`, with its adapters merged into the weights of the frozen one as they are stored."""
        model = cast(Family, network).model
        with loading.without_weights():
            plain = type(model).from_config(architectures.own_config(model))
        plain.load_state_dict(merged(model, self._weights(), self._network.model, dtype), assign=True)
        return type(self._network)(plain.to(memory_format=torch.channels_last).requires_grad_(False).eval())

    def head(self, layers: Sequence[str] = (), name: str = "teacher") -> nn.Module:
        """A new discriminator's head on the features of a role's networks; without memory for weights where the pipeline is `bare`."""
        with loading.without_weights() if self.bare else nullcontext():
            return self._like(name).head(layers)

    def _architecture(self, name: str) -> Architecture:
        """That of the role `name`: the teacher's, with its weights, where the source says no other."""
        said = self.source.networks.get(name)
        if said is None:
            return Architecture(architectures.own_config(self._network.model), self._weights)
        if name not in self._others:
            self._others[name] = architectures.described(said, self._network, self._weights, name)
        return self._others[name]

    def _like(self, name: str) -> Family:
        """A network of the architecture of the role `name`, which need not have memory for its weights."""
        if name not in self.source.networks:
            return self._network
        return type(self._network)(architectures.bare(type(self._network.model), self._architecture(name).config))

    def _weights(self) -> Weights:
        """The network's weights as they are stored, and a LoRA in them: a half-precision teacher has rounded its own."""
        quantising.check_exact(self._network.model.config, self.path, self.quantize)
        if self.dtype == torch.float32:
            return self._network.model.state_dict().items()
        return loading.exact_weights(self.source, self.pipe, self._network.component)

    # Called as its users call it -----------------------------------------------------------------------------------------------------

    @property
    def guidance(self) -> float:
        """The guidance g that its card recommends, else that of a plain call of its pipeline."""
        return float(self.about["guidance"] if "guidance" in self.about else self._network.usual(self.pipe))

    @property
    def guidance_before(self) -> float:
        """Without a card that says it, 7.5 of all but those whose calls name it true_cfg_scale, Flux's and Qwen-Image's."""
        return self.guidance if "guidance" in self.about or self._network.cfg == "true_cfg_scale" else 7.5

    @property
    def called_with(self) -> Mapping[str, Any]:
        """What its call is given besides prompts, steps, guidance and latents: by its family, and what its scheduler is told so alone.

        Where nobody has said TCD's gamma it is the authors', as TCDScheduler has it: diffusers' pipelines hand that an eta of 0.
        """
        told = TCD().called_with if type(self.pipe.scheduler).__name__ == "TCDScheduler" else {}
        return {**self._network.called_with, **told, **self._asked}

    def frozen(self) -> dict[str, Any]:
        """The text encoders and the autoencoder by the names of their components."""
        named = self.pipe.components.items()
        return {name: part for name, part in named if isinstance(part, nn.Module) and part is not self._network.model}

    def sharing(self, pipe: Any, asked: Mapping[str, float] | None = None) -> Pipeline:
        """The same backbone around another pipeline, of which the device holds nothing twice; `asked`: see stepping.

        That one gets the encoders of this, and those that it has in another precision rest on the CPU between their calls. Its network
        stays on the CPU as well: `resting.visiting` brings it.
        """
        for name, own in self.frozen().items():
            its = getattr(pipe, name)
            if name == "vae" or its.dtype == own.dtype:  # nobody decodes by it
                setattr(pipe, name, own)
            else:
                Resting(its)
        kind, device, other = type(pipe), self.device, copy.copy(self)
        # diffusers would look for the device in the weights, which need not be there when it asks.
        names = {"__module__": kind.__module__, "_execution_device": property(lambda _: device)}
        pipe.__class__ = type(kind.__name__, (kind,), names)
        other.pipe, other._asked, other.at = pipe, asked or {}, device
        other._network, other._contents = family_of(pipe, self.path), []
        return other

    def stepping(self, scheduler: Any, asked: Mapping[str, float] | None = None) -> Pipeline:
        """The same pipeline with another scheduler, and with what that is told by the call (`Transition.called_with`)."""
        other = copy.copy(self)
        other.pipe, other._asked = copy.copy(self.pipe), asked or {}
        other.pipe.scheduler = scheduler
        return other

    def with_solver(self, dpm: bool) -> Pipeline:
        """The pipeline with its own scheduler, or with DPM-Solver++ 2M made from it. Raises ValueError where its pipeline tells that mu."""
        if dpm and self._network.passes_sigmas:
            kind = type(self.pipe).__name__
            raise ValueError(
                f"the {kind} of {self.path} hands its scheduler sigmas or a shift, for which DPM-Solver++ is not set up here: use euler"
            )
        return self.stepping(schedulers.dpm(self.pipe.scheduler, self.shift)) if dpm else self

    @property
    def steps_by_ddim(self) -> bool:
        """Whether its scheduler is DDIM's, or DPM-Solver++'s, which is DDIM in its first order."""
        return type(self.pipe.scheduler).__name__ in ("DDIMScheduler", "DPMSolverMultistepScheduler")

    def check_steps(self, n: int) -> None:
        """Raises ValueError, with the reason, for a step count that its scheduler cannot take, or that its student is not for."""
        if self.about.get("made_for") == [1] and n != 1:
            raise ValueError("its student is made for one step")
        schedulers.check_steps(self.pipe.scheduler, n, self._network, self.latent_shape, self.device)
        if self._network.flow and {"sigmas", "shift"} <= self.about.keys():
            flows.check_trained(self.pipe.scheduler, n, self.about["sigmas"], self.about["shift"])

    @contextmanager
    def counting(self) -> Iterator[list[int]]:
        """Inside, the first entry of the list counts the network's evaluations of one sample each."""
        calls = [0]

        def count(module: Any, args: Any, kwargs: Any) -> None:
            calls[0] += len(args[0] if args else kwargs[next(name for name in ("sample", "hidden_states") if name in kwargs)])

        handle = self._network.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            yield calls
        finally:
            handle.remove()

    # Students ------------------------------------------------------------------------------------------------------------------------

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
        """The scheduler of diffusers that steps as a student does (`backbones.schedulers`, of a flow `backbones.flows`)."""
        if self._network.flow:
            if grid is None or predicts != "flow":
                raise ValueError(f"a pipeline of {self.path} holds velocities and the nodes of one step count, not {predicts} on {rule}")
            return flows.student(self.schedule.steps, transition, self.schedule.sigmas[grid.nodes], self._network.passes_sigmas)
        kind = next(name for name, space in schedulers.PREDICTS.items() if space == predicts)
        return schedulers.student(self.pipe.scheduler, transition, kind, rule, steps, scaling, times)

    def save(self, folder: Path, network: nn.Module, scheduler: Callable[[], Any] | None, dtype: Dtypes, safety_checker: bool) -> Path:
        """A pipeline folder: the teacher's encoders, the student's network, its scheduler, all of it in `dtype`.

        Frozen parts that were trained with in half precision are read again. `safety_checker`: with the teacher's.
        """
        kind = type(self._network)
        if not isinstance(network, kind):
            raise ValueError(f"pipelines of {self.path} hold a {kind.__name__}, and this student is a {type(network).__name__}")
        assert scheduler is not None  # a deployment without one is refused before (made_scheduler)
        own = {kind.component: network.model, "scheduler": scheduler()}
        square = self.size[0] == self.size[1]  # no pipeline of SDXL could keep two sides
        if self.resized and square and kind.resizable:  # then a plain call makes this size
            network.model.register_to_config(sample_size=self.latent_shape[-1])
        saving.write(self, folder, own, dtype, safety_checker)
        return folder

    def laid_out_as(self, network: nn.Module) -> Pipeline:
        """The pipeline with its network's weights in the memory layout of `network`: another takes other kernels, which round otherwise."""
        last = [p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in network.parameters() if p.ndim == 4]
        self._network.model.to(memory_format=torch.channels_last if any(last) else torch.contiguous_format)
        return self

    # Encoders ------------------------------------------------------------------------------------------------------------------------

    def encoders(self) -> str:
        """A digest of everything that makes latents and text states: weights of the encoders, the latents' scale, the vocabulary."""
        found = digest(self.pipe, self._network.component)
        return f"{found} at {by(self.size)}" if self.resized else found  # SDXL is told the size with every caption that has no image

    def content(self) -> str:
        """A digest of the weights of network and encoders. They are frozen: it is computed once, also for those that step otherwise."""
        if not self._contents:
            self._contents.append(f"{weights(self._network)} {digest(self.pipe, self._network.component)}")
        return self._contents[0]

    def fingerprints(self) -> dict[str, str]:
        """A digest of each encoder and vocabulary by its name."""
        return fingerprints(self.pipe, self._network.component)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the VAE's posterior mean, so that a cache is reproducible."""
        return autoencoder.encode(self.pipe.vae, pixels, self.device)

    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents, on the backbone's device; with `gradients`, not clamped."""
        return autoencoder.decode(self.pipe.vae, latents, self.device, self.pipe.vae_scale_factor, gradients)
