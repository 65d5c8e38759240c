"""ddil-test, ddil-sample, ddil-export: what is done with a run or a pipeline folder afterwards."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import check_writable, replacing
from .main import Refusal, one_line


class _Parser(argparse.ArgumentParser):
    """argparse that answers on one line."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Bad usage is bad input like any other."""
        raise Refusal(f"{message}; {self.prog} --help shows the usage")


def _place(text: str) -> str:
    """A path as it was meant: `~` is the home folder."""
    if "\0" in text or not text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path")
    return os.path.expanduser(text)


def _path(text: str) -> Path:
    return Path(_place(text))


def _number(low: float, high: float, kind: type = int) -> Any:
    """A type of argparse: a number within these bounds."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = float("nan")
        if not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low:g} to {high:g}")
        return value

    return read


_steps, _seed, _scale = _number(1, 1000), _number(0, 2**32 - 1), _number(0, 1000, float)


def test(argv: list[str]) -> int:
    """Metrics of a run, a checkpoint or a pipeline folder, as a table and in metrics.json."""
    parser = _Parser("ddil-test", description=test.__doc__)
    parser.add_argument("run", nargs="?", type=_place, help="a run folder (its exported pipelines are tested)")
    parser.add_argument("--ckpt_path", type=_place, help="a checkpoint file of a run, beside or below its config.yaml")
    parser.add_argument("--pipeline", type=_place, help="any pipeline folder, a hub id, builtin or builtin/digits")
    parser.add_argument("--steps", type=_steps, nargs="+", help="step counts (default: those a student is made for, 32 for a teacher)")
    parser.add_argument("--guidance", type=_scale, help="guidance g (default: what the pipeline recommends)")
    parser.add_argument("--dpm", action="store_true", help="rows with DPM-Solver++ 2M too, for students that step by DDIM")
    parser.add_argument("--n", type=_number(16, 10**7), help="held-out prompts (default: 1000, or all of a smaller set of your own)")
    parser.add_argument("--seed", type=_seed, default=0, help="of prompts and noise")
    parser.add_argument("--truncate", action="store_true", help="cut captions that are too long for the text encoder")
    parser.add_argument(
        "--data", type=_place, help="shapes, digits (default: what the pipeline names), or a caption file of your own (COCO json, jsonl)"
    )
    parser.add_argument("--images", type=_place, help="the folder of the images that a caption file names")
    parser.add_argument("--out", type=_path, help="the JSON file (default: metrics.json in the run folder, else here)")
    args = parser.parse_args(argv)
    if sum(x is not None for x in (args.run, args.ckpt_path, args.pipeline)) != 1:
        raise Refusal("give one of: a run folder, --ckpt_path FILE, --pipeline DIR")
    if args.images and args.data in (None, "shapes", "digits"):
        raise Refusal(f"--images {args.images} is the folder of a caption file's images: give that file too, by --data FILE")
    home = Path(args.run) if args.run else _config_of(args.ckpt_path).parent if args.ckpt_path else Path.cwd()
    out = args.out or home / "metrics.json"
    check_writable(out)
    args.n = _count(args)
    from . import evaluate

    rows = _checkpoint_rows(args) if args.ckpt_path else _pipeline_rows(args)
    print(evaluate.table(rows), end="", flush=True)  # first: what cannot be written can still be read
    evaluate.write_rows(out, {"rows": rows, "n": args.n, "seed": args.seed})  # type: ignore[arg-type]
    print(f"written to {out}")
    return 0


def _count(args: argparse.Namespace) -> int:
    """How many prompts: as asked, else 1000, or all of a smaller set of the user's own. Raises Refusal for fewer than 16."""
    if args.n is not None or args.data in (None, "shapes", "digits"):
        n, what = 1000 if args.n is None else args.n, f"--n {args.n}"
    else:
        from .metrics.pairs import read_pairs

        n = min(1000, len(read_pairs(args.data, args.images)))
        what = f"{args.data} holds {n} images with captions"
    if n < 16:
        raise Refusal(f"{what}: at least 16 prompts, and some hundreds for numbers that mean something")
    return n


def _pipeline_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    from . import runs, scoring
    from .backbones import Backbone

    if args.run and (Path(args.run) / "student.safetensors").is_file():
        raise Refusal(f"no pipeline can hold the student of {args.run}, so there is none to test: its rows are in summary.json")
    if args.run and not (Path(args.run) / "pipeline").is_dir():
        raise Refusal(f"{args.run} holds no exported pipeline (pipeline/): give a finished run, or --ckpt_path for one that is not")
    backbone = Backbone(str(Path(args.run) / "pipeline") if args.run else args.pipeline).to(_device())
    suite = _suite(args, backbone)
    _check_prompts(args, suite, backbone)
    stages = runs.stage_pipelines(Path(args.run)) if args.run else {}
    own = backbone.about.get("made_for", [4, 2, 1] if "method" in backbone.about else [32])
    g = _guidance(backbone, args.guidance)
    counts, rows = args.steps or sorted({*stages, *own}, reverse=True), []
    _check_steps(backbone, [n for n in counts if n not in stages], _solvers(args, backbone))
    for n in counts:
        tested = Backbone(str(stages[n])).to(_device()) if n in stages else backbone
        rows += [scoring.pipeline_row(suite, tested, n, g, dpm) for dpm in _solvers(args, tested)]
    return rows


def _solvers(args: argparse.Namespace, backbone: Any) -> list[bool]:
    """Whether DPM-Solver++ 2M, for each row of a step count."""
    ddim = type(backbone.pipe.scheduler).__name__ in ("DDIMScheduler", "DPMSolverMultistepScheduler")
    return [False, True] if args.dpm and ddim else [False]


def _check_steps(backbone: Any, counts: Sequence[int], solvers: Sequence[bool] = (False,)) -> None:
    """Raises Refusal for a step count that the pipeline's scheduler cannot take, before an hour of sampling with another one."""
    from diffusers import DPMSolverMultistepScheduler

    own = backbone.pipe.scheduler
    for scheduler in (DPMSolverMultistepScheduler.from_config(own.config, solver_order=2) if dpm else own for dpm in solvers):
        for n in counts:
            try:
                scheduler.set_timesteps(n, device=backbone.device)
                # Without sigmas to interpolate, a scheduler looks its times up: "leading" ones with an offset may lie beyond the last.
                if not hasattr(scheduler, "sigmas") and int(scheduler.timesteps.max()) >= scheduler.config.num_train_timesteps:
                    raise ValueError(f"its times begin at {int(scheduler.timesteps.max())}")
            except Exception as error:  # whatever a scheduler of diffusers raises
                why = f"{type(scheduler).__name__}: {one_line(error).split('. ')[0]}"
                raise Refusal(f"--steps {n}: {backbone.path} cannot be sampled in so many steps ({why}): give another number") from error


def _checkpoint_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    from . import scoring

    method = restore(args.ckpt_path).to(_device())
    suite = _suite(args, method.backbone)
    _check_prompts(args, suite, method.backbone)
    if args.guidance is not None and not method.deployed().w_conditioned:
        raise Refusal(baked(args.ckpt_path, method.student_guidance))
    g = method.student_guidance if args.guidance is None else args.guidance
    return scoring.student_rows(suite, method.backbone, {n: method.sampler(n) for n in args.steps or method.steps}, g, args.dpm)


def _suite(args: argparse.Namespace, backbone: Any) -> Any:
    from .evaluate import Suite

    data = args.data or backbone.about.get("dataset")
    if data is None:
        raise Refusal(f"the pipeline {backbone.path} names no data set: say --data shapes, --data digits or --data CAPTIONS --images DIR")
    if data not in ("shapes", "digits"):
        return Suite.from_folder(data, args.images, n=args.n, seed=args.seed, device=backbone.device)
    return Suite.builtin(data, n=args.n, seed=args.seed).for_pipeline(backbone)


def _check_prompts(args: argparse.Namespace, suite: Any, backbone: Any) -> None:
    """Raises ValueError for a prompt that would be cut, before an hour of sampling and not in it."""
    if not args.truncate:
        with _advising("--truncate"):
            backbone.check_length([*suite.prompts, *suite.probes])


@contextmanager
def _advising(option: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("or allow truncation", f"or cut it by {option}")) from error


def _guidance(backbone: Any, given: float | None) -> float:
    """The guidance_scale to call a pipeline with: as given, or as its card says (1 where guidance is baked in)."""
    if given is not None and backbone.baked:
        raise Refusal(baked(backbone.path, backbone.guidance))
    return float(backbone.about.get("guidance_scale", backbone.guidance)) if given is None else given


def baked(what: Any, g: float) -> str:
    """What a student whose guidance is in its weights answers to another."""
    return f"guidance {g:g} is part of the weights of {what}, and another would come on top of it: leave --guidance out"


def restore(ckpt_path: str | Path) -> Any:
    """The method of a checkpoint, rebuilt from the config.yaml of its run, for inference: only the deployed network is read.

    Raises ValueError where either is missing, lacks something, or they do not fit.
    """
    from . import finish, messages, resuming

    path, config = resuming.checkpoint(str(ckpt_path), None, ""), _config_of(ckpt_path)
    state = resuming.load_checkpoint(path)
    messages.quiet()
    method = finish.rebuild(config)
    resuming.check_fits(path, state, method)
    resuming.check_clocks(path, state, method)
    method.on_load_checkpoint(state)
    method.adopt(state["state_dict"])
    return method.eval()


def _config_of(ckpt_path: str | Path) -> Path:
    from . import resuming

    path = resuming.checkpoint(str(ckpt_path), None, "")
    for folder in (path.parent, path.parent.parent):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError(f"no config.yaml beside {path} or above it: a checkpoint is rebuilt from the config of its run")


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sample(argv: list[str]) -> int:
    """Images of prompts from a pipeline folder."""
    parser = _Parser("ddil-sample", description=sample.__doc__)
    parser.add_argument("--pipeline", type=_place, required=True, help="a pipeline folder, a hub id, builtin or builtin/digits")
    parser.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    parser.add_argument("--truncate", action="store_true", help="cut prompts that are too long for the text encoder")
    parser.add_argument("--steps", type=_steps, help="default: what the pipeline recommends, else 32")
    parser.add_argument("--guidance", type=_scale, help="default: what the pipeline recommends")
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--n", type=_number(1, 1000), default=1, help="images per prompt")
    parser.add_argument("--scale", type=_number(1, 64), help="enlarge every pixel (default: to at least 256)")
    parser.add_argument("--out", type=_path, required=True, help="the PNG; several images make a sheet")
    args = parser.parse_args(argv)
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(args.out.suffix.lower())
    if kind is None and not args.out.exists():
        raise Refusal(f"--out {args.out}: give a picture's name, such as x.png")
    check_writable(args.out)
    from . import sampling
    from .backbones import Backbone

    backbone = Backbone(args.pipeline).to(_device())
    prompts = [p for p in args.prompt for _ in range(args.n)]
    if not args.truncate:
        with _advising("--truncate"):
            backbone.check_length(args.prompt)
    steps = args.steps or int(backbone.about.get("steps", 32))
    g = _guidance(backbone, args.guidance)
    _check_steps(backbone, [steps])
    made = sampling.decoded(backbone, sampling.pipeline_latents(backbone.pipe, prompts, steps, g, args.seed))
    scale = args.scale or max(1, 256 // made.shape[-1])
    picture = sampling.tiles(made, scale, columns=args.n if args.n > 1 else len(made))
    with replacing(args.out) as temporary:
        picture.save(temporary, format=kind or "PNG")
    print(f"{len(made)} image(s), {steps} steps: {args.out}")
    return 0


def export(argv: list[str]) -> int:
    """The student of a checkpoint as a diffusers pipeline folder, reloaded and compared."""
    parser = _Parser("ddil-export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=_place, required=True, help="a checkpoint file or a run folder")
    parser.add_argument("--out", type=_path, required=True, help="the folder to write: a new or an empty one")
    parser.add_argument("--steps", type=_steps, help="the step count that the folder recommends (default: what the student is made for)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of all components")
    parser.add_argument("--safety_checker", action="store_true", help="with the teacher's safety checker and its feature extractor")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise Refusal(f"{args.out} is there and not an empty folder: choose another --out")
    check_writable(args.out / "model_index.json")
    import torch

    from . import export as exporting

    method = restore(args.ckpt_path).to(_device())
    if not exporting.exportable(method):
        raise Refusal(f"no pipeline can hold the student of {args.ckpt_path}: its weights are in the checkpoint")
    prompts, steps, dtype = exporting.check_prompts(method, []), args.steps or method.steps[0], getattr(torch, args.dtype)
    difference = exporting.deliver(method, args.out, prompts, steps, dtype, args.safety_checker)
    print(f"pipeline written and checked: {args.out} (latents differ by {difference:.1e})")
    return 0
