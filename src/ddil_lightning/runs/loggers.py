"""Where a run's curves go, metrics.csv, and what of a config may be told to others."""

from __future__ import annotations

import argparse
import csv
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from ddil_lightning.evaluation.table import CLOCK
from ddil_lightning.files import replacing


class MetricsFile(Logger):
    """metrics.csv: one row per logged update, the union of all columns, complete after every row and after a resume.

    Its one clock are student updates: a row of somebody who counts otherwise (Lightning counts batches) is one of the update that `clock`
    says, or of the last row's. Lightning's CSVLogger deletes the file of the run it goes on with. `source`, `upto`: the run folder that is
    resumed and its clock; rows of later updates are left out, because these updates are made again.
    """

    name, version = "metrics", ""

    def __init__(self, folder: Path, source: Path | None = None, upto: int = 0, clock: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._fields: list[str] = []
        self._last: float = upto
        self._clock = clock or (lambda: self._last)
        self._resumed = None if source is None else (source / "metrics.csv", upto)

    @property
    def save_dir(self) -> str:
        """The run folder, where Lightning's other parts write too."""
        return str(self.path.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row; `step` is Lightning's and is not asked."""
        row = {key: float(value) if hasattr(value, "item") else value for key, value in metrics.items()}
        self._last = row.setdefault(CLOCK, self._clock())
        if set(row) - set(self._fields) or not self.path.is_file():
            rows = self._kept()
            fields = {name for r in (*rows, row) for name in r}
            self._fields = sorted(fields, key=lambda name: (name != CLOCK, name))
            self._write([*rows, row])
            return
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._fields).writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing, because config.yaml holds all options."""

    def _kept(self) -> list[dict[str, Any]]:
        (path, upto), self._resumed = self._resumed or (self.path, None), None
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            whole = (row for row in csv.DictReader(file) if None not in row.values())  # a kill may have cut the last row
            # `step` was a second clock in the files of older versions, and the only one of some rows.
            rows = [{key: value for key, value in row.items() if key and value and key != "step"} for row in whole]
        last = "0"
        for row in rows:
            last = row.setdefault(CLOCK, last)
        return [row for row in rows if upto is None or float(row[CLOCK]) <= upto]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with replacing(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._fields)
            writer.writeheader()
            writer.writerows(rows)


MASK = "(masked)"
SECRET = re.compile(
    r"password|passwd|passphrase|apikey|(^|_)((api|access|secret|private|auth|account|signing|encryption)_?keys?"
    r"|token|secrets?|pwd|passcode|credentials?|authorization|authentication|bearer|cookies?)\d*($|_)"
)
IN_ADDRESS = re.compile(r"(://[^/@\s:]*:)[^/\s]+@")
IN_QUERY = re.compile(r"([?&])([^?&=\s]+)=[^&#\s]+")


def masked(config: Any) -> Any:
    """A nested config with MASK for everything under keys that sound like secrets (api_key, token, ...) and for passwords in addresses.

    Of a secret that is a table or a list, every text and number in it. Nothing, an empty text, true and false tell no secret.
    """
    return _masked(config, False)


def _masked(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(inner, secret or _is_secret(str(key))) for key, inner in value.items()}
    if isinstance(value, argparse.Namespace):
        return type(value)(**{key: _masked(inner, secret or _is_secret(key)) for key, inner in vars(value).items()})
    if isinstance(value, list | tuple):
        return [_masked(inner, secret) for inner in value]
    if secret:
        return value if value is None or isinstance(value, bool) or value == "" else MASK
    if not isinstance(value, str):
        return value
    asked = IN_QUERY.sub(lambda found: f"{found[1]}{found[2]}={MASK}" if _is_secret(found[2]) else found[0], value)
    return IN_ADDRESS.sub(rf"\1{MASK}@", asked)


def _is_secret(key: str) -> bool:
    """Whether a key sounds like one, however its words are joined: apiKey, X-Api-Key, api_key."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+", "_", key)
    return SECRET.search(words.lower()) is not None


def refuse_masked(value: Any, where: str = "") -> None:
    """Raises ValueError, naming the key, for a value that an earlier run has masked in its config.yaml: it must be given anew."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_masked(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            refuse_masked(inner, f"{where}[{i}]")
    elif isinstance(value, str) and MASK in value:
        raise ValueError(f"{where} is masked, as in every config.yaml that a run writes: give it again, or by the environment")


LATER = "--wandb offline and `wandb sync` later"


def check_wandb(option: str = "--wandb online", otherwise: str = LATER, limit: float = 10.0) -> None:
    """Raises ValueError where W&B, which `option` asks for, would ask for a key, or does not answer within `limit` seconds."""
    import urllib.error
    import urllib.request

    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    _check_key(base, option, otherwise)
    try:
        urllib.request.urlopen(base, timeout=limit).close()
    except urllib.error.HTTPError:
        pass  # an answer
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{option}: {base} does not answer ({reason}): use {otherwise}") from error


def _check_key(base: str, option: str = "--wandb online", otherwise: str = LATER) -> None:
    import netrc
    from urllib.parse import urlparse

    host = urlparse(base).hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if not known and not os.environ.get("WANDB_API_KEY"):
        raise ValueError(f"{option} needs a key: run `wandb login` or set WANDB_API_KEY, or use {otherwise}")
