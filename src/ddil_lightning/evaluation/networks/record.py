"""What a suite looks through, each named or given, and how what is named is loaded."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddil_lightning.evaluation.networks.kinds import Absent, Distance, Features, Scorer, said
from ddil_lightning.evaluation.networks.table import NETWORKS
from ddil_lightning.messages import nearest

MEMBERS = ("features", "clip", "distance", "text", "embed", "hps", "pickscore", "image_reward")
ALWAYS = MEMBERS[:5]
"""Those of which a protocol says that there is none; of any other it is silent, and so are the protocols of rows from before it."""


class Spec(NamedTuple):
    """A network as a config names it: one of NETWORKS, `path` to its weights (None: caches or download), and options of its loader."""

    name: str
    path: str | None = None
    options: Mapping[str, Any] = {}

    @classmethod
    def read(cls, given: str | Mapping[str, Any] | Spec) -> Spec:
        """Of `NAME`, `NAME:PATH`, or a table `{name: NAME, path: PATH, OPTION: ...}`. Raises ValueError, in a line, for anything else."""
        if isinstance(given, Spec):
            return given
        table = dict(given) if isinstance(given, Mapping) else dict(zip(("name", "path"), given.split(":", 1), strict=False))
        name, path = table.pop("name", None), table.pop("path", None)
        if name not in NETWORKS:
            near = nearest(str(name), list(NETWORKS))
            hint = f"did you mean {near}? " if near else ""
            raise ValueError(f"no network {name!r}: {hint}choose {', '.join(NETWORKS)}, pass a callable, or None to skip its metrics")
        if not (path is None or (isinstance(path, str) and path)):
            raise ValueError(f"network {name}: path is {path!r}; give {NETWORKS[name].file}, as {name}:PATH")
        known = list(inspect.signature(NETWORKS[name].make).parameters.values())[2:]
        options = [p.name for p in known]
        for key, value in table.items():
            if key not in options or isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError(f"network {name}: no option {key}: {value!r}; it has {', '.join(['path', *options])}, each a text")
        return cls(name, path, {key: str(value) for key, value in table.items()})

    @property
    def about(self) -> str:
        """What a protocol calls it before it is loaded."""
        return ", ".join([NETWORKS[self.name].about, *filter(None, [self.path]), *(f"{k} {v!r}" for k, v in self.options.items())])


Name = str | Mapping[str, Any] | Spec
"""What `Spec.read` reads."""


@dataclass(frozen=True)
class Networks:
    """What a suite looks through: a callable, the name of one (`Spec`; `load` makes it), or None, which leaves its metrics None.

    `features`: of images. `clip`: cosines of images and prompts, or instead of it `text`: prompts to [B, D], compared with `features`.
    `distance`: of two images. `embed`: embeddings of images by another network, for CMMD and for diversity in features. `hps`, `pickscore`,
    `image_reward`: what people would prefer, of images and prompts. `strict`: one that cannot be had is refused, where its metrics are
    else left out. Raises ValueError for `text` without `features`, for an unknown name, and for a network of another kind.
    """

    features: Features | Name | None = None
    clip: Scorer | Name | None = None
    distance: Distance | Name | None = None
    text: Callable[[Sequence[str]], Tensor] | None = None
    embed: Features | Name | None = None
    hps: Scorer | Name | None = None
    pickscore: Scorer | Name | None = None
    image_reward: Scorer | Name | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.text is not None and self.features is None:
            raise ValueError("Networks: `text` is compared with `features`, which is None; give both, or `clip`")
        self.named  # noqa: B018  # raises for a name that says nothing

    @property
    def named(self) -> dict[str, Spec]:
        """Those that are named and not made yet, by member. Raises ValueError for an unknown name and for a network of another kind."""
        found = {m: Spec.read(getattr(self, m)) for m in MEMBERS if isinstance(getattr(self, m), (str, Mapping, Spec))}
        for member, spec in found.items():
            if member not in NETWORKS[spec.name].members:
                fits = [name for name, entry in NETWORKS.items() if member in entry.members]
                raise ValueError(f"{spec.name} is no network for {member}: choose {', '.join(fits) or 'a callable'}")
        return found

    def load(self, device: str | torch.device = "cpu", lacking: Callable[[str, Spec, Absent], None] | None = None) -> Networks:
        """The same with a network in the place of every name, on `device`.

        `lacking(member, spec, why)` hears of one that cannot be had, whose member is None then; without it Absent is raised. Raises
        ValueError as `named` does, and for a file or an option that does not fit.
        """
        made: dict[str, Any] = {}
        for spec in self.named.values():  # first, for some networks take a minute to load
            if spec.path is not None and not Path(spec.path).expanduser().exists():
                raise ValueError(f"network {spec.name}: {spec.path} is not there: give {NETWORKS[spec.name].file}")
        for member, spec in self.named.items():
            try:
                made[member] = NETWORKS[spec.name].make(spec.path, device, **spec.options)
            except Absent as why:
                if lacking is None:
                    raise
                lacking(member, spec, why)
                made[member] = None
        return replace(self, **made)

    def about(self) -> dict[str, str | None]:
        """What each of the networks is, in words, as a protocol names it."""
        named = self.named
        found = {m: named[m].about if m in named else said(getattr(self, m)) for m in MEMBERS}
        return {m: text for m, text in found.items() if m in ALWAYS or text is not None}


PAPER = Networks("inception", "open_clip", "lpips")
"""The networks that the paper's tables were measured with."""


def read_networks(words: Sequence[str], base: Networks = PAPER) -> Networks:
    """`base` with what `words` say, each `[MEMBER=]NAME[:PATH]`, or `MEMBER=none` for none. Raises ValueError, in a line, for another word.

    Without MEMBER a network is what it is first of all: `hps:FILE` is `hps=hps:FILE`, `dinov2` is `embed=dinov2`. In the place of
    NAME:PATH there can be a table in YAML's braces, `clip={name: open_clip, prefix: A photo depicts}`.
    """
    found: dict[str, Any] = {}
    for word in words:
        given = re.fullmatch(r"(\w+)=(.*)", word, re.DOTALL)
        if given and (given[1] not in MEMBERS or given[1] == "text"):
            raise ValueError(f"{word}: networks are for {', '.join(m for m in MEMBERS if m != 'text')}, not {given[1]}")
        spec = None if given and given[2] == "none" else Spec.read(_table(given[2] if given else word))
        member = given[1] if given else NETWORKS[spec.name].members[0]  # type: ignore[union-attr]
        if member in found:
            raise ValueError(f"{word}: {member} is named twice")
        found[member] = spec
    return replace(base, **found)


def _table(text: str) -> str | Mapping[str, Any]:
    """A text as it is, or the table that it writes in braces. Raises ValueError, in a line, for braces that hold no table."""
    if not text.startswith("{"):
        return text
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text} is no table: write {{name: NAME, path: PATH, OPTION: VALUE}}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{text} is no table: write {{name: NAME, path: PATH, OPTION: VALUE}}")
    return found
