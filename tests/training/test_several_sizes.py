"""Training on pictures of three shapes, on a pipeline of the SDXL class: what the networks are told, exact resuming, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddil_lightning.backbones.pipeline import Pipeline
from ddil_lightning.backbones.source import Source
from ddil_lightning.callbacks import Checkpoints
from ddil_lightning.data.captions import Images, Prompts
from ddil_lightning.data.datamodule import DDILDataModule
from ddil_lightning.data.encoded import Encoded
from ddil_lightning.imitation.options import Buffer, Rollouts
from ddil_lightning.imitation.prior import SamplingPrior
from ddil_lightning.methods import DMD2, LCM
from ddil_lightning.runs.export import deliver
from ddil_lightning.training.adversary import Critic
from pair import Pair
from suite import equal, fit, state

SIZES = [(16, 16), (16, 24), (24, 16)]
STORED = [(20, 20), (30, 40), (40, 30)]
TOLD = {(16, 16): (20, 20, 0, 0, 16, 16), (16, 24): (30, 40, 1, 0, 16, 24), (24, 16): (40, 30, 0, 1, 24, 16)}
"""Of [30, 40] the part of the aspect 2:3 is [27, 40], from line 1 on; resized by 0.6 that is again line 1."""
METHODS: dict[str, Any] = {
    "lcm": (LCM, {"guidance": [1.0, 4.0], "updates": 5}),
    "dmd2": (DMD2, {"guidance": 2.0, "updates": 3, "critic": Critic(steps=2)}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of each shape: two batches, and one that is left over."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(15):
        pixels = torch.randint(0, 256, (*STORED[i % 3], 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(["a red circle", "a handwritten seven", "two"][i % 3])
    return folder


def parts(name: str, xl: Path, pictures: Path, **kwargs: Any) -> tuple[Any, DDILDataModule]:
    method, settings = METHODS[name]
    torch.manual_seed(0)
    made = method(pipeline=Pipeline(str(xl)), ema=0.9, log_every=1, reflect="static", **settings)
    options: dict[str, Any] = {"batch_size": 2, "rollouts": Rollouts(every=2), "buffer": Buffer(capacity=48), **kwargs}
    return made, DDILDataModule(Images(str(pictures), size=SIZES), SamplingPrior(0.5, 0.25, 0.25), **options)


class Heard:
    """The shapes of latents and the time ids that every call of the networks of a run was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, int], list[tuple[float, ...]]]] = []

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        self.calls.append((tuple(args[0].shape[2:]), [tuple(row) for row in kwargs["added_cond_kwargs"]["time_ids"].tolist()]))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name == "lcm" else pytest.mark.slow) for name in METHODS])
def straight(request: Any, xl: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any, Heard, Path]]:
    """(method, its run in one piece, what its networks have heard, a checkpoint of its middle)."""
    folder, heard = tmp_path_factory.mktemp(request.param), Heard()
    method, data = parts(request.param, xl, pictures)
    for role in method.roles.values():
        role.network.model.register_forward_pre_hook(heard, with_kwargs=True)
    yield request.param, fit(method, data, Checkpoints(every=2, keep=9, folder=str(folder))), heard, folder / "updates=2.ckpt"


def test_networks_are_told_the_sizes_of_the_pictures(straight: Any) -> None:
    """Student, critic, both branches of the teacher and all roll-outs: those of the caption, whose picture has the latents' shape."""
    _, run, heard, _ = straight
    seen = {((2 * h, 2 * w), row) for (h, w), ids in heard.calls for row in ids}
    assert seen == set(TOLD.items())
    pipe = run.method.backbone.pipe
    for original, crop, target in ((told[:2], told[2:4], told[4:]) for told in TOLD.values()):
        own = pipe._get_add_time_ids(original, crop, target, torch.float32, pipe.text_encoder_2.config.projection_dim)
        assert (target, tuple(own[0].tolist())) in seen


def test_resuming_within_an_epoch_is_exact(straight: Any, xl: Path, pictures: Path) -> None:
    name, run, _, ckpt = straight
    saved = torch.load(ckpt, weights_only=True)["DDILDataModule"]
    assert saved["done"] % 6 and len({tuple(k["states"]["x_t"].shape[1:]) for k in saved["buffers"][0]["chunks"]}) > 1
    resumed = fit(*parts(name, xl, pictures), ckpt=ckpt)
    mine, theirs = state(run), state(resumed)
    assert all(equal(mine[part], theirs[part]) for part in mine) and resumed.rows == run.rows[2:]


def test_the_student_samples_at_the_pipelines_own_size(straight: Any, tmp_path: Path) -> None:
    name, run, _, _ = straight
    if name == "lcm":  # the export of every method is tested elsewhere
        assert deliver(run.method, tmp_path / "made", ["a red circle"], 2) < 1e-2
        assert Pipeline(str(tmp_path / "made")).size == (16, 16)


@pytest.mark.parametrize("size", [(24, 24), pytest.param((16, 24), marks=pytest.mark.slow)])
def test_a_run_at_another_size_samples_and_exports_at_it(size: tuple[int, int], xl: Path, pictures: Path, tmp_path: Path) -> None:
    method = LCM(pipeline=Pipeline(Source(str(xl), size=size)), updates=1, guidance=2.0, w_conditioned=False)
    data = DDILDataModule(Images(str(pictures), size=size), batch_size=2)
    fit(method, data)
    assert data.reference(1).latent.shape[2:] == (size[0] // 2, size[1] // 2)  # type: ignore[union-attr]
    assert deliver(method, tmp_path / "made", ["a red circle"], 2) < 1e-2
    made = Pipeline(str(tmp_path / "made"))
    assert made.size == size and f"height={size[0]}, width={size[1]}" in (tmp_path / "made" / "README.md").read_text()
    if size[0] == size[1]:  # a plain call makes it too
        assert made.pipe("two", num_inference_steps=1, output_type="latent").images.shape[2:] == (12, 12)


def test_captions_alone_are_of_the_size_that_is_sampled(xl: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo\na handwritten seven\na\n")
    heard, method = Heard(), LCM(pipeline=Pipeline(Source(str(xl), size=(16, 24))), updates=1, guidance=2.0, w_conditioned=False)
    method.student.network.model.register_forward_pre_hook(heard, with_kwargs=True)
    fit(method, DDILDataModule(Prompts(str(tmp_path / "prompts.txt")), SamplingPrior(0, 1, 0), batch_size=2, buffer=Buffer(capacity=48)))
    assert {shape for shape, _ in heard.calls} == {(8, 12)} and {row for _, ids in heard.calls for row in ids} == {(16, 24, 0, 0, 16, 24)}


def of_a_process(rank: int, name: str, xl: Path, pictures: Path, file: Path, world: int = 2) -> list[list[int]]:
    """The rows of the batches of an epoch, after a fit whose cache all processes have written."""
    from lightning.pytorch.strategies import DDPStrategy

    kwargs: dict[str, Any] = {}
    if world > 1:
        kwargs = {"strategy": DDPStrategy(process_group_backend="gloo", find_unused_parameters=True), "devices": world, "num_nodes": 1}
    method, data = parts(name, xl, pictures, batch_size=2 // world, cache=str(file))
    run = fit(method, data, **kwargs)
    data.done = 0
    return [batch.rows.tolist() for batch in data.train_dataloader()] + [run.method.student_updates]


@pytest.mark.slow
def test_two_processes_are_at_the_same_shape_and_share_its_rows(pair: Pair, xl: Path, pictures: Path, tmp_path: Path) -> None:
    """Network calls go in step, or the processes would wait for each other for ever; the cache holds what one process writes."""
    a, b = pair.run(of_a_process, "lcm", xl, pictures, tmp_path / "two")
    alone = of_a_process(0, "lcm", xl, pictures, tmp_path / "one", world=1)
    assert a.pop() == b.pop() == alone.pop() == 5
    assert [x + y for x, y in zip(a, b, strict=True)] == alone and len(alone) == 6
    one, two = (Encoded.load(tmp_path / name) for name in ("one", "two"))
    for x, y in zip(one.tables, two.tables, strict=True):
        assert torch.equal(x.rows, y.rows) and torch.equal(x.c.ids, y.c.ids)  # type: ignore[arg-type]
        torch.testing.assert_close(x.latents, y.latents, rtol=0, atol=2e-3)  # the encoders saw other batches
