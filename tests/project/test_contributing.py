"""CONTRIBUTING is carried out: the house as it is drawn, and a method, a network family and a metric, each a file outside the package."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from PIL import Image
from test_layers import ORDER, ROOT
from torch import Tensor

import commandline
import suite
from ddil_lightning import plugins
from ddil_lightning.backbones import sampling
from ddil_lightning.backbones.families import FAMILIES
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands import main
from ddil_lightning.diffusion.grid import Grid
from ddil_lightning.diffusion.policy import Policy
from ddil_lightning.diffusion.transitions import Transition, ddim
from ddil_lightning.evaluation import registry
from ddil_lightning.evaluation.drawing import Timed
from ddil_lightning.evaluation.suite import Suite, make_row
from ddil_lightning.evaluation.table import results_table
from ddil_lightning.runs.export import export, verify
from ddil_lightning.testing import CHECKS
from ddil_lightning.training import completeness
from ddil_lightning.training.deployment import Deployment
from ddil_lightning.training.method import Distillation
from pixarts import make_pixart

PAGE = pages.read(pages.ROOT / "CONTRIBUTING.md")
FILES = {found[1]: code for _, code in PAGE.blocks if (found := pages.NAMED.match(code))}
ALPHA = "PixArtAlphaPipeline"
PROMPTS = ["a small red circle", "a handwritten seven left of a large blue square"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where Python finds the files of the page; what the package itself knows of PixArt is away meanwhile."""
    folder = tmp_path_factory.mktemp("own")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    own = FAMILIES["PixArtTransformer2DModel"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        forget()
        yield folder
    forget()
    FAMILIES["PixArtTransformer2DModel"] = own


def forget() -> None:
    """As if nobody had imported the modules of the page."""
    for metric in [metric for metric in registry._added.values() if metric.__module__ == "colourfulness"]:
        registry.unregister(metric)
    FAMILIES.pop("PixArtTransformer2DModel", None)
    for name in ("pixart", "colourfulness"):
        sys.modules.pop(name, None)
        plugins._begun.discard(name)
    plugins.installed.cache_clear()


@pytest.fixture(scope="session")
def tiny(light: Path) -> Path:
    """What is trained here: these tests wait for calls of the U-Net more than for anything else."""
    return light


# The house ----------------------------------------------------------------------------------------------------------------------------


def test_the_house_is_as_it_is_drawn() -> None:
    (drawn,) = re.findall(r"^src/ddil_lightning/\n((?:  .*\n)+)", PAGE.text, re.M)
    rooms: dict[str, set[str]] = {"ground": set()}
    for line in drawn.splitlines():
        names = line[:76].split()
        if re.match(r"  \w+/ ", line):
            rooms[names.pop(0).rstrip("/")] = set()
        rooms[list(rooms)[-1]] |= {name for name in names if not name.endswith("/")}
    assert list(rooms) == ORDER
    for name, said in rooms.items():
        folder = ROOT if name == "ground" else ROOT / name
        assert said == {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}, name


def test_what_ci_runs() -> None:
    run = (pages.ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)$", run, re.M) == re.findall(r"`make (\w+)`", PAGE.text.partition(" are all that CI runs")[0])


@pytest.mark.parametrize("name", re.findall(r"^\| .*? \| `([a-z_]+\.[\w.]+)`", PAGE.text, re.M))
def test_the_doors_exist_and_say_how_to_build_them(name: str) -> None:
    module, _, door = name.rpartition(".")
    assert len(getattr(importlib.import_module(f"ddil_lightning.{module}"), door).__doc__.splitlines()) > 3


def test_a_sampler_of_ones_own_is_exported_as_the_page_says(tiny: Path) -> None:
    """With the scheduler of another one, and in the words of its author."""
    method = suite.build(suite.BY_NAME["lcm-fixed-guidance"], tiny)
    (said,) = re.findall(r"`(Deployment\(Policy\(student, Halfway.*?)`", PAGE.text, re.S)
    given = {"Halfway": type("Halfway", (Transition,), {"__call__": lambda self, *given: given[1]}), "n": 4, "g": 2.0, "self": method}
    given |= {"grid": partial(Grid.named, "trailing", total=1000), "student": method.outgoing.apart(), "partial": partial}
    deployment = eval(said.replace("\n", " "), given | {"Deployment": Deployment, "Policy": Policy, "ddim": ddim})
    assert type(deployment.made_scheduler(4)).__name__ == "DDIMScheduler" and "fresh noise for half of it" in deployment.remark
    assert type(deployment.policy.transition).__name__ == "Halfway" and deployment.exported.policy.transition == ddim


def test_every_hook_that_needs_super_is_named() -> None:
    (said,) = re.findall(r"^- \*\*Hooks\*\* .*?(?=^- )", PAGE.text, re.M | re.S)
    noted = {name for name, hook in vars(Distillation).items() if getattr(hook, "__code__", None) is completeness.ours(print).__code__}
    assert {*noted, "on_save_checkpoint"} == set(re.findall(r"`(\w+)`", said.partition(" begin in ")[0]))


# The method ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry(place: Path) -> Any:
    """The list entry, of a module that lies where Python finds it."""
    named = {"Entry": suite.Entry, "Direct": importlib.import_module("direct").Direct}
    (found,) = re.findall(r"`(Entry\(.*?\))`", PAGE.text)
    return eval(found, named)


def test_the_config_trains_tests_and_exports_it(entry: Any, place: Path, tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "model.updates=4",
        "data.batch_size=8",
        "previews.count=1",
        "previews.teacher_steps=[4]",
        "test.n=16",
        "test.teacher_steps=[1]",
    )
    code, out, err = commandline.fit(capsys, "--config", str(place / "direct.yaml"), f"model.pipeline={tiny}", *small)
    assert code == 0, err
    run = (Path("runs") / "direct" / "latest").resolve()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["export_difference"] < 1e-4 and "student@4" in out and (run / "report.html").is_file()
    about = json.loads((run / "pipeline" / "ddil.json").read_text())
    assert (about["method"], about["timesteps"], about["guidance_scale"]) == ("Direct", [999, 749, 499, 249], 1.0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_what_every_method_has_to(check: Any, entry: Any, place: Path, tiny: Path) -> None:
    """By the test that the page has for it."""
    importlib.import_module("test_direct").test_direct(check, tiny)


@pytest.mark.parametrize(("k", "exact"), [(1, True), (2, False)])
def test_the_loss_of_an_exact_student_is_zero(k: int, exact: bool, entry: Any, tiny: Path) -> None:
    """A fresh student is its teacher: one step of it is one unguided step of the teacher, and not two."""
    run = suite.train(entry, tiny, prior=suite.FORWARD, updates=1, guidance=1.0, reflect="off", teacher_steps=4 * k)
    assert (run.rows[0]["loss"] < 1e-10) is exact


def test_a_plan_that_does_not_nest_is_refused(entry: Any, tiny: Path) -> None:
    with pytest.raises(ValueError, match="teacher_steps = 10 is no multiple of steps = 4"):
        suite.build(entry, tiny, teacher_steps=10)


# The network family -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixart(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    importlib.import_module("pixart")
    return make_pixart(tmp_path_factory.mktemp("pixart") / "tiny-pixart", kind=ALPHA)


def guided(pipe: Any, x_t: Tensor, t: Tensor, g: float) -> Tensor:
    """eps by the formula out_u + g (out_c - out_u), from what diffusers' own parts say."""
    text, mask, *_ = pipe.encode_prompt([*PROMPTS, "", ""], do_classifier_free_guidance=False)
    told = {"resolution": None, "aspect_ratio": None}
    kwargs = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": told, "return_dict": False}
    out_c, out_u = pipe.transformer(torch.cat([x_t, x_t]), timestep=torch.cat([t, t]), **kwargs)[0][:, :4].chunk(2)
    return out_u + g * (out_c - out_u)


def test_the_teacher_is_guided_as_the_formula_says(pixart: Path) -> None:
    backbone, generator = Pipeline(str(pixart)), torch.Generator().manual_seed(0)
    x_t, t, c = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 999]), backbone.encode_text(PROMPTS)
    teacher = backbone.role("teacher")
    got = teacher(x_t, t, c.guided(3.5)).eps
    torch.testing.assert_close(got, guided(backbone.pipe, x_t, t, 4.5), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, teacher(x_t, t, c._replace(mask=torch.ones_like(c.mask)).guided(3.5)).eps, atol=1e-3)  # masked words
    assert torch.equal(backbone.role("student")(x_t, t, c).eps, teacher(x_t, t, c).eps)


@pytest.mark.parametrize("side", [16, 256])
def test_its_samples_are_the_pipelines_own(side: int, place: Path, tmp_path: Path) -> None:
    """As its users call it, with guidance; the transformers for latents of 128 are told the size of the image, too."""
    from diffusers import DDIMScheduler

    importlib.import_module("pixart")
    backbone, n = Pipeline(str(make_pixart(tmp_path / "made", side, ALPHA))), 4 if side == 16 else 1
    backbone.pipe.scheduler = DDIMScheduler.from_config(backbone.pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    x_t, c = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0)), backbone.encode_text(PROMPTS[:1])
    assert (c.ids is not None) is (side == 256)
    call = {"num_inference_steps": n, "latents": x_t.clone(), "output_type": "latent", "use_resolution_binning": False}
    expected = backbone.pipe(prompt=PROMPTS[:1], guidance_scale=3.0, **call).images
    got = Policy(backbone.role("teacher"), ddim).sample(x_t, Grid.named("trailing", n), c.guided(2.0))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_prompts_are_counted_as_its_pipelines_read_them(pixart: Path) -> None:
    backbone, long = Pipeline(str(pixart)), " ".join(["Red"] * 120)
    backbone.check_length([long.removesuffix(" Red")])
    with pytest.raises(ValueError, match="has 121 tokens and the text encoder reads 120"):
        backbone.encode_text(["a", long])


@pytest.mark.parametrize("method", [pytest.param("LCM", marks=pytest.mark.slow), "Direct"])
def test_methods_distil_it_and_diffusers_loads_the_student(method: str, entry: Any, pixart: Path, tmp_path: Path) -> None:
    """With roll-outs of student and teacher; the exported pipeline is called by diffusers alone, with the noise of the trainer."""
    from diffusers import PixArtAlphaPipeline

    of = entry if method == "Direct" else suite.Entry("lcm", suite.LCM, {"w_conditioned": False, "guidance": 4.5})
    run = suite.train(of, pixart, updates=8)
    assert all(sum(row[f"drawn/share_{name}"] for row in run.rows) > 0 for name in ("forward", "student", "teacher"))
    before, after = suite.backbone(pixart).network().state_dict(), run.method.student.network.state_dict()
    assert before.keys() == after.keys() and not torch.equal(before["transformer.proj_out.weight"], after["transformer.proj_out.weight"])
    folder = export(run.method, tmp_path / "student", 4)
    assert verify(run.method, folder, PROMPTS, 4) < 1e-4
    pipe, n = PixArtAlphaPipeline.from_pretrained(folder), 4
    policy, grid = run.method.deployment.sampler(n)
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    mine = policy.sample(x_T, grid, suite.backbone(pixart).encode_text(PROMPTS), seeds)
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    call = {"latents": x_T, "generator": seeds, "output_type": "latent", "use_resolution_binning": False}
    theirs = pipe(PROMPTS, num_inference_steps=n, guidance_scale=1.0, **call).images
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_one_step_of_a_scheduler_that_its_pipeline_cannot_read_is_refused(pixart: Path) -> None:
    """At one step diffusers' pipeline takes the estimate of x0 from the scheduler's answer, which DPM-Solver does not give."""
    from diffusers import DDIMScheduler

    backbone = suite.backbone(pixart)
    why = r"cannot be sampled in 1 step by its DPMSolverMultistepScheduler \(IndexError: tuple index out of range\)"
    with pytest.raises(ValueError, match=why):
        sampling.pipeline_latents(backbone, PROMPTS, 1, 4.5)
    ddim = backbone.stepping(DDIMScheduler.from_config(backbone.pipe.scheduler.config))
    assert all(sampling.pipeline_latents(one, PROMPTS, n, 4.5).isfinite().all() for one, n in ((backbone, 2), (ddim, 1)))


def test_what_it_lacks_is_refused_by_name(pixart: Path) -> None:
    backbone = suite.backbone(pixart)
    with pytest.raises(ValueError, match=r"PixArt cannot be told the guidance: set model\.w_conditioned to false"):
        suite.LCM(pipeline=backbone)
    with pytest.raises(NotImplementedError, match="PixArt has no discriminator's head"):
        backbone.head()


# The commands -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["environment", "package"])
def named(request: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the page is imported yet; its modules are named as it says, in the environment or by an installed package."""
    (points,), (variables, *_) = PAGE.of("toml"), PAGE.of("bash")
    if request.param == "environment":
        said = dict(word.split("=") for word in shlex.split(variables)[1:])
        assert said.pop("PYTHONPATH") == "."
        for name, value in said.items():
            monkeypatch.setenv(name, value)
    else:
        (info := tmp_path / "mine-1.dist-info").mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        (info / "entry_points.txt").write_text(points.replace('project.entry-points."', "").replace('"', ""))
        monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield
    monkeypatch.undo()
    forget()


def images(folder: Path) -> None:
    """A stand-in for images of the reader's own."""
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (32 * i, 0, 0)).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "a red square"}) for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def call(capsys: Any, name: str, *words: str) -> str:
    """What a command in this process prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(main.command(name), f"ddil-{name}", list(words))
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return out


@pytest.mark.parametrize("named", [pytest.param("environment", marks=pytest.mark.slow), "package"], indirect=True)
def test_every_command_knows_both(named: None, pixart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The command of the page on a folder of images of one's own; then test, sample and export of what it leaves."""
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "my_images")
    forget()  # what the fixtures have imported
    (line,) = [line for line in PAGE.lines if line.startswith("ddil-fit")]
    said = pages.smaller(pages.words(line))[1:]
    more = [f"model.pipeline={pixart}" if word.startswith("model.pipeline=") else word for word in said]
    call(capsys, "fit", *more, "--name", "own")
    run = Path("runs", "own", "latest").resolve()
    out = call(capsys, "test", str(run), "--n", "16", "--data", "digits", "--steps", "2")
    assert "student@2" in out and registry.metrics()[-1].__name__ == "Colourfulness"
    (row,) = json.loads((run / "metrics.json").read_text())["rows"]
    assert row["metrics"]["colourfulness"] > 0
    forget()
    assert "written and checked: exported/pipeline" in call(capsys, "export", "--ckpt_path", str(run), "--out", "exported")
    forget()
    call(capsys, "sample", "--pipeline", "exported/pipeline", "--prompt", "a red square", "--out", "x.png")
    assert Path("x.png").is_file()


def test_a_plugin_that_fails_is_named(pixart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where `refused` looks for what was left behind
    forget()
    monkeypatch.setenv("DDIL_PLUGINS", "pixart, not_there")
    for _ in range(2):
        said = commandline.refused(capsys, "--config", "lcm.yaml")
        assert said == "the plugin not_there in DDIL_PLUGINS cannot be imported (ModuleNotFoundError: No module named 'not_there')"
    monkeypatch.delenv("DDIL_PLUGINS")
    forget()
    with pytest.raises(ValueError, match="denoises with a PixArtTransformer2DModel: known are UNet2D.*; CONTRIBUTING.md"):
        Pipeline(str(pixart))


# The metric ---------------------------------------------------------------------------------------------------------------------------


def test_the_metric_is_known_wherever_it_is_named(named: None) -> None:
    """To tables and suites alone, without a command or a family that would have imported it."""
    assert registry.columns()[-1].key == "colourfulness" and registry.unmeasured()["colourfulness"] is None


def test_the_metric_is_measured_and_shown(place: Path) -> None:
    """Half pure red, half grey: |rg| is 255 or 0 and |yb| half of it, so spread 127.5 r and mean 127.5 r with r = sqrt(1 + 1/4)."""
    forget()
    colourfulness = importlib.import_module("colourfulness").colourfulness
    image = torch.zeros(1, 3, 4, 4)
    image[:, :, :, :2] = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1)
    expected = 1.3 * 127.5 * 1.25**0.5
    torch.testing.assert_close(colourfulness(torch.cat([image, torch.ones_like(image)])), torch.tensor([expected, 0.0]).double())

    def sample(prompts: list[str], seed: int) -> Tensor:
        return torch.cat([image if "red" in prompt else torch.ones_like(image) for prompt in prompts])

    made, timed = Suite("mine", ["a red one", "a grey one", "a red one"], batch=2), Timed(sample)
    found = made.score(timed)
    assert found["colourfulness"] == pytest.approx(2 / 3 * expected, abs=0.01)
    rows = [make_row("student@1", 1, 1.0, 1, timed.seconds_per_image, found, made.protocol)]
    assert "| Colourfulness |" in results_table(rows) and f"| {2 / 3 * expected:.1f} |" in results_table(rows)
    forget()
