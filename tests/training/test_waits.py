"""No step has the host wait for the device: nothing is read, and nothing is copied so that the host must stay (tests/support/waits.py)."""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import toys
from ddil_lightning.backbones import roles
from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.callbacks.checkpoints import finite
from ddil_lightning.data.encoded import encode_batch
from ddil_lightning.data.pairs import Stored
from ddil_lightning.data.raw import RawBatch
from ddil_lightning.imitation import collecting
from ddil_lightning.imitation.buffer import ReplayBuffer
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.imitation.rollout import collect, forward
from ddil_lightning.methods import LCM
from ddil_lightning.records import FORWARD, TEACHER, CaptionBatch, Context, LatentBatch, Origin, Rollout, send, sent
from ddil_lightning.streams import Streams
from fluxes import make_flux
from options import options
from pixarts import make_pixart
from sanas import make_sana
from sd3 import make_sd3
from suite import BY_NAME
from waits import GPU, Beside, Watched, waits, without_one

NAMES = [pytest.param(n, marks=() if n == "lcm" else pytest.mark.slow) for n in BY_NAME]


def made(name: str, backbone: Any) -> Any:
    entry = BY_NAME[name]
    return entry.method(**{"pipeline": backbone, "guidance": 3.0, "ema": 0.9, **options(entry.method, entry.kwargs)})


@pytest.mark.parametrize("name", NAMES)
def test_no_step_has_the_host_wait(name: str, light: Path) -> None:
    assert waits(made(name, Pipeline(str(light)))) == []


FAMILIES = {"flux": make_flux, "sd3": make_sd3, "sana": make_sana, "pixart": make_pixart}
"""Qwen-Image and Z-Image read each text to its end, which a mask on the device tells: they wait for it (docs/memory.md)."""


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name == "flux" else pytest.mark.slow) for name in FAMILIES])
def test_nor_has_one_of_another_family(family: str, tmp_path: Path) -> None:
    folder, even = FAMILIES[family](tmp_path / family), {} if family == "pixart" else {"solver_steps": 40, "rollouts": (2, 4)}
    method = LCM(pipeline=Pipeline(str(folder)), guidance=3.0, ema=0.9, w_conditioned=family == "flux", **even)
    assert waits(method) == []


@pytest.mark.parametrize("name", [pytest.param("reflow"), *(pytest.param(n, marks=pytest.mark.slow) for n in ("dmd", "ufogen", "boot"))])
def test_nor_has_one_on_roll_outs(name: str, light: Path) -> None:
    """What a batch consists of is known before it is on its way: the losses that depend on it ask the feed, and not the device."""
    mixed = Origin((FORWARD, TEACHER), (1, 1), (-1, 0), (FORWARD, TEACHER))
    assert waits(made(name, Pipeline(str(light))), mixed) == []


def test_no_latents_have_the_host_wait(light: Path) -> None:
    """Forward latents and a roll-out, from captions on the device to states on their way home."""
    method = made("lcm", Pipeline(str(light)))
    learner = SimpleNamespace(grid=method.grid, guidance=(1.0, 4.0), wants=method.wants, policies=method.policies)
    with Watched() as watched, without_one():
        batch = send(CaptionBatch(torch.zeros(4, *method.backbone.latent_shape), method.backbone.null().expand(4), torch.arange(4)), GPU)
        for module in method.backbone.network().modules():
            module._parameters = {name: p if p is None else torch.nn.Parameter(p.to(GPU)) for name, p in module._parameters.items()}
        for _ in range(2):
            watched.waits.clear()
            forward(batch, learner, Streams(0, 1))
            collect(batch, learner, SamplingPrior(0.5, 0.0, 0.5), Streams(0, 1), method.backbone.latent_shape)
    assert watched.waits == []


def test_no_batch_of_the_data_module_has_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the loader's batch to drawn latents and kept answers: a roll-out is waited for, once, where the buffer is to have it."""
    homes = []

    def home(made: Rollout) -> Rollout:
        homes.append(made.x_t.device)
        values = torch.randn(made.x_t.shape, generator=torch.Generator().manual_seed(len(homes)))
        return made._replace(x_t=values, c=made.c._replace(text=torch.zeros(made.c.text.shape), w=torch.ones(len(made.c.text))))

    monkeypatch.setattr(collecting, "home", home)
    feed = toys.module(toys.HALF, rollouts={"every": 3})
    asked: list[int] = []

    def ask(b: LatentBatch) -> torch.Tensor:
        asked.append(len(b.t))
        return b.x_t * 2

    with Beside() as watched, without_one():
        for update in range(8):
            for raw in islice(feed.train_dataloader(), 1):
                batch = feed.on_after_batch_transfer(feed.transfer_batch_to_device(raw, GPU, 0), 0)
            assert isinstance(batch, LatentBatch) and batch.x_t.device == GPU
            feed.answered(batch, ask)
            feed.learner.stage_updates += 1  # type: ignore[misc]
            feed.commit()
            if update == 0:  # in which tables are copied
                watched.waits.clear()
    assert watched.waits == [] and homes == [GPU] * 3
    assert asked[0] == 4 and min(asked) < 4  # some of a batch were known


def test_no_answer_that_is_kept_has_the_host_wait() -> None:
    """With none, some and all of the states known, and with a network that waits for every process."""
    states, c = torch.arange(6), Context(torch.zeros(6, 2, 4))
    made = Rollout(torch.ones(6, 4, 2, 2), states + 500, states, torch.ones_like(states), states, c)
    buffer, asked = ReplayBuffer(64), []
    buffer.add(made, clock=0, stage=0)

    def ask(b: LatentBatch) -> torch.Tensor:
        asked.append(len(b.t))
        return b.x_t * 2

    with Beside() as watched, without_one():
        for slots, alone in (([0, 1, -1], True), ([0, 1, 2], True), ([2, 0, 1], True), ([1, 2, 0], False)):
            slot, t = torch.tensor(slots), torch.ones(3, dtype=torch.long, device=GPU)
            x = torch.ones(3, 4, 2, 2, device=GPU)
            b = LatentBatch(x, t, t, t, Context(torch.zeros(3, 2, 4, device=GPU)), None, t, torch.ones(3, device=GPU), t)
            assert buffer.answers.of(b, slot, ask, alone).device == GPU
    assert watched.waits == [] and asked == [3, 1, 1]


def test_pairs_and_what_is_encoded_on_the_way_have_the_host_wait_for_nothing() -> None:
    """Rows are known where a batch is still on the host; raw latents are sent as they are stored, and widened on the device."""
    columns = {"rows": torch.arange(4), "number": torch.zeros(4, dtype=torch.long), "w": torch.ones(4)}
    stored = Stored([{**columns, "noise": torch.ones(4, 4, 2, 2).half(), "end": torch.ones(4, 4, 2, 2).half()}], 4, 1)
    there = SimpleNamespace(device=GPU, encode_text=lambda prompts, *_, **__: Context(torch.zeros(len(prompts), 2, 4, device=GPU)))
    with Beside() as watched, without_one():
        raw = RawBatch(None, ["a"] * 3, torch.tensor([2, 0, 1]), latent=torch.ones(3, 4, 2, 2).half())
        batch = stored.joined(encode_batch(raw, there), rows=raw.rows)  # type: ignore[arg-type]
    assert watched.waits == [] and batch.pair is not None and {x.device for x in (*batch.pair, batch.rows, batch.latent)} == {GPU}
    assert batch.latent.dtype == torch.float32  # type: ignore[union-attr]


def test_pictures_cross_to_the_device_in_8_bits() -> None:
    """And are divided there, as on the CPU to the bit; a data set of one's own may have them in [-1, 1]."""
    known = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    raw = RawBatch(known, ["a"], torch.arange(1))
    assert torch.equal(raw.images(), known.float() / 127.5 - 1)  # type: ignore[arg-type]
    plain = RawBatch(torch.ones(1, 3, 2, 2), ["a"], torch.arange(1))
    assert plain.images() is plain.pixels
    with Beside() as watched, without_one():
        there = raw.images(GPU)
    assert watched.waits == [] and there is not None and there.device == GPU and there.dtype == torch.float32


def test_weights_reach_an_average_on_the_cpu_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waited for once, and not tensor by tensor; what is on one device is averaged there."""
    waited, stream = [], SimpleNamespace(synchronize=lambda: waited.append(1))
    with Watched() as watched:
        average, online = (torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(6)) for _ in range(2))
        for layer in online[:5]:
            layer.weight = torch.nn.Parameter(layer.weight.to(GPU))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
        monkeypatch.setattr(roles, "PORTION", 2 * 8 * 8 * 4)
        watched.waits.clear()
        roles.lerp_(average, online, 0.9)
    assert watched.waits == [] and len(waited) == 3


def test_all_weights_are_found_finite_in_one_wait(light: Path) -> None:
    method = made("lcm", Pipeline(str(light)))
    with Watched() as watched:
        parameters = [torch.nn.Parameter(p.detach().to(GPU)) for p in method.parameters()]
        watched.waits.clear()
        finite(SimpleNamespace(parameters=lambda: parameters, roles=method.roles, device=GPU))
    assert len(parameters) > 100 and len(watched.waits) == 1


def test_losses_reach_the_buffers_priorities_without_a_wait() -> None:
    """They are taken before anybody asks for one, in the order in which they came: as on the CPU, where they are there at once."""
    buffers = [ReplayBuffer(64, priority=1.0) for _ in range(2)]
    states, slots, losses = torch.tensor([999, 499, 249]), torch.arange(3), torch.tensor([1.0, 2.0, 3.0])
    made = Rollout(torch.ones(3, 4, 2, 2), states, torch.arange(3), torch.ones_like(states), states, Context(torch.zeros(3, 2, 4)))
    for buffer in buffers:
        buffer.add(made, clock=0, stage=0)
    with Watched() as watched, without_one():
        buffers[0].update(slots, sent(losses, GPU), states)
    assert watched.waits == [] and not torch.cat([k.states.u for k in buffers[0]._chunks]).any()
    ((slot, _, t, arrived),) = buffers[0]._arriving
    buffers[0]._arriving = [(slot, losses.double(), t, arrived)]  # a GPU that is not there has no values
    buffers[1].update(slots, losses, states)
    assert torch.equal(*(buffer.probabilities(1) for buffer in buffers)) and buffers[0]._arriving == []


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("a value is read", lambda x, y: bool(x.any())),
        ("a value is read", lambda x, y: float(x.sum())),
        ("a copy blocks", lambda x, y: torch.tensor(1e4, device=GPU)),
        ("a copy blocks", lambda x, y: y.to(GPU)),
        ("a copy blocks", lambda x, y: y.to(GPU, non_blocking=True)),
        ("a copy blocks", lambda x, y: x.cpu()),
        ("a GPU's tensor is indexed by one of the CPU", lambda x, y: x[y]),
        ("has a size of its own", lambda x, y: x[x > 0]),
        ("has a size of its own", lambda x, y: (x > 0).nonzero()),
    ],
)
def test_what_makes_a_host_wait_is_found(what: str, act: Any) -> None:
    with Watched() as watched:
        x, y = torch.zeros(3, device=GPU), torch.arange(2)
        assert watched.waits == []
        with contextlib.suppress(torch._subclasses.fake_tensor.DynamicOutputShapeException):
            act(x, y)
    assert len(watched.waits) == 1 and what in watched.waits[0]


def test_what_does_not_is_not() -> None:
    with Watched() as watched:
        x, y = torch.zeros(3, device=GPU), torch.arange(2)
        y.pin_memory().to(GPU, non_blocking=True)
        x.to("cpu", non_blocking=True)
        torch.where(x > 0, x, torch.full((), 2.0, device=GPU))
        x[:2], x.view(1, 3), y.tolist()
    assert watched.waits == []
