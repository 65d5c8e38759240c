"""Random miniatures of Z-Image, by diffusers' own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ddil_lightning.testing.subject import WORDS

NETWORK: dict[str, Any] = {
    "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 12,
    "axes_dims": [4, 2, 2], "axes_lens": [1024, 32, 32],
}  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(more: Sequence[str] = ()) -> Any:
    """Qwen's kind of tokenizer, with its chat: a token for a word of the tests after a space, and for every byte elsewhere.

    `more`: other words that are a token, a space before them written as \u0120.
    """
    from transformers import Qwen2Tokenizer

    letters = [chr(i) for i in range(33, 127)]
    vocabulary, merges = ["<|endoftext|>", "\u0120", "\u010a", *letters], []
    for word in (*("\u0120" + word for word in WORDS), *more):
        pieces = [word[: i + 1] for i in range(len(word))]
        merges += [(before, letter) for before, letter in zip(pieces, word[1:], strict=False)]
        vocabulary += pieces[1:]
    known = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    made = Qwen2Tokenizer(vocab=known, merges=list(dict.fromkeys(merges)), extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    made.chat_template = CHAT
    return made


def make_zimage(folder: Path, size: tuple[int, int] | None = (16, 16), **network: Any) -> Path:
    """An untrained Z-Image in miniature: Qwen of two layers, transformer of two and one that refines, latents half as large as images."""
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    from ddil_lightning.miniature import networks

    torch.manual_seed(6)
    words = tokenizer()
    qwen = Qwen3Config(
        vocab_size=len(words), hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, initializer_range=0.5,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(**{**NETWORK, **network})
    with torch.no_grad():
        transformer.x_pad_token.normal_()  # zero at first, and then nobody would see whether it counts
        transformer.cap_pad_token.normal_()
    vae = networks.build_autoencoder(networks.Sizes(image=16, autoencoder=(8, 8)))
    vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=Qwen3Model(qwen),
        tokenizer=words,
        transformer=transformer,
    ).save_pretrained(folder)
    (folder / "ddil.json").write_text(json.dumps({} if size is None else {"size": list(size)}))
    return folder
