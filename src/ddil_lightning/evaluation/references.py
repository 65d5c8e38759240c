"""References of a protocol: statistics of real images, computed once, kept in the user's cache, and written to files and read from them.

What is kept are the rows of numbers of all images in a space (features, embeddings, crops' features, tones), under a key of the images'
bytes, the network, its resizing, the size and the crops. A file of statistics holds the rows of all spaces of a suite and what they were
made with; the .npz of clean-fid and pytorch-fid hold mean and covariance alone, which a Fréchet distance needs and nothing else has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddil_lightning.data.raw import digest
from ddil_lightning.evaluation.galleries import Gallery
from ddil_lightning.evaluation.given import SPACES, Given, Reference
from ddil_lightning.evaluation.networks import Named, said
from ddil_lightning.evaluation.protocols import STATISTICS
from ddil_lightning.files import cache_folder, replacing
from ddil_lightning.processes import Processes
from ddil_lightning.texts import from_json, reason

VERSION = 1
"""Of the numbers and their files: another one when a space is computed in another way."""
ABOUT = "ddil_reference"
"""Where a file of statistics says what it was made of and with."""
Moments = tuple[Tensor, Tensor]
log = logging.getLogger(__name__)


def made_with(given: Given, space: str) -> dict[str, Any]:
    """What rows of a space depend on besides the images: network, how it resizes, size, crops."""
    networks, view = given.networks, given.view
    net = {"features": networks.features, "patches": networks.features, "embeddings": networks.embed}.get(space)
    about = {"network": said(net), "resizing": getattr(net, "resizing", None)}
    if space == "patches":
        return {**about, "crops": view.crops and view.crops.about}
    return {**about, "size": None if space == "embeddings" and given.whole else view.size}


def gathered(given: Given, gallery: Gallery, about: str) -> Reference:
    """The pictures as a reference, in all spaces that a suite has; of networks that have a name the rows are kept for the next time.

    Raises ValueError for a picture that cannot be read, unless the gallery leaves such out.
    """
    spaces = [space for space in SPACES if space in given.has()]
    if not spaces:
        return Reference()
    content, copies = gallery.digest()
    if copies:
        log.warning(f"{copies} of {len(gallery)} real images are copies of others, byte for byte: each counts")
    files = {space: _file(given, space, content) for space in spaces}
    found_of = {space: found for space, file in files.items() if file and (found := _kept(file, given, space))}
    kept = {space: found for space, found in found_of.items() if gallery.skip or not found[1]}
    rows = {space: found[0] for space, found in kept.items()}
    unreadable = next((found[1] for found in kept.values()), 0)
    apart = {"patches": lambda: gallery.crops(given.view.crops)}  # type: ignore[arg-type]
    apart |= {"embeddings": gallery.whole} if given.whole else {}
    missing = [space for space in spaces if space not in rows]
    for part, batches in (
        ([space for space in missing if space not in apart], lambda: gallery.squares(given.view.size or _own(gallery))),
        *(([space], apart[space]) for space in missing if space in apart),
    ):
        if part:
            fresh = given.rows_of(batches(), part)
            unreadable = len(gallery.unreadable)
            rows |= fresh
            for space in part:
                _keep(files[space], fresh[space], made_with(given, space), unreadable)
    return Reference({space: rows[space] for space in spaces}, about, digest=content, unreadable=unreadable)


def recalled(
    given: Given,
    spaces: Sequence[str],
    content: str | None,
    draw: Callable[[Sequence[str]], dict[str, Tensor]],
    processes: Processes,
) -> dict[str, Tensor]:
    """Rows [N, D] by space of images that a sampler draws: those that are kept, and of all other `spaces` what `draw` makes of them.

    `content`: a digest of all that decides on the images, None where nobody knows it and nothing is kept. `draw` is for all processes.
    """
    files = {space: _file(given, space, content) if content else None for space in spaces}
    kept = {space: file for space, file in files.items() if file}
    rows = processes.by_first(lambda: {space: found[0] for space, file in kept.items() if (found := _kept(file, given, space))})
    missing = [space for space in spaces if space not in rows]
    fresh = draw(missing) if missing else {}
    for space in missing if processes.first else ():
        _keep(files[space], fresh[space], made_with(given, space), 0)
    return {space: (rows | fresh)[space] for space in spaces}


def check_name(path: Path) -> None:
    """Raises ValueError for a name that no file of statistics has."""
    if path.suffix not in STATISTICS:
        raise ValueError(f"{path}: statistics are written as .safetensors (all that a reference has) or .npz (mu and sigma)")


def save(path: Path, reference: Reference, given: Given) -> None:
    """Write a reference for another time: .safetensors with the rows of all its spaces, or .npz with mean and covariance of the features.

    Raises ValueError for another ending, and for a reference without what is to be written.
    """
    check_name(path)
    said_of: dict[str, Any] = {"version": VERSION, "about": reference.about, "images": reference.images, "digest": reference.digest}
    said_of |= {
        "unreadable": reference.unreadable,
        "spaces": {space: made_with(given, space) for space in SPACES if reference.knows(space) and not reference.unverified},
    }
    if path.suffix == ".npz":
        import numpy as np

        if not reference.knows("features"):
            raise ValueError(f"{path}: there are no features whose mean and covariance it could hold: give references and a network")
        mean, covariance = reference.moments("features")
        with replacing(path) as part, open(part, "wb") as file:
            np.savez(file, mu=mean.numpy(), sigma=covariance.numpy(), ddil_reference=np.array(json.dumps(said_of)))
        return
    from safetensors.torch import save_file

    if not reference.rows:
        raise ValueError(f"{path}: there are no rows that it could hold, only mean and covariance: write them as .npz")
    with replacing(path) as part:
        save_file({space: rows.contiguous() for space, rows in reference.rows.items()}, part, {ABOUT: json.dumps(said_of)})


def load(path: Path, given: Given) -> Reference:
    """The reference that a file of statistics holds, in the spaces that a suite has.

    Raises ValueError for a file that is none, is damaged, or was made with another network, size, resizing or other crops than the suite
    has, as far as it says so, and FileNotFoundError. Of what does not say so the width alone is checked, and it is `unverified`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of statistics; make one by ddil-test --save_reference {path}")
    found = _read_npz(path) if path.suffix == ".npz" else _read(path)
    known = [*found.rows, *found.gaussians]
    spaces = [space for space in known if space in given.has()]
    for space in spaces:
        _check_made(path, space, found.spaces.get(space), made_with(given, space))
        _check_width(path, space, found, given)
    rows = {space: rows for space, rows in found.rows.items() if space in spaces}
    gaussians = {space: pair for space, pair in found.gaussians.items() if space in spaces}
    about = found.about.get("about") or path.name
    digest_of = found.about.get("digest") or digest([x.numpy().tobytes() for pair in gaussians.values() for x in pair])
    unverified = any(space not in found.spaces for space in spaces)
    return Reference(rows, about, gaussians, found.about.get("images"), digest_of, found.about.get("unreadable", 0), unverified)


@dataclass(frozen=True)
class Found:
    """What a file of statistics holds."""

    about: Mapping[str, Any]
    rows: Mapping[str, Tensor]
    gaussians: Mapping[str, Moments]

    @property
    def spaces(self) -> Mapping[str, Any]:
        """What the rows of each space were made with, as far as the file says so."""
        return self.about.get("spaces", {})


def _read(path: Path) -> Found:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = from_json((file.metadata() or {}).get(ABOUT, "null"))
            rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of statistics: {reason(error)}") from error
    if not isinstance(about, dict) or about.get("version") != VERSION or not set(rows) <= set(SPACES):
        raise ValueError(f"{path} holds no statistics of this version: make them anew by ddil-test --save_reference {path}")
    return Found(about, rows, {})


def _read_npz(path: Path) -> Found:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in ("mu", "sigma"))
            about = from_json(str(file[ABOUT])) if ABOUT in file.files else {}
    except KeyError as error:
        raise ValueError(f"{path}: it has no `mu` and `sigma`, as clean-fid and pytorch-fid write them ({reason(error)})") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {reason(error)}") from error
    d = mean.numel()
    if mean.ndim != 1 or covariance.shape != (d, d) or not (mean.isfinite().all() and covariance.isfinite().all()):
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}"
        raise ValueError(f"{path}: {shapes}; they must be finite, [D] and [D, D]")
    if not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * float(covariance.abs().max())):
        raise ValueError(f"{path}: sigma is not symmetric, so it is no covariance")
    return Found(about, {}, {"features": (mean, covariance)})


def _check_made(path: Path, space: str, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> None:
    """Raises ValueError where a file says that its rows were made with something else."""
    other = [key for key in ours if theirs is not None and theirs.get(key) != ours[key]]
    if theirs is not None and other:
        what = ", ".join(f"{key} {theirs.get(key)} where this protocol has {ours[key]}" for key in other)
        raise ValueError(f"{path}: its {space} were made with {what}: they cannot be compared; make statistics with the protocol's own")


def _check_width(path: Path, space: str, found: Found, given: Given) -> None:
    """Raises ValueError for statistics of another number of features than the network makes."""
    theirs = found.rows[space].shape[1] if space in found.rows else len(found.gaussians[space][0])
    side = given.view.size or 64
    if space == "patches" and given.view.crops is not None:
        side = given.view.crops.at or given.view.crops.side
    ours = given.rows(space, torch.zeros(1, 3, side, side)).shape[1]
    if theirs != ours:
        raise ValueError(f"{path}: {space} of {theirs} numbers, and this protocol's network makes {ours}: they are of another network")


def _own(gallery: Gallery) -> int:
    raise ValueError(f"{len(gallery)} real images, and the protocol has no size to which they and generated ones are resized: give one")


def _file(given: Given, space: str, content: str) -> Path | None:
    """Where the rows of a space are kept; None for a network that nobody can name for certain, as any callable."""
    net = {"features": given.networks.features, "patches": given.networks.features, "embeddings": given.networks.embed}.get(space)
    if net is not None and not isinstance(net, Named):
        return None
    key = digest([VERSION, content, space, json.dumps(made_with(given, space), sort_keys=True)])
    return cache_folder() / "references" / f"{space}-{key[:32]}.safetensors"


def _kept(file: Path, given: Given, space: str) -> tuple[Tensor, int] | None:
    """Rows from the cache, and how many pictures they leave out; None where there are none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as found:
            about, rows = from_json(found.metadata()[ABOUT]), found.get_tensor("rows")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None  # not there, or damaged: it is made again
    return (rows, about["unreadable"]) if about["made_with"] == made_with(given, space) else None


def _keep(file: Path | None, rows: Tensor, made: Mapping[str, Any], unreadable: int) -> None:
    """Put rows into the cache; where that cannot be written, go on without."""
    from safetensors.torch import save_file

    if file is None:
        return
    try:
        with replacing(file) as part:
            save_file({"rows": rows.contiguous()}, part, {ABOUT: json.dumps({"made_with": made, "unreadable": unreadable})})
    except OSError as error:
        log.warning(f"statistics of the reference's images are not kept for the next time: {file.parent}: {reason(error)}")
