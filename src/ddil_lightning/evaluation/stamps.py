"""Stamps: what a number must be quoted with as a short digest, and rows that must not be compared because theirs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ddil_lightning.backbones.sampling import to_uint8
from ddil_lightning.evaluation.networks.kinds import UNVERIFIED
from ddil_lightning.texts import by, json_digest

LENGTH = 12
WORDS = ("stamp", "name", "changed", "prompts", "batch", "metrics")
"""What a protocol says that changes no number: names, places, and how many images are drawn at a time. Of prompts and references their
contents count (`digests`), wherever they lie."""


def short(texts: Sequence[str]) -> str:
    """A short digest of texts in their order."""
    return json_digest(list(texts))[:LENGTH]


def content(images: Tensor) -> str:
    """The digest of images [N, 3, H, W] as 8-bit files hold them, whatever their order."""
    each = sorted(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in to_uint8(images))
    return hashlib.sha256("".join(each).encode()).hexdigest()


def stamp(protocol: Mapping[str, Any]) -> str:
    """The digest of all in a protocol that a number depends on: rows with equal ones can be compared."""
    told = {key: value for key, value in protocol.items() if key not in WORDS}
    if isinstance(protocol.get("reference"), Mapping):
        digests = protocol.get("digests", {})
        named = [key for key, digest in (("source", "reference"), ("teacher", "teacher")) if digests.get(digest)]
        told["reference"] = {key: value for key, value in protocol["reference"].items() if key not in named}
    return json_digest(told)[:LENGTH]


def stamped(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A protocol with its stamp."""
    return {**protocol, "stamp": stamp(protocol)}


def covers(row: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a row has all that the protocol `asked` asks for: their stamps are equal, and it was asked for as much or more.

    Older rows do not say what they were asked for: they have the numbers that they have.
    """
    if row["protocol"].get("stamp") != asked.get("stamp"):
        return False
    numbers = [key for key, value in row["metrics"].items() if value is not None]
    had, wanted = row["protocol"].get("metrics", numbers), asked.get("metrics")
    return had is None or (wanted is not None and set(wanted) <= set(had))


def comparable(*rows: Mapping[str, Any]) -> bool:
    """Whether rows of results were measured by one protocol. Rows of older runs, which have none, are taken to be."""
    return len(protocols(rows)) <= 1


def protocols(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The different protocols that rows were measured by, told apart by their stamps, or whole where they have none as of older runs.

    Rows without a protocol, of runs still older, are passed over.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for protocol in (row.get("protocol") for row in rows):
        if isinstance(protocol, Mapping):
            found.setdefault(_key(protocol), protocol)
    return list(found.values())


def called(protocol: Mapping[str, Any]) -> str:
    """A protocol as a line names it: coco2017_5k (n = 100) 1a2b3c4d5e6f."""
    changed = protocol.get("changed") or {}
    parts = [str(protocol.get("name") or "unnamed"), f"({', '.join(f'{k} = {v}' for k, v in changed.items())})" if changed else ""]
    return " ".join(filter(None, [*parts, protocol.get("stamp", "")]))


def note(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for a table whose rows must not all be compared, naming their protocols; empty where they can be."""
    found = protocols(rows)
    names = ", ".join(map(called, found))
    return f"The rows were measured by {len(found)} protocols: compare only rows of the same. They are {names}." if len(found) > 1 else ""


def remembered(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which rows of a table were kept of an earlier measurement (`known`) and since when, in a line; empty where none was."""
    kept = {str(row.get("name")): row["generation"]["kept"] for row in rows if (row.get("generation") or {}).get("kept")}
    if not kept:
        return ""
    since = " to ".join(dict.fromkeys((min(kept.values()), max(kept.values()))))
    return f"Measured {since} by the same weights, prompts and metrics: {', '.join(kept)} (test.fresh=true measures them now)."


def sized(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for a table of images of several sizes, naming the numbers that see them so (`presence.as_made`); empty where none does."""
    made: dict[str, list[str]] = {}
    keys: dict[str, None] = {}
    for row in rows:
        said, found = row.get("generation") or {}, row.get("metrics") or {}
        keys |= dict.fromkeys(key for key in said.get("as_made") or () if found.get(key) is not None)
        if said.get("size"):
            made.setdefault(by(said["size"]), []).append(str(row.get("name")))
    if len(made) < 2 or not keys:
        return ""
    sizes = "; ".join(f"{size}: {', '.join(names)}" for size, names in made.items())
    return f"Images as large as they are made are seen by {', '.join(keys)}: compare these only among rows of one size. {sizes}."


def by_name(protocol: Mapping[str, Any]) -> list[str]:
    """The networks of a protocol that are known by their names alone (`kinds.UNVERIFIED`): its stamp may be that of others, too."""
    return [words for words in (protocol.get("networks") or {}).values() if words and UNVERIFIED in words]


def unverified(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for a table of several rows by networks that are known by their names alone; empty where none is."""
    names = ", ".join(dict.fromkeys(words for protocol in protocols(rows) for words in by_name(protocol)))
    return f"Known by name alone, so that it may not be the same in all rows: {names}." if names and len(rows) > 1 else ""


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines below a table of rows."""
    return [line for line in (note(rows), unverified(rows), sized(rows), remembered(rows)) if line]


def _key(protocol: Mapping[str, Any]) -> str:
    """The stamp; without one all that the protocol says, but for how many images were drawn at a time."""
    told = {key: value for key, value in protocol.items() if key != "batch"}
    return str(protocol.get("stamp") or json.dumps(told, sort_keys=True, default=str))
