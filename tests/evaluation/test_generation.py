"""How the images of a row come about: shared over processes, kept in a folder, gone on with, and timed."""

from __future__ import annotations

import json
import math
import random
import re
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddil_lightning import counting
from ddil_lightning.commands.launched import together
from ddil_lightning.evaluation import kept
from ddil_lightning.evaluation.captioned import choice, read_set
from ddil_lightning.evaluation.drawing import Cost, Pass, Timed, runs
from ddil_lightning.evaluation.generation import Generation, Source
from ddil_lightning.evaluation.given import Given, Judge
from ddil_lightning.evaluation.kept import Keep
from ddil_lightning.evaluation.layouts import DPGBench, GenEval, grid, ungrid
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.protocols import PromptSource
from ddil_lightning.evaluation.registry import keys
from ddil_lightning.evaluation.suite import Probes, Suite

if TYPE_CHECKING:
    from pair import Pair

PROMPTS = [f"caption {i}" for i in range(23)]


def colours(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def modes(images: Tensor, prompts: list[str]) -> float:
    return float(images.mean())


def suite(**changes: Any) -> Suite:
    networks = Networks(colours, distance=lambda a, b: (a - b).square().mean((1, 2, 3)), embed=colours)
    own: dict[str, Any] = {"given": Given(networks, judge=Judge(modes=modes)), "probes": Probes(["a", "b", "c"], 4), "batch": 5}
    return Suite("mine", **{"prompts": PROMPTS, **own, **changes})


class Drawer:
    """A sampler that keeps the convention, and the seeds that it was asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def __call__(self, prompts: list[str], seed: int) -> Tensor:
        own = range(seed, seed + len(prompts))
        self.seeds += own
        made = torch.stack([torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(i)) / 2 for i in own])
        return made.contiguous(memory_format=torch.channels_last)  # as a decoder's are

    def source(self, name: str = "student@4", **about: Any) -> Source:
        return Source(name, self, lambda: 8 * len(self.seeds), lambda: {"network": "abc"} | about, 128)


def measured(how: Generation, over: Suite | None = None, **about: Any) -> tuple[dict[str, Any], Cost, list[int]]:
    drawer = Drawer()
    metrics, cost = how.measured(over or suite(), drawer.source(**about))
    return metrics, cost, drawer.seeds


# calls and shares


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize(("n", "seeds", "size"), [(23, 1, 5), (4, 1, 128), (24, 4, 10), (24, 4, 3)])
def test_shares_are_all_images_in_order(world: int, n: int, seeds: int, size: int) -> None:
    part = Pass("prompts", ["x"] * n, seeds, 0, size)
    shares = [[i for call in part.calls(rank, world) for i in call] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(n)) and len(shares[0]) == max(map(len, shares)) > 0
    assert all(len(call) % seeds == 0 and len(call) <= max(size, seeds) for rank in range(world) for call in part.calls(rank, world))
    if world * max(size, seeds) <= n:
        assert min(map(len, shares)) > 0


def test_runs_are_of_numbers_that_follow_one_another() -> None:
    assert list(runs([0, 1, 2, 5, 7, 8], 2)) == [range(2), range(2, 3), range(5, 6), range(7, 9)] and list(runs([], 3)) == []


def test_the_time_of_a_call_counts_once_its_size_is_warm() -> None:
    timed = Timed(Drawer(), chunk=10)
    timed(PROMPTS, 0)  # 10, 10 and 3
    assert (timed.cost.images, timed.cost.warm_images) == (23, 10) and timed.seconds_per_image == timed.cost.warm_seconds / 10
    assert Cost(4, 2.0, evaluations=32).seconds_per_image is None and Cost(4, evaluations=30).nfe == 8 and Cost().nfe is None
    assert Cost(1, 2.0, 3, 4.0, 5) + Cost(1, 1.0, 1, 1.0, 1) == Cost(2, 3.0, 4, 5.0, 6)


def test_images_depend_on_no_batch_and_several_of_a_prompt_have_seeds_in_a_row() -> None:
    one, cost, seeds = measured(Generation())
    assert seeds == list(range(35)) and cost.nfe == 8 and set(keys()) <= set(one)
    for batch in (1, 3, 64):
        found, cost, same = measured(Generation(batch=batch))
        again = list(range(23)) if batch == 64 else []  # 23 and 12 at a time: no size came twice
        assert same == seeds + again and (cost.images, cost.nfe) == (35, 8) and cost.seconds_per_image
        assert [found[key] for key in keys()] == pytest.approx([one[key] for key in keys()])
    twice = suite(samples=2, probes=Probes())
    assert twice.passes()[0].asked[:3] == ["caption 0", "caption 0", "caption 1"]
    assert twice.protocol["n"] == 46 and twice.protocol["seeds"]["per_prompt"] == 2 and "batch" not in twice.protocol
    assert twice.protocol != replace(twice, samples=1).protocol and suite(batch=1).protocol == suite().protocol


def test_memory_is_given_back_after_every_batch_when_its_images_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    class Watched(Drawer):
        def __call__(self, prompts: list[str], seed: int) -> Tensor:
            images = super().__call__(prompts, seed)
            alive.append(weakref.ref(images))
            return images

    def given_back() -> None:
        left.append(sum(images() is not None for images in alive))

    monkeypatch.setattr("ddil_lightning.evaluation.suite.give_back", given_back)
    monkeypatch.setattr("ddil_lightning.evaluation.given.give_back", given_back)
    over = suite()
    over.score(Watched())
    assert left == [0] * (5 + 3)  # 23 prompts and 3 probes of 4 seeds, at most 5 at a time
    over.taught(Watched(), "teacher")
    assert left == [0] * (5 + 3 + 5)


def test_a_long_row_is_told_by_tenths_where_no_terminal_is(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "PATIENCE", 0.0)
    clock = map(float, range(1000))
    monkeypatch.setattr(counting, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    over = suite(probes=Probes(), prompts=PROMPTS[:20], batch=1, given=Given())
    Generation(told=True).measured(over, Drawer().source())
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"student@4, in batches: {i} of 20, about {20 - i} s left" for i in range(2, 21, 2)]
    assert re.fullmatch(r"student@4: 20 images, \d+ s", last)
    Generation().measured(over, Drawer().source())
    assert capsys.readouterr().out == ""


# kept images


@pytest.mark.parametrize("layout", ["folder", "geneval", "dpg"])
def test_a_row_goes_on_with_what_is_there(layout: str, tmp_path: Path) -> None:
    notes = [{"prompt": prompt, "tag": "", "include": [], "item_id": f"{k:05d}"} for k, prompt in enumerate(PROMPTS)]
    over = suite(samples=4, batch=8, notes=notes)
    whole, cost, every = measured(Generation(), over)
    how = Generation(keep=Keep(tmp_path, layout))
    first, own, seeds = measured(how, over)
    assert first == whole and seeds == every and (own.images, own.evaluations) == (cost.images, cost.evaluations) == (104, 832)
    again, own, seeds = measured(how, over)
    assert again == whole and seeds == [] and own.nfe == 8 and own.seconds_per_image
    stamp = tmp_path / "student@4" / "generation.json"
    told = json.loads(stamp.read_text())
    stamp.write_text(json.dumps({**told, "sampler": {**told["sampler"], "name": "teacher@4"}}))  # as folders of before have it
    assert measured(how, over)[2] == []
    files = sorted((tmp_path / "student@4").rglob("*.png"))
    assert len(files) == {"folder": 104, "geneval": 104, "dpg": 35}[layout]
    lost = [*files[:2], files[7], files[-1]]
    for file in lost[:3]:
        file.unlink()
    lost[3].write_bytes(lost[3].read_bytes()[:60])  # as a full disk leaves it
    (lost[3].parent / f".{lost[3].name}.999999999.ddil-part").write_bytes(b"as a kill leaves it")
    again, _, seeds = measured(replace(how, batch=3), over)
    assert again == whole and len(seeds) == 4 if layout != "dpg" else 1 + 4 * 3
    assert not list(tmp_path.rglob(".*"))


def test_a_kill_between_two_calls_costs_what_was_not_drawn(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    drawer, how = Drawer(), Generation(batch=2, keep=Keep(tmp_path))

    def dying(prompts: list[str], seed: int) -> Tensor:
        if seed == 12:
            raise Killed
        return drawer(prompts, seed)

    with pytest.raises(Killed):
        how.measured(suite(), drawer.source()._replace(sample=dying))
    assert drawer.seeds == list(range(12)) and len(list(tmp_path.rglob("*.png"))) == 12
    metrics, cost, seeds = measured(how)
    assert metrics == measured(Generation())[0] and seeds == list(range(12, 35))
    assert (cost.images, cost.evaluations) == (35, 8 * 35)  # both runs together


def test_seconds_of_another_machine_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = Generation(keep=Keep(tmp_path))
    _, first, _ = measured(how)
    _, same, seeds = measured(how)
    assert same == first and first.seconds_per_image and seeds == []
    monkeypatch.setattr(kept, "machine", lambda: "another")
    _, other, seeds = measured(how)
    assert (other.images, other.nfe, other.seconds_per_image, seeds) == (35, 8, None, [])  # what nothing here was drawn by has no time
    (tmp_path / "student@4" / "prompts" / "00003.png").unlink()
    _, own, seeds = measured(how)
    assert seeds == [3, 3] and (own.images, own.warm_images) == (36, 1) and own.seconds_per_image


def test_datasets_reads_the_plain_folder(tmp_path: Path) -> None:
    from datasets import load_dataset

    measured(Generation(keep=Keep(tmp_path / "kept")), suite(samples=2))
    found = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "kept" / "student@4" / "prompts"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert len(found) == 46 and found[3]["text"] == "caption 1" and (found[3]["prompt"], found[3]["seed"]) == (1, 3)
    assert found[3]["image"].size == (8, 6)


def test_geneval_reads_its_own_line_and_dpg_its_samples(tmp_path: Path) -> None:
    """As their scripts do: folders whose names are digits, json.load of metadata.jsonl; parts of a picture, whose name is the key."""
    lines = [{"tag": "counting", "include": [{"class": "cat", "count": k}], "prompt": f"{k % 2} cats"} for k in range(9)]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = PromptSource(str(tmp_path / "evaluation_metadata.jsonl"), n=3, choice=2)
    chosen = choice(read_set(source), source)
    lines = [lines[k] for k in sorted(random.Random(2).sample(range(9), 3))]  # of prompts that come again the chosen row, not the first
    measured(
        Generation(keep=Keep(tmp_path / "g", "geneval")), suite(prompts=chosen.prompts, samples=2, probes=Probes(), notes=chosen.notes)
    )
    folders = sorted(f for f in (tmp_path / "g" / "student@4" / "prompts").iterdir() if f.is_dir() and f.name.isdigit())
    assert [json.loads((f / "metadata.jsonl").read_text()) for f in folders] == lines
    assert [sorted(p.name for p in (f / "samples").iterdir()) for f in folders] == [["0000.png", "0001.png"]] * 3

    (tmp_path / "texts").mkdir()
    for name, text in (("COCOval5", "two cats"), ("whoops-1", "one dog")):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{text}\n")
    chosen = choice(read_set(PromptSource(str(tmp_path / "texts"))), PromptSource(str(tmp_path / "texts")))
    (tmp_path / "texts.json").write_text(json.dumps({"COCOval5": "two cats", "whoops-1": "one dog"}))
    by_id = PromptSource(str(tmp_path / "texts.json"))
    assert choice(read_set(by_id), by_id)[:1] + choice(read_set(by_id), by_id)[4:5] == (chosen.prompts, chosen.notes)
    over = suite(prompts=chosen.prompts, samples=4, probes=Probes(), notes=chosen.notes)
    measured(Generation(keep=Keep(tmp_path / "d", "dpg")), over)
    folder = tmp_path / "d" / "student@4" / "prompts"
    assert sorted(p.name for p in folder.iterdir()) == ["COCOval5.png", "whoops-1.png"]
    picture = Image.open(folder / "whoops-1.png")
    drawn = Drawer()(["one dog"] * 4, 4)
    for k, corner in enumerate([(0, 0), (8, 0), (0, 6), (8, 6)]):
        tile = torch.from_numpy(np.array(picture.crop((*corner, corner[0] + 8, corner[1] + 6)))).permute(2, 0, 1)
        assert torch.equal(tile, ((drawn[k].clamp(-1, 1) + 1) * 127.5).round().byte())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_grid_comes_apart_again(k: int) -> None:
    images = torch.randint(0, 256, (k, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(ungrid(grid(images).permute(1, 2, 0).contiguous().numpy(), k), images)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    how = Generation(keep=Keep(tmp_path))
    measured(how)
    place = re.escape(str(tmp_path / "student@4"))
    wrong = r": give another folder, or delete it$"
    for changes, what in (
        ({"seed": 7}, r"seed \(0, not 7\)"),
        ({"prompts": PROMPTS[:-1]}, r"images prompts \(\[23, 1\], not \[22, 1\]\)"),
        ({"prompts": [*PROMPTS[:-1], "else"]}, "prompts"),
        ({"samples": 2}, r"images prompts \(\[23, 1\], not \[23, 2\]\)"),
    ):
        with pytest.raises(ValueError, match=f"student@4: {place} holds images of another {what}{wrong}"):
            measured(how, suite(**changes))
    with pytest.raises(ValueError, match=r"another sampler network \(abc, not other\)"):
        measured(how, network="other")
    with pytest.raises(ValueError, match="another layout"):
        measured(Generation(keep=Keep(tmp_path, "dpg")), suite(notes=[{"id": i} for i in range(23)]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="mine is not empty and holds no generation.json: give another folder"):
        how.measured(suite(), Drawer().source("mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_what_no_picture_of_dpg_bench_can_be(tmp_path: Path) -> None:
    def part(asked: list[str], seeds: int = 1) -> Pass:
        return Pass("prompts", [p for p in asked for _ in range(seeds)], seeds, 0, 8)

    with pytest.raises(ValueError, match="5 images of a prompt: a picture of DPG-Bench holds at most 4"):
        DPGBench(part(["a"], 5), ())
    with pytest.raises(ValueError, match="the id '../x' is no name of a file"):
        DPGBench(part(["a"]), [{"item_id": "../x"}])
    with pytest.raises(ValueError, match="two prompts have the same id"):
        DPGBench(part(["a", "b"]), [{"id": 7}, {"id": "7"}])
    with pytest.raises(ValueError, match=r"the id of its prompt, and prompt 1 \(from 0\), 'b', has none: give its folder of ID.txt"):
        DPGBench(part(["a", "b"]), [{"id": 7, "prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(ValueError, match=r"that of prompt 0 \(from 0\), 'a', has no tag: give its evaluation_metadata.jsonl"):
        GenEval(part(["a"]), [])


def test_a_sampler_that_diverges_is_named_with_the_prompt(tmp_path: Path) -> None:
    def source(drawer: Drawer) -> Source:
        def sample(prompts: list[str], seed: int) -> Tensor:
            images = drawer(prompts, seed)
            return images.masked_fill(torch.arange(seed, seed + len(prompts)).eq(13)[:, None, None, None], math.nan)

        return drawer.source()._replace(sample=sample)

    told = r"student@4: images: 1 of 5 hold NaN or infinity, the first that of prompt 13 \(from 0\), 'caption 13'; the sampler diverged"
    with pytest.raises(ValueError, match=told):
        Generation().measured(suite(), source(Drawer()))
    with pytest.raises(ValueError, match=told):
        Generation(keep=Keep(tmp_path)).measured(suite(), source(Drawer()))
    assert len(list(tmp_path.rglob("*.png"))) == 10
    with pytest.raises(ValueError, match=r"prompt 6 \(from 0\), 'caption 6'"):  # two samples a prompt: number 13 is the seventh's
        Generation().measured(suite(samples=2), source(Drawer()))


# several processes


def shared(rank: int, place: str | None, over: dict[str, Any], bad: int = -1) -> Any:
    """A row by both; what this process has drawn itself. `bad`: the image that is NaN."""
    processes, _ = together()
    assert (processes.rank, processes.world) == (rank, 2)
    drawer = Drawer()

    def sample(prompts: list[str], seed: int) -> Tensor:
        images = drawer(prompts, seed)
        return images * math.nan if seed <= bad < seed + len(prompts) else images

    how = Generation(keep=Keep(Path(place)) if place else None, processes=processes)
    try:
        metrics, cost = how.measured(suite(**over), drawer.source()._replace(sample=sample))
    except (ValueError, SystemExit) as error:
        return type(error).__name__, str(error)
    return metrics, cost.images, cost.nfe, drawer.seeds


@pytest.mark.parametrize(
    "over",
    [{}, *(pytest.param(over, marks=pytest.mark.slow) for over in ({"prompts": PROMPTS[:1], "probes": Probes(["a"], 3)}, {"samples": 3}))],
    ids=["shares", "one", "samples"],
)
def test_two_processes_equal_one(over: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    """Also where the second has nothing to do, and where one goes on with what two have left."""
    one, cost, every = measured(Generation(), suite(**over))
    for place in (None, str(tmp_path)):
        (first, *_, mine), (second, images, nfe, its) = pair.run(shared, place, over)
        assert first == second == one and (images, nfe) == (cost.images, 8)
        assert sorted(mine + its) == sorted(every) and len(mine) >= len(its)
    (tmp_path / "student@4" / "prompts" / "00000.png").unlink()
    assert measured(Generation(keep=Keep(tmp_path)), suite(**over))[::2] == (one, [0])


def test_one_of_two_processes_tells_what_went_wrong(pair: Pair) -> None:
    (other, heard), (name, told) = pair.run(shared, None, {}, 21)
    assert other == "Elsewhere" and name == "ValueError" and "prompt 20" in told and told.endswith(heard)  # the call from 20 on
    (name, told), (other, heard) = pair.run(shared, None, {}, 3)
    assert name == "ValueError" and "prompt 0" in told and other == "Elsewhere" and told.endswith(heard)
