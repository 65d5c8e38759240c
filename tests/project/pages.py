"""README.md and the pages of docs/ taken apart, and a reader who types what they say."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

from ddil_lightning.commands import main

ROOT = Path(__file__).parents[2]


class Page(NamedTuple):
    """A text of the project: its fenced blocks as (language, code), the rest, and the code within the rest."""

    path: Path
    text: str
    blocks: list[tuple[str, str]]
    prose: str
    inline: list[str]

    @property
    def lines(self) -> list[str]:
        """The lines that a reader types into a shell, whatever they start."""
        return [line for code in self.of("bash") for line in code.splitlines() if line.strip()]

    @property
    def sessions(self) -> list[tuple[str, str]]:
        """(line, what it prints) of every line behind a `$`."""
        return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(self.of("console")), re.M)

    def of(self, language: str) -> list[str]:
        """The blocks of a language."""
        return [code for said, code in self.blocks if said == language]


def read(path: Path) -> Page:
    """A file as a page."""
    text = path.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    inline = [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", prose)]
    return Page(path, text, re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S), prose, inline)


def listed() -> list[Path]:
    """The files that mkdocs.yml lists, in its order; of those outside docs/ only README.md, its front page."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]
    names = re.findall(r": ([\w-]+\.md)", nav)
    return [ROOT / "README.md" if name == "index.md" else ROOT / "docs" / name for name in names if not (ROOT / name).is_file()]


PAGES = {path.name: read(path) for path in listed()}
GUIDES = {name: page for name, page in PAGES.items() if name != "METHODS.md"}
"""All but the formulas, whose code is no program's."""

TEXT = "\n".join(page.text for page in GUIDES.values())
INLINE = [code for page in GUIDES.values() for code in page.inline]
NAMED = re.compile(r"# ([\w.]+\.(?:py|yaml))\n")
FILES = {found[1]: code for page in GUIDES.values() for _, code in page.blocks if (found := NAMED.match(code))}
"""Files that the reader saves: blocks whose first line is their name."""

SNIPPETS = [(page.path.name, code) for page in GUIDES.values() for code in page.of("python") if not NAMED.match(code)]

FIT = "trainer.accelerator=cpu data.batch_size=8 previews.count=1 previews.teacher_steps=[4] checkpoints.every=2"
PRETRAIN = (
    "--images=16 --unet.batch_size=8 --unet.devices=1 --autoencoder.steps=1 --autoencoder.decoder_steps=1 --measurement.prompts=4 "
    "--measurement.guidance=[2.0] --interim.progress=false"
)
HERE = (
    "model.memory.teacher_dtype=float32 data.captions.size=16 data.workers=0 previews.every=0 trainer.devices=1 trainer.strategy=auto "
    "trainer.precision=32-true"
)
SMALL = {
    "ddil-fit": FIT,
    "ddil-test": "--n 16",
    "ddil-probe": "--n 16 --teacher_steps 4",
    "ddil-invert": "--n 1 --tokens 3 --updates 0 --passes 1 --seeds 1 --teacher_steps 2",
    "ddil-pretrain": f"{PRETRAIN} --interim.folder=null --dataset=digits",
    "data.captions=Images": "data.captions.size=16",
    "captions.path=my_images": "size=16",
    "--captions.path": "--size 16",
    "lcm_ddil_sd15.yaml": f"model.pipeline=builtin {HERE}",
    "lcm_lora_sdxl.yaml": f"model.pipeline=builtin model.memory.vae_dtype=float32 {HERE}",
    "lcm_lora_sd3.yaml": f"model.pipeline=sd3 model.memory.vae_dtype=float32 {HERE}",
    "dmd2_lora_flux.yaml": f"model.pipeline=flux model.memory.vae_dtype=float32 model.gan.layers=[block1,block3] {HERE}",
}
"""What is added to a line, by a word of it: the same, in seconds."""


@lru_cache
def recipe(target: str) -> str:
    """The last line that `make TARGET` would start, once all is installed; without the settings of a `make` that runs these tests."""
    clean = {"PATH": os.environ["PATH"]}
    dry = ["make", "--dry-run", "--no-print-directory", "--old-file=.venv/.ready", target]
    done = subprocess.run(dry, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1].removeprefix(".venv/bin/")


def words(line: str) -> list[str]:
    """The command of a line: without comment and variables, and what make starts instead of `make fit`."""
    said = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", said[0]):
        said.pop(0)
    return shlex.split(recipe("fit")) if said == ["make", "fit"] else said


COMMANDS = [(page.path.name, line) for page in GUIDES.values() for line in page.lines if words(line)[0].startswith("ddil-")]


def smaller(said: list[str]) -> list[str]:
    """The words of a command, with those that make it small."""
    more = [word for name, small in SMALL.items() if name in said for word in small.split()]
    if said[0] != "ddil-fit" or "--print_config" in said:
        return said if said[0] == "ddil-fit" else said + more
    if "--wandb" in said or "--tensorboard" in said:
        return [*said, "--print_config"]  # W&B itself takes as long as all others together; tests/commands/ has it
    first = said in (["ddil-fit", "--config", "lcm_ddil.yaml"], shlex.split(recipe("fit")))
    return [*said, *more, "--updates", "5" if "--ckpt_path" in said else "3", f"test.n={16 if first else 0}"]


def call(said: list[str]) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as stop:
        main.run(main.command(said[0].removeprefix("ddil-")), said[0], said[1:])
    return stop.value.code, out.getvalue(), err.getvalue()


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a file."""
    heads = re.findall(r"^#+ (.*)$", read(path).prose, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
