"""What a cache folder says of itself: by whom and from what it was made, and which files it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddil_lightning.backbones.interface import Backbone
from ddil_lightning.data.base import Captions
from ddil_lightning.data.shards import checksum
from ddil_lightning.files import holds_anything, read_table, write_text
from ddil_lightning.texts import by

NAME, FORMAT = "manifest.json", 1
AGAIN = "make it by the same ddil-cache command"
REMEDY = "make it anew by ddil-cache, or give another data.cache"
SAME = ("format", "encoders", "sizes", "told", "dtype", "rows", "shard_rows")
"""What must not change while a cache is made, besides the data. Text states may be asked for later, or with `truncate`, which each file
of them says; and each file says what is skipped."""


def origin(captions: Captions, backbone: Backbone, truncate: bool, images: bool) -> dict[str, Any]:
    """What a cache depends on. `images`: whether the data have any."""
    told = None if images or backbone.size is None else by(backbone.size)  # SDXL is told it where there is no image to be told of
    return {
        "format": FORMAT,
        "model": backbone.path,
        "revision": revision(backbone.path),
        "encoders": backbone.fingerprints(),
        "sizes": None if captions.sizes is None else [list(size) for size in captions.sizes],
        "told": told,
        "truncate": truncate,
        **data(captions),
    }


def data(captions: Captions) -> dict[str, Any]:
    """What tells the data from others: a stamp and what their copies have of it, and where there is no stamp every caption and picture."""
    stamp = captions.stamp()
    known = (None, captions.content()) if stamp is None else (captions.likeness(), None)
    return {"rows": len(captions), "stamp": stamp, **dict(zip(("alike", "content"), known, strict=True))}


def is_of(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether a cache was made from the data of `mine`, or from others that these are a copy of. One of before that says nothing of its
    data is of none."""
    same = (mine[name] is not None and theirs.get(name) == mine[name] for name in ("stamp", "alike", "content"))
    return theirs["rows"] == mine["rows"] and any(same)


def revision(path: str) -> str | None:
    """The commit of a pipeline of the Hub that lies in the local cache; None for a folder."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).exists() or path.count("/") != 1 or path.startswith(("builtin/", "~", ".")):
        return None
    found = try_to_load_from_cache(path, "model_index.json")
    return Path(found).parent.name if isinstance(found, str) else None


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises ValueError where there is none, or one of another format."""
    found = read_table(folder / NAME)
    if not found:
        raise ValueError(f"{folder} is no cache: it has no {NAME}; make one by ddil-cache, or name a file for data.cache to write")
    if found.get("format") != FORMAT:
        raise ValueError(f"the cache {folder} has the format {found.get('format')}, and this version reads {FORMAT}: {REMEDY}")
    return found


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder, whole or not at all."""
    write_text(folder / NAME, json.dumps(manifest, indent=1) + "\n")


def check_same(folder: Path, mine: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a cache that is to be made or gone on with, {} of a new one. Raises ValueError where the folder holds another."""
    filled = holds_anything(folder)  # before the look for a manifest, with which another process may just begin the folder
    if not (folder / NAME).is_file():
        if filled:
            raise ValueError(f"{folder} holds something else than a cache: give another --out, or an empty folder")
        return {}
    theirs = read(folder)
    different = [name for name in SAME if theirs.get(name) != mine[name]]
    if different:
        name = different[0]
        what = f"{name} {theirs.get(name)}, not {mine[name]}" if name in ("dtype", "rows", "shard_rows") else f"other {name}"
        raise ValueError(f"{folder} holds a cache with {what}: remove it, or give another --out")
    if not is_of(theirs, mine):
        raise ValueError(f"{folder} holds a cache of other captions or pictures: remove it, or give another --out")
    return theirs


def drop_damaged(folder: Path, manifest: Mapping[str, Any]) -> bool:
    """Remove files of another length than they were written with -> whether any file is missing now, so that it is made again."""
    for name, known in manifest["files"].items():
        if (folder / name).is_file() and (folder / name).stat().st_size != known["bytes"]:
            (folder / name).unlink(missing_ok=True)
    return not all((folder / name).is_file() for name in manifest["files"])


def check_files(folder: Path, manifest: Mapping[str, Any], whole: bool = False) -> None:
    """Raises ValueError, naming the file, for one that is gone or has another length; if `whole`, for one with another checksum."""
    if not manifest.get("complete"):
        raise ValueError(f"the cache {folder} is not complete: give the same ddil-cache command again, and it goes on")
    for name, known in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"the cache {folder} is damaged: {name} is missing; copy it anew, or {AGAIN}")
        if file.stat().st_size != known["bytes"] or (whole and checksum(file) != known):
            raise ValueError(f"the cache {folder} is damaged: {name} is not as it was written; remove it, and {AGAIN}")


def check_use(folder: Path, manifest: Mapping[str, Any], captions: Captions | None, backbone: Backbone, truncate: bool, skip: bool) -> None:
    """Raises ValueError for a cache that was made by or from something else, or in a way that a run does not allow."""
    check_files(folder, manifest)
    theirs, mine = manifest["encoders"], backbone.fingerprints()
    for name in sorted({*theirs, *mine}):
        if theirs.get(name) != mine.get(name) and (manifest["text"] or name in ("vae", "encoders")):
            raise ValueError(
                f"the cache {folder} was made by another {name} than that of {backbone.path}, or in another precision: {REMEDY}"
            )
    if manifest["told"] not in (None, backbone.size and by(backbone.size)):
        raise ValueError(f"the cache {folder} was made for images of {manifest['told']}, not of {by(backbone.size or ())}: {REMEDY}")
    if captions is not None:
        sizes = None if captions.sizes is None else [list(size) for size in captions.sizes]
        if manifest["sizes"] != sizes:
            said = [", ".join(by(size) for size in given or []) or "one size" for given in (manifest["sizes"], sizes)]
            raise ValueError(f"the cache {folder} was made of pictures of {said[0]}, and data.captions.size is {said[1]}: {REMEDY}")
        unchanged = manifest["rows"] == len(captions) and manifest["stamp"] is not None and manifest["stamp"] == captions.stamp()
        if not unchanged and not is_of(manifest, data(captions)):
            raise ValueError(f"the cache {folder} was made from other captions or pictures: {REMEDY}, or leave data.captions out")
    if manifest["text"] and manifest["truncate"] and not truncate:
        raise ValueError(f"the cache {folder} was made with data.truncate, and prompts in it may be cut: set data.truncate, or {REMEDY}")
    if manifest["skipped"]["count"] and not skip:
        count = manifest["skipped"]["count"]
        raise ValueError(f"the cache {folder} was made with {count} rows skipped: set data.on_error to skip, or {REMEDY}")
