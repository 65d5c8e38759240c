"""Modules that rest on the CPU: called on another device they are there, and afterwards nothing of them has changed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones import interface
from ddil_lightning.backbones.resting import Resting, to_file
from ddil_lightning.training import offload
from suite import BY_NAME, build, captions, equal, fit, state

META = torch.device("meta")  # the other device of a machine that has none


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False).eval()


def places(module: nn.Module) -> set[str]:
    return {x.device.type for x in (*module.parameters(), *module.buffers())}


def test_it_works_where_it_is_called_and_lies_where_it_lay() -> None:
    module, seen = net(), []
    module[0].register_forward_hook(lambda m, args, out: seen.append((places(m), out.device.type)))
    before = {name: (x, x.data_ptr()) for name, x in module.state_dict().items()}
    resting = Resting(module)
    assert module(torch.ones(4, 2, device=META)).device.type == "meta" and seen == [({"meta"}, "meta")]
    assert places(module) == {"cpu"}
    assert all(torch.equal(x, before[name][0]) and x.data_ptr() == before[name][1] for name, x in module.state_dict().items())
    resting.wake()
    assert not module._forward_pre_hooks and not module._forward_hooks and places(module) == {"cpu"}


def test_a_call_that_fails_leaves_it_at_rest() -> None:
    module = net()
    Resting(module)
    with pytest.raises(RuntimeError, match="reduction dim"):
        module(torch.ones(4, 5, device=META))
    assert places(module) == {"cpu"}


def test_gradients_wake_it_for_good() -> None:
    """The backward pass needs the weights where the forward pass had them."""
    module = net()
    resting = Resting(module)
    module(torch.ones(4, 2, requires_grad=True)).sum().backward()
    assert not resting.module._forward_pre_hooks and places(module) == {"cpu"}


def test_what_is_shared_stays() -> None:
    module = net()
    module[0].to(META)
    Resting(module, module[0].parameters())
    assert places(module[0]) == {"meta"} and places(module[1]) == {"cpu"}
    shared = list(module[0].parameters())
    module(torch.ones(4, 2, device=META))
    assert all(a is b for a, b in zip(module[0].parameters(), shared, strict=True))


class Large(nn.Module):
    """Tied weights, an order of memory of its own, a buffer that repeats one row, something small."""

    def __init__(self) -> None:
        super().__init__()
        self.tied = nn.ModuleList([nn.Linear(600, 600, bias=False), nn.Linear(600, 600)])
        self.tied[1].weight = self.tied[0].weight
        self.conv = nn.Conv2d(256, 256, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        self.register_buffer("rows", torch.arange(3.0).expand(2**18, 3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied[1](self.tied[0](x))


def resident() -> int:
    """Bytes of anonymous memory of this process, counted page by page: the sum in `status` may lag behind."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in rollup if line.startswith("Anonymous:")).split()[1]) * 1024


def test_on_a_cpu_it_lies_in_a_file_and_is_what_it_was(tmp_path: Path) -> None:
    module, x = Large(), torch.ones(1, 600)
    before = {name: (value.clone(), value.stride(), value.data_ptr()) for name, value in module.state_dict().items()}
    answer = module(x)
    to_file([module], tmp_path / "new")
    after = module.state_dict()
    assert all(torch.equal(after[name], value) and after[name].stride() == stride for name, (value, stride, _) in before.items())
    moved = {name for name, (_, _, place) in before.items() if after[name].data_ptr() != place}
    assert moved == {"tied.0.weight", "tied.1.weight", "conv.weight"} and module.tied[0].weight is module.tied[1].weight
    assert torch.equal(module(x), answer) and not list((tmp_path / "new").iterdir())
    module.tied[0].weight.zero_()  # a private copy: no file is written
    assert not module.tied[1].weight.any()


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's count of memory")
def test_what_lies_in_a_file_takes_no_memory(tmp_path: Path) -> None:
    """In pages of its own, which go back to the system with the tensor: an allocator may keep those that it was given back."""
    pages = mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    module = nn.Linear(4096, 4096, bias=False, device=META)
    module.weight = nn.Parameter(torch.frombuffer(pages, dtype=torch.float32).view(4096, 4096), requires_grad=False)
    del pages
    module.weight.fill_(0.5)
    place, with_it = module.weight.data_ptr(), resident()
    to_file([module], tmp_path)
    assert module.weight.data_ptr() != place and with_it - resident() > 0.9 * module.weight.nbytes
    assert module.weight.eq(0.5).all()


def test_where_a_file_finds_no_room_it_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    module = nn.Linear(600, 600)
    place = module.weight.data_ptr()
    folder = tmp_path / "file" / "folder"
    to_file([module], folder)
    assert module.weight.data_ptr() == place
    assert caplog.messages == [f"weights that nobody asks stay in memory, a file in {folder} cannot hold them: Not a directory"]


@pytest.mark.parametrize(
    ("name", "names"), [("lcm", ("average", "target", "teacher")), pytest.param("lcm-lora", ("average", "target"), marks=pytest.mark.slow)]
)
def test_a_run_is_the_same_with_its_roles_at_rest(name: str, names: tuple[str, ...], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[Any] = []

    class Seen(Resting):
        def __init__(self, module: nn.Module, shared: Any = (), home: Any = None) -> None:
            super().__init__(module, shared, home)
            rested.append(module)

    def run(**memory: Any) -> Any:
        torch.manual_seed(0)
        return fit(build(BY_NAME[name], tiny, updates=3, memory=memory), captions(tiny))

    plain = run()
    monkeypatch.setattr(offload, "apart", lambda device: True)
    monkeypatch.setattr(offload, "Resting", Seen)
    monkeypatch.setattr(interface, "Resting", Seen)
    other = run(offload=names)
    assert equal(state(plain), state(other))
    pipe = other.method.backbone.pipe
    encoders = [pipe.text_encoder, *pipe.vae.children()]  # the data are encoded
    assert rested[: len(encoders)] == encoders and len(rested) == len(encoders) + len(names)
    assert other.method.backbone.at is None and not any(m._forward_pre_hooks for m in rested)  # awake again


def test_encoders_that_nobody_will_ask_are_never_on_the_device(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data that are encoded already: not before the training either, when all networks go there."""
    from ddil_lightning.data import preparation

    data, method = captions(light), build(BY_NAME["lcm"], light, updates=1)
    for module in (offload, preparation):
        monkeypatch.setattr(module, "apart", lambda device: True)
    moved: list[str] = []
    parts = {name: part for name, part in method.backbone.pipe.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        for module in part.modules():
            apply = module._apply
            monkeypatch.setattr(module, "_apply", lambda *args, apply=apply, name=name: (moved.append(name), apply(*args))[1])
    end, trained = method.offload.end, []
    monkeypatch.setattr(method.offload, "end", lambda method: (trained.extend(moved), end(method)))  # then all goes to the CPU
    fit(method, data)
    assert set(trained) == {"unet"} and method.backbone.at is None and not method.backbone.resting
    assert not any(m._forward_pre_hooks for part in parts.values() for m in part.modules())
    moved.clear()
    method.backbone.rest(torch.device("cpu"))
    assert method.backbone.to(torch.device("cpu")) and {*moved} == {*parts} and not method.backbone.resting  # by name all of it moves


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("lcm", ("student",), "memory.offload has 'student', which is trained: give names of target, teacher, average"),
        ("lcm", ("former",), "memory.offload has 'former', which there is not"),
        ("dmd2", ("critic",), "'critic', which is trained: give names of teacher, average"),
        ("lcm-lora", ("teacher",), "'teacher', which is the network below the adapters of all others"),
    ],
)
def test_what_cannot_rest_is_refused(name: str, given: tuple[str, ...], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        build(BY_NAME[name], tiny, memory={"offload": given})
