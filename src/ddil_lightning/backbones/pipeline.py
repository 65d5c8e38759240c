"""diffusers pipelines as teachers and students: networks, text and image encoders, schedulers.

The built-in miniatures, a local folder and a hub id all come through `Backbone`: there is no second path for the toy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.loading import check_weights, empty_unet, load_pipeline, pipeline_folder, recommended
from ddil_lightning.diffusion.schedule import NoiseSchedule, Predicts
from ddil_lightning.records import Context
from ddil_lightning.texts import check_prompts

W_EMBEDDING = 256
PREDICTS: dict[str, Predicts] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""What a diffusers scheduler says of the forward process. Everything else in its configuration is a way to sample."""
PIXELS = 4 * 512 * 512
"""How many pixels the autoencoder works on at a time: some 4 GB in float32, whatever the size of an image. A larger one is tiled."""


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

    `path`: built-in name, folder or hub id. `dtype`: of the frozen U-Net and text encoders (the student is always made in float32).
    `vae_dtype`: of the autoencoder, whose latents are what training takes for data. `bare`: U-Nets, the teacher's too, are without memory
    for weights; the one that is wanted gets them from a checkpoint.
    """

    def __init__(
        self, path: str = "builtin", dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype = torch.float32, bare: bool = False
    ) -> None:
        self.path, self.dtype, self.bare = str(path), dtype, bare
        self.about = recommended(path)
        empty = {"unet": empty_unet(path)} if bare else {}
        self.pipe: Any = load_pipeline(path, {"default": dtype, "vae": vae_dtype}, **empty)
        check_weights(self.pipe, path, empty)
        for part in self.parts():
            part.requires_grad_(False).eval()
        for part in (self.pipe.unet, self.pipe.vae):
            part.to(memory_format=torch.channels_last)  # convolutions run faster so, on CPUs and on tensor cores
        config = self.pipe.scheduler.config
        if "Flow" in type(self.pipe.scheduler).__name__:
            raise ValueError(f"the pipeline {path} has a flow-matching scheduler, which is not supported with a U-Net yet")
        self.schedule = NoiseSchedule.from_scheduler(self.pipe.scheduler)
        kind = config.get("prediction_type", "epsilon")
        if kind not in PREDICTS:
            raise ValueError(f"the pipeline {path} predicts {kind!r}: known are {', '.join(PREDICTS)}")
        self.predicts: Predicts = PREDICTS[kind]
        unet = self.pipe.unet.config
        if unet.in_channels != unet.out_channels or unet.in_channels != self.pipe.vae.config.latent_channels:
            raise ValueError(
                f"the U-Net of {path} reads {unet.in_channels} channels and writes {unet.out_channels}, and its autoencoder has "
                f"{self.pipe.vae.config.latent_channels}: only text-to-image is distilled, no inpainting, editing or upscaling"
            )
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
        return next(self.pipe.vae.parameters()).device

    @property
    def guidance(self) -> float:
        """The guidance g that the pipeline's own card recommends (7.5, Stable Diffusion's, without one)."""
        return float(self.about.get("guidance", 7.5))

    @property
    def baked(self) -> bool:
        """Whether it is a student with its guidance in the weights, to be called with guidance_scale 1."""
        return "method" in self.about and self.pipe.unet.config.time_cond_proj_dim is None

    def stands_in(self, network: nn.Module) -> None:
        """Put a student's network in the place of a `bare` pipeline's own, which has no weights."""
        self.pipe.unet = cast(UNet, network).unet

    def teacher(self) -> nn.Module:
        """The frozen network itself, shared, not copied."""
        return UNet(self.pipe.unet)

    def student(self, w_conditioned: bool = False, gradient_checkpointing: bool = False) -> nn.Module:
        """A trainable float32 copy. With `w_conditioned` it has an embedding of w behind a bias-free linear layer that starts at zero,
        so that the copy equals its source at every w."""
        source = self.pipe.unet
        extra = {"time_cond_proj_dim": W_EMBEDDING} if w_conditioned and source.config.time_cond_proj_dim is None else {}
        with self._memory():
            # Where the teacher lay on this machine is nobody else's business.
            unet = type(source).from_config({k: v for k, v in {**source.config, **extra}.items() if k != "_name_or_path"})
        if not self.bare:
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
        with self._memory():
            while side > 1:
                layers += [nn.Conv2d(width, width, 4, 2, 1), nn.GroupNorm(config.norm_num_groups or 1, width), nn.SiLU()]
                side //= 2
            return nn.Sequential(*layers, nn.Conv2d(width, 1, 1)).to(memory_format=torch.channels_last)

    def _memory(self) -> Any:
        """Where new networks are made: as usual, or without memory."""
        return torch.device("meta") if self.bare else nullcontext()

    def scheduler(self, kind: str, **own: Any) -> Any:
        """diffusers' scheduler `kind` on the pipeline's forward process, with `own` options and nothing else of the teacher's.

        A teacher's ways to sample (Karras or other sigmas, thresholding, an offset, rules for the last step) are not the student's.
        """
        import diffusers

        process = {name: value for name, value in self.pipe.scheduler.config.items() if name in PROCESS}
        # An offset of 1 has no effect but on `leading` times, and diffusers warns of any other at every load.
        common = {"steps_offset": 1, "prediction_type": self.pipe.scheduler.config.get("prediction_type", "epsilon"), "thresholding": False}
        return getattr(diffusers, kind)(**{**process, **common, **own})

    def _weights(self) -> dict[str, Tensor]:
        """The U-Net's weights in float32, as they are stored: a half-precision teacher has rounded its own."""
        unet = self.pipe.unet
        if self.dtype != torch.float32:
            where = str(pipeline_folder(self.path) or self.path)
            unet = type(unet).from_pretrained(where, subfolder="unet", use_safetensors=True, dtype=torch.float32)
        return {name: value.float() for name, value in unet.state_dict().items()}

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str], truncate: bool = False) -> Context:
        """The text states of `prompts`, unguided. Raises ValueError for one that no tokenizer takes, or is too long without `truncate`."""
        check_prompts(prompts)
        if not truncate:
            self.check_length(prompts)
        made = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(made) == 2:
            return Context(made[0].float())
        text, _, pooled, _ = made
        side = float(self.latent_shape[1] * self.pipe.vae_scale_factor)
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=self.device).repeat(len(prompts), 1)
        return Context(text.float(), pooled=pooled.float(), ids=ids)

    def encoders(self) -> str:
        """A digest of everything that makes latents and text states: weights of the encoders, the latents' scale, the vocabulary."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            if isinstance(part, nn.Module) and name != "unet":
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
        with self._autoencoder(pixels.shape[2] * pixels.shape[3]) as chunk:
            parts = [vae.encode(part.to(self.device, vae.dtype)).latent_dist.mode().float() for part in pixels.split(chunk)]
        return ((torch.cat(parts) - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] of scaled latents, on the backbone's device."""
        vae = self.pipe.vae
        made = []
        with self._autoencoder(latents.shape[2] * latents.shape[3] * self.pipe.vae_scale_factor**2) as chunk:
            for part in latents.split(chunk):
                z = part.to(self.device, vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
                made.append(vae.decode(z, return_dict=False)[0].float().clamp(-1, 1))
        return torch.cat(made)

    @contextmanager
    def _autoencoder(self, pixels: int) -> Iterator[int]:
        """In full precision, whatever the trainer's is -> how many images of so many `pixels` at a time; one that is too large in tiles."""
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
