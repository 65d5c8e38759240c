"""The networks of a miniature Stable Diffusion, in the layout of diffusers' StableDiffusionPipeline, with fresh weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


class Sizes(NamedTuple):
    """Sizes of one miniature; the autoencoder halves the image, so the latents are image / 2 wide."""

    image: int = 32  # pixels
    tokens: int = 16  # positions of the text encoder, start and end token included
    text: int = 64  # width of the text encoder and of the cross attention
    autoencoder: tuple[int, ...] = (16, 32)
    unet: tuple[int, ...] = (32, 64, 64)  # the first block has no cross attention, the others have


SIZES = {"shapes": Sizes(), "digits": Sizes(image=16, tokens=8, text=32, autoencoder=(16, 32), unet=(32, 48))}


def byte_pairs(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-pair encoding in which every word of a list is one token.

    The merges come from a real run: the most frequent pair first; hand-made ones split words such as "small", because a
    tokeniser applies merges in their order.
    """
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))}
    symbols = sorted({s.removesuffix("</w>") for split in splits.values() for s in split})
    tokens = ["<|startoftext|>", "<|endoftext|>", *symbols, *(s + "</w>" for s in symbols)]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for split in splits.values() for pair in zip(split, split[1:], strict=False)):
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((left, right))
        tokens.append(left + right)
        for split in splits.values():
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == (left, right):
                    split[i : i + 2] = [left + right]
                i += 1
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def build_tokenizer(words: Sequence[str], tokens: int) -> CLIPTokenizer:
    """A CLIPTokenizer that knows `words`, each as one token; unknown ones become the end token."""
    from transformers import CLIPTokenizer

    vocab, merges = byte_pairs(words)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=tokens)


def build_text_encoder(vocab_size: int, sizes: Sizes) -> CLIPTextModel:
    """Two layers of CLIP's text model; the ids of the special tokens are those of `byte_pairs`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text,
        intermediate_size=2 * sizes.text,
        projection_dim=sizes.text,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=sizes.tokens,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def build_autoencoder(sizes: Sizes) -> AutoencoderKL:
    """AutoencoderKL that halves the image, four latent channels; its scaling_factor is set after training."""
    from diffusers import AutoencoderKL

    n = len(sizes.autoencoder)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=sizes.autoencoder,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=sizes.image,
    )


def build_unet(sizes: Sizes) -> UNet2DConditionModel:
    """UNet2DConditionModel on latents of half the image's width; its heads have 16 channels, since others run slower on a CPU."""
    from diffusers import UNet2DConditionModel

    n = len(sizes.unet)
    return UNet2DConditionModel(
        sample_size=sizes.image // 2,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=sizes.unet,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (n - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (n - 1) + ("UpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=sizes.text,
        attention_head_dim=tuple(c // 16 for c in sizes.unet),  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )


def build_scheduler() -> Any:
    """DDIM over Stable Diffusion's schedule, v-prediction, trailing steps (leading ones would never see t = 999)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,  # has no effect on trailing steps; without it diffusers warns at every load
        set_alpha_to_one=True,
        clip_sample=False,
    )


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as one pipeline, without a safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def build_pipeline(words: Sequence[str], sizes: Sizes) -> StableDiffusionPipeline:
    """A whole pipeline with fresh weights for captions of these words."""
    tokenizer = build_tokenizer(words, sizes.tokens)
    return assemble(build_autoencoder(sizes), build_text_encoder(len(tokenizer), sizes), tokenizer, build_unet(sizes))


def parameters(module: torch.nn.Module) -> int:
    """The number of parameters of a network, frozen ones included."""
    return sum(p.numel() for p in module.parameters())
