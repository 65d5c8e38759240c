"""A pipeline that is read again beside the method that it came from: the device holds nothing twice, and what is shared was compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ddil_lightning.backbones import saving
from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.resting import visiting
from ddil_lightning.methods import LCM
from ddil_lightning.runs import export, release, reread
from ddil_lightning.runs.release import Release
from ddil_lightning.training.options import Memory

PROMPTS = ["a handwritten one", ""]
LORA: dict[str, Any] = {"adapter": Adapter(2)}
FLOW: dict[str, Any] = {"solver_steps": 40, "rollouts": [2, 4, 5]}


def student(folder: Path, dtype: Any = "float32", **kwargs: Any) -> Any:
    """One that is no longer its teacher."""
    fields: Any = {"guidance": 2.0, "w_conditioned": False, "memory": Memory(dtype), **kwargs}
    method = LCM(pipeline=str(folder), **fields).eval()
    with torch.no_grad():
        for p in filter(lambda p: p.requires_grad, method.outgoing.network.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
    return method


def storages(module: nn.Module) -> dict[int, int]:
    """The bytes of its storages by where they begin."""
    tensors = [x for x in (*module.parameters(), *module.buffers()) if x.numel()]
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


@contextmanager
def counted(method: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, the bytes that a device would hold whenever a layer computes: all of the method and of its pipeline, and who visits.

    Every layer that computes has to be there. What is read, merged or rounded lies on the CPU until it comes.
    """
    here: dict[int, int] = {}
    for module in (method, *method.backbone.parts()):
        here |= storages(module)
    seen, real = [sum(here.values())], visiting

    @contextmanager
    def watched(guest: nn.Module, others: Any, device: torch.device) -> Iterator[None]:
        others = list(others)
        before, new = dict(here), storages(guest)
        if not new.keys() <= here.keys():
            for other in others:
                for place in storages(other):
                    here.pop(place, None)
            here.update(new)
        with real(guest, others, device):
            yield
        here.clear()
        here.update(before)

    def computes(module: nn.Module, args: Any) -> None:
        own = [x for x in module._parameters.values() if x is not None]
        assert all(x.untyped_storage().data_ptr() in here for x in own), f"a {type(module).__name__} is not on the device"
        if own:
            seen.append(sum(here.values()))

    monkeypatch.setattr(export, "visiting", watched)
    handle = nn.modules.module.register_module_forward_pre_hook(computes)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("folder", "dtype", "fields"),
    [("sd3", "bfloat16", LORA | FLOW), ("light", "float32", LORA), ("light", "float32", {"ema": 0.9})],
    ids=["lean", "adapters", "whole"],
)
def test_the_end_of_a_run_and_its_rehearsal_hold_nothing_twice(
    folder: str, dtype: str, fields: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = student(request.getfixturevalue(folder), dtype, **fields)
    with counted(method, monkeypatch) as seen:
        export.rehearse(method, tmp_path / "rehearsal", PROMPTS, 1)
        assert len(seen) > 10 and max(seen) == seen[0]
        assert export.deliver(method, tmp_path / "out", PROMPTS, 1) < 1e-4
        assert export.deliver(method, tmp_path / "half", PROMPTS, 1, torch.bfloat16) < 1e-4
    assert max(seen) == seen[0]


def test_a_release_holds_nothing_twice(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = student(light, "bfloat16", **LORA)
    with counted(method, monkeypatch) as seen:
        found = dict(release.release(method, Release(tmp_path, ["lora", "single-file"], "x", 1, PROMPTS)))
    assert len(found) == 2 and max(found.values()) < 1e-5 and len(seen) > 10 and max(seen) == seen[0]


def test_what_is_shared_is_what_was_written(light: Path, tmp_path: Path) -> None:
    """The folder is read whole: an encoder that is another one there is found, though the method's own takes its place."""
    method = student(light)
    export.export(method, tmp_path / "p")
    made = export.reloaded(method, tmp_path / "p")
    assert made.frozen() == method.backbone.frozen() and made.network() is not method.backbone.network()
    file = tmp_path / "p" / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    name = next(name for name in stored if name.endswith("final_layer_norm.weight"))
    stored[name] = stored[name] * 1.1
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(export.NotAsTrained, match=f"the text_encoder in the pipeline p is not as it was written: {name} is another"):
        export.verify(method, tmp_path / "p", PROMPTS, 1)


def test_a_frozen_part_with_other_settings_is_found(light: Path, tmp_path: Path) -> None:
    """Its weights are the same, and the method's own would have answered in its place."""
    method = student(light)
    export.export(method, tmp_path / "p")
    for part, old, new in (("vae", "scaling_factor", 0.5), ("text_encoder", "layer_norm_eps", 0.1)):
        file = tmp_path / "p" / part / "config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps(said | {old: new}))
        with pytest.raises(export.NotAsTrained, match=f"the {part} in the pipeline p is not as it was written: it has another {old}"):
            export.verify(method, tmp_path / "p", PROMPTS, 1)
        file.write_text(json.dumps(said))
    assert export.verify(method, tmp_path / "p", PROMPTS, 1) < 1e-5


def test_large_tensors_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reread, "PIECE", 7)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    off = x.clone()
    off[4, 5] += 2**-6 * float(x.abs().max())
    assert reread._near(x, x.clone()) and reread._near(x.bfloat16(), x) and not reread._near(off, x)
    assert reread._near(torch.zeros(0), torch.zeros(0, dtype=torch.float16)) and not reread._near(x * torch.nan, x)


def test_a_precision_that_is_asked_for_is_that_of_all_parts(light: Path, tmp_path: Path) -> None:
    """Whatever the run held its autoencoder in."""
    method = student(light, "bfloat16", **LORA)
    export.deliver(method, tmp_path / "p", PROMPTS, 2, torch.bfloat16)
    found = {part: load_file(next((tmp_path / "p" / part).glob("*.safetensors"))) for part in ("unet", "text_encoder", "vae")}
    assert {x.dtype for state in found.values() for x in state.values() if x.is_floating_point()} == {torch.bfloat16}


def test_a_network_with_other_settings_is_found(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a lean student, whose reloaded network is not asked."""
    method, write = student(light, "bfloat16", **LORA), type(student(light).backbone).save

    def other(self: Any, folder: Path, network: Any, *args: Any) -> Any:
        write(self, folder, network, *args)
        text = (folder / "unet" / "config.json").read_text()
        (folder / "unet" / "config.json").write_text(text.replace('"norm_eps": 1e-05', '"norm_eps": 1e-03'))

    monkeypatch.setattr(type(method.backbone), "save", other)
    with pytest.raises(export.NotAsTrained, match="the pipeline made is not as it was written: it has another norm_eps"):
        export.deliver(method, tmp_path / "p", PROMPTS, 1)


def test_a_lean_student_is_delivered_as_it_was_held(light: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network and its text encoder in the half precision of the training, each number rounded once; the autoencoder in float32."""
    method, read = student(light, "bfloat16", **LORA), []
    load = saving.load_pipeline
    monkeypatch.setattr(saving, "load_pipeline", lambda source, dtype, **kwargs: (read.append(dtype), load(source, dtype, **kwargs))[1])
    assert export.deliver(method, tmp_path / "p", PROMPTS, 2) < 1e-5
    assert read == [{"default": torch.bfloat16, "vae": torch.float32}]  # no part is ever read in more
    exact = method.backbone.merged(method.outgoing.network).model.state_dict()
    kept = {part: load_file(next((tmp_path / "p" / part).glob("*.safetensors"))) for part in ("unet", "text_encoder", "vae")}
    assert kept["unet"].keys() == exact.keys() and {x.dtype for x in exact.values()} == {torch.float32}
    assert all(torch.equal(value, exact[name].to(torch.bfloat16)) for name, value in kept["unet"].items())
    types = {part: {x.dtype for x in state.values() if x.is_floating_point()} for part, state in kept.items()}
    assert types == {"unet": {torch.bfloat16}, "text_encoder": {torch.bfloat16}, "vae": {torch.float32}}
    theirs = load_file(light / "text_encoder" / "model.safetensors")
    assert all(torch.equal(value, theirs[name].to(value)) for name, value in kept["text_encoder"].items())
    assert ", dtype=torch.bfloat16)" in (tmp_path / "p" / "README.md").read_text()
    assert export.deliver(student(light), tmp_path / "whole", PROMPTS, 2) < 1e-4  # whole copies in float32, as they are
    assert {x.dtype for x in load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors").values()} == {torch.float32}


def test_who_visits_takes_the_place_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others leave first; parameters stay the very objects that they were, with their values, after an error too."""
    there, (guest, other) = torch.device("meta"), (nn.Linear(2, 3).requires_grad_(False) for _ in "12")
    objects, values = [*guest.parameters(), *other.parameters()], [p.clone() for p in (*guest.parameters(), *other.parameters())]
    moves: list[str] = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (moves.append("off"), x.clone())[1])
    monkeypatch.setattr(torch.Tensor, "to", lambda x, place: (moves.append("on" if place == there else "back"), x.clone())[1])
    places = [p.data_ptr() for p in objects]
    with pytest.raises(KeyError), visiting(guest, [other], there):
        assert moves == ["off", "off", "on", "on"] and not {p.data_ptr() for p in objects} & {*places}
        raise KeyError
    assert moves[4:] == ["back", "back"] and [p.data_ptr() for p in objects[:2]] == places[:2]  # the guest is not copied back
    assert all(a is b for a, b in zip(objects, (*guest.parameters(), *other.parameters()), strict=True))
    assert all(torch.equal(p, value) for p, value in zip(objects, values, strict=True))
    with visiting(guest, [other], torch.device("cpu")):  # who is there already
        assert len(moves) == 6
