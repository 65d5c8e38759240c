"""The networks that a suite can name, an entry each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ddil_lightning.evaluation.networks import clip, dino, imagereward, inception, lpips, preference


class Entry(NamedTuple):
    """A network by name. `about`: what a protocol calls it. `members`: those of `Networks` that it can be, the first if nothing is said.

    `make(path, device, **options)` loads it, from `path` or, where that is None, from the caches or a download; every keyword of `make`
    is an option, a text. `file`: what `path` is to be, and where that is from.
    """

    about: str
    members: tuple[str, ...]
    make: Callable[..., Any]
    file: str


LOOKS = ("embed", "features")
_INCEPTION = f"{inception.URL.rpartition('/')[2]} of github.com/toshas/torch-fidelity, releases"
_OPEN_CLIP = "open_clip_model.safetensors of huggingface.co/laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
_L14 = "open_clip_model.safetensors of huggingface.co/timm/vit_large_patch14_clip_336.openai"


NETWORKS = {
    "inception": Entry(inception.INCEPTION, LOOKS[::-1], inception.inception_features, _INCEPTION),
    "inception_clean_fid": Entry(inception.INCEPTION, LOOKS[::-1], inception.clean_fid_features, _INCEPTION),
    "open_clip": Entry("OpenCLIP ViT-g-14 laion2b_s12b_b42k", ("clip",), clip.clip_scores, _OPEN_CLIP),
    "clip_l14_336": Entry("OpenCLIP ViT-L-14-336-quickgelu openai", LOOKS, clip.clip_features, _L14),
    "lpips": Entry("LPIPS 0.1 alex", ("distance",), lpips.lpips_named, "alexnet-owt-7be5be79.pth of download.pytorch.org/models"),
    "dinov2": Entry(f"DINOv2 {dino.DINOV2}", LOOKS, dino.dinov2_features, f"the folder of huggingface.co/{dino.DINOV2}"),
    "dino": Entry(f"DINO {dino.DINO}", LOOKS, dino.dino_features, f"the folder of huggingface.co/{dino.DINO}"),
    "hps": Entry("HPS v2.1, ViT-H-14", ("hps",), preference.hps_scores, f"{preference.HPS['2.1']} of huggingface.co/xswu/HPSv2"),
    "pickscore": Entry(
        f"PickScore {preference.PICKSCORE}",
        ("pickscore",),
        preference.pick_scores,
        f"the folder of huggingface.co/{preference.PICKSCORE}, with the tokenizer and preprocessor_config.json of {preference.PROCESSOR}",
    ),
    "image_reward": Entry(
        "ImageReward 1.0",
        ("image_reward",),
        imagereward.image_reward,
        f"ImageReward.pt and med_config.json of huggingface.co/{imagereward.REPOSITORY}, with vocab.txt of {imagereward.WORDS}",
    ),
}
"""The names that a config, a protocol and `ddil-test --network` know."""
