"""The command ddil-cache, as far as it needs nothing heavy: its command line in full, and caches that are only looked at."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ddil_lightning.commands.arguments import Parser, path
from ddil_lightning.commands.configs import CACHE_SHORT, expand
from ddil_lightning.errors import Refusal

SHORT = ("captions", "size", "image", "caption", "split", "limit", "stream", "workers", "truncate", "on_error")
"""Options of `data` and of its captions that need no more than their name."""


def cache(argv: list[str]) -> int:
    """Encode images and captions once into a folder, which `data.cache` names in training; or look whether one is as it was written."""
    if "--verify" in argv:
        return verify(argv)
    words = in_full(expand(argv, CACHE_SHORT))
    asks = any(word == "-h" or word.partition("=")[0].endswith("help") for word in words)
    if not asks and not any(word.partition("=")[0] == "--out" for word in words):
        raise Refusal("ddil-cache needs --out DIR, the folder to write")
    if not asks and os.environ.get("LOCAL_RANK", "0") == "0":
        print("ddil-cache: loading PyTorch and Lightning ...", flush=True)
    from ddil_lightning.commands import caching

    return caching.cache(words)


def in_full(words: Sequence[str]) -> list[str]:
    """An expanded command line with the options of the data under their whole names. Without a config any method will do: none is made."""
    made = []
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("--")
        first = name.partition(".")[0]
        if key.startswith("--") and first in SHORT:
            where = "data" if first in ("captions", "workers", "truncate", "on_error") else "data.captions.init_args"
            key = f"--{where}.{name}"
        made.append(key + equals + value)
    keys = [word.partition("=")[0] for word in made]
    if "--config" in keys:
        return made
    named = [] if "--data.captions" in keys or not any(key.startswith("--data.captions.") for key in keys) else ["--data.captions=Images"]
    return [*([] if "--model" in keys else ["--model=LCM"]), *named, *made]


def verify(argv: Sequence[str]) -> int:
    """Read every file of a cache and compare its checksum. Raises ValueError, naming it, for one that is not as it was written."""
    parser = Parser("ddil-cache", description=verify.__doc__)
    parser.add_argument("--verify", action="store_true", help="look at every file of a cache that is there")
    parser.add_argument("--out", type=path, required=True, help="its folder")
    args = parser.parse_args(argv)
    from ddil_lightning.data import manifest

    about = manifest.read(args.out)
    manifest.check_files(args.out, about, whole=True)
    size = sum(known["bytes"] for known in about["files"].values())
    print(f"{len(about['files'])} files with {about['rows']} rows, {size / 2**20:.1f} MiB, as they were written: {args.out}")
    return 0
