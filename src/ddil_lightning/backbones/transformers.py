"""What diffusion transformers have in common: patches, a row of blocks, and a discriminator's head on what leaves them; packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ddil_lightning.backbones.family import Family
from ddil_lightning.backbones.heads import convolutions, watched
from ddil_lightning.backbones.network import Heads
from ddil_lightning.records import Context

HEAD = 256
"""Channels of a discriminator's head: a transformer's features are wider than a U-Net's, and its convolutions would be larger than it."""
PACKED_SIDE = 128
"""Of the latents of a plain call, the default_sample_size of pipelines that pack them: no configuration says it."""


class Transformer(Family):
    """A transformer on patches of latents [B, C, H, W], `row` after `row` of blocks whose states are tokens [B, N, F] of its image.

    A family writes `forward` and `row`, and `image` where its blocks answer with more than the image's tokens.
    """

    image: int = 0
    """Which of a block's answers are the tokens of the image, or begin with them."""

    def row(self) -> Sequence[nn.Module]:
        """Its blocks, in the order of its forward."""
        return list(self.model.transformer_blocks)

    @property
    def patch(self) -> int:
        """The side of a patch in latents."""
        return int(self.model.config.patch_size)

    @property
    def width(self) -> int:
        """F, of a token."""
        return int(self.model.config.num_attention_heads * self.model.config.attention_head_dim)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w] by its configuration."""
        config = self.model.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def divisor(self) -> int:
        """A patch is whole."""
        return self.patch

    def positions(self, shape: Sequence[int]) -> int | None:
        """A token for every patch."""
        return (shape[1] // self.patch) * (shape[2] // self.patch)

    def check(self, path: str, channels: int | None) -> None:
        """Raises ValueError for another task than text-to-image in latents of so many `channels`."""
        config = self.model.config
        written = config.get("out_channels") or config.in_channels
        if config.in_channels != channels or written != channels:
            raise ValueError(
                f"the transformer of {path} reads {config.in_channels} channels and writes {written}, and its autoencoder has {channels}: "
                "only text-to-image is distilled, no editing or upscaling"
            )

    @property
    def layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """block0, block1, ...: what leaves each block."""
        return tuple(f"block{i}" for i in range(len(self.row())))

    def _asked(self, layers: Sequence[str]) -> dict[str, nn.Module]:
        """The blocks of `layers`, by default that in the middle."""
        known = dict(zip(self.layers, self.row(), strict=True))
        return {name: known[name] for name in self.named(layers, f"block{len(known) // 2}")}

    def head(self, layers: Sequence[str] = ()) -> nn.Module:
        """A discriminator's head for each layer, DMD2's on a projection: features [B, F, h, w] -> logits [B, 1, 1, 1] at any size."""
        side = min(self.latent_shape[1:]) // self.patch
        inner = min(HEAD, self.width)
        groups = next(n for n in (32, 16, 8, 4, 2, 1) if inner % n == 0)
        made = [convolutions(self.width, side, groups, inner) for _ in self._asked(layers)]
        return made[0] if len(made) == 1 else Heads(made)

    def widths(self, layers: Sequence[str] = ()) -> tuple[int, ...]:
        """The same of each block."""
        return (self.width,) * len(self._asked(layers))

    def features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, ...]:
        """The features [B, F, h, w] that leave the blocks `layers`, by default the middle one; what comes after the last is not run."""
        return self._watched(x_t, t, c, layers, no_further=True)[1]

    def with_features(self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The output [B, C, H, W] and the features, from one forward."""
        return self._watched(x_t, t, c, layers)

    def _watched(
        self, x_t: Tensor, t: Tensor, c: Context, layers: Sequence[str], no_further: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        # Not self(...): under FSDP2 the call of `features` has gathered the weights already.
        out, found = watched(lambda: self.forward(x_t, t, c), self._asked(layers), no_further, self.image)
        height, width = x_t.shape[2] // self.patch, x_t.shape[3] // self.patch
        return out, tuple(x[:, : height * width].transpose(1, 2).unflatten(2, (height, width)) for x in found)

    def spaces(self) -> dict[str, Any]:
        """Latents, and the width of the text states."""
        config = self.model.config
        widths = {name: config[name] for name in ("joint_attention_dim", "caption_channels", "pooled_projection_dim") if config.get(name)}
        return {"number of latent channels": self.latent_shape[0], **{f"text width ({name})": width for name, width in widths.items()}}


class Packed(Transformer):
    """A transformer of a flow whose pipeline holds latents packed in patches of 2 x 2, and hands its scheduler sigmas of its own.

    A plain call makes latents of PACKED_SIDE, whatever the network was trained on, and guides by a negative prompt if it is told
    true_cfg_scale.
    """

    flow = True
    passes_sigmas = True
    cfg = "true_cfg_scale"
    image = 1
    patch = 2
    sized = ()
    resizable = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w] of a plain call."""
        return self.model.config.in_channels // 4, PACKED_SIDE, PACKED_SIDE

    @staticmethod
    def packed(x: Tensor) -> Tensor:
        """[B, H W / 4, 4 C] of latents [B, C, H, W]. Raises ValueError for what is packed already."""
        if x.ndim != 4:
            raise ValueError(f"latents are [B, C, h, w], not {tuple(x.shape)}: the network packs them itself, so unpack them first")
        b, c, h, w = x.shape
        return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)

    @staticmethod
    def unpacked(x: Tensor, shape: Sequence[int]) -> Tensor:
        """Latents [B, C, H, W], of a `shape` [C, H, W], of packed ones."""
        c, h, w = shape
        return x.reshape(-1, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, h, w)
