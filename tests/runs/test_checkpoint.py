"""Checkpoints that a run goes on from: found, and refused by name where they do not fit or lack something."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.commands.restore import restore
from ddil_lightning.runs import checkpoint
from ddil_lightning.runs import folder as run_folder
from suite import BY_NAME, METHODS, PER_METHOD, build, equal, train


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoints(folder: Path, *clocks: int) -> list[Path]:
    (folder / "checkpoints").mkdir(parents=True)
    made = [folder / "checkpoints" / f"updates={clock}.ckpt" for clock in clocks]
    for path in made:
        torch.save({"ddil": {"student_updates": checkpoint.clock_of(path)}, "state_dict": {}}, path)
    return made


def test_which_checkpoint(here: Path) -> None:
    made = checkpoints(here / "r", 4, 20, 8)
    for ckpt_path, run_dir in (("last", "r"), ("r", None), ("r/checkpoints", None)):
        assert checkpoint.find_checkpoint(ckpt_path, run_dir, "c") == made[1]
    assert checkpoint.find_checkpoint("r/checkpoints/updates=8.ckpt", None, "c") == Path("r/checkpoints/updates=8.ckpt")
    for ckpt_path, run_dir, said in (
        ("last", None, "runs/c/latest does not exist"),
        ("nowhere.ckpt", None, "nowhere.ckpt does not exist"),
        (".", None, "holds no checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpoint.find_checkpoint(ckpt_path, run_dir, "c")


def test_checkpoints_outside_their_run_s_folder(here: Path) -> None:
    """Which names them, and which they name."""
    run, (made,) = here / "r", checkpoints(here / "fast", 4)
    checkpoints(run, 2)  # of before the run had them written elsewhere
    (run / "config.yaml").write_text("checkpoints: {folder: fast/checkpoints}\n")
    assert checkpoint.find_checkpoint("last", "r", "c") == made and checkpoint.folder_of(made) is None
    checkpoint.note_run(made.parent, Path("r"))
    assert checkpoint.folder_of(made) == run and checkpoint.config_of("fast/checkpoints") == run / "config.yaml"
    (here / "s").mkdir()
    (here / "s" / "config.yaml").touch()
    checkpoint.note_run(made.parent, Path("s"))  # of another run by now
    assert checkpoint.find_checkpoint("last", "r", "c").parent == run / "checkpoints" and checkpoint.folder_of(made) == here / "s"


def test_half_a_checkpoint_is_named_and_so_are_the_others(here: Path) -> None:
    old, new = checkpoints(here / "r", 4, 8)
    new.write_bytes(new.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"updates=8.ckpt cannot be read .* half written .*; take another: updates=4.ckpt"):
        checkpoint.load_checkpoint(new)
    assert checkpoint.load_checkpoint(old)["ddil"] == {"student_updates": 4}
    for alien in ({"weights": 1}, [1, 2]):
        torch.save(alien, "alien.ckpt")
        with pytest.raises(ValueError, match=r"alien.ckpt is no checkpoint of this library"):
            checkpoint.load_checkpoint(Path("alien.ckpt"))


@pytest.mark.parametrize("entry", **PER_METHOD)
def test_a_reinstated_method_is_the_trained_one(entry: Any, light: Path) -> None:
    """Networks, averages, clocks and, of a run in stages, the stage with its grid and its teacher."""
    trained, fresh = train(entry, light).method, build(entry, light, seed=1)
    state, again = {"state_dict": trained.state_dict()}, {}
    trained.on_save_checkpoint(state)
    assert not equal(dict(fresh.state_dict()), dict(state["state_dict"]))
    checkpoint.reinstate(fresh, state)
    fresh.on_save_checkpoint(again)
    assert equal(dict(fresh.state_dict()), dict(state["state_dict"])) and again["ddil"] == state["ddil"]
    assert fresh.student_updates == 6 and fresh.stage == trained.stage and equal(fresh.grid.times, trained.grid.times)
    for role, theirs in ((fresh.roles[name], trained.roles[name]) for name in trained.roles):
        assert role.predicts == theirs.predicts
        assert equal(dict(role.network.state_dict()), dict(theirs.network.state_dict()))


def test_weights_that_do_not_fit_are_named(here: Path) -> None:
    method: Any = torch.nn.Linear(2, 3)
    method.roles, method.averaging = {}, SimpleNamespace(role=None)
    good = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    checkpoint.check_fits(here, {"state_dict": good}, method)
    for state, said in (
        ({"weight": good["weight"]}, "it lacks bias"),
        ({**good, "more": good["bias"]}, "it has more as well"),
        ({**good, "bias": torch.zeros(4)}, "the shape of bias differs"),
        ({**good, "bias": 5}, "the shape of bias differs"),
    ):
        with pytest.raises(ValueError, match=f"does not fit this config: {said}"):
            checkpoint.check_fits(here, {"state_dict": state}, method)


def test_only_the_newest_checkpoint_is_gone_on_from(here: Path) -> None:
    old, new = checkpoints(here / "r", 4, 8)
    checkpoint.check_newest(new)
    with pytest.raises(ValueError, match=r"updates=4.ckpt is not the newest .* updates=8.ckpt: .*--run_dir"):
        checkpoint.check_newest(old)
    assert checkpoint.folder_of(new) is None
    (here / "r" / "config.yaml").touch()
    assert checkpoint.folder_of(new) == here / "r"


def test_latest_without_links(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    checkpoints(here / "somewhere", 4)
    run_folder.point_latest(Path("somewhere"), "c")
    assert checkpoint.find_checkpoint("last", None, "c") == here / "somewhere" / "checkpoints" / "updates=4.ckpt"


WHOLE = ("DDILDataModule", "DDILDataModule.done", "DDILDataModule.buffers", "loops", "callbacks", "optimizer_states", "lr_schedulers")


@pytest.fixture(scope="module")
def untrained(tiny: Path) -> Any:
    """The method of the finished run, which checkpoints are compared with and nobody trains."""
    return build(METHODS[0], tiny)


@pytest.mark.parametrize("key", [*WHOLE, "optimizer_states.0.state", "ddil.stage_start", "ddil.evaluations.teacher", "ddil.has_box"])
def test_a_checkpoint_that_lacks_something_is_refused_by_name(key: str, finished: Path, untrained: Any) -> None:
    """Half of a state is never restored in silence."""
    path = finished / "checkpoints" / "updates=12.ckpt"
    state, method = checkpoint.load_checkpoint(path), untrained
    checkpoint.check_whole(path, state, method)
    *above, last = key.split(".")
    inner: Any = state
    for name in above:
        inner = inner[int(name)] if name.isdigit() else inner[name]
    inner[last] = {} if last == "state" else inner.pop(last) and None
    if last != "state":
        del inner[last]
    with pytest.raises(ValueError, match=rf"the checkpoint {path} lacks {key}: ") as error:
        checkpoint.check_whole(path, state, method)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_half_of_the_optimisers_is_refused(tiny: Path, here: Path) -> None:
    """Lightning restores as many optimisers, and states of parameters, as there are, and begins the others anew."""
    entry = next(entry for entry in METHODS if entry.name == "dmd2")
    train(entry, tiny, Checkpoints(folder=str(here)), updates=2)
    path = here / "updates=2.ckpt"
    method, read = build(entry, tiny, updates=2), lambda: checkpoint.load_checkpoint(path)
    checkpoint.check_whole(path, read(), method)
    assert method._trainer is None  # the stand-in that the optimisers are made with stays with nobody
    first: list[tuple[Any, str]] = [
        (lambda s: s.update(optimizer_states=s["optimizer_states"][:1]), "lacks optimizer_states.1"),
        (lambda s: s["optimizer_states"].append(s["optimizer_states"][0]), r"has optimizer_states.2, and the method 2 optimiser\(s\)"),
        (lambda s: s["optimizer_states"].reverse(), "has 218 parameters in optimizer_states.0, and the method 208"),
        (lambda s: [s["optimizer_states"][1]["state"].pop(k) for k in range(1, 218)], "lacks optimizer_states.1.state.1"),
        (lambda s: s["optimizer_states"][1]["state"].update({217: {}}), "lacks optimizer_states.1.state.217"),
        (lambda s: s.update(callbacks={}), "lacks callbacks.Checkpoints"),
        (lambda s: s.update(callbacks=None), "lacks callbacks.Checkpoints"),
        (lambda s: s["ddil"].update(evaluations=5), "lacks ddil.evaluations.student"),
    ]
    for change, said in first:
        changed = read()
        change(changed)
        with pytest.raises(ValueError, match=f"the checkpoint {path} {said}: it was changed or written by another version"):
            checkpoint.check_whole(path, changed, method)


def test_optimisers_that_never_stepped_and_parameters_without_gradients_have_no_state(finished: Path, tiny: Path) -> None:
    path = finished / "checkpoints" / "updates=12.ckpt"
    state, method = checkpoint.load_checkpoint(path), build(METHODS[0], tiny)
    steps = state["optimizer_states"][0]["state"]
    own = list(method.student.parameters())[3]
    name = next(name for name, p in method.named_parameters() if p is own)
    state["state_dict"][name] = own.detach().clone()  # as it is where no loss depends on it
    del steps[3]
    checkpoint.check_whole(path, state, method)
    steps.clear()
    state["ddil"]["stage_start"] = state["ddil"]["student_updates"]
    checkpoint.check_whole(path, state, method)


@pytest.mark.parametrize(("options", "complete"), [({}, True), pytest.param({"momentum": 0.9}, False, marks=pytest.mark.slow)])
def test_an_optimiser_that_keeps_nothing_has_no_state(options: dict[str, Any], complete: bool, light: Path, here: Path) -> None:
    """A run with plain SGD could not be resumed."""
    given = {"optimizer": {"kind": "SGD", "options": options}}
    train(METHODS[0], light, Checkpoints(folder=str(here)), updates=2, **given)
    path, method = here / "updates=2.ckpt", build(METHODS[0], light, **given)
    state = checkpoint.load_checkpoint(path)
    checkpoint.check_whole(path, state, method)
    state["optimizer_states"][0]["state"] = {}
    if complete:
        checkpoint.check_whole(path, state, method)
        return
    with pytest.raises(ValueError, match=r"lacks optimizer_states.0.state"):
        checkpoint.check_whole(path, state, method)


@pytest.mark.slow
def test_adapters_of_another_strength_are_not_gone_on_from(tiny: Path, here: Path) -> None:
    """Their weights have the same names and shapes, and with another alpha they are another student."""
    entry = BY_NAME["lcm-lora"]
    train(entry, tiny, Checkpoints(folder=str(here)), updates=1)
    path = here / "updates=1.ckpt"
    state = checkpoint.load_checkpoint(path)
    checkpoint.check_whole(path, state, build(entry, tiny))
    other = build(entry, tiny, adapter=Adapter(4, alpha=4.0))
    with pytest.raises(ValueError, match=r"its adapters have an alpha of 8 x rank, and these one of 1 x rank"):
        checkpoint.check_whole(path, state, other)
    del state["ddil"]["strength"]  # as runs of before have it
    checkpoint.check_whole(path, state, other)


def test_an_optimiser_that_asks_more_of_its_trainer_is_left_alone(finished: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, method = finished / "checkpoints" / "updates=12.ckpt", build(METHODS[0], tiny)
    monkeypatch.setattr(type(method), "configure_optimizers", lambda self: self.trainer.world_size)
    checkpoint.check_whole(path, checkpoint.load_checkpoint(path), method)


@pytest.mark.parametrize(
    "key", [pytest.param("stage", marks=pytest.mark.slow), "has_box", pytest.param("evaluations", marks=pytest.mark.slow)]
)
def test_a_student_without_its_clock_is_refused_by_name(key: str, finished: Path, here: Path) -> None:
    """ddil-test and ddil-export said KeyError, and not of which file."""
    state = torch.load(finished / "checkpoints" / "updates=12.ckpt", weights_only=True)
    del state["ddil"][key]
    torch.save(state, here / "x.ckpt")
    (here / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(ValueError, match=f"the checkpoint x.ckpt lacks ddil.{key}: "):
        restore("x.ckpt")


def test_a_checkpoint_is_mapped_and_not_read(finished: Path) -> None:
    """Its tensors lie in the file: a process that wants one of them reads no other."""
    state = checkpoint.load_checkpoint(finished / "checkpoints" / "updates=12.ckpt")["state_dict"]
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc here")
    assert "updates=12.ckpt" in maps.read_text()
    assert all(tensor.device.type == "cpu" for tensor in state.values())
