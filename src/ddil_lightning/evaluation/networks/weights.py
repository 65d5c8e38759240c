"""Where a network's weights come from: a file of the user's, the caches of the hub and of torch, or a download that does not hang.

The hub's client tries an unreachable server for half a minute a file, and torch's download has no limit at all. So the caches are looked
into first, without a network, and a server is asked once whether it is there.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor, nn

from ddil_lightning.evaluation.networks.kinds import Absent
from ddil_lightning.servers import no_hub, unreachable

PICKLED = (".pt", ".pth", ".bin", ".ckpt")


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, a connection that says nothing for a minute is given up, also by libraries that set no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def hub_file(repository: str, *names: str) -> Path:
    """The first of `names` that a hub repository has, in the hub's cache, where it is fetched to if needed.

    Raises Absent where it is not there and cannot be fetched.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    known = [path for path in (try_to_load_from_cache(repository, name) for name in names) if isinstance(path, str)]
    if known:
        return Path(known[0])
    why = no_hub()
    for name in names if why is None else ():
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:  # the server went away meanwhile
            raise Absent(f"{repository} cannot be fetched: {' '.join(str(error).split())[:200]}") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # no right to it, no space, a connection that broke: the client has many names for it
            raise Absent(f"{repository} cannot be fetched: {type(error).__name__}, {' '.join(str(error).split())[:200]}") from error
    raise Absent(f"the hub's cache has no {' or '.join(names)} of {repository}, and {why or 'the repository has no such file'}")


def hub_folder(repository: str, *files: str | Sequence[str], spare: Sequence[str] = ()) -> Path:
    """The folder in the hub's cache of a repository with all of `files`, each a name or several of which one will do.

    `spare`: files that are taken where there are any. Raises Absent as `hub_file` does.
    """
    wanted = [(names,) if isinstance(names, str) else names for names in files]
    found = [hub_file(repository, *names) for names in wanted]
    if len({path.parent for path in found}) > 1:  # the repository has moved on since the first was fetched, and now all are of one commit
        found = [hub_file(repository, *names) for names in wanted]
    for name in spare:
        try:
            hub_file(repository, name)
        except Absent:
            continue
    return found[0].parent


def url_file(url: str) -> Path:
    """The file of an address in torch's cache, where it is fetched to if needed. Raises Absent where that fails."""
    from torch import hub

    target, server = (
        Path(hub.get_dir()) / "checkpoints" / os.path.basename(urlsplit(url).path),
        "{0.scheme}://{0.netloc}".format(urlsplit(url)),
    )
    if target.is_file():
        return target
    why = unreachable(server)
    if why:
        raise Absent(f"torch's cache has no {target}, and {why}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with impatient():
            hub.download_url_to_file(url, str(target), progress=False)
    except (OSError, RuntimeError) as error:
        raise Absent(f"{url} cannot be fetched: {error}") from error
    return target


def given_file(path: str, *names: str) -> Path:
    """A user's file, or the first of `names` in his folder. Raises ValueError, in a line, where there is none."""
    place = Path(path).expanduser()
    found = place if place.is_file() else next((place / name for name in names if (place / name).is_file()), None)
    if found is None:
        wanted = " or ".join(names)
        raise ValueError(f"{path} holds no {wanted}" if place.is_dir() else f"{path} is not there: give a file, or a folder with {wanted}")
    return found


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled one by torch's loader of nothing but tensors; of several records, its state_dict.

    Raises ValueError, in a line, for a file that holds something else.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as weights ({' '.join(str(error).split())[:160]})") from error
    except Exception as error:  # pickle.UnpicklingError: something that may run code when it is read
        raise ValueError(f"{path} holds more than tensors, which is not read: give weights alone, best as .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no table of weights by name")
    return {key.removeprefix("module."): value for key, value in found.items()}


def fit(net: nn.Module, weights: Mapping[str, Tensor], path: Path, what: str) -> nn.Module:
    """`net` with `weights`, ready to be asked. Raises ValueError, in a line with the first difference, for weights of another network."""
    own = net.state_dict()
    missing, odd = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    shaped = [key for key in sorted(set(own) & set(weights)) if own[key].shape != weights[key].shape]
    if missing or odd or shaped:
        key = (missing or odd or shaped)[0]
        kind = "lacks" if missing else "has besides" if odd else "has in another shape"
        raise ValueError(f"{path} holds no weights of {what}: it {kind} {key} ({len(missing) + len(odd) + len(shaped)} such differences)")
    net.load_state_dict(dict(weights))
    return net.eval().requires_grad_(False)


def told(about: str, path: Path | None, settings: Sequence[Path] = ()) -> str:
    """A network in words with the file that was given for it, by name and content, so that it is the same wherever the file lies.

    `settings`: small files beside it on which its numbers depend as well (architecture, preprocessing, tokenizer), in one digest of their
    names and contents.
    """
    if path is not None:
        about = f"{about}, {path.name} sha256 {_sha256([path])}"
    return f"{about}, its settings sha256 {_sha256(settings, named=True)}" if settings else about


def beside(folder: Path, *names: str) -> list[Path]:
    """Those of `names` that a folder has, for the settings of `told`."""
    return [folder / name for name in names if (folder / name).is_file()]


def _sha256(files: Sequence[Path], named: bool = False) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() if named else b"")
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:12]
