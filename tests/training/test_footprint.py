"""The memory plan's arithmetic, against methods that are built and steps that are taken."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.backbones.adapters import Adapter
from ddil_lightning.backbones.outline import Outline
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.commands.plan import recomputing
from ddil_lightning.methods import LADD, SiD
from ddil_lightning.training import frugality
from ddil_lightning.training.footprint import Footprint, Part, Setting, away, footprint, parts, placed
from ddil_lightning.training.frugality import smaller
from ddil_lightning.training.ledger import Ledger, Precision, latents
from ddil_lightning.training.options import Memory
from options import options
from suite import BY_NAME, Entry

ENTRIES = [pytest.param(name, marks=() if name == "lcm-lora" else pytest.mark.slow) for name in ("lcm", "dmd2", "lcm-lora", "dmd2-lora")]


def made(entry: Entry, backbone: Any, **kwargs: Any) -> Any:
    return entry.method(**{"pipeline": backbone, "guidance": [1.0, 3.0], "ema": 0.9, **options(entry.method, entry.kwargs, kwargs)})


def stepped(method: Any, batch: int, times: int = 1) -> tuple[list[torch.optim.Optimizer], int, int]:
    """One real update of a method: its optimisers, the bytes of its gradients, and those saved for the backward passes at a time."""
    strategy = SimpleNamespace(backward=lambda loss, *a: loss.backward(), reduce_boolean_decision=lambda fine: fine)
    method.trainer = SimpleNamespace(precision_plugin=Precision("32-true"), strategy=strategy, global_rank=0)
    made = method.configure_optimizers()
    strategy._lightning_optimizers = list(made) if isinstance(made, list) else [made]
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    saved: dict[int, int] = {}
    grads: dict[int, int] = {}
    for p in method.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: grads.update({id(p): p.grad.untyped_storage().nbytes()}))

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    method.on_student_turn()
    b = latents(method, batch, method.teacher.null)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for i in range(times):
            method.training_step(b, i)
    return strategy._lightning_optimizers, sum(grads.values()), sum(saved.values())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_plan_of_configurations_is_what_a_method_holds_and_a_step_takes(name: str, light: Path) -> None:
    """Weights, gradients and states to the byte; what is saved for the backward pass is most of what a step needs besides."""
    entry, batch = BY_NAME[name], 4
    found = footprint(made(entry, Outline(str(light), bare=True)), Setting(batch))
    method = made(entry, Pipeline(str(light)))
    tensors = {id(x): x for x in (*method.parameters(), *method.buffers())}
    tensors |= {id(x): x for part in method.backbone.parts() for x in (*part.parameters(), *part.buffers())}
    assert found.of("weights") == sum(x.numel() * x.element_size() for x in tensors.values())
    optimizers, gradients, saved = stepped(method, batch)
    assert found.of("gradients") == gradients > 0
    states = [value for o in optimizers for state in o.state.values() for value in state.values()]
    assert found.of("optimizer") == sum(x.untyped_storage().nbytes() for x in states)
    assert saved / len(optimizers) < found.activations < 2 * saved  # of two backward passes, one after the other
    held, both = found.at_once - found.of("optimizer"), found.of("gradients") + found.activations
    assert max(found.of("gradients"), found.activations) <= held <= both


def test_shapes_alone_are_counted_as_real_tensors_are(light: Path) -> None:
    """The same counting on a step that computes gives the same peak, up to the few numbers that only shapes make."""

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        """The ledger's counting of tensors with values."""

        def __init__(self) -> None:
            super().__init__()
            self.book = Ledger()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                if isinstance(value, Tensor):
                    self.book._note(value, False)
            return out

    method = made(BY_NAME["lcm"], Pipeline(str(light)))
    expected = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    found = footprint(method, Setting(4))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected)) and gc.isenabled()  # a plan leaves both as they were
    counted = Counted()
    for p in (*method.parameters(), *(p for part in method.backbone.parts() for p in part.parameters())):
        counted.book._note(p, False)
    weights = counted.book.live
    with counted:
        stepped(method, 4, times=2)  # the states that the first leaves are there in the second
    assert found.at_once == pytest.approx(counted.book.peak - weights, rel=0.02)


@pytest.mark.slow
def test_checkpointing_precision_and_micro_batches_change_what_they_should(light: Path) -> None:
    """And the method that was planned with is as it was, with weights and clocks."""
    method = made(BY_NAME["lcm"], Pipeline(str(light)))
    before = copy.deepcopy(method.state_dict())
    plain = footprint(method, Setting(8))
    method.descent.accumulate = 3
    several = footprint(method, Setting(8))
    assert several.at_once > plain.at_once  # the gradients of the first micro-batch are there in the forward pass of the next
    assert several.activations == pytest.approx(plain.activations, rel=1e-3)
    method.descent.accumulate = 1
    half = footprint(method, Setting(8, "bf16-mixed"))
    assert 0.4 * plain.activations < half.activations < 0.9 * plain.activations and half.parts == plain.parts
    for role in (method.student,):
        role.network.recompute()
    assert footprint(method, Setting(8)).activations < 0.9 * plain.activations
    method.student.network.recompute(False)
    assert footprint(method, Setting(8)) == plain
    encoded = footprint(method, Setting(8, encoded=True))  # on a CPU too the encoders go
    assert [p.weights for p in encoded.parts if p.name == "encoders"] == [0] and encoded.total < plain.total
    assert method.student_updates == 0 and method._trainer is None
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("kind", [LADD, pytest.param(SiD, marks=pytest.mark.slow)])
def test_checkpointing_reaches_the_frozen_network_that_gradients_pass_through(kind: Any, sd3: Path) -> None:
    """LADD's heads and SiD's score read it at the student's samples: what it keeps for them is the most of a step. No gradient changes."""
    gradients, footprints = [], []
    for flag in (False, True):
        torch.manual_seed(0)  # of the heads
        method = made(Entry("x", kind, {"guidance": 3.0}), Pipeline(str(sd3)), memory={"gradient_checkpointing": flag})
        assert method.backbone.role("teacher").network is method.teacher.network  # as whoever makes pairs asks for it
        assert method.teacher.network.model.is_gradient_checkpointing == flag
        b = latents(method, 2, method.teacher.null)
        x = torch.randn(b.x_t.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        judged: Any = method.adversary.realism(x, b) if kind is LADD else method.identity(x, b)
        gradients += torch.autograd.grad(judged.sum(), x)
        footprints.append(recomputing(method, Setting(8), flag))
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    assert footprints[1].activations < 0.36 * footprints[0].activations


def test_shards_and_buckets(light: Path) -> None:
    """DDP holds all gradients all the time; fsdp2 a share of everything that is not frozen, and what it gathers."""
    method = made(BY_NAME["lcm"], Outline(str(light), bare=True))
    whole = Footprint(tuple(parts(method)), activations=1000, at_once=10**9, encoding=0)
    ddp = placed(whole._replace(activations=1000, at_once=1000), method, Setting(1, strategy="ddp", devices=2))
    assert ddp.buckets == whole.of("gradients") and ddp.at_once == ddp.buckets + 1000
    assert ddp.total == ddp.of("weights") + ddp.buckets + 1000
    assert ddp._replace(offloaded=2000).total == ddp.total + 1000  # a run's ends have them too
    method.descent.accumulate = 2  # micro-batches that send nothing have gradients of their own
    assert placed(whole, method, Setting(1, strategy="ddp", devices=2)).at_once == 2 * ddp.buckets + 1000
    method.descent.accumulate = 1
    split = placed(whole, method, Setting(1, strategy="fsdp2", devices=2))
    frozen = [p.weights for p in whole.parts if not p.own]
    assert split.of("weights") - sum(frozen) == pytest.approx((whole.of("weights") - sum(frozen)) / 2, abs=len(split.parts))
    assert split.of("gradients") == pytest.approx(whole.of("gradients") / 2, abs=len(split.parts))
    network = method.student.network
    sizes = sorted(sum(p.numel() * 4 for p in block.parameters()) for block in network.blocks())
    outside = sum(p.numel() * 4 for p in network.parameters()) - sum(sizes)
    assert split.gathered == 2 * (outside + sum(sizes[-2:]))
    assert split.at_once == 1000 + split.of("gradients")
    assert split.whole == sum(p.numel() * 4 for p in network.parameters())
    small = split._replace(at_once=0, gathered=0)
    assert small.total == small.of("weights") + small.whole  # the run's ends, at which there are no gradients, are its peak


def test_what_rests_in_the_training_is_there_at_its_ends() -> None:
    """But for encoders, which rest at both ends as well where the data are encoded."""
    held = (Part("teacher", 100, 0, 0, False), Part("encoders", 70, 0, 0, False), Part("average", 50, 0, 0, True))
    made = away(Footprint(held, activations=30, at_once=30, encoding=9), ["average", "encoders"])
    assert (made.of("weights"), made.offloaded, made.encoding) == (100, 50, 0)
    assert made.total == 150 and made._replace(at_once=60).total == 160


@pytest.mark.slow
def test_what_would_be_smaller_is_what_the_option_gives(light: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimates of exact options are the plans of configs with these options."""
    monkeypatch.setattr(frugality, "RANK", 4)  # of networks of 32 channels
    entry, setting = BY_NAME["lcm"], Setting(4)
    method = made(entry, Outline(str(light), bare=True))
    now = footprint(method, setting)
    said = dict(smaller(method, setting, now, now))
    half = made(entry, Outline(str(light), torch.bfloat16, bare=True))
    assert said["model.memory.teacher_dtype=bfloat16"].of("weights") == footprint(half, setting).of("weights") < now.of("weights")
    eight = footprint(made(entry, Outline(str(light), torch.bfloat16, bare=True, quantize="int8")), setting)
    told = dict(smaller(half, setting, footprint(half, setting), now))
    assert told["model.memory.quantize=int8"].of("weights") == eight.of("weights") and not any("nf4" in name for name in told)
    assert not any("quantize" in name for name in said)  # it computes in half precision
    bare = made(entry, Outline(str(light), bare=True), ema=0.0)
    assert said["model.ema=0 (no average of the student)"].total == footprint(bare, setting).total
    lora = made(entry, Outline(str(light), bare=True), adapter=Adapter(4))
    adapted, exact = said["model.adapter.rank=4"], footprint(lora, setting)
    assert [p.name for p in adapted.parts] == [p.name for p in exact.parts]
    assert adapted.of("weights") == exact.of("weights") and adapted.of("gradients") == exact.of("gradients")
    assert adapted.of("optimizer") == pytest.approx(exact.of("optimizer"), rel=0.01)
    assert Memory().gradient_checkpointing is False and "model.memory.gradient_checkpointing=true" in said


def test_a_footprint_adds_up() -> None:
    """At a time: weights, and either a step or, between two of them, buckets, the states and what encoding needs."""
    held = (Part("teacher", 10, 0, 0, False), Part("student", 20, 20, 40, True))
    assert Footprint(held, activations=5, at_once=62, encoding=3).total == 30 + 62
    assert Footprint(held, activations=5, at_once=62, encoding=30, buckets=20).total == 30 + 20 + 40 + 30


def test_what_rests_on_the_cpu_weighs_nothing_on_a_gpu() -> None:
    made = Footprint((Part("student", 10, 10, 20, True), Part("average", 10, 0, 0, True), Part("encoders", 7, 0, 0, False)), 5, 30, 9)
    assert made.total == 27 + max(30, 20 + 9)
    assert away(made, ["average"]).total == 17 + 30
    assert away(made, ["encoders"]).total == 20 + 30 and away(made, ["encoders"]).encoding == 0
