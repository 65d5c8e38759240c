"""diffusers pipelines as backbones: networks, text and image encoders, schedulers.

The built-in miniatures, a local folder and a hub id all come through `Pipeline`: there is no second path for the toy.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning import plugins
from ddil_lightning.backbones import loading, schedulers
from ddil_lightning.backbones.adapters import Adapter, adapt, graft, merged, sharing
from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.backbones.loading import DENOISERS, check_weights, empty_network, load_pipeline, pipeline_folder, recommended
from ddil_lightning.backbones.unet import UNet
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.diffusion.transitions import Transition
from ddil_lightning.records import Context
from ddil_lightning.texts import check_prompts

FAMILIES: dict[str, type[Family]] = {"UNet2DConditionModel": UNet}
"""The family of a pipeline by the class of its network in diffusers. A third party's is an entry made where its file is imported."""
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
PIXELS = 4 * 512 * 512
"""How many pixels the autoencoder works on at a time: some 4 GB in float32, whatever the size of an image. A larger one is tiled."""


def family_of(pipe: Any, path: str) -> Family:
    """The network of a pipeline in its family. Raises ValueError for a pipeline of no known one."""
    name = next(name for name in DENOISERS if getattr(pipe, name, None) is not None)
    model = getattr(pipe, name)
    if type(model).__name__ not in FAMILIES:
        plugins.load()
    if type(model).__name__ not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"the pipeline {path} denoises with a {type(model).__name__}: known are {known}; CONTRIBUTING.md adds one")
    return FAMILIES[type(model).__name__](model)


def settings(model: Any, changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The configuration of a network, with `changes`, for another one.

    Where it lay on this machine is nobody else's business, and of the names that its file leaves out, as Stable Diffusion's does with the
    embedding of the guidance, diffusers would take no other value than the default.
    """
    return {key: value for key, value in {**model.config, **changes}.items() if key not in ("_name_or_path", "_use_default_values")}


class Pipeline(Backbone):
    """A teacher pipeline of diffusers.

    Args:
        path: built-in name, folder or hub id.
        dtype: of the frozen network and of the text encoders; the student is always made in float32.
        vae_dtype: of the autoencoder, whose latents are what training takes for data.
        bare: networks, the teacher's too, are without memory for weights; the one that is wanted gets them from a checkpoint.
    """

    holds_students = True

    def __init__(
        self, path: str = "builtin", dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32, bare: bool = False
    ) -> None:
        about = recommended(path)
        self.pipe: Any = self.load(path, dtype, vae_dtype, bare)
        self._network = family_of(self.pipe, str(path))
        for part in self.parts():
            part.requires_grad_(False).eval()
        for part in (self._network.model, self.pipe.vae):
            part.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPUs and on tensor cores
        if "Flow" in type(self.pipe.scheduler).__name__:
            raise ValueError(f"the pipeline {path} has a flow-matching scheduler, which is not supported yet")
        schedule = NoiseSchedule.from_scheduler(self.pipe.scheduler)
        kind = self.pipe.scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTS:
            raise ValueError(f"the pipeline {path} predicts {kind!r}: known are {', '.join(PREDICTS)}")
        self._network.check(str(path), self.pipe.vae.config.latent_channels)
        super().__init__(str(path), schedule, PREDICTS[kind], self._network.latent_shape, about, dtype)
        self.bare = bare

    def load(self, path: str, dtype: torch.dtype, vae_dtype: torch.dtype, bare: bool) -> Any:
        """The pipeline of diffusers, checked; its network without memory for weights where it is `bare`."""
        empty = empty_network(path) if bare else {}
        pipe = load_pipeline(path, {"default": dtype, "vae": vae_dtype}, **empty)
        check_weights(pipe, path, empty)
        return pipe

    def parts(self) -> list[nn.Module]:
        """Every component that is a module, frozen: the network, the autoencoder, the text encoders."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> Pipeline:
        """The pipeline itself, after its encoders and the teacher have been moved to `device`."""
        self.pipe.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the frozen parts."""
        return next(self.pipe.vae.parameters()).device

    @property
    def side(self) -> int:
        """The edge of its images in pixels."""
        return self.latent_shape[-1] * int(self.pipe.vae_scale_factor)

    # Networks ------------------------------------------------------------------------------------------------------------------------

    def network(self) -> Family:
        """The frozen network itself, shared, not copied."""
        return self._network

    def stands_in(self, network: nn.Module) -> None:
        """Put a student's network in the place of a `bare` pipeline's own, which has no weights."""
        self._network = cast(Family, network)
        setattr(self.pipe, self._network.component, self._network.model)

    def trainable(self, w_conditioned: bool = False) -> Family:
        """A trainable float32 copy. With `w_conditioned` it has an embedding of w whose layer starts at zero, so that the copy equals its
        source at every w."""
        source = self._network
        extra = source.told() if w_conditioned and not source.w_conditioned else {}
        with self._memory():
            model = type(source.model).from_config(settings(source.model, extra))
        if not self.bare:
            missing, unexpected = model.load_state_dict(self._weights(), strict=False)
            if unexpected or (missing and not extra):
                raise ValueError(f"the network of {self.path} could not be copied: missing {missing}, unexpected {unexpected}")
            for name in missing:
                nn.init.zeros_(model.get_parameter(name))
        return type(source)(model.to(memory_format=torch.channels_last).requires_grad_(True).train())

    def adapted(self, adapter: Adapter, w_conditioned: bool = False) -> Family:
        """The frozen network below trainable adapters. With `w_conditioned` it has an embedding of w besides, trained whole, zero first."""
        source = self._network
        model: Any = sharing(source.model, source.model.parameters())
        new: list[str] = []
        if w_conditioned and not source.w_conditioned:
            with loading.without_weights():
                told = type(model).from_config(settings(model, source.told()))
            new = graft(model, told)
            model.register_to_config(**source.told())
        adapt(model, adapter, source.adapts, new)
        return type(source)(model.train())

    def merged(self, network: nn.Module) -> Family:
        """A network with its adapters merged into the weights of the frozen one as they are stored, whatever it computes in."""
        model = cast(Family, network).model
        with loading.without_weights():
            plain = type(model).from_config(settings(model))
        plain.load_state_dict(merged(model, self._weights(), self._network.model), assign=True)
        return type(self._network)(plain.to(memory_format=torch.channels_last).requires_grad_(False).eval())

    def head(self, layers: Sequence[str] = ()) -> nn.Module:
        """A new discriminator's head on the features of its networks; without memory for weights where the pipeline is `bare`."""
        with self._memory():
            return self._network.head(layers)

    def _memory(self) -> Any:
        """Inside, new networks are made as usual, or without memory for weights where the pipeline is `bare`."""
        return loading.without_weights() if self.bare else nullcontext()

    def _weights(self) -> dict[str, Tensor]:
        """The network's weights in float32, as they are stored: a half-precision teacher has rounded its own."""
        model = self._network.model
        if self.dtype != torch.float32:
            where = str(pipeline_folder(self.path) or self.path)
            model = type(model).from_pretrained(where, subfolder=self._network.component, use_safetensors=True, dtype=torch.float32)
        return {name: value.float() for name, value in model.state_dict().items()}

    # Called as its users call it -----------------------------------------------------------------------------------------------------

    def holding(self, pipe: Any) -> Pipeline:
        """The same backbone around another pipeline of its kind, such as a student's that was read again, on the same device."""
        other = copy.copy(self)
        other.pipe = pipe.to(self.device)
        other._network = family_of(pipe, self.path)
        return other

    def stepping(self, scheduler: Any) -> Pipeline:
        """The same pipeline with another scheduler."""
        other = copy.copy(self)
        other.pipe = copy.copy(self.pipe)
        other.pipe.scheduler = scheduler
        return other

    def with_solver(self, dpm: bool) -> Pipeline:
        """The pipeline with its own scheduler, or with DPM-Solver++ 2M made from it."""
        return self.stepping(schedulers.dpm(self.pipe.scheduler)) if dpm else self

    @property
    def steps_by_ddim(self) -> bool:
        """Whether its scheduler is DDIM's, or DPM-Solver++'s, which is DDIM in its first order."""
        return type(self.pipe.scheduler).__name__ in ("DDIMScheduler", "DPMSolverMultistepScheduler")

    def check_steps(self, n: int) -> None:
        """Raises ValueError, with its scheduler's reason, for a step count that it cannot take."""
        schedulers.check_steps(self.pipe.scheduler, n, self.device)

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

    def scheduler(self, transition: Transition, predicts: Predicts, rule: str, steps: int, scaling: float | None = None) -> Any:
        """The scheduler of diffusers that steps as a student does (`backbones.schedulers`)."""
        kind = next(name for name, space in PREDICTS.items() if space == predicts)
        return schedulers.student(self.pipe.scheduler, transition, kind, rule, steps, scaling)

    def save(self, folder: Path, network: nn.Module, scheduler: Callable[[], Any] | None, dtype: torch.dtype, safety_checker: bool) -> Path:
        """A pipeline folder: the teacher's encoders, the student's network, its scheduler, all of it in `dtype`.

        Frozen parts that were trained with in half precision are read again and saved as they came. `safety_checker`: with the teacher's.
        """
        kind = type(self._network)
        if not isinstance(network, kind):
            raise ValueError(f"pipelines of {self.path} hold a {kind.__name__}, and this student is a {type(network).__name__}")
        if scheduler is None:
            raise ValueError("a pipeline needs the scheduler that its student was trained for: give Deployment one in deploy(student)")
        own = {kind.component: network.model, "scheduler": scheduler()}
        whole = {part.dtype for part in self.parts() if part is not self._network.model} == {torch.float32}
        if safety_checker or not whole:
            parts = load_pipeline(self.path, spare=not safety_checker, **own).components
        else:
            parts = {**self.pipe.components, **own}
        if dtype != torch.float32:
            parts = {name: copy.deepcopy(part).to(dtype) if isinstance(part, nn.Module) else part for name, part in parts.items()}
        extra = {"requires_safety_checker": parts["safety_checker"] is not None} if "safety_checker" in parts else {}
        type(self.pipe)(**parts, **extra).save_pretrained(folder, safe_serialization=True)
        return folder

    def laid_out_as(self, network: nn.Module) -> Pipeline:
        """The pipeline with its network's weights in the memory layout of `network`: another takes other kernels, which round otherwise."""
        last = [p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in network.parameters() if p.ndim == 4]
        self._network.model.to(memory_format=torch.channels_last if any(last) else torch.contiguous_format)
        return self

    # Encoders ------------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], truncate: bool = False) -> Context:
        """The text states of `prompts`, unguided. Raises ValueError for one that no tokenizer takes, or is too long without `truncate`."""
        check_prompts(prompts)
        if not truncate:
            self.check_length(prompts)
        return self._network.context(self.pipe, prompts, self.device, self.side)

    def encoders(self) -> str:
        """A digest of everything that makes latents and text states: weights of the encoders, the latents' scale, the vocabulary."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            if isinstance(part, nn.Module) and name != self._network.component:
                for key, value in sorted(part.state_dict().items()):
                    data = value.detach().cpu().flatten().contiguous().view(torch.uint8)
                    digest.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode() + memoryview(data.numpy()))
            elif hasattr(part, "get_vocab"):
                digest.update(json.dumps([name, part.model_max_length, sorted(part.get_vocab().items())]).encode())
        config = self.pipe.vae.config
        digest.update(f"{config.scaling_factor} {config.get('shift_factor')}".encode())
        return digest.hexdigest()

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, naming the first prompt that the tokenizer would cut or does not take."""
        check_prompts(prompts)
        counts, limit = self._network.tokens(self.pipe, prompts)
        for prompt, count in zip(prompts, counts, strict=True):
            if count > limit:
                shown = prompt if len(prompt) < 80 else prompt[:77] + "..."
                raise ValueError(
                    f"the prompt {shown!r} has {count} tokens and the text encoder reads {limit}: shorten it, or allow truncation"
                )

    def null(self) -> Context:
        """The context of the empty prompt, one sample: the unconditional branch of guidance. Zeros where the pipeline says so (SDXL)."""
        c = self.encode_text([""])
        if not self.pipe.config.get("force_zeros_for_empty_prompt"):
            return c
        return c._replace(text=torch.zeros_like(c.text), pooled=None if c.pooled is None else torch.zeros_like(c.pooled))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]: the VAE's posterior mean, so that a cache is reproducible."""
        vae = self.pipe.vae
        with self._autoencoder(pixels.shape[2] * pixels.shape[3]) as chunk:
            parts = [vae.encode(part.to(self.device, vae.dtype)).latent_dist.mode().float() for part in pixels.split(chunk)]
        return ((torch.cat(parts) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).contiguous()

    def decode(self, latents: Tensor, gradients: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents, on the backbone's device; with `gradients`, not clamped."""
        vae = self.pipe.vae
        made = []
        with torch.set_grad_enabled(gradients), self._autoencoder(latents.shape[2] * latents.shape[3] * self.pipe.vae_scale_factor**2) as n:
            for part in latents.split(n):
                z = part.to(self.device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
                image = vae.decode(z, return_dict=False)[0].float()
                made.append(image if gradients else image.clamp(-1, 1))
        return torch.cat(made)

    @contextmanager
    def _autoencoder(self, pixels: int) -> Iterator[int]:
        """Inside, the autoencoder works in full precision, whatever the trainer's is, and on an image that is too large in tiles.

        Yields how many images of so many `pixels` each it takes at a time.
        """
        vae = self.pipe.vae
        tiled = pixels > PIXELS and hasattr(vae, "enable_tiling")
        if tiled:
            vae.enable_tiling()
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield min(64, max(1, PIXELS // pixels))
        finally:
            if tiled:
                vae.disable_tiling()
