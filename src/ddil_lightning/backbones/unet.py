"""U-Nets of Stable Diffusion 1.x, 2.x and XL, SSD-1B and their kin (UNet2DConditionModel)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.family import Family
from ddil_lightning.diffusion.denoiser import W_EMBEDDING, w_embedding
from ddil_lightning.records import Context


class _Bottleneck(Exception):
    """Ends a U-Net's forward once the features are there."""


class UNet(Family):
    """A UNet2DConditionModel as a network `(x_t, t, c) -> output`."""

    component = "unet"
    blocks_of = ("BasicTransformerBlock", "ResnetBlock2D")

    @property
    def w_conditioned(self) -> bool:  # type: ignore[override]
        """Whether it is told the guidance."""
        return self.model.config.time_cond_proj_dim is not None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w] by its configuration."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for another task than text-to-image in latents of so many `channels`."""
        config = self.model.config
        if config.in_channels != config.out_channels or config.in_channels != channels:
            raise ValueError(
                f"the U-Net of {path} reads {config.in_channels} channels and writes {config.out_channels}, and its autoencoder has "
                f"{channels}: only text-to-image is distilled, no inpainting, editing or upscaling"
            )

    def told(self) -> dict[str, Any]:
        """An embedding of w behind a bias-free linear layer, added to that of the time (Meng et al. 2023, as LCM does it)."""
        return {"time_cond_proj_dim": W_EMBEDDING}

    def head(self) -> nn.Module:
        """DMD2's discriminator: bottleneck features [B, F, h, w] -> logits [B, 1, 1, 1] (convolution, group norm, SiLU, stride 2)."""
        config = self.model.config
        width, side = config.block_out_channels[-1], config.sample_size >> (len(config.block_out_channels) - 1)
        layers: list[nn.Module] = []
        while side > 1:
            layers += [nn.Conv2d(width, width, 4, 2, 1), nn.GroupNorm(config.norm_num_groups or 1, width), nn.SiLU()]
            side //= 2
        return nn.Sequential(*layers, nn.Conv2d(width, 1, 1)).to(memory_format=torch.channels_last)

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, side: int) -> Context:
        """The text states; with the pooled text and the size that SDXL is told, square and not cropped."""
        made = pipe.encode_prompt(prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(made) == 2:
            return Context(made[0].float())
        text, _, pooled, _ = made
        ids = torch.tensor([side, side, 0.0, 0.0, side, side], device=device).repeat(len(prompts), 1)
        return Context(text.float(), pooled=pooled.float(), ids=ids)

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

        unet = self.model
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
        dtype = next(self.model.parameters()).dtype  # a teacher may be in half precision; its answer is upcast by the schedule
        if self.w_conditioned:
            if c.w is None:
                raise ValueError("this U-Net is conditioned on guidance, but the context carries no w: give it guidance g (w = g - 1)")
            kwargs["timestep_cond"] = w_embedding(c.w, self.model.config.time_cond_proj_dim).to(dtype)
        if c.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": c.pooled.to(dtype), "time_ids": c.ids}
        text = c.text.to(dtype)
        return self.model(x_t.to(dtype), t, encoder_hidden_states=text, encoder_attention_mask=c.mask, return_dict=False, **kwargs)[0]
