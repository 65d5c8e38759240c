"""What a measurement of hours has found so far, so that a call that was stopped, or failed late, goes on from there."""

from __future__ import annotations

import json
import logging
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ddil_lightning.errors import one_line
from ddil_lightning.evaluation.stamps import LENGTH, short
from ddil_lightning.files import replacing, write_text
from ddil_lightning.signals import Stopped

log = logging.getLogger(__name__)

VERSION = "1"
"""Of what is computed for a question: raised where a measurement changes, so that nobody goes on with answers of before."""
NAMED = re.compile(rf"[0-9a-f]{{{LENGTH}}}\.(json|safetensors)")
"""Files of answers: what else lies in the folder is not ours."""


class Findings:
    """Answers, a file each in a folder beside the result `out`, named by a digest of the question: all that the answer depends on.

    Another question finds nothing, and leaves what is there until a result is written. Where the folder cannot be written a line says so,
    and nothing is kept.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_suffix(".parts")
        self._asked: list[Path] = []
        self._keeps = True

    def answer(self, question: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What is kept of a question, in types that JSON has, or what `make` finds, which is kept."""
        file = self._file(question, ".json")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there, or damaged: it is made
            made = make()
        self._keep(lambda: write_text(file, json.dumps(made)))
        return made

    def tensor(self, question: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """The same of a tensor on the CPU."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        file = self._file(question, ".safetensors")
        try:
            return load_file(file)["answer"]
        except (OSError, KeyError, SafetensorError):
            made = make()

        def write() -> None:
            with replacing(file) as part:
                save_file({"answer": made.contiguous()}, part)

        self._keep(write)
        return made

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Inside, a signal that stops the command says that it can go on. At the end, when the result is there, the folder is emptied:
        of what was asked for it and of what earlier calls have left that were never gone on with."""
        try:
            yield
        except KeyboardInterrupt as stop:
            if not any(file.is_file() for file in self._asked):
                raise
            said = f"stopped; what was found stays in {self.folder}, and the same command goes on"
            raise Stopped(getattr(stop, "number", signal.SIGINT), said) from stop
        with suppress(OSError):
            for file in self.folder.iterdir():
                if NAMED.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _file(self, question: Mapping[str, Any], suffix: str) -> Path:
        file = self.folder / f"{short([VERSION, json.dumps(question, sort_keys=True)])}{suffix}"
        self._asked.append(file)
        return file

    def _keep(self, write: Callable[[], None]) -> None:
        try:
            if self._keeps:
                write()
        except OSError as error:
            self._keeps = False
            log.warning(f"what is found is not kept for a call that goes on: {one_line(error)}")
