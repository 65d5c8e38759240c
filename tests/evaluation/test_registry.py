"""A metric is one file and one entry: one that stands outside the package is measured, written and shown like the package's own."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.given import NEEDS, Given, Judge, Reference, View
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.networks import Networks
from ddil_lightning.evaluation.registry import METRICS, columns, keys, metrics, register, unmeasured, unregister
from ddil_lightning.evaluation.suite import Probes, Suite, make_row
from ddil_lightning.evaluation.table import results_table, table, write_rows
from ddil_lightning.evaluation.views import Crops
from ddil_lightning.runs.report import write_report

OUTSIDE = """
from ddil_lightning.evaluation.columns import Column
from ddil_lightning.evaluation.metrics.base import Metric
from ddil_lightning.evaluation.registry import register


@register
class Vividness(Metric):
    columns = (Column("vividness", "Vividness", "lower", "mean distance from grey", short="colour", decimals=4, headline=True),)
    states = ("values",)
    details = {"brightest": []}

    def update(self, batch):
        self.values.append((batch.images - batch.images.mean(1, keepdim=True)).abs().mean((1, 2, 3)))
        self.held.setdefault("brightest", []).append(float(batch.images.max()))

    def compute(self):
        return {"vividness": float(self.all("values").mean()), "brightest": self.held["brightest"]}
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """What a test registers is taken out after it."""
    before = metrics()
    yield
    for metric in metrics():
        if metric not in before:
            unregister(metric)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "vividness_of_mine.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("vividness_of_mine")
    sys.modules.pop("vividness_of_mine")


def red(prompts: list[str], seed: int) -> Tensor:
    """Pure red, 8-bit: (1, -1, -1) is 4/3, 2/3, 2/3 from grey, 8/9 on the mean."""
    return torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(len(prompts), 3, 4, 4)


def test_one_from_outside_is_measured_written_and_shown(outside: Any, tmp_path: Path) -> None:
    suite = Suite("mine", [f"a {i}" for i in range(5)], batch=2)
    found = suite.score(red)
    assert found["vividness"] == pytest.approx(8 / 9, abs=1e-6) and found["brightest"] == [1.0, 1.0, 1.0]
    rows = [make_row(f"{who}@{n}", n, 1.0, n, 0.1, found, suite.protocol) for who in ("teacher", "student") for n in (4, 2)]
    assert "| Vividness ↓ |" in results_table(rows) and "| 0.8889 |" in results_table(rows)
    assert "Vividness ↓" in table(rows) and table(rows).count("0.8889") == 4
    write_rows(tmp_path / "summary.json", {"rows": rows})  # type: ignore[arg-type]
    written = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert written == rows and written[0]["protocol"]["n"] == 5
    page = write_report(tmp_path).read_text()
    assert "<th>Vividness ↓</th>" in page and "<dd>mean distance from grey</dd>" in page and "<b>Vividness ↓</b>" in page
    assert "How it was measured" in page and "<b>prompts</b>given" in page


def test_a_benchmark_has_its_column(outside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    monkeypatch.delitem(sys.modules, "builtin_table", raising=False)
    module = importlib.import_module("builtin_table")
    sys.modules.pop("builtin_table")
    assert ("vividness", "Vividness ↓") in module.COLUMNS and ("gap_vividness", "gap colour ↑") in module.COLUMNS
    assert module.GAPS == ("frechet", "all_right", "vividness")


def test_without_a_meeting_need_its_number_is_none_and_every_other_as_before(outside: Any) -> None:
    nothing = Suite("mine", ["a"] * 3).score(red)
    unregister(outside.Vividness)
    before = Suite("mine", ["a"] * 3).score(red)
    assert set(nothing) - set(before) == {"vividness", "brightest"} and before["saturation"] == pytest.approx(1)
    tones = {"saturation": before["saturation"], "contrast": 0}  # which need no network and no reference
    assert before == unmeasured() | tones and before["per_attribute"] == before["intervals"] == {}


def test_what_comes_twice_from_one_place_replaces_itself(outside: Any) -> None:
    first = outside.Vividness
    again = importlib.reload(outside).Vividness
    assert again in metrics() and first not in metrics() and keys().count("vividness") == 1


def fine(**changes: Any) -> type[Metric]:
    """A metric that is registered without a word, but for what is changed; None takes a member out."""
    members: dict[str, Any] = {
        "columns": (Column("sharp", "Sharpness", "higher", "of edges"),),
        "states": ("values",),
        "update": lambda self, batch: self.values.append(batch.images.mean((1, 2, 3))),
        "compute": lambda self: {"sharp": float(self.all("values").mean())},
        "__module__": __name__,
        "__qualname__": "Sharp",
    }
    return type("Sharp", (Metric,), {k: v for k, v in (members | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"columns": None}, "it declares no number; write `columns = "),
        (
            {"columns": (Column("sharp", "", "higher", "of edges"),)},
            "a column needs a key, a label and a meaning: Column(",
        ),
        (
            {"columns": (Column("sharp", "Sharpness", "up", "of edges"),)},
            "sharp: better='up'; it is 'higher', 'lower', or ''",
        ),
        ({"columns": (Column("clip", "Mine", "", "x"),)}, "clip is a number of ClipScore already; choose another key"),
        ({"columns": (Column("mode_kl", "Mine", "", "x"),)}, "mode_kl is a number of the analytic toy already"),
        ({"columns": (Column("steps", "Mine", "", "x"),)}, "steps is the name of another part of a row"),
        ({"needs": ("depth",)}, "needs depth: no suite has it; choose among features, embeddings, patches, tones, real"),
        ({"wants": ("depth",)}, "needs depth: no suite has it; choose among features"),
        ({"columns": (Column("intervals", "Mine", "", "x"),)}, "intervals is the name of another part of a row"),
        ({"over": "images"}, "over='images'; it is 'prompts' or 'probes'"),
        ({"compute": None}, "it does not define compute"),
        ({"update": None, "compute": None}, "it does not define compute and update"),
    ],
)
def test_what_is_not_declared_is_refused_by_name_in_a_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        register(fine(**changes))
    assert str(error.value).startswith(f"metric Sharp: {said}") and "\n" not in str(error.value)
    assert "Sharp" not in [m.__name__ for m in metrics()]
    register(fine())
    assert metrics()[-1].__name__ == "Sharp"


def test_what_is_no_metric_is_refused() -> None:
    class Loose:
        columns = ()

    with pytest.raises(ValueError, match=r"^metric Loose: it is no subclass of ddil_lightning\.evaluation\.metrics\.base\.Metric$"):
        register(Loose)  # type: ignore[type-var]


class Seen:
    """What a judge says of images that it does not look at."""

    def __init__(self, n: int) -> None:
        self.correct, self.residual = {"all": torch.ones(n)}, torch.zeros(n)


def full(count: list[str]) -> Suite:
    """A suite that has everything, and writes down which of its networks is called."""

    def called(name: str, answer: Any) -> Any:
        return lambda *args: count.append(name) or answer(*args)

    nets = Networks(
        called("features", lambda x: x.flatten(1)[:, :4]),
        distance=called("distance", lambda a, b: (a - b).abs().mean((1, 2, 3))),
        text=called("text", lambda prompts: torch.ones(len(prompts), 4)),
        embed=called("embed", lambda x: x.flatten(1)[:, :3]),
        **{name: called(name, lambda x, p: torch.ones(len(p))) for name in ("hps", "pickscore", "image_reward")},
    )
    judge = Judge(called("verdict", lambda x, p: Seen(len(x))), called("modes", lambda x, p: 1.0))
    rows = {"features": torch.randn(12, 4), "embeddings": torch.randn(12, 3), "patches": torch.randn(12, 4), "tones": torch.rand(12, 2)}
    given = Given(nets, Reference(rows), judge, View(crops=Crops(2, 4)), Reference(rows))
    return Suite("full", [f"{i}" for i in range(12)], given, Probes(["a", "b"], 2), batch=6)


def test_a_need_that_is_read_and_not_declared_is_refused_by_name() -> None:
    """Also where the suite at hand has it: the next one may not."""
    for need in NEEDS:
        register(fine(update=lambda self, batch, need=need: getattr(batch, need)))
        said = f"metric Sharp: it reads batch.{need} and does not declare it; write '{need}' into its `needs`"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            full([]).score(noise)
        register(fine(needs=(need,), update=lambda self, batch, need=need: self.values.append(torch.ones(1)) or getattr(batch, need)))
        assert full([]).score(noise)["sharp"] == 1


def test_what_is_computed_is_what_is_declared() -> None:
    register(fine(compute=lambda self: {"sharpness": 1.0}))
    with pytest.raises(ValueError, match=r"^metric Sharp: it computes \['sharpness'\] and declares \['sharp'\]$"):
        Suite("mine", ["a"]).score(red)


def noise(prompts: list[str], seed: int) -> Tensor:
    return torch.rand(len(prompts), 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_what_metrics_share_is_computed_once_and_what_none_needs_not_at_all() -> None:
    count: list[str] = []
    both = {"needs": ("features", "verdict")}
    register(fine(**both, update=lambda self, batch: self.values.append(batch.features.mean(1) + batch.verdict.residual)))
    full(count).score(noise)
    expected = {"features": 2 + 2, "embed": 2 + 1, "text": 2, "verdict": 2, "modes": 1}  # with the crops, with the probes
    assert {k: count.count(k) for k in expected} == expected
    count.clear()
    made = full(count)
    batch = next(made.batches(noise, made.passes()[0]))
    assert batch.prompts == ["0", "1", "2", "3", "4", "5"] and count == []


def test_every_entry_is_a_file_and_every_file_an_entry() -> None:
    folder = Path(sys.modules[Metric.__module__].__file__ or "").parent
    files = {p.stem for p in folder.glob("*.py")} - {"__init__", "base", "pairs"}
    assert sorted(entry.split(".")[0] for entry in METRICS) == sorted(files)
    assert [m.__name__ for m in metrics()] == [entry.split(".")[1] for entry in METRICS]
    assert all(c.meaning and c.better in ("higher", "lower", "") for c in columns()) and len(set(keys())) == len(keys())


def test_every_number_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    first = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    told = {key: bool(dot) for cell in first for key, dot in re.findall(r"`(\w+)`( •)?", cell)}
    assert told == {c.key: c.shown for c in columns()}


@pytest.mark.slow
def test_no_metric_is_loaded_before_one_is_asked_for() -> None:
    """torchmetrics costs seconds, which a suite, a table or a network does not need."""
    names = ("suite", "table", "registry", "networks", "batches", "columns")
    code = "".join(f"import ddil_lightning.evaluation.{name}\n" for name in names) + "import sys; print('torchmetrics' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
