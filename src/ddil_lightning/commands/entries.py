"""The entries of a comparison: pipelines of any origin, each with a name, a sampler and a guidance of its own, as words or in YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddil_lightning.backbones.source import Lora, Source
from ddil_lightning.errors import Refusal, one_line
from ddil_lightning.texts import place, read_text

FORM = "[NAME=]PATH[+LORA[*SCALE]][:SAMPLER][@GUIDANCE][#STEPS]"
SAMPLERS = ("lcm", "tcd", "ddim", "ddim-nc", "euler", "dpm")
"""Samplers that an entry can name in the place of its pipeline's own: those of `backbones.samplers`, and DPM-Solver++ 2M."""
REMEDIES = r"(-ts[1-9]\d{0,2}(-tv\d+(\.\d+)?)?(-tc[1-9]\d{0,2})?)?(-es[01]\.\d+)?"
"""What the name of a sampler, but of the last, may end in: `-ts20`, shifted times, behind it `-tv1.0`, the variance of the data, and
`-tc100`, the time up to which nothing is shifted; `-es1.01`, scaled eps (`diffusion.remedies`)."""
OF_SOURCE = ("path", "variant", "config", "vae", "lora", "size")
KEYS = ("name", *OF_SOURCE, "sampler", "eta", "guidance", "steps")
"""What an entry of a YAML file may say."""
LONGEST = 100
SHOWN = re.compile(r"[^\w.+ :=-]+")


def is_sampler(name: Any) -> bool:
    """Whether it is one of SAMPLERS, with one of REMEDIES or without."""
    *remedied, plain = SAMPLERS
    return name == plain or re.fullmatch(f"({'|'.join(remedied)}){REMEDIES}", str(name)) is not None


@dataclass(frozen=True)
class Entry:
    """A pipeline that is compared. `source`: where it is stored, which may be a finished run's folder.

    `sampler`: one of SAMPLERS, None for its own scheduler; `guidance`: guidance_scale, None for what its card recommends; `steps`: None for
    those of all entries; `eta`: of tcd, the strength of its noise, None for what its card says, else 0.3.
    """

    name: str
    source: Source
    sampler: str | None = None
    guidance: float | None = None
    steps: tuple[int, ...] | None = None
    eta: float | None = None

    @property
    def run(self) -> Path | None:
        """The folder of the finished run that it is; None for a pipeline."""
        folder = place(self.source.path)
        is_run = (folder / "config.yaml").is_file() and not (folder / "model_index.json").is_file()
        return folder if is_run else None

    def at(self, steps: int | None = None) -> Source:
        """The pipeline itself; of a run that of the stage that was made for so many steps, else its last."""
        from ddil_lightning.runs.folder import stage_pipelines

        if self.run is None:
            return self.source
        return replace(self.source, path=str(stage_pipelines(self.run).get(steps or 0, self.run / "pipeline")))

    def own_steps(self, about: Mapping[str, Any]) -> list[int]:
        """The step counts that it is made for, by its card and its stages; 32 for a teacher."""
        from ddil_lightning.runs.folder import stage_pipelines

        stages = stage_pipelines(self.run) if self.run else {}
        return sorted({*stages, *about.get("made_for", [4, 2, 1] if "method" in about else [32])}, reverse=True)

    def check(self) -> None:
        """Raises Refusal, naming the entry, for files that are not there, before anything is loaded."""
        from ddil_lightning.backbones.repositories import local_folder, pipeline_folder, single_file

        if self.run and (self.run / "student.safetensors").is_file():
            raise Refusal(f"{self.name}: no pipeline can hold the student of {self.run}: its rows are in summary.json")
        if self.run and not (self.run / "pipeline").is_dir():
            raise Refusal(
                f"{self.name}: {self.run} holds no exported pipeline (pipeline/): give a finished run, or ddil-export a checkpoint"
            )
        try:
            if single_file(self.at().path) is None:
                pipeline_folder(self.at().path)
            for lora in self.source.lora:
                if not place(lora.path).is_file():
                    local_folder(lora.path, "LoRA")
        except ValueError as error:
            raise Refusal(f"{self.name}: {one_line(error)}") from error


def read_entries(words: Sequence[str]) -> list[Entry]:
    """The entries of --compare: words of FORM, and YAML files of a list of them or of tables. Raises Refusal for what is none."""
    entries = [entry for word in words for entry in (_listed(word) if word.endswith((".yaml", ".yml")) else [parsed(word)])]
    if len(entries) < 2:
        alone = entries[0].source.path
        raise Refusal(f"--compare has one pipeline, {alone}: give another beside it, each {FORM}, or test it alone, by --pipeline {alone}")
    seen: dict[str, Entry] = {}
    for entry in entries:
        filed = re.sub(r"\W+", "-", entry.name)  # as their files are named
        if filed in seen:
            both = f"{entry.source.path} and {seen[filed].source.path} are both called {entry.name}"
            raise Refusal(f"--compare: {both}: name them, by NAME={entry.source.path}")
        seen[filed] = entry
    for entry in entries:
        entry.check()
    return entries


def student(word: str) -> Entry:
    """The pipeline of --student, by a word of FORM or a YAML file of a list of one, in one step count if it says any. Raises Refusal."""
    found = _only(word, "--student")
    if found.steps and len(found.steps) > 1:
        raise Refusal(f"--student {word}: a student is asked in one step count: say one after #")
    return found


def teacher(word: str) -> Source:
    """The pipeline of --teacher, by PATH[+LORA[*SCALE]] or a YAML file of a list of one. Raises Refusal for what says more."""
    found = _only(word, "--teacher")
    if (found.sampler, found.guidance, found.steps) != (None, None, None):
        raise Refusal(f"--teacher {word}: it is sampled by --guidance and --teacher_steps: leave sampler, guidance and steps out of it")
    return found.source


def _only(word: str, option: str) -> Entry:
    if not word.endswith((".yaml", ".yml")):
        return parsed(word, option)
    found = list(_listed(word, option))
    if len(found) != 1:
        raise Refusal(f"{option} {word}: it lists {len(found)} pipelines: give a list of one")
    return found[0]


def written(source: Source) -> str:
    """A pipeline and its LoRAs as FORM has them."""
    return "+".join([source.path, *(lora.path + ("" if lora.scale == 1 else f"*{lora.scale:g}") for lora in source.lora)])


def parsed(word: str, option: str = "--compare") -> Entry:
    """The entry of a word of FORM. A path that exists as it stands is taken so. Raises Refusal, of `option`, for what cannot be read."""
    name, text = None, word
    found = re.fullmatch(r"([^/=]+)=(.+)", word, re.S)
    if found and not place(word).exists():
        name, text = found[1], found[2]
    text, steps = _peeled(text, "#")
    text, guidance = _peeled(text, "@")
    text, sampler = _peeled(text, ":")
    path, *loras = [text] if place(text).exists() else text.split("+")
    said: dict[str, Any] = {"path": path, "lora": [_lora(lora, f"{option} {word}") for lora in loras], "sampler": sampler}
    if guidance is not None:
        said["guidance"] = _number(guidance, f"{option} {word}: the guidance after @")
    if steps is not None:
        said["steps"] = [_count(n, f"{option} {word}: the steps after #") for n in steps.split(",")]
    return _entry({**said, **({"name": name} if name else {})}, f"{option} {word}")


def _peeled(text: str, mark: str) -> tuple[str, str | None]:
    """A text without what follows its last `mark`, and that; the whole where there is none, or where it is a path as it stands."""
    head, found, tail = text.rpartition(mark)
    return (text, None) if not found or not head or "/" in tail or place(text).exists() else (head, tail)


def _lora(text: str, where: str) -> dict[str, Any]:
    path, found, scale = text.rpartition("*")
    return {"path": path, "scale": _number(scale, f"{where}: the scale after *")} if found else {"path": text}


def _number(text: Any, what: str, low: float = -100.0, high: float = 1000.0) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = float("nan")
    if not low <= value <= high:
        raise Refusal(f"{what} is {text!r}: give a number, as in {FORM}")
    return value


def _count(text: Any, what: str) -> int:
    if isinstance(text, bool) or not re.fullmatch(r"\d{1,4}", str(text)) or not 1 <= int(text) <= 1000:
        raise Refusal(f"{what} are {text!r}: give whole numbers from 1 to 1000")
    return int(text)


def _listed(file: str, option: str = "--compare") -> Iterator[Entry]:
    """The entries of a YAML file, a list of words of FORM and of tables of KEYS."""
    import yaml

    try:
        found = yaml.safe_load(read_text(file))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refusal(f"{option} {file}: {one_line(error)}") from error
    if not isinstance(found, list) or not found:
        raise Refusal(f"{option} {file}: give a list of pipelines, each as {FORM} or as a table of {', '.join(KEYS)}")
    for i, said in enumerate(found, 1):
        where = f"{option} {file}, entry {i}"
        if isinstance(said, str):
            yield parsed(said, option)
        elif isinstance(said, Mapping):
            yield _entry(said, where)
        else:
            raise Refusal(f"{where} is {said!r}: give {FORM} or a table of {', '.join(KEYS)}")


def _entry(said: Mapping[str, Any], where: str) -> Entry:
    """The entry of a table of KEYS."""
    wrong = [key for key in said if key not in KEYS]
    if wrong or not isinstance(said.get("path"), str):
        raise Refusal(f"{where}: {f'no key {wrong[0]!r}' if wrong else 'no path'}: an entry says path, and may say {', '.join(KEYS)}")
    sampler, guidance, steps, eta = (said.get(key) for key in ("sampler", "guidance", "steps", "eta"))
    if sampler is not None and not is_sampler(sampler):
        known = f"known are {', '.join(SAMPLERS)}, and -ts20 (-ts20-tv1.0-tc100) or -es1.01 behind one but dpm"
        raise Refusal(f"{where}: no sampler {sampler!r}: {known}; without one it is the pipeline's own")
    if guidance is not None:
        guidance = _number(guidance, f"{where}: guidance", 0.0)
    if eta is not None:
        if str(sampler).partition("-")[0] != "tcd":
            raise Refusal(f"{where}: eta is the strength of TCD's noise: say sampler: tcd, or leave eta out")
        eta = _number(eta, f"{where}: eta (TCD's gamma, from 0 to 1)", 0.0, 1.0)
    if steps is not None:
        steps = tuple(_count(n, f"{where}: steps") for n in (steps if isinstance(steps, list) else [steps]))
    loras = said.get("lora") or []
    try:
        loras = [{"path": one} if isinstance(one, str) else one for one in (loras if isinstance(loras, list) else [loras])]
        source = Source.of({key: value for key, value in said.items() if key in OF_SOURCE} | {"lora": loras})
    except (ValueError, TypeError) as error:
        raise Refusal(f"{where}: {one_line(error)}") from error
    source = replace(source, path=str(place(source.path)), lora=tuple(replace(lora, path=str(place(lora.path))) for lora in source.lora))
    name = SHOWN.sub("-", str(said.get("name") or _called(source, sampler, guidance, eta))).strip()
    if not 1 <= len(name) <= LONGEST:
        raise Refusal(f"{where}: a name has 1 to {LONGEST} letters, for files are named by it: say one, by NAME={source.path[:80]}")
    return Entry(name, source, sampler, guidance, steps, eta)


def _called(source: Source, sampler: str | None, guidance: float | None, eta: float | None) -> str:
    """A name for what has none: of the folder or hub id, of the LoRAs, and of what differs from the pipeline's own settings."""
    last = _last(source.path)
    parts = [last, *(f"+{_last(lora.path)}{_scaled(lora)}" for lora in source.lora), f":{sampler}" if sampler else ""]
    return "".join(parts) + (f" eta{eta:g}" if eta is not None else "") + (f" g{guidance:g}" if guidance is not None else "")


def _scaled(lora: Lora) -> str:
    return "" if lora.scale == 1 else f" {lora.scale:g}"


def _last(path: str) -> str:
    """The last part of a path that says something: of runs/sd15/latest and of runs/sd15/latest/pipeline sd15."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    telling = [part for part in parts if part not in ("latest", "pipeline")] or parts or [path]
    return telling[-1].removesuffix(".safetensors")
