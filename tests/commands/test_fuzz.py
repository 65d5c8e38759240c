"""Whatever is given to any of the five commands: a result, or one line and code 2. No traceback, no folder left, no wait without end.

The inputs are generated from SEED, hundreds of them in one process: every numeric option of every class and command at values that mean
nothing, configs that are cut and twisted, pipelines, runs and data with damaged files, prompts and paths of all kinds. What is accepted
is carried out.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from ddil_lightning.callbacks import Alerts, Cadence, FlushBuffer, Previews, Progress, ShiftProbe
from ddil_lightning.callbacks.checkpoints import Checkpoints
from ddil_lightning.commands import fit_cli, main
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.errors import Refusal
from ddil_lightning.imitation.prior import Exponential, Gated, Linear
from ddil_lightning.methods import DMD2, LCM, PD
from ddil_lightning.miniature import pretrain
from ddil_lightning.runs.finish import Test as Measured
from ddil_lightning.toy import Toy

SEED, LIMIT = 0, 20  # the seconds that one input may take
HUGE = "100000000000000000000000"
VALUES = ["-1", "0", ".nan", "nan", ".inf", "-.inf", "null", "1e30", HUGE, "1.5", "true", "x", "[]", "{}", "[1, [2]]", '""', "-4"]
COMMANDS = {
    "fit": main.command("fit"),
    "test": main.command("test"),
    "sample": main.command("sample"),
    "export": main.command("export"),
    "pretrain": main.command("pretrain"),
}
TRAINER = """max_epochs min_epochs max_steps min_steps max_time limit_train_batches overfit_batches accumulate_grad_batches
gradient_clip_val log_every_n_steps devices num_nodes val_check_interval check_val_every_n_epoch num_sanity_val_steps fast_dev_run precision
strategy accelerator logger callbacks profiler plugins deterministic benchmark inference_mode use_distributed_sampler detect_anomaly
barebones sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir enable_checkpointing enable_progress_bar""".split()


class Case(NamedTuple):
    """One input: a command, its words, and what is done to the files of the place before."""

    command: str
    words: list[str]
    change: Callable[[], Any] = lambda: None


def parameters(cls: type) -> list[str]:
    """The options of a class and of its bases."""
    found = [inspect.signature(c).parameters.values() for c in cls.__mro__[:-1] if "__init__" in vars(c)]
    known = (p for ps in found for p in ps if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [p.name for p in known if p.name not in ("self", "pipeline", "captions", "schedule", "first", "last", "stages", "prior")]


def fit_options() -> Iterator[list[str]]:  # noqa: C901 (a list of cases)
    """Words that end where a value is missing, for everything that ddil-fit takes numbers or names for."""
    plan = "model.stages=[{steps: 4, updates: 1}, {steps: 2, updates: 1}]"
    for cls, own in ((LCM, []), (DMD2, ["model.guidance=2.0"]), (PD, [plan, "model.teacher_steps=8"])):
        for name in parameters(cls):
            yield [f"model={cls.__name__}", *own, f"model.{name}"]
    for group, cls in (
        ("data", DDILDataModule),
        ("alerts", Alerts),
        ("checkpoints", Checkpoints),
        ("previews", Previews),
        ("progress", Progress),
        ("test", Measured),
    ):
        for name in parameters(cls):
            yield [f"{group}.{name}"]
    for name in ("forward", "student", "teacher", "mix"):
        yield [f"data.prior.{name}"]
    for name in ("n", "seed"):
        yield ["data.captions=Shapes", f"data.captions.{name}"]
    for cls in (ShiftProbe, Cadence, FlushBuffer):
        for name in parameters(cls):
            yield [f"trainer.callbacks+={cls.__name__}", f"trainer.callbacks.{name}"]
    for schedule in (Linear, Exponential, Gated):
        for name in parameters(schedule):
            ends = ["schedule.first={forward: 0.5, student: 0.5}", "schedule.last={forward: 0.5, student: 0.5}"]
            made = [f"trainer.callbacks+={json.dumps({'class_path': 'AnnealPrior', 'init_args': {'schedule': schedule.__name__}})}"]
            yield [*made, *(f"trainer.callbacks.{end}" for end in ends), f"trainer.callbacks.schedule.{name}"]
    for name in parameters(Toy):
        yield [f"model.pipeline={json.dumps({'class_path': 'Toy'})}", f"model.pipeline.{name}"]
    for kind, name in itertools.product(("stages", "parts"), ("steps", "updates", "lr", "warmup", "kind", "parts", "forward")):
        inner = "{%s}" if kind == "stages" else "{steps: 4, parts: [{updates: 1, %s}]}"
        yield ["model=PD", "model.teacher_steps=8", f"model.stages=[{inner % f'{name}: VALUE'}]"]
    for name in TRAINER:
        yield [f"trainer.{name}"]
    for name in ("updates", "seed", "run_dir", "ckpt_path", "checkpoint_every", "wandb", "export_steps", "name"):
        yield [f"--{name}"]


def with_value(words: list[str], value: str) -> list[str]:
    *before, last = words
    return [*before, last.replace("VALUE", value) if "VALUE" in last else f"{last}={value}"]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file that was cut, emptied, doubled, overwritten, or had a few of its bytes changed."""
    kind = rng.randrange(6)
    if kind == 0:
        return data[: rng.randrange(len(data) or 1)]
    if kind == 1:
        return rng.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe", b"\0" * 64, b"<html>404</html>", b"a: &x [*x]", b"[" * 3000])
    if kind == 2:
        return data + data
    at = [rng.randrange(len(data) or 1) for _ in range(8)]
    changed = bytearray(data)
    for k in at if data else []:
        changed[k] = rng.randrange(256)
    return bytes(changed)


def damage(folder: str, names: list[str], rng: random.Random) -> Callable[[], None]:
    name, seed = rng.choice(names), rng.random()

    def change() -> None:
        file = Path(folder, name)
        file.write_bytes(damaged(file.read_bytes(), random.Random(seed)))

    return change


def fit_cases(rng: random.Random) -> Iterator[Case]:
    options = list(fit_options())
    for words in rng.sample(options, len(options)):
        yield Case("fit", ["--config", "tiny.yaml", *with_value(words, rng.choice(VALUES))])
    for text in twisted(Path("tiny.yaml").read_text()):
        write = functools.partial(Path("twisted.yaml").write_bytes, text.encode())
        yield Case("fit", ["--config", "twisted.yaml", "model.pipeline=tiny"], write)
    for words in ODD:
        yield Case("fit", ["--config", "tiny.yaml", *words])


def twisted(text: str) -> Iterator[str]:
    """A config that is cut, that is something else, whose aliases stand for billions of values, and whose values are of other types."""
    yield from (text[:k] for k in range(0, len(text), 40))
    yield from ["", "null", "[]", "3", "a", "{", "&a {data: *a}", "data: &a [*a]", "\0", "\t- a", "!!python/object:os.x {}"]
    steps = itertools.pairwise("abcdefghij")
    yield "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in steps)
    for word, value in itertools.product(("LCM", "student: 0.25", "12", "8"), ("null", "[]", "{}", "x: y", "'")):
        yield text.replace(word, value)
    for group, value in itertools.product(("trainer", "model", "data", "previews", "test", "seed_everything"), ("null", "[]", "3", "x")):
        yield f"{group}: {value}\n"


ODD = [
    ["model=Distillation"], ["data.captions=Captions"], ["trainer.callbacks+=Callback"], ["trainer.callbacks+=OnClock"], ["model=Descent"],
    ["trainer.callbacks+=EarlyStopping", "trainer.callbacks.monitor=nothing"], ["trainer.callbacks+=ModelCheckpoint"],
    ["--run_dir=tiny.yaml/x"], ["--run_dir=/proc/x"], ["--ckpt_path=a\0b"], ["--ckpt_path=tiny.yaml"], ["--name=../x"], ["--name=a\nb"],
    ["data.cache=/dev/null"], ["data.cache=tiny"], ["model.pipeline=tiny.yaml"], ["previews.prompts=['\ud800']"], ["--run_dir=a\0b"],
    ["previews.prompts=[]"], ["trainer.logger=[]"], ["trainer.logger=CSVLogger"], ["--config"], ["--"], ["-"], ["=3"], ["--=3"],
    ["model.init_args=3"], ["model.class_path=3"], ["--model.help"], ["data.captions={class_path: Images, init_args: {path: nowhere}}"],
    ["model.box=[[1],[2]]"], ["a.b.c=1"], ["trainer.callbacks+={class_path: Linear}"], ["data.prior=3"], ["--help"], ["--print_config"],
]  # fmt: skip


PARTS = ["model_index.json", "ddil.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"]
PARTS += ["vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"]
PARTS += ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"]
RUN = ["config.yaml", "checkpoints/updates=12.ckpt", "checkpoints/updates=8.ckpt", "pipeline/ddil.json", "metrics.csv", "summary.json"]
DATA = ["metadata.jsonl", "0.png", "1.png", "2.png"]


def file_cases(rng: random.Random) -> Iterator[Case]:
    """Damaged pipelines, runs and data."""
    sample = ["sample", "--pipeline", "tiny", "--prompt", "a digit", "--steps", "1", "--out", "x.png"]
    fit = ["fit", "--config", "tiny.yaml", "model.pipeline=tiny"]
    for _ in range(40):
        command, *words = rng.choice([sample, sample, ["test", "--pipeline", "tiny", "--n", "16", "--steps", "1"], fit])
        yield Case(command, words, damage("tiny", PARTS, rng))
    for _ in range(30):
        command, *words = rng.choice([
            ["export", "--ckpt_path", "run", "--out", "out"], ["test", "--ckpt_path", "run", "--n", "16", "--steps", "1"],
            ["test", "run", "--n", "16", "--steps", "1"], ["fit", "--config", "run/config.yaml", "--ckpt_path", "run", "--updates", "13"],
        ])  # fmt: skip
        yield Case(command, words, damage("run", RUN, rng))
    images = "data.captions={class_path: Images, init_args: {path: data, size: 16}}"
    for _ in range(20):
        on_error = rng.choice(["data.on_error=skip", "data.on_error=stop"])
        yield Case("fit", ["--config", "tiny.yaml", images, on_error, "data.batch_size=2"], damage("data", DATA, rng))


ANY = [
    "",
    "\0",
    "a\0b",
    "\ud800",
    "é\u2028",
    "~",
    "/dev/null",
    "/dev/full",
    "tiny",
    "tiny.yaml",
    "nowhere/x",
    "-1",
    "0",
    "nan",
    "inf",
    HUGE,
]
OPTIONS = {
    "sample": ("--pipeline tiny --prompt digit --out x.png", "pipeline prompt steps guidance seed n scale out truncate"),
    "test": ("--pipeline tiny --n 16 --steps 1", "pipeline steps guidance n seed data images out ckpt_path dpm"),
    "export": ("--ckpt_path run --out out", "ckpt_path out format name steps dtype license push"),
    "pretrain": ("--out out", """dataset images seed out unet unet.batch_size unet.lr unet.devices unet.hold unet.ema unet.focus autoencoder
                 autoencoder.steps autoencoder.decoder_steps measurement.guidance measurement.prompts interim interim.folder interim.every
                 resume progress config"""),
}  # fmt: skip


def word_cases(rng: random.Random) -> Iterator[Case]:
    """Options of the commands that take no config."""
    for command, (words, options) in OPTIONS.items():
        for option, value in ((option, value) for option in options.split() for value in rng.sample(ANY, 3)):
            yield Case(command, [*words.split(), *([f"--{option}", value] if rng.random() < 0.5 else [f"--{option}={value}"])])
        yield from (Case(command, words) for words in ([], ["--help"], ["x", "y"], ["--nothing"], ["--version"]))


KINDS: dict[str, Callable[[random.Random], Iterator[Case]]] = {"fit": fit_cases, "file": file_cases, "word": word_cases}


class Hang(BaseException):
    """An input took longer than it may."""


def left(here: Path) -> set[str]:
    return {str(p.relative_to(here)) for p in here.rglob("*") if "__pycache__" not in p.parts}


@pytest.fixture
def place(tmp_path: Path, tiny: Path, tiny_config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pipeline, a config, a run and pictures, in which the commands are called; and how to make it anew."""
    whole = tmp_path / "whole"
    shutil.copytree(tiny, whole / "tiny")
    shutil.copytree(finished, whole / "run", ignore=shutil.ignore_patterns("samples"))
    (whole / "data").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 20), (80 * i, 0, 0)).save(whole / "data" / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": "a digit"}) for i in range(3)]
    (whole / "data" / "metadata.jsonl").write_text("\n".join(rows))
    small = {"updates: 12": "updates: 1", "every: 6": "every: 0", "batch_size: 8": "batch_size: 4", str(tiny): "tiny"}
    (whole / "tiny.yaml").write_text(functools.reduce(lambda text, pair: text.replace(*pair), small.items(), tiny_config.read_text()))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def begun(*args: Any, **kwargs: Any) -> None:
        raise Refusal("accepted")

    monkeypatch.setattr(pretrain.networks, "build_pipeline", begun)  # half a minute each
    return whole


def outcome(case: Case, capsys: Any) -> tuple[int, str, str]:
    def late(*args: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LIMIT)
    try:
        main.run(COMMANDS[case.command], f"ddil-{case.command}", case.words)
    except SystemExit as stop:
        return int(stop.code or 0), *capsys.readouterr()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("no exit")


@pytest.mark.parametrize(
    ("kind", "share"), [("fit", 3), ("file", 2), ("word", 15), *(pytest.param(k, None, marks=pytest.mark.slow) for k in KINDS)]
)
@pytest.mark.filterwarnings("ignore")
def test_every_input_gets_its_line(
    kind: str, share: int | None, place: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the inputs, or as a slow test all of them."""
    monkeypatch.chdir(place)
    rng = random.Random(SEED)
    cases = list(KINDS[kind](rng))
    cases = cases if share is None else rng.sample(cases, share)
    wrong = []
    for k, case in enumerate(cases):
        here = tmp_path / f"{k}"
        shutil.copytree(place, here, symlinks=True)
        os.chdir(here)
        case.change()
        before = left(here)
        capsys.readouterr()
        code, out, err = outcome(case, capsys)
        said = [line for line in err.splitlines() if line.startswith(f"ddil-{case.command}: ")]
        if code not in (0, 2) or "Traceback" in err + out or "not foreseen" in err or (code == 2 and len(said) != 1):
            wrong.append((case, code, err[-300:]))
        elif code == 2 and (left(here) - before or fit_cli.RUN_DIR in os.environ):
            wrong.append((case, "left", sorted(left(here) - before)[:3], err[-200:]))
        os.chdir(tmp_path)
        shutil.rmtree(here)
    assert not wrong, "\n".join(map(str, wrong))
