"""Modules that rest on the CPU: called on another device they are there, and afterwards nothing of them has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddil_lightning.backbones.resting import Resting
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


@pytest.mark.parametrize(("name", "names"), [("lcm", ("average", "target", "teacher")), ("lcm-lora", ("average", "target"))])
def test_a_run_is_the_same_with_its_roles_at_rest(name: str, names: tuple[str, ...], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rested: list[Any] = []

    class Seen(Resting):
        def __init__(self, module: nn.Module, shared: Any = ()) -> None:
            super().__init__(module, shared)
            rested.append(module)

    def run(**memory: Any) -> Any:
        torch.manual_seed(0)
        return fit(build(BY_NAME[name], tiny, updates=3, memory=memory), captions(tiny))

    plain = run()
    monkeypatch.setattr(offload, "apart", lambda device: True)
    monkeypatch.setattr(offload, "Resting", Seen)
    other = run(offload=names)
    assert equal(state(plain), state(other))
    pipe = other.method.backbone.pipe
    encoders = [pipe.text_encoder, *pipe.vae.children()]  # the data are encoded
    assert rested[: len(encoders)] == encoders and len(rested) == len(encoders) + len(names)
    assert other.method.backbone.at is None and not any(m._forward_pre_hooks for m in rested)  # awake again


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
