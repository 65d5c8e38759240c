"""LoRA roles on one base: equal to separate copies in every gradient, whatever is called in between, and merged without a difference."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddil_lightning.backbones.adapters import Adapter, sharing
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.roles import Role
from ddil_lightning.backbones.source import Source
from ddil_lightning.methods import DMD2, LCM
from ddil_lightning.records import Context
from ddil_lightning.training.optimisation import Optimizer
from suite import digest

ADAPTER = Adapter(rank=4, alpha=8.0)
Given = tuple[Tensor, Tensor, Context]


@pytest.fixture(scope="module")
def backbone(tiny: Path) -> Pipeline:
    return Pipeline(str(tiny))


@pytest.fixture(scope="module")
def given(backbone: Pipeline) -> Given:
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([10, 990]), backbone.encode_text(["a", "a red circle"])


def moved(role: Role, seed: int) -> Role:
    """The role with adapters that do something: a fresh one's B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in role.weights():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return role


def gradients(student: Role, critic: Role, teacher: Role, given: Given) -> list[Tensor]:
    """Of student and critic, in a graph that runs through both, with the teacher asked before and after."""
    x_t, t, c = given
    with torch.no_grad():
        goal = teacher(x_t, t, c.guided(2.0)).x0
    y = student(x_t, t, c).x0
    fake = critic(0.3 * x_t + 0.7 * y, t, c).x0
    with torch.no_grad():
        again = teacher(fake.detach(), t, c).x0
    (fake - goal).square().mean().add((y - again).square().mean()).backward()
    found = [p.grad for role in (student, critic) for p in role.weights()]
    for role in (student, critic):
        role.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True], ids=["kept", "checkpointing"])
def test_gradients_are_those_of_separate_copies(recompute: bool, backbone: Pipeline, given: Given) -> None:
    """Switching the adapters of one network gives a student gradient of 0, and a wrong one under checkpointing, without an error."""
    before = digest(backbone.network())
    roles = [moved(backbone.role(name, adapter=ADAPTER, recompute=recompute), i) for i, name in enumerate(("student", "critic"))]
    apart = [copy.deepcopy(role) for role in roles]  # each with a base of its own
    base = {p.data_ptr() for p in backbone.network().parameters()}
    assert all(base <= {p.data_ptr() for p in role.parameters()} for role in roles)
    assert not any(base & {p.data_ptr() for p in role.parameters()} for role in apart)
    teacher = backbone.role("teacher")
    mine, theirs = gradients(*roles, teacher, given), gradients(*apart, teacher, given)
    assert len(mine) == len(theirs) > 100
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert min(float(g.abs().sum()) for g in mine) > 0
    assert digest(backbone.network()) == before and all(p.grad is None for p in backbone.network().parameters())


@pytest.mark.slow
def test_checkpointing_changes_no_gradient_though_roles_take_turns(backbone: Pipeline, given: Given) -> None:
    roles = [moved(backbone.role(name, adapter=ADAPTER), i) for i, name in enumerate(("student", "critic"))]
    teacher = backbone.role("teacher")
    kept = gradients(*roles, teacher, given)
    for role in roles:
        role.network.recompute()  # type: ignore[operator]
    for a, b in zip(gradients(*roles, teacher, given), kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("told", [False, True])
def test_a_role_starts_as_its_base_and_trains_little(told: bool, backbone: Pipeline, given: Given) -> None:
    x_t, t, c = given
    student = backbone.role("student", w_conditioned=told, adapter=ADAPTER)
    c_w = c.guided(3.0) if told else c
    torch.testing.assert_close(student(x_t, t, c_w).x0, backbone.role("teacher")(x_t, t, c).x0)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == ({"network.unet.time_embedding.cond_proj.weight"} if told else set())
    assert sum(p.numel() for p in student.weights()) < 0.3 * sum(p.numel() for p in backbone.network().parameters())
    assert student.network.w_conditioned is told and not backbone.network().w_conditioned  # the base is what it was


def test_the_last_layer_is_on_the_way_out_and_not_where_names_end(backbone: Pipeline) -> None:
    """By whose gradients CTM weighs its losses: adapters have none in the last convolution, and names end in the bottleneck."""
    whole, adapted = backbone.role("student").network, backbone.role("student", adapter=Adapter(2)).network
    assert whole.last_layer() is whole.model.conv_out.weight
    name = next(name for name, p in adapted.named_parameters() if p is adapted.last_layer())
    assert ".up_blocks." in name and "lora_" in name


def test_an_average_follows_adapters_alone(backbone: Pipeline, given: Given) -> None:
    student = backbone.role("student", w_conditioned=True, adapter=ADAPTER)
    average, before = student.copied("average"), digest(backbone.network())
    assert average.weights() == [] and {id(p) for p in average.shared} == {id(p) for p in backbone.network().parameters()}
    start = [p.clone() for p in student.weights()]
    moved(student, 0)
    average.follow(student, 0.75)
    own = [p for p in average.parameters() if id(p) not in {id(q) for q in average.shared}]
    for p, a, b in zip(own, start, student.weights(), strict=True):
        torch.testing.assert_close(p, 0.75 * a + 0.25 * b)
    assert digest(backbone.network()) == before
    twice = average.copied("target")  # a copy of what is frozen is a copy
    assert not {id(p) for p in own} & {id(p) for p in twice.parameters()}


@pytest.mark.slow
def test_half_a_base_has_adapters_and_embeddings_in_float32(tiny: Path, given: Given) -> None:
    half, (x_t, t, c) = Pipeline(str(tiny), torch.bfloat16), given
    student = half.role("student", w_conditioned=True, adapter=ADAPTER)
    assert {p.dtype for p in student.weights()} == {torch.float32}
    assert {p.dtype for p in student.shared} == {torch.bfloat16}
    teacher = half.role("teacher")(x_t, t, c).x0
    torch.testing.assert_close(student(x_t, t, c.guided(2.0)).x0, teacher)
    moved(student, 0)(x_t, t, c.guided(2.0)).x0.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.weights())
    average = student.copied("average")
    # Its hooks are there too. In bfloat16 two calls may differ by a rounding of theirs on a busy machine.
    torch.testing.assert_close(average(x_t, t, c.guided(2.0)).x0, student(x_t, t, c.guided(2.0)).x0, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("told", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("full", [(), ("conv_out", "to_out.0")], ids=["lora", "some in full"])
def test_merged_weights_do_as_the_adapters(told: bool, full: tuple[str, ...], backbone: Pipeline, given: Given) -> None:
    x_t, t, c = given
    c = c.guided(3.0) if told else c
    student = moved(backbone.role("student", w_conditioned=told, adapter=Adapter(4, full=full)), 0).eval()
    average = student.copied("average")  # its weights are not trained, and still its own
    for role in (student, average):
        plain = backbone.merged(role.network)
        assert not any(".lora_" in name for name, _ in plain.named_parameters()) and plain.w_conditioned is told
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        torch.testing.assert_close(plain(x_t, t, c), student.network(x_t, t, c), rtol=1e-4, atol=1e-5)
    assert float((student.network(x_t, t, c) - backbone.network()(x_t, t, c)).abs().max()) > 1e-2


def test_weights_are_merged_as_they_are_stored(tiny: Path, backbone: Pipeline) -> None:
    """A base in half precision has rounded its own, and a release stands on those of the file."""
    half = Pipeline(str(tiny), torch.bfloat16)
    plain = half.merged(half.role("student", adapter=ADAPTER).network)  # B is zero
    for a, b in zip(plain.parameters(), backbone.network().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_alone(tiny: Path) -> None:
    method = LCM(pipeline=str(tiny), adapter=ADAPTER, guidance=2.0, ema=0.9, optimizer=Optimizer(lr=1e-3))
    moved(method.student, 0)
    state = method.state_dict()
    assert all(".lora_" in name or "cond_proj" in name or name.startswith("reflection.") for name in state)
    again = LCM(pipeline=str(tiny), adapter=ADAPTER, guidance=2.0, ema=0.9)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(method.student.weights(), again.student.weights(), strict=True))
    del state[next(name for name in state if name.startswith("student."))]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .student\."):
        again.load_state_dict(state)


def test_a_critic_may_be_whole_beside_a_student_of_adapters(tiny: Path) -> None:
    method = DMD2(pipeline=str(tiny), guidance=2.0, adapter=Adapter(4, whole=("critic",)))
    assert method.student.shared and not method.critic.shared
    assert len(method.critic.weights()) == len(list(method.backbone.network().parameters()))


@pytest.mark.slow
def test_moving_the_method_moves_what_is_shared_once(tiny: Path) -> None:
    method = LCM(pipeline=str(tiny), adapter=ADAPTER, guidance=2.0)
    method.to(torch.float64)
    base = {p.data_ptr() for p in method.backbone.network().parameters()}
    assert all(base <= {p.data_ptr() for p in role.parameters()} for role in method.roles.values())
    assert {p.dtype for p in method.backbone.network().parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": 0}, "adapter.rank is 0"),
        ({"alpha": 0.0}, "adapter.alpha is 0"),
        ({"dropout": 1.0}, "adapter.dropout is 1"),
        ({"targets": ("to_x",)}, r"adapter.targets has 'to_x', which is the end of no layer's name: did you mean .*to_q"),
        ({"targets": ("to_q", "wholly.other")}, r"adapter.targets has 'wholly.other', .* such as conv_in"),
        ({"full": ("conv_int",)}, "adapter.full has 'conv_int', .* did you mean conv_in"),
        ({"targets": ("to_q",), "full": ("to_q",)}, "leaves no layer for an adapter"),
        ({"rank": None}, "adapter.alpha without adapters: set adapter.rank, such as 64"),
        ({"whole": ("crtic",)}, "adapter.whole has 'crtic': the roles that DMD2 trains are student, critic"),
        ({"whole": ("teacher",)}, "adapter.whole has 'teacher': the roles that DMD2 trains are student, critic"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=words):
        DMD2(pipeline=str(tiny), guidance=2.0, adapter=Adapter(**{"rank": 4, "alpha": 2.0, **given}))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_layers_trained_whole_on_half_a_base_begin_as_they_are_stored(quantize: Any, tiny: Path, backbone: Pipeline, given: Given) -> None:
    """The first layer among them: what the network computes in is the base's type, not its. A quantised layer gets plain weights."""
    if quantize:
        pytest.importorskip("torchao")
    small, (x_t, t, c) = Pipeline(str(tiny), torch.bfloat16, quantize=quantize), given
    names = ("conv_in", "time_embedding.linear_1")
    role = small.role("student", adapter=Adapter(4, full=names))
    stored = backbone.network().model
    for name in names:
        layer = role.network.model.get_submodule(name)
        assert all(torch.equal(p, stored.get_submodule(name).get_parameter(key)) for key, p in layer.named_parameters())
    role(x_t, t, c).x0.square().mean().backward()
    own = [p for name in names for p in role.network.model.get_submodule(name).parameters()]
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 and p.dtype == torch.float32 for p in own)
    with torch.no_grad():
        for p in own:
            p.add_(1.0)
    merged = small.merged(role.network).model
    assert all(torch.equal(merged.get_submodule(name).bias, stored.get_submodule(name).bias + 1) for name in names)


@pytest.mark.parametrize("name", ["studnet", "target"])
def test_networks_are_for_roles_that_are_trained(name: str, tiny: Path) -> None:
    with pytest.raises(ValueError, match=f"model.pipeline.networks has '{name}': the roles that LCM trains are student"):
        LCM(pipeline=Source(str(tiny), networks={name: {"layers_per_block": 2}}), guidance=2.0)  # type: ignore[arg-type]


def test_sharing_shares_what_it_is_told_to() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    other = sharing(net, net[0].parameters())
    assert other[0].weight is net[0].weight and other[1].weight is not net[1].weight  # type: ignore[index]
    assert other[1].running_mean is not net[1].running_mean  # type: ignore[index]


@pytest.mark.parametrize("rank", [None, 4])
def test_a_configuration_that_leaves_the_embedding_out_still_gets_one(rank: int | None, light: Path, tmp_path: Path) -> None:
    """As the published one of Stable Diffusion 1.5 does: diffusers takes what a file leaves out at its default, whatever is asked for."""
    import json
    import shutil

    folder = Path(shutil.copytree(light, tmp_path / "published"))
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    config.pop("time_cond_proj_dim", None)
    file.write_text(json.dumps(config))
    role = Pipeline(str(folder)).role("student", w_conditioned=True, adapter=Adapter(rank))
    assert role.network.w_conditioned and any("cond_proj" in name for name, p in role.named_parameters() if p.requires_grad)
