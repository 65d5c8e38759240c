"""What people prefer, as CLIP ViT-H/14 has learned it: PickScore (Kirstain et al. 2023) and HPSv2 (Wu et al. 2023).

Both compare an image with its prompt, both are of the authors' weights through this package's own loaders, in float32. PickScore is 100
times a cosine (the weights' own temperature), about 20 to 23 for good images. HPSv2 is the cosine itself, about 0.25 to 0.31, as in the
DDIL paper; the authors' benchmark prints 100 times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddil_lightning.evaluation.networks.clip import open_clip_net
from ddil_lightning.evaluation.networks.kinds import Absent, Named, Scorer, paired
from ddil_lightning.evaluation.networks.transformer import SETTINGS, WORDS, folder_model, pictures
from ddil_lightning.evaluation.networks.weights import beside, given_file, hub_file, hub_folder, told
from ddil_lightning.records import wide

HPS = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
"""The authors' files of either version, in xswu/HPSv2 on the hub."""
PICKSCORE, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
READS = ("preprocessor_config.json", ("tokenizer.json", "vocab.json"))
SPARE = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json")


def hps_scores(path: str | None, device: str | torch.device, version: str = "2.1", model: str = "ViT-H-14") -> Scorer:
    """HPSv2 of images and prompts, [B] float64: the cosine in OpenCLIP `model` with the authors' weights, `path` or the hub's.

    Images that are no squares are shrunk to their longest side and padded, as the authors do.
    """
    if version not in HPS:
        raise ValueError(f"hps_scores: version={version!r}; choose {' or '.join(HPS)}")
    given = given_file(path, HPS[version]) if path else None
    net = open_clip_net(model, str(given or hub_file("xswu/HPSv2", HPS[version])), device=device, resize="longest")
    return Named(told(f"HPS v{version}, {model}", given), net.score)


def pick_scores(path: str | None, device: str | torch.device, processor: str | None = None) -> Scorer:
    """PickScore of images and prompts, [B] float64: the cosine times the temperature, by transformers' CLIPModel.

    `path`: its folder. `processor`: the folder of tokenizer and preprocessing, by default `path` where it has them, else the hub's own.
    """
    from transformers import AutoTokenizer, CLIPModel

    weights = ("model.safetensors", "pytorch_model.bin")
    given = given_file(path, *weights) if path else None
    folder = Path(path).expanduser() if path else hub_folder(PICKSCORE, "config.json", weights)
    reads = Path(processor).expanduser() if processor else folder if (folder / "preprocessor_config.json").is_file() else None
    if reads is None:
        try:
            reads = hub_folder(PROCESSOR, *READS, spare=SPARE)
        except Absent as error:
            if path is None:
                raise
            raise Absent(f"{error}; copy these files of it into {path} instead: {READS[0]}, tokenizer.json") from error
    net = folder_model(CLIPModel, folder, "PickScore").to(device)
    see = pictures(reads)
    try:
        tokenizer = AutoTokenizer.from_pretrained(reads, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{reads} has no tokenizer that transformers reads: copy tokenizer.json beside the weights") from error
    longest = net.config.text_config.max_position_embeddings

    @torch.no_grad()
    def scores(images: Tensor, prompts: Sequence[str], chunk: int = 32) -> Tensor:
        texts, out = paired(images, prompts, "PickScore"), [torch.empty(0, dtype=torch.float64)]
        for i in range(0, len(texts), chunk):
            words = tokenizer(texts[i : i + chunk], padding=True, truncation=True, max_length=longest, return_tensors="pt").to(device)
            found = net(pixel_values=see(images[i : i + chunk]).to(device), **words)  # whose embeddings have unit length
            cosines = (wide(found.image_embeds) * wide(found.text_embeds)).sum(1)
            out.append((wide(net.logit_scale).exp() * cosines).cpu())
        return torch.cat(out)

    own = beside(folder, SETTINGS[0]) if given else []
    own += beside(reads, *SETTINGS[1:], *WORDS) if given or processor else []
    return Named(told("PickScore" if given else f"PickScore {PICKSCORE}", given, own), scores)
