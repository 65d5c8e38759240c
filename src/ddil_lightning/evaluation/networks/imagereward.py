"""ImageReward (Xu et al. 2023): BLIP's image-grounded text encoder and a linear head, trained on rankings by people.

The authors' package needs an old transformers. BLIP is transformers' own here; `renamed` says which of their weights is which of its.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.networks.kinds import Named, Scorer, paired
from ddil_lightning.evaluation.networks.weights import beside, fit, given_file, hub_file, hub_folder, read, told
from ddil_lightning.records import wide
from ddil_lightning.texts import from_json

REPOSITORY, WORDS = "THUDM/ImageReward", "google-bert/bert-base-uncased"
FILES = ("ImageReward.pt", "ImageReward.safetensors")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's numbers over the authors' data: a score is their distance from the mean in standard deviations."""
PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOKENS = 35
"""As many as the authors' text has, padded or cut."""

NAMES = (
    (r"visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"text_encoder\.", "text."),
)
"""The authors' names of BLIP's weights, and transformers'; all others are the same."""


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint by the names of `Reward`; what BLIP has besides (its projections for
    retrieval) and its numbering of tokens are left out."""
    found = {}
    for key, value in weights.items():
        name = key.removeprefix("blip.")
        if not name.startswith(("visual_encoder.", "text_encoder.", "mlp.")) or name.endswith("position_ids"):
            continue
        for pattern, new in NAMES:
            name, n = re.subn("^" + pattern, new, name)
            if n:
                break
        found[name] = value
    return found


class Reward(nn.Module):
    """The network of a checkpoint, whose shapes say how large it is; `med`: the authors' med_config.json, of the text encoder."""

    def __init__(self, weights: Mapping[str, Tensor], med: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        width = weights["vision.embeddings.class_embedding"].shape[-1]
        patch = weights["vision.embeddings.patch_embedding.weight"].shape[-1]
        self.side = patch * round((weights["vision.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
        depth = len({key.split(".")[3] for key in weights if key.startswith("vision.encoder.layers.")})
        hidden = weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=width // 64,  # as both of BLIP's sizes have it
            image_size=self.side,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        kept = {k: v for k, v in med.items() if k not in ("architectures", "model_type", "encoder_width", "add_cross_attention")}
        # with is_decoder a layer has cross-attention; the text is read in both directions all the same
        text = BlipTextConfig(**kept | {"encoder_hidden_size": width, "is_decoder": True}, attn_implementation="eager")
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        layers = sorted({int(key.split(".")[2]) for key in weights if key.startswith("mlp.layers.")})
        sizes = {i: weights[f"mlp.layers.{i}.weight"].shape for i in layers}
        self.mlp = nn.ModuleDict({"layers": nn.ModuleDict({str(i): nn.Linear(n, m) for i, (m, n) in sizes.items()})})

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The score [B] of normalised pixels [B, 3, S, S] and tokens [B, L] under their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        x = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state[:, 0]
        for layer in self.mlp["layers"].values():  # type: ignore[operator, union-attr]
            x = layer(x)  # the authors' head has no activation, and no dropout when it is asked
        return (wide(x[:, 0]) - MEAN) / STD


def image_reward(path: str | None, device: str | torch.device, words: str | None = None) -> Scorer:
    """ImageReward of images and prompts, [B] float64, in standard deviations of the authors' data (0 is their mean).

    `path`: the authors' checkpoint with med_config.json beside it, or the folder of both. `words`: the folder of BERT's tokenizer
    (vocab.txt), by default that of `path` where it has one, else the hub's.
    """
    from transformers import BertTokenizer

    given = given_file(path, *FILES) if path else None
    file = given or hub_file(REPOSITORY, FILES[0])
    med = given_file(str(file.parent), "med_config.json") if given else hub_file(REPOSITORY, "med_config.json")
    own = words or (str(file.parent) if given and (file.parent / "vocab.txt").is_file() else None)
    vocabulary = given_file(own, "vocab.txt").parent if own else hub_folder(WORDS, "vocab.txt", spare=("tokenizer_config.json",))
    weights = renamed(read(file))
    try:
        net = Reward(weights, from_json(med.read_text()))
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        why = f"it has no {error.args[0]}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file} and {med.name} hold no ImageReward: {why}") from error
    model = fit(net, weights, file, "ImageReward").float().to(device)
    tokenizer = BertTokenizer.from_pretrained(vocabulary, local_files_only=True)

    @torch.no_grad()
    def scores(images: Tensor, prompts: Sequence[str], chunk: int = 32) -> Tensor:
        texts, out = paired(images, prompts, "ImageReward"), [torch.empty(0, dtype=torch.float64)]
        for i in range(0, len(texts), chunk):
            text = tokenizer(texts[i : i + chunk], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            pixels = preprocessed(images[i : i + chunk], net.side)
            out.append(model(pixels.to(device), text["input_ids"].to(device), text["attention_mask"].to(device)).cpu())
        return torch.cat(out)

    settings = [*([med] if given else []), *([vocabulary / "vocab.txt"] if given or words else [])]
    settings += beside(vocabulary, "tokenizer_config.json") if settings else []
    return Named(told("ImageReward 1.0", given, settings), scores)


def preprocessed(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], rounded to 8 bits, as the authors' torchvision transform makes pixels of them, [B, 3, side, side]."""
    from torchvision.transforms import v2

    see = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC), v2.CenterCrop(side), v2.PILToTensor()])
    pixels = torch.stack([see(v2.functional.to_pil_image(x)) for x in to_uint8(images)]).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in PIXELS)
    return (pixels - mean) / std
