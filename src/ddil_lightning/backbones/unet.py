"""U-Nets of Stable Diffusion 1.x, 2.x and XL, SSD-1B and their kin (UNet2DConditionModel)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.heads import convolutions, watched
from ddil_lightning.backbones.network import Heads
from ddil_lightning.backbones.weights import Weights
from ddil_lightning.diffusion.denoiser import S_EMBEDDING, W_EMBEDDING, s_embedding, w_embedding
from ddil_lightning.records import Context

UP = re.compile(r"(up_blocks\.\d+\.(?:resnets|attentions)\.)(\d+)(\..*)")
"""A weight of a layer on the way up: its block, its number, the rest of its name."""


def _last_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of the last layer of each block on the way up."""
    last: dict[str, int] = {}
    for found in filter(None, map(UP.match, names)):
        last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return last


class UNet(Family):
    """A UNet2DConditionModel as a network `(x_t, t, c) -> output`."""

    component = "unet"
    blocks_of = ("BasicTransformerBlock", "ResnetBlock2D")
    adapts = (  # LCM-LoRA's (Luo et al. 2023b), as its training script in diffusers has them
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )

    @property
    def w_conditioned(self) -> bool:  # type: ignore[override]
        """Whether it is told the guidance, through an embedding that its configuration provides for; one of s alone is narrower."""
        return self.model.config.time_cond_proj_dim not in (None, S_EMBEDDING)

    @property
    def s_conditioned(self) -> bool:  # type: ignore[override]
        """Whether it is told s, through the same embedding: its width says which of the two, or both one after the other."""
        return self.model.config.time_cond_proj_dim in (S_EMBEDDING, W_EMBEDDING + S_EMBEDDING)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w] by its configuration."""
        size = self.model.config.sample_size
        return (self.model.config.in_channels, *(size if isinstance(size, list | tuple) else (size, size)))

    @property
    def divisor(self) -> int:
        """Every block but the last of the way down halves the sides."""
        return 1 << (len(self.model.config.block_out_channels) - 1)

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for another task than text-to-image in latents of so many `channels`."""
        config = self.model.config
        if config.in_channels != config.out_channels or config.in_channels != channels:
            raise ValueError(
                f"the U-Net of {path} reads {config.in_channels} channels and writes {config.out_channels}, and its autoencoder has "
                f"{channels}: only text-to-image is distilled, no inpainting, editing or upscaling"
            )

    def spaces(self) -> dict[str, Any]:
        """Latents, the width of text states, and what of SDXL's pooled text and time ids reaches the embedding of the time."""
        config = self.model.config
        width = config.cross_attention_dim
        return {
            "number of latent channels": (config.in_channels, config.out_channels),
            "text width (cross_attention_dim)": width if isinstance(width, int) else max(width),
            "embedding of pooled text and time ids (addition_embed_type)": config.addition_embed_type,
            "width of pooled text and time ids (projection_class_embeddings_input_dim)": config.projection_class_embeddings_input_dim,
            "width of a time id (addition_time_embed_dim)": config.addition_time_embed_dim,
            "projection of the text (encoder_hid_dim_type)": config.encoder_hid_dim_type,
            "class embedding (class_embed_type)": config.class_embed_type,
        }

    def handed(self, weights: Weights, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Blocks of fewer layers keep the first ones, and on the way up the last one, which alone reads the skip of the level before: those
        between them go (BK-SDM, Kim et al. 2023)."""
        mine, theirs = _last_layers(self.model.state_dict()), _last_layers(names)
        for key, value in weights:
            found = UP.match(key)
            last = theirs.get(found[1]) if found else None
            if found and last is not None and last < mine[found[1]]:
                layer = int(found[2])
                if layer == mine[found[1]]:
                    key = f"{found[1]}{last}{found[3]}"
                elif layer >= last:
                    continue
            yield key, value

    def told(self) -> dict[str, Any]:
        """An embedding of w behind a bias-free linear layer, added to that of the time (Meng et al. 2023, as LCM does it)."""
        return {"time_cond_proj_dim": W_EMBEDDING}

    def aimed(self, w_conditioned: bool) -> dict[str, Any]:
        """The same layer, which reads the embedding of s, or those of w and s."""
        return {"time_cond_proj_dim": S_EMBEDDING + W_EMBEDDING * w_conditioned}

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """down0 ..., mid, up0 ...: what leaves each block."""
        return tuple(self._depths())

    def tail(self) -> Sequence[nn.Module]:
        """Its way up and the last convolution: the bottleneck comes after them by name alone."""
        return self.model.up_blocks, self.model.conv_out

    def _depths(self) -> dict[str, nn.Module]:
        unet = self.model
        down = {f"down{i}": block for i, block in enumerate(unet.down_blocks)}
        mid = {} if unet.mid_block is None else {"mid": unet.mid_block}
        return {**down, **mid, **{f"up{i}": block for i, block in enumerate(unet.up_blocks)}}

    def _asked(self, layers: Sequence[str]) -> dict[str, nn.Module]:
        """The blocks of `layers`, by default the bottleneck."""
        known = self._depths()
        usual = "mid" if "mid" in known else f"down{len(self.model.down_blocks) - 1}"
        return {name: known[name] for name in self.named(layers, usual)}

    def head(self, layers: Sequence[str] = ()) -> nn.Module:
        """DMD2's discriminator, one for each layer: features [B, F, h, w] -> logits [B, 1, 1, 1] (convolutions of stride 2, norm, SiLU).

        Made for latents of its own size, and good for every other: see `heads.Head`.
        """
        groups = self.model.config.norm_num_groups or 1
        made = [convolutions(*self._size(name), groups) for name in self._asked(layers)]
        return made[0] if len(made) == 1 else Heads(made)

    def widths(self, layers: Sequence[str] = ()) -> tuple[int, ...]:
        """The channels of what leaves the blocks `layers`."""
        return tuple(self._size(name)[0] for name in self._asked(layers))

    def _size(self, layer: str) -> tuple[int, int]:
        """(channels, side) of what leaves a block; every block but the last of its way halves or doubles the side."""
        widths, side = self.model.config.block_out_channels, min(self.latent_shape[1:])
        last = len(widths) - 1
        if layer == "mid":
            return widths[-1], side >> last
        i = int(layer.removeprefix("down").removeprefix("up"))
        if layer.startswith("down"):
            return widths[i], side >> min(i + 1, last)
        return widths[last - i], side >> max(last - i - 1, 0)

    @staticmethod
    def context(pipe: Any, prompts: Sequence[str], device: torch.device, sizes: Tensor) -> Context:
        """The text states; with the pooled text and the sizes that SDXL is told, in the order of its pipeline's `_get_add_time_ids`."""
        made = pipe.encode_prompt(prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)
        if len(made) == 2:
            return Context(made[0].float())
        text, _, pooled, _ = made
        return Context(text.float(), pooled=pooled.float(), ids=sizes.to(device, torch.float32))

    def blank(self, n: int, tokens: int) -> Context:
        """Text states; with the pooled text and the size that SDXL is told."""
        c, config = super().blank(n, tokens), self.model.config
        if config.addition_embed_type != "text_time":
            return c
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return c._replace(pooled=torch.zeros(n, pooled), ids=torch.zeros(n, 6))

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """The features [B, F, h, w] that leave the blocks `layers`, by default the bottleneck; what comes after the last is not run."""
        return self._watched(x_t, t, c, layers, no_further=True)[1]

    def with_features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output [B, C, H, W] and the features, from one forward."""
        return self._watched(x_t, t, c, layers)

    def _watched(
        self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str], no_further: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Not self(...): under FSDP2 the call of `features` has gathered the weights already.
        return watched(lambda: self.forward(x_t, t, c), self._asked(layers), no_further)

    def forward(self, x_t: Tensor, t: Tensor, c: Context) -> Tensor:
        """[B, C, H, W] in the unet's prediction space. Raises ValueError when a w-conditioned U-Net is not told w."""
        kwargs: dict[str, Any] = {}
        dtype = self.dtype
        told = []
        if self.w_conditioned:
            if c.w is None:
                raise ValueError("this U-Net is conditioned on guidance, but the context carries no w: give it guidance g (w = g - 1)")
            told.append(w_embedding(c.w, self.model.config.time_cond_proj_dim - S_EMBEDDING * self.s_conditioned))
        if self.s_conditioned:
            if c.s is None:
                raise ValueError("this U-Net is told the time that is jumped to, but the context carries no s: ask it by a policy")
            told.append(s_embedding(c.s))
        if told:
            kwargs["timestep_cond"] = torch.cat(told, 1).to(dtype)
        if c.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": c.pooled.to(dtype), "time_ids": c.ids}
        text = c.text.to(dtype)
        return self.model(x_t.to(dtype), t, encoder_hidden_states=text, encoder_attention_mask=c.mask, return_dict=False, **kwargs)[0]
