"""Random miniatures of SANA, by diffusers' own classes."""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import suite
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded, encode
from ddil_lightning.testing.subject import WORDS
from options import options

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
"""SANA's scheduler, DPM-Solver++ of the second order on a flow's nodes, as it is published."""
NETWORK: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12,
}  # fmt: skip
VAE: dict[str, Any] = {
    "latent_channels": 4, "attention_head_dim": 4, "encoder_block_out_channels": (8, 8, 16), "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "scaling_factor": 0.41407,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "decoder_qkv_multiscales": ((), (), (5,)),
}  # fmt: skip
"""Four times smaller latents, where SANA's are 32 times smaller: its pipeline makes no sides that are no multiples of 32 pixels."""


class Pictures(suite.Pictures):
    """Those of the suite, twice as large."""

    def pixels(self, index: Any) -> Tensor:
        return super().pixels(index).repeat_interleave(2, 2).repeat_interleave(2, 3)


def instruction() -> str:
    """What its pipeline writes before every prompt."""
    from diffusers import SanaPipeline

    return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)


def tokenizer() -> Any:
    """Gemma's kind of tokenizer: a token for a word after a space, of the tests and of the instruction, and for every letter elsewhere."""
    from transformers import GemmaTokenizer

    letters = [chr(i) for i in range(33, 127)]
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", "\n", *letters]
    merges = []
    for word in dict.fromkeys([*WORDS, *instruction().split()]):
        pieces = ["\u2581" + word[:i] for i in range(len(word) + 1)]
        merges += [(before, letter) for before, letter in zip(pieces, word, strict=False)]
        vocabulary += pieces[1:]
    known = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    return GemmaTokenizer(vocab=known, merges=list(dict.fromkeys(merges)), add_bos_token=True)


def make_sana(folder: Path, scheduler: Any = None, **network: Any) -> Path:
    """An untrained SANA in miniature: Gemma of one layer, transformer of two, images of 32 x 32 and latents of 8 x 8."""
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(5)
    words = tokenizer()
    gemma = Gemma2Config(
        vocab_size=len(words), hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, query_pre_attn_scalar=8, initializer_range=0.5,
    )  # fmt: skip
    diffusers.SanaPipeline(
        tokenizer=words,
        text_encoder=Gemma2Model(gemma),
        vae=diffusers.AutoencoderDC(**VAE),
        transformer=diffusers.SanaTransformer2DModel(**{**NETWORK, **network}),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**FLOW),
    ).save_pretrained(folder)
    return folder


@lru_cache
def _encoded(folder: Path) -> Encoded:
    return encode(Pictures(), suite.backbone(folder))


def captions(folder: Path, **kwargs: Any) -> DDILDataModule:
    """As the suite's, of these pictures, with roll-outs of student and teacher."""
    settings = {"batch_size": suite.BATCH, "rollouts": {"every": 2}, "buffer": {"capacity": 64}}
    return DDILDataModule(_encoded(folder), suite.MIXED, **options(DDILDataModule, settings, kwargs))
