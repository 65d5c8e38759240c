"""A protocol by its name, and its files in their places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ddil_lightning.errors import Refusal
from ddil_lightning.evaluation.protocols import ALL, OWN, STATISTICS, Protocol, protocol
from ddil_lightning.packaged import find_config, table_of


def named_protocol(name: str) -> Protocol:
    """A packaged protocol, or that of a YAML file. Raises Refusal for neither, ValueError for a file that holds none."""
    file = find_config(name if name.endswith((".yaml", ".yml")) else f"protocols/{name}")
    return protocol(table_of(file), str(file))


def against(made: Protocol, source: str) -> Protocol:
    """The protocol with other real images. Statistics of them have neither split nor column; a data set is read as the protocol says."""
    read: dict[str, Any] = {"image": None, "split": None} if Path(source).suffix in STATISTICS else {}
    return replace(made, references=replace(made.references, source=source, **read))


def placed(made: Protocol, data: str | None, images: str | None, called: tuple[str, str] = ("data", "images")) -> Protocol:
    """The protocol with its files in their places: below the folder `data`, or captions of the file `data` and pictures in `images`.

    Raises Refusal, naming them all, where some are not there; `called`: the names of the two options, for its advice.
    """
    prompts, real = made.prompts, made.references
    below = Path(data) if data is not None and Path(data).is_dir() else None
    if data is not None and below is None:
        prompts = replace(prompts, source=data)
    if below is not None:
        sources = prompts.source if isinstance(prompts.source, list) else [prompts.source]
        found = [str(below / name) for name in sources]
        prompts = replace(prompts, source=found if isinstance(prompts.source, list) else found[0])
        inside: dict[str, Any] = {key: str(below / value) for key in ("images", "only") if (value := getattr(prompts, key)) is not None}
        prompts = replace(prompts, **inside)
        if real.source not in (None, OWN, ALL) and (below / str(real.source)).exists():  # an absolute one stays
            real = replace(real, source=str(below / str(real.source)))
    if images is not None:
        prompts = replace(prompts, images=images)
    there = replace(made, prompts=prompts, references=real)
    _check_there(made, there, called)
    return there


def _check_there(made: Protocol, placed: Protocol, called: tuple[str, str]) -> None:
    """Raises Refusal for a protocol's files that are not there. What looks like a data set of the Hub is left to `datasets`."""
    sources = placed.prompts.source if isinstance(placed.prompts.source, list) else [placed.prompts.source]
    gone = [name for name in sources if Path(name).suffix and not Path(name).exists() and not any(c in name for c in "*?[{")]
    needs_images = placed.references.source in (OWN, ALL) and placed.prompts.images is not None
    gone += [placed.prompts.only] if placed.prompts.only is not None and not Path(placed.prompts.only).is_file() else []
    gone += [str(placed.prompts.images)] if needs_images and not Path(str(placed.prompts.images)).is_dir() else []
    if gone:
        where = f": they are {made.obtain}" if made.obtain else ""
        raise Refusal(
            f"protocol {made.name}: no {', no '.join(gone)}; give {called[0]} DIR that holds what the protocol names, or {called[0]} "
            f"FILE and {called[1]} DIR{where}"
        )
