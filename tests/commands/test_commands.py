"""ddil-test, ddil-sample and ddil-export on a finished run of the random pipeline."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddil_lightning.commands import main
from ddil_lightning.commands.restore import restore
from ddil_lightning.commands.test import _written as written
from ddil_lightning.evaluation import rows as scoring
from ddil_lightning.evaluation import table
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.suite import Suite, make_row
from ddil_lightning.methods import DMD2
from ddil_lightning.miniature import digits
from ddil_lightning.processes import Processes
from ddil_lightning.runs import export
from suite import METHODS, Entry, build

ROW = {"name", "steps", "guidance", "n", "nfe", "seconds_per_image", "metrics", "protocol", "generation"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in suite without its evaluator: the judge alone, which needs no weights."""

    def builtin(data: str, n: int, seed: int) -> Suite:
        assert data == "digits"
        return Suite(data, digits.prompts(n, seed), Given(judge=Judge(digits.judge)), seed=seed, batch=8)

    monkeypatch.setattr(Suite, "builtin", staticmethod(builtin))


def call(capsys: Any, command: Any, *words: Any) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.run(command, "ddil-x", [str(word) for word in words])
    return (stop.value.code, *capsys.readouterr())


def refused(capsys: Any, command: Any, *words: Any) -> str:
    code, _, err = call(capsys, command, *words)
    assert code == 2 and err.count("\n") == 1 and err.startswith("ddil-x: "), err
    return err


def scored(capsys: Any, *words: Any, out: str = "metrics.json") -> list[dict[str, Any]]:
    code, shown, err = call(capsys, main.command("test"), *words, "--n", 16)
    assert code == 0 and f"written to {out}" in shown, err
    rows = json.loads(Path(out).read_text())["rows"]
    assert all(
        set(row) == ROW and row["name"] in shown and row["n"] == row["protocol"]["n"] == 16 and row["seconds_per_image"] > 0 for row in rows
    )
    assert all(set(keys()) <= set(row["metrics"]) and 0 <= row["metrics"]["attribute_accuracy"] <= 1 for row in rows)
    return rows


def test_a_run_and_its_checkpoint_score_alike(finished: Path, here: Path, judged: None, capsys: Any) -> None:
    shutil.copytree(finished, here / "r")
    from_run = scored(capsys, "r", out="r/metrics.json")
    (here / "r" / "metrics.json").unlink()
    from_checkpoint = scored(capsys, "--ckpt_path", "r/checkpoints/updates=12.ckpt", out="r/metrics.json")
    for rows in (from_run, from_checkpoint):
        assert [(row["name"], row["steps"], row["nfe"]) for row in rows] == [("student@4", 4, 4), ("student@2", 2, 2), ("student@1", 1, 1)]
        assert {row["guidance"] for row in rows} == {2.0}
    assert [row["metrics"]["all_right"] for row in from_run] == [row["metrics"]["all_right"] for row in from_checkpoint]
    words = ("--ckpt_path", "r/checkpoints/updates=12.ckpt", "--steps", 2, "--keep_images", "kept")
    for drawn in ("16 images, ", "16 images, 0 of them drawn now"):
        code, shown, err = call(capsys, main.command("test"), *words, "--n", 16)
        assert code == 0 and f"student@2: {drawn}" in shown, err
        (row,) = json.loads(Path("r/metrics.json").read_text())["rows"]
        assert (row["metrics"], row["nfe"]) == (from_checkpoint[1]["metrics"], 2) and len(
            list(Path("kept/student@2/prompts").iterdir())
        ) == 17


def test_rows_say_their_checkpoint_and_those_of_another_stay(finished: Path, here: Path, judged: None, capsys: Any) -> None:
    shutil.copytree(finished, here / "r")
    state = torch.load("r/checkpoints/updates=12.ckpt", weights_only=False)
    state["ddil"]["student_updates"] = 6
    state["state_dict"] = {key: 1.01 * x if x.is_floating_point() else x for key, x in state["state_dict"].items()}
    torch.save(state, "r/checkpoints/updates=6.ckpt")

    def tested(*words: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
        code, shown, err = call(capsys, main.command("test"), *words, "--steps", 2, "--n", 16)
        assert code == 0, err
        found = json.loads(Path("r/metrics.json").read_text())
        return found["rows"], found.get("earlier", []), shown

    first, none, shown = tested("--ckpt_path", "r/checkpoints/updates=6.ckpt")
    said = first[0]["generation"]
    assert said["student_updates"] == 6 and said["checkpoint"] == "r/checkpoints/updates=6.ckpt" and not none and "earlier" not in shown
    (last,), earlier, shown = tested("--ckpt_path", "r/checkpoints")
    assert last["generation"]["student_updates"] == 12 and last["generation"]["weights"] != said["weights"] and earlier == first
    assert "rows of before stay in it, under `earlier`: student@2 of update 6 by digits " in shown


def test_the_checkpoint_of_a_run_that_goes_on_is_looked_for_once(
    finished: Path, here: Path, judged: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the time that the teacher's images were drawn it had gone, or a row named the newer one that had come."""
    shutil.copytree(finished, here / "r")
    checkpoints = here / "r" / "checkpoints"

    def goes_on(path: Any) -> Any:
        method = restore(path)
        (checkpoints / "updates=12.ckpt").rename(checkpoints / "updates=24.ckpt")
        return method

    monkeypatch.setattr("ddil_lightning.commands.restore.restore", goes_on)
    (row,) = scored(capsys, "--ckpt_path", "r", "--steps", 2, out=str(here / "r" / "metrics.json"))
    assert Path(row["generation"]["checkpoint"]).name == "updates=12.ckpt" and row["generation"]["student_updates"] == 12


def test_any_pipeline_with_steps_and_guidance(tiny: Path, judged: None, capsys: Any) -> None:
    rows = scored(capsys, "--pipeline", tiny, "--steps", 2, 3, "--guidance", 3.5, "--out", "here.json", out="here.json")
    assert [(row["name"], row["nfe"], row["guidance"]) for row in rows] == [("teacher@2", 4, 3.5), ("teacher@3", 6, 3.5)]


def test_guidance_in_the_weights_is_reported_and_not_given_again(tiny: Path, here: Path, judged: None, capsys: Any) -> None:
    method = build(Entry("dmd2", DMD2, {"guidance": 2.0, "scores": {"guidance": 1.5}}), tiny)
    export.export(method, here / "student", steps=2)
    about = json.loads((here / "student" / "ddil.json").read_text())
    assert (about["guidance"], about["guidance_scale"], about["guidance_range"]) == (1.5, 1.0, [1.5, 1.5])
    assert "right because guidance 1.5 is part of the weights" in (here / "student" / "README.md").read_text()
    (row,) = scored(capsys, "--pipeline", "student", "--steps", 2, "--out", "metrics.json")
    assert (row["name"], row["nfe"], row["guidance"]) == ("student@2", 2, 1.5)
    said = "guidance 1.5 is part of the weights of student, and another would come on top of it: leave --guidance out"
    assert said in refused(capsys, main.command("test"), "--pipeline", "student", "--guidance", 3)
    assert said in refused(capsys, main.command("sample"), "--pipeline", "student", "--guidance", 3, "--prompt", "a zero", "--out", "x.png")
    rows = scoring.method_rows(Suite.builtin("digits", n=16, seed=0), method, [2], [2])
    assert [(row["name"], row["guidance"]) for row in rows] == [("teacher@2", 2.0), ("student@2", 1.5)]


def test_what_cannot_be_tested(tiny: Path, here: Path, finished: Path, capsys: Any) -> None:
    assert "give one of: a run folder, --ckpt_path FILE, --pipeline DIR" in refused(capsys, main.command("test"))
    assert "nowhere holds no exported pipeline" in refused(capsys, main.command("test"), "nowhere")
    assert "no pipeline at nowhere: give a diffusers folder" in refused(capsys, main.command("test"), "--pipeline", "nowhere")
    said = refused(capsys, main.command("test"), "--ckpt_path", "nowhere")
    assert said.strip().endswith("nowhere does not exist; give a file or a run folder")  # `last` is of ddil-fit
    shutil.copytree(tiny, here / "plain")
    (here / "plain" / "ddil.json").unlink()
    assert "names no data set: say --data shapes" in refused(capsys, main.command("test"), "--pipeline", "plain")
    shutil.copy(finished / "checkpoints" / "updates=12.ckpt", here / "alone.ckpt")
    assert "no config.yaml beside alone.ckpt or above it" in refused(
        capsys, main.command("export"), "--ckpt_path", "alone.ckpt", "--out", "out"
    )
    text = (finished / "config.yaml").read_text()
    for old, new, said in (
        ("ema: 0.9", "ema: 0.0", "does not fit this config: it has "),
        ("updates: 12", "updatez: 12", "unknown key model.updatez: did you mean model.updates?"),
        ("ddil_lightning.LCM", "LCMM", "no class is called LCMM; did you mean LCM?"),
    ):
        (here / "config.yaml").write_text(text.replace(old, new))
        assert said in refused(capsys, main.command("export"), "--ckpt_path", "alone.ckpt", "--out", "out")
    assert not (here / "out").exists()


def test_a_set_of_one_s_own(tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All of a set smaller than 1000 without --n; and what is missing is said before anything is drawn."""
    (here / "set").mkdir()
    for i in range(17):
        Image.new("RGB", (16, 16), (15 * i, 0, 0)).save(here / "set" / f"{i}.png")
        (here / "set" / f"{i}.txt").write_text("a handwritten one")
    words = ["--pipeline", tiny, "--steps", 1, "--data"]
    said = "--images set is the folder of a caption file's images: give that file too, by --data FILE"
    assert said in refused(capsys, main.command("test"), *words[:2], "--images", "set")
    assert said in refused(capsys, main.command("test"), *words, "digits", "--images", "set")
    assert "n=18: choose 2 to 17 of the 17 images" in refused(capsys, main.command("test"), *words, "set", "--n", 18)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    strictly = refused(capsys, main.command("test"), *words, "set", "--strict")
    assert (
        "the network inception, which frechet, density, " in strictly
        and "need torch-fidelity: pip install 'ddil-lightning[eval]'" in strictly
    )
    said = "no network 'lpisp': did you mean lpips?"
    assert said in refused(capsys, main.command("test"), *words, "set", "--network", "distance=lpisp")
    said = "--network hps: digits has networks of its own, others are for captions of your own"
    assert said in refused(capsys, main.command("test"), *words, "digits", "--network", "hps")
    words = ["--network", "clip=none", "distance=none", *words]
    for given, n in (([], 17), (["--n", 16], 16)):
        assert call(capsys, main.command("test"), *words, "set", *given)[0] == 0
        kept = json.loads((here / "metrics.json").read_text())
        assert kept["n"] == n == kept["rows"][0]["n"] and kept["rows"][0]["metrics"]["frechet"] is None
    for i in range(2, 17):
        (here / "set" / f"{i}.png").unlink()
    assert "set holds 2 images with captions: at least 16" in refused(capsys, main.command("test"), *words, "set")


def test_samples(tiny: Path, finished: Path, here: Path, capsys: Any) -> None:
    words = ["--prompt", "a handwritten two", "a handwritten one", "--out"]
    assert call(capsys, main.command("sample"), "--pipeline", tiny, "--steps", 2, *words, "new/x.png")[0] == 0
    assert Image.open("new/x.png").size == (2 * 256 + 3 * 4, 256 + 2 * 4)  # a row of two
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, out, _ = call(
            capsys,
            main.command("sample"),
            "--pipeline",
            finished / "pipeline",
            *words,
            f"{name}.png",
            "--seed",
            seed,
            "--n",
            3,
            "--scale",
            1,
        )
        assert code == 0 and "6 image(s), 4 steps" in out  # as the folder recommends
    assert Image.open("a.png").size == (3 * 16 + 4 * 4, 2 * 16 + 3 * 4)
    a, b, c = (Path(f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_a_prompt_that_is_too_long(tiny: Path, here: Path, capsys: Any) -> None:
    said = refused(capsys, main.command("sample"), "--pipeline", tiny, "--prompt", "a " * 30, "--out", "x.png")
    assert "tokens and the text encoder reads 16: shorten it" in said and list(here.iterdir()) == []


def test_export_writes_what_the_run_itself_exported(finished: Path, here: Path, capsys: Any) -> None:
    code, out, err = call(capsys, main.command("export"), "--ckpt_path", finished, "--out", "out")
    assert code == 0 and "written and checked: out/pipeline (latents" in out and "model card: out/README.md" in out, err
    assert "its licence is `other`" in out and "say it, by --license" in out
    for path in (p for p in (finished / "pipeline").rglob("*") if p.is_file() and p.name != "README.md"):
        assert (here / "out" / "pipeline" / path.relative_to(finished / "pipeline")).read_bytes() == path.read_bytes(), path
    cards = [(here / "out" / part / "README.md").read_text() for part in (".", "pipeline")]  # of the run, and more than it could know
    assert all("0.75 forward, 0.25 student, 0 teacher" in card and "12 updates, batch 8 a device" in card for card in cards)
    assert "is there and not an empty folder" in refused(capsys, main.command("export"), "--ckpt_path", finished, "--out", "out")
    (here / "empty").mkdir()
    words = ["--ckpt_path", finished, "--out", "empty", "--steps", 2, "--dtype", "float16"]
    assert call(capsys, main.command("export"), *words)[0] == 0
    code, out, err = call(capsys, main.command("export"), *words[:2], "--out", "single", "--format", "single-file", "lora", "--name", "a/b")
    assert code != 0 and "'a/b' is no name for files" in err
    said = refused(capsys, main.command("export"), *words[:2], "--out", "single", "--format", "single-file", "lora")
    assert "this student has no adapters" in said or "told its guidance" in said
    assert "give --push owner/name too" in refused(capsys, main.command("export"), *words[:2], "--out", "single", "--public")
    assert "--push needs the hub, and HF_HUB_OFFLINE is set" in refused(
        capsys, main.command("export"), *words[:2], "--out", "single", "--push", "me/few"
    )
    assert not (here / "single").exists()
    assert json.loads((here / "empty" / "pipeline" / "ddil.json").read_text())["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", [pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4], ids=["lcm", "pd", "dmd2"]
)
def test_a_restored_method_holds_the_one_network_that_is_asked_for(which: int, tiny: Path, here: Path, capsys: Any) -> None:
    """Of a checkpoint with student, average, target, critic and head, and of a pipeline with a teacher: one U-Net, mapped from the file."""
    entry = METHODS[which]
    fields = {**{"guidance": 2.0, "ema": 0.9, "updates": 2}, **{k: v for k, v in entry.kwargs.items() if k != "stages"}}
    stages = ", stages: [{steps: 8, updates: 1}, {steps: 4, updates: 1}]" if entry.name == "pd" else ""
    told = ", ".join(f"{k}: {str(v).lower()}" for k, v in ({**fields, "w_conditioned": False} if which != 4 else fields).items())
    model = f"{{class_path: {entry.method.__name__}, init_args: {{pipeline: {tiny}, {told}{stages}}}}}"
    Path("c.yaml").write_text(f"model: {model}\ndata: {{batch_size: 4}}\ntest: {{n: 0}}\npreviews: {{every: 0}}\n")
    assert call(capsys, main.command("fit"), "--config", "c.yaml", "--run_dir", "r")[0] == 0
    method = restore("r")
    unets = {id(m) for m in [*method.modules(), *method.backbone.parts()] if type(m).__name__ == "UNet2DConditionModel"}
    tensors = [*method.parameters(), *(p for part in method.backbone.parts() for p in part.parameters())]
    assert len(unets) == 1 and not any(p.is_meta for p in tensors)
    state = torch.load("r/checkpoints/updates=2.ckpt", weights_only=True)["state_dict"]
    deployed = method.deployment.network.state_dict()
    assert all(torch.equal(value, state[f"average.{name}"]) for name, value in deployed.items())
    assert torch.equal(method.reflection.lo, state["reflection.lo"]) and method.student_updates == 2 and not method.training
    assert call(capsys, main.command("export"), "--ckpt_path", "r", "--out", "out")[0] == 0
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert Path("out/pipeline", name).read_bytes() == Path("r/pipeline", name).read_bytes()


def test_a_table_is_printed_before_it_is_written(tiny: Path, here: Path, judged: None, capsys: Any) -> None:
    """A full disk costs the file, not the result; a device stays a device, and a link a link."""
    words = ["--pipeline", tiny, "--n", 16, "--steps", 1]
    code, out, err = call(capsys, main.command("test"), *words, "--out", "/dev/full")
    assert code == 2 and "teacher@1" in out and err == "ddil-x: No space left on device: /dev/full\n"
    assert Path("/dev/full").is_char_device()
    (here / "link.json").symlink_to("real.json")
    assert call(capsys, main.command("test"), *words, "--out", "link.json")[0] == 0
    assert (here / "link.json").is_symlink() and json.loads(Path("real.json").read_text())["n"] == 16
    said = refused(capsys, main.command("test"), *words, "--out", ".")  # before an hour of sampling
    assert "--out . is a folder: give the name of a file" in said
    assert sorted(p.name for p in here.iterdir()) == ["link.json", "real.json"]


def test_a_later_row_that_cannot_be_written_is_not_said_to_be(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def write_rows(out: Path, found: dict[str, Any]) -> None:
        if len(found["rows"]) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table, "write_rows", write_rows)
    with pytest.raises(OSError), written(tmp_path / "metrics.json", Processes()) as add:
        for n in (1, 2):
            add(make_row(f"teacher@{n}", n, 1.0, n, 0.1, {"frechet": 1.0}, {"n": 16, "seeds": {"first": 0}}))
    out = capsys.readouterr().out
    assert "teacher@2" in out and "written to" not in out


def test_rows_of_before_stay_unless_they_are_measured_anew(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "metrics.json"

    def row(n: int, stamp: str, digest: str, metrics: list[str] | None = None, dtype: str = "float32") -> dict[str, Any]:
        protocol = {"name": "mine", "n": 16, "seeds": {"first": 0}, "stamp": stamp, "metrics": metrics}
        return make_row(f"student@{n}", n, 1.0, n, 0.1, {"frechet": 1.0}, protocol, {"digest": digest, "dtype": dtype})

    def measured(*rows: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
        with written(out, Processes()) as add:
            for one in rows:
                add(one)
        found = json.loads(out.read_text())
        assert found["rows"] == list(rows)
        return found.get("earlier", []), capsys.readouterr().out

    plain = row(4, "s", "d"), row(2, "s", "e")
    assert measured(*plain)[0] == [] == measured(*plain)[0]  # the same again is no other
    assert measured(plain[0])[0] == [plain[1]]  # as of a test that was stopped after its first row
    assert measured(*plain)[0] == []
    other = row(4, "30k", "d")
    earlier, said = measured(other)
    assert earlier == list(plain) and "under `earlier`: student@4 by mine s, student@2 by mine s\n" in said
    assert measured(*plain)[0] == [other]
    anew, half, fewer = row(4, "s", "later"), row(4, "s", "d", dtype="float16"), row(4, "s", "d", ["frechet"])
    assert measured(anew)[0] == [*plain, other]
    assert measured(half)[0] == [anew, *plain, other]
    assert measured(fewer)[0] == [half, anew, *plain, other]  # which lacks numbers that the plain one has
    assert measured(*plain)[0] == [half, anew, other]
    out.write_text("somebody's own notes")
    assert measured(*plain)[0] == []


@pytest.mark.slow
def test_pictures_and_pipelines_go_where_they_are_meant_to(tiny: Path, finished: Path, here: Path, capsys: Any) -> None:
    sample = ["--pipeline", tiny, "--prompt", "a digit", "--steps", 1]
    (here / "link.png").symlink_to("real.png")
    assert call(capsys, main.command("sample"), *sample, "--out", "link.png")[0] == 0 and (here / "link.png").is_symlink()
    assert call(capsys, main.command("sample"), *sample, "--out", "/dev/null")[0] == 0 and Path("/dev/null").is_char_device()
    assert "Is a directory" in refused(capsys, main.command("sample"), *sample, "--out", ".")
    (here / "real").mkdir()
    (here / "out").symlink_to("real")
    assert call(capsys, main.command("export"), "--ckpt_path", finished, "--out", "out")[0] == 0
    assert (here / "out").is_symlink() and (here / "real" / "pipeline" / "unet").is_dir() and not list(here.glob(".*"))


def test_a_pipeline_of_another_size_than_the_data_names_the_remedy(tiny: Path, here: Path, capsys: Any) -> None:
    said = refused(capsys, main.command("test"), "--pipeline", tiny, "--data", "shapes", "--n", 16)
    assert "shapes are pictures of 32 pixels and the pipeline" in said and "makes 16" in said and "--data CAPTIONS --images DIR" in said


def test_captions_that_are_too_long_are_said_before_anything_is_sampled(tiny: Path, here: Path, monkeypatch: Any, capsys: Any) -> None:
    for i in range(16):
        Image.new("RGB", (16, 16)).save(here / f"{i}.png")
        (here / f"{i}.txt").write_text("a small red circle " * (9 if i == 7 else 1))
    suite = Suite("own", [f"{'a digit ' * (9 if i == 7 else 1)}" for i in range(16)])
    monkeypatch.setattr(Suite, "of", staticmethod(lambda *args, **kwargs: suite))
    words = ["--pipeline", tiny, "--data", str(here), "--n", 16, "--steps", 1]
    assert "and the text encoder reads 16: shorten it, or cut it by --truncate" in refused(capsys, main.command("test"), *words)
    assert call(capsys, main.command("test"), *words, "--truncate")[0] == 0


def test_every_step_count_is_asked_for_before_anything_is_sampled(
    tiny: Path, finished: Path, here: Path, judged: None, monkeypatch: Any, capsys: Any
) -> None:
    """A count that fails after an hour would cost the rows before it. LCM's grid has 50 nodes; a table of 1000 times has no 1000."""
    monkeypatch.setattr(scoring, "pipeline_row", lambda *args: pytest.fail("it has begun"))
    pipeline = finished / "pipeline"
    said = refused(capsys, main.command("test"), "--pipeline", pipeline, "--n", 16, "--steps", 4, 60)
    assert said.startswith(f"ddil-x: --steps 60: {pipeline} cannot be sampled in so many steps (LCMScheduler: ")
    words = ["--pipeline", pipeline, "--steps", 60, "--prompt", "a zero", "--out", "x.png"]
    assert "--steps 60: " in refused(capsys, main.command("sample"), *words)
    shutil.copytree(tiny, here / "leading")
    file = here / "leading" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "timestep_spacing": "leading", "steps_offset": 1}))
    said = refused(capsys, main.command("test"), "--pipeline", "leading", "--n", 16, "--steps", 4, 1000)
    assert "--steps 1000: leading cannot be sampled in so many steps (DDIMScheduler: its times begin at 1000)" in said
    assert [p.name for p in here.iterdir()] == ["leading"]


def test_a_solver_that_fails_in_few_steps_is_found_before_more_are_measured(
    tiny: Path, here: Path, judged: None, monkeypatch: Any, capsys: Any
) -> None:
    from diffusers import DPMSolverMultistepScheduler as Solver

    whole = Solver.set_timesteps

    def short(self: Any, n: int, **kwargs: Any) -> None:
        whole(self, n, **kwargs)
        self.sigmas = self.sigmas[: 1 if n == 1 else None]

    monkeypatch.setattr(Solver, "set_timesteps", short)
    monkeypatch.setattr(scoring, "pipeline_row", lambda *args: pytest.fail("it has begun"))
    said = refused(capsys, main.command("test"), "--pipeline", tiny, "--n", 16, "--steps", 4, 1, "--dpm")
    assert said.startswith(f"ddil-x: {tiny} cannot be sampled in 1 step by its DPMSolverMultistepScheduler (IndexError: index 1 is out of")


def test_a_restored_method_knows_where_it_was(finished: Path) -> None:
    method = restore(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert method.student_updates == 12 and method.evaluations["teacher"] <= summary["network_evaluations"]["teacher"]
    state = torch.load(finished / "checkpoints" / "updates=12.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items() if "network" not in name)
    assert not method.training
