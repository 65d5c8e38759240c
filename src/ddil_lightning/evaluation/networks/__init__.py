"""The networks that metrics look through, by name or given: each is made once, for all metrics, and no metric owns one.

Defaults are the paper's: Inception-v3 for the Fréchet distance, OpenCLIP ViT-g/14 for the CLIP score, LPIPS for diversity. A kind of
network is a file, a network an entry of `table.NETWORKS`; packages and weights are loaded when they are asked for (`weights` says whence).
"""

from ddil_lightning.evaluation.networks.clip import ClipNet, cosine, open_clip_net
from ddil_lightning.evaluation.networks.inception import INCEPTION, LAYERS, clean, inception_features
from ddil_lightning.evaluation.networks.kinds import Absent, Distance, Features, Named, Scorer, Unpackaged, said
from ddil_lightning.evaluation.networks.lpips import MapDistance, lpips_distance
from ddil_lightning.evaluation.networks.record import MEMBERS, PAPER, Networks, Spec, read_networks
from ddil_lightning.evaluation.networks.table import NETWORKS

__all__ = [
    "INCEPTION",
    "LAYERS",
    "MEMBERS",
    "NETWORKS",
    "PAPER",
    "Absent",
    "ClipNet",
    "Distance",
    "Features",
    "MapDistance",
    "Named",
    "Networks",
    "Scorer",
    "Spec",
    "Unpackaged",
    "clean",
    "cosine",
    "inception_features",
    "lpips_distance",
    "open_clip_net",
    "read_networks",
    "said",
]
