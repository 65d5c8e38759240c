"""diffusers pipelines in: teacher and student networks, text and image encoders. The one file that imports diffusers models.

The built-in miniatures, a local folder and a hub id all come through `Backbone`: there is no second path for the toy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .schedule import NoiseSchedule, Predicts
from .types import Context

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BUILTIN = {"builtin": "shapes", "builtin/shapes": "shapes", "builtin/digits": "digits"}
W_EMBEDDING = 256
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def pipeline_folder(path: str | Path) -> Path | None:
    """The folder behind `path`: a built-in name, or a local pipeline folder; None where it can only be a hub id.

    Raises ValueError for a folder that holds no pipeline with a U-Net, and for a path that looks local but does not exist.
    """
    if str(path) in BUILTIN:
        return Path(str(resources.files("ddil_lightning"))) / "miniature" / "weights" / BUILTIN[str(path)]
    folder = Path(path).expanduser()
    if not folder.exists():
        if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
            raise ValueError(f"no pipeline at {path}: give a diffusers folder, a hub id such as owner/name, or one of {', '.join(BUILTIN)}")
        return None
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline folder: it has no model_index.json")
    if "unet" not in json.loads((folder / "model_index.json").read_text()) or not (folder / "unet").is_dir():
        raise ValueError(f"the pipeline {folder} has no U-Net (folder unet/): distillation needs a Stable Diffusion class pipeline")
    return folder


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> DiffusionPipeline:
    """A diffusers pipeline from a built-in name, a folder or a hub id; safetensors only, no safety checker, quiet."""
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = pipeline_folder(path)
    kwargs = {"use_safetensors": True, **kwargs}
    if folder is not None:
        # Components that a folder stores as null must be passed as None, or loading raises.
        index = json.loads((folder / "model_index.json").read_text())
        kwargs.update({name: None for name, value in index.items() if isinstance(value, list) and value[0] is None})
    try:
        pipe = DiffusionPipeline.from_pretrained(str(folder or path), dtype=dtype, **kwargs)
    except OSError as error:
        raise ValueError(f"the pipeline {path} could not be loaded: {str(error).splitlines()[0]}") from error
    if not hasattr(pipe, "unet") or pipe.unet is None:
        raise ValueError(f"the pipeline {path} has no U-Net: distillation needs a Stable Diffusion class pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recommended(path: str | Path) -> dict[str, Any]:
    """What a pipeline folder says of itself in ddil.json (guidance, dataset, steps, box, ...); empty without that file."""
    folder = pipeline_folder(path)
    file = folder / "ddil.json" if folder else None
    return json.loads(file.read_text()) if file and file.is_file() else {}


def w_embedding(w: Tensor, dim: int = W_EMBEDDING) -> Tensor:
    """[B, dim] sinusoids of guidance w [B]: sin then cos of 1000 w 10000^(-j / (dim / 2 - 1)) (LCM's embedding, METHODS 0.4)."""
    rate = torch.exp(
        torch.arange(dim // 2, device=w.device, dtype=torch.float32)
        * (-torch.log(torch.tensor(1e4, dtype=torch.float32, device=w.device)) / (dim // 2 - 1))
    )
    angle = 1000.0 * w.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class _Bottleneck(Exception):
    """Ends a U-Net's forward once the features are there."""


class UNet(nn.Module):
    """A UNet2DConditionModel as a network `(x_t, t, c) -> output`."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def w_conditioned(self) -> bool:
        """Whether it is told the guidance."""
        return cast(Any, self.unet).config.time_cond_proj_dim is not None

    def features(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, F, h, w] what leaves the bottleneck; the decoder is not run."""
        return self._watched(x_t, t, c, encoder_only=True)[1]

    def with_features(self, x_t: Tensor, t: Tensor, c: Context) -> tuple[Tensor, Tensor]:
        """(output, features) from one forward."""
        return self._watched(x_t, t, c)

    def _watched(self, x_t: Tensor, t: Tensor, c: Context, encoder_only: bool = False) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            kept.append(out[0] if isinstance(out, tuple) else out)  # a down block also returns what its skips carry
            if encoder_only:
                raise _Bottleneck  # the one way out of diffusers' forward that does not repeat its first half here

        unet = cast(Any, self.unet)
        handle = (unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block).register_forward_hook(keep)
        out = x_t
        try:
            with suppress(_Bottleneck):
                out = self.forward(x_t, t, c)  # not self(...): under FSDP2 the call of `features` has gathered the weights already
        finally:
            handle.remove()
        return out, kept[0]

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] in the unet's prediction space. Raises ValueError when a w-conditioned U-Net is not told w."""
        kwargs: dict[str, Any] = {}
        dtype = next(self.unet.parameters()).dtype  # a teacher may be in half precision; its answer is upcast by the schedule
        if self.w_conditioned:
            if c.w is None:
                raise ValueError("this U-Net is conditioned on guidance, but the context carries no w: give it guidance g (w = g - 1)")
            kwargs["timestep_cond"] = w_embedding(c.w, cast(Any, self.unet).config.time_cond_proj_dim).to(dtype)
        if c.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": c.pooled.to(dtype), "time_ids": c.ids}
        text = c.text.to(dtype)
        return self.unet(x_t.to(dtype), t, encoder_hidden_states=text, encoder_attention_mask=c.mask, return_dict=False, **kwargs)[0]


class Backbone:
    """A teacher pipeline and what a method needs of it. Loaded once; `unet` stays frozen in eval mode.

    `path`: built-in name, folder or hub id. `dtype`: of the frozen parts (the student is always made in float32).
    """

    def __init__(self, path: str = "builtin", dtype: torch.dtype = torch.float32) -> None:
        self.path, self.dtype = str(path), dtype
        self.pipe: Any = load_pipeline(path, dtype)
        self.about = recommended(path)
        for part in self.parts():
            part.requires_grad_(False).eval()
        for part in (self.pipe.unet, self.pipe.vae):
            part.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPUs and on tensor cores
        if dtype == torch.float16 and self.pipe.vae.config.get("force_upcast", True):
            self.pipe.vae.float()  # what diffusers does at every call: the autoencoder's activations overflow in float16
        config = self.pipe.scheduler.config
        if "beta_schedule" not in config and "Flow" in type(self.pipe.scheduler).__name__:
            raise ValueError(f"the pipeline {path} has a flow-matching scheduler, which is not supported with a U-Net yet")
        self.schedule = NoiseSchedule.from_scheduler(self.pipe.scheduler)
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTS:
            raise ValueError(f"the pipeline {path} predicts {kind!r}: known are {', '.join(PREDICTS)}")
        self.predicts: Predicts = PREDICTS[kind]
        unet = self.pipe.unet.config
        self.latent_shape: tuple[int, ...] = (unet.in_channels, unet.sample_size, unet.sample_size)

    captions: Any = None
    """The data set that comes with the backbone itself (the analytic toy's)."""

    def parts(self) -> list[nn.Module]:
        """The frozen modules."""
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def to(self, device: torch.device) -> Backbone:
        """The frozen encoders and the teacher on `device`."""
        self.pipe.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the frozen parts are."""
        return next(self.pipe.unet.parameters()).device

    @property
    def guidance(self) -> float:
        """The guidance g that the pipeline's own card recommends (7.5, Stable Diffusion's, without one)."""
        return float(self.about.get("guidance", 7.5))

    @property
    def baked(self) -> bool:
        """Whether it is a student with its guidance in the weights, to be called with guidance_scale 1."""
        return "method" in self.about and self.pipe.unet.config.time_cond_proj_dim is None

    def teacher(self) -> nn.Module:
        """The frozen network itself, shared, not copied."""
        return UNet(self.pipe.unet)

    def student(self, w_conditioned: bool = False, gradient_checkpointing: bool = False) -> nn.Module:
        """A trainable float32 copy. With `w_conditioned` it has an embedding of w behind a bias-free linear layer that starts at zero,
        so that the copy equals its source at every w."""
        source = self.pipe.unet
        extra = {"time_cond_proj_dim": W_EMBEDDING} if w_conditioned and source.config.time_cond_proj_dim is None else {}
        unet = type(source).from_config({**source.config, **extra})
        missing, unexpected = unet.load_state_dict(self._weights(), strict=False)
        if unexpected or set(missing) - {"time_embedding.cond_proj.weight"}:
            raise ValueError(f"the U-Net of {self.path} could not be copied: missing {missing}, unexpected {unexpected}")
        if extra:
            nn.init.zeros_(unet.time_embedding.cond_proj.weight)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        return UNet(unet.to(memory_format=torch.channels_last).requires_grad_(True).train())

    def critic(self, gradient_checkpointing: bool = False) -> nn.Module:
        """A trainable float32 copy that follows the student's outputs, and whose features a GAN reads."""
        return self.student(gradient_checkpointing=gradient_checkpointing)

    def head(self) -> nn.Module:
        """DMD2's discriminator: bottleneck features [B, F, h, w] -> logits [B, 1, 1, 1] (convolution, group norm, SiLU, stride 2)."""
        config = self.pipe.unet.config
        width, side = config.block_out_channels[-1], config.sample_size >> (len(config.block_out_channels) - 1)
        layers: list[nn.Module] = []
        while side > 1:
            layers += [nn.Conv2d(width, width, 4, 2, 1), nn.GroupNorm(config.norm_num_groups or 1, width), nn.SiLU()]
            side //= 2
        return nn.Sequential(*layers, nn.Conv2d(width, 1, 1)).to(memory_format=torch.channels_last)

    def _weights(self) -> dict[str, Tensor]:
        """The U-Net's weights in float32, as they are stored: a half-precision teacher has rounded its own."""
        unet = self.pipe.unet
        if self.dtype != torch.float32:
            unet = type(unet).from_pretrained(str(pipeline_folder(self.path) or self.path), subfolder="unet", use_safetensors=True)
        return {name: value.float() for name, value in unet.state_dict().items()}

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], truncate: bool = False) -> Context:
        """The text states of `prompts`, unguided. Raises ValueError for a prompt over the tokenizer's limit, unless `truncate`."""
        if not truncate:
            self.check_length(prompts)
        made = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(made) == 2:
            return Context(made[0].float())
        text, _, pooled, _ = made
        side = float(self.latent_shape[1] * self.pipe.vae_scale_factor)
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device).repeat(len(prompts), 1)
        return Context(text.float(), pooled=pooled.float(), ids=ids)

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, naming the first prompt that the tokenizer would cut."""
        tokenizer = self.pipe.tokenizer
        limit = tokenizer.model_max_length
        for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
            if len(ids) > limit:
                shown = prompt if len(prompt) < 80 else prompt[:77] + "..."
                raise ValueError(
                    f"the prompt {shown!r} has {len(ids)} tokens and the text encoder reads {limit}: shorten it, or allow truncation"
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
        with torch.autocast(self.device.type, enabled=False):  # the trainer's precision is the student's
            mean = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist.mode()
        return ((mean.float() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 64) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents."""
        vae = self.pipe.vae
        parts = [
            part / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
            for part in latents.to(self.device, vae.dtype).split(chunk)
        ]
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([vae.decode(part, return_dict=False)[0].float().clamp(-1, 1) for part in parts])
