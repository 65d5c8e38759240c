"""The page of a comparison: whatever names and prompts hold, in a browser too, on a phone and on a desk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Browser, needs_chromium
from ddil_lightning.evaluation.registry import unmeasured
from ddil_lightning.evaluation.stamps import sized
from ddil_lightning.evaluation.suite import make_row
from ddil_lightning.runs.compared import markdown, text, write_compared
from ddil_lightning.runs.comparison import Comparison, Seen, small
from hostile import EVIL

NAME = "<img src=x onerror=\"document.title='taken'\">" + "w" * 55


@pytest.fixture
def found(tmp_path: Path) -> Comparison:
    """Two pipelines in one and four steps, the last row by another protocol, with markup and words without an end wherever a text is."""
    made = Comparison(tmp_path / "x.json", ["one", NAME])
    made.prompts, made.notes = [EVIL, "a cross"], [EVIL]
    for k, (name, n, stamp) in enumerate((("one", 1, "s"), ("one", 4, "s"), (NAME, 1, "s"), (NAME, 4, "other"))):
        protocol = {"name": EVIL, "n": 12, "stamp": stamp, "seeds": {"first": 0}, "prompts": EVIL}
        metrics = {"frechet": 9.0 / n, "all_right": 0.1 * n, "clip": 0.8, "saturation": 0.5}
        generation = {"pipeline": EVIL, "lora": [EVIL], "sampler": EVIL, "digest": "d", "dtype": "float32"}
        seen = Seen(small(torch.rand(2, 3, 200, 100) * 2 - 1), {"clip": torch.arange(12.0) * (k + 1), "blur": torch.ones(12)})
        made.add(make_row(f"{name}@{n}", n, 3.0, 2 * n, 0.1, metrics, protocol, generation), seen)
    made.left_out[f"{NAME}@8"] = EVIL
    made.write()
    return made


def test_texts_are_escaped_and_rows_of_another_protocol_are_paired_with_none(found: Comparison) -> None:
    names = write_compared(found)
    page = names[1].read_text()
    assert "<script" not in page and "<img src=x" not in page and page.count('<img width="64" height="128"') == 8
    (pair,) = found.against()
    assert (pair["name"], pair["against"]) == (f"{NAME}@1", "one@1")
    assert pair["differences"]["clip"]["mean"] == 11.0 and pair["differences"]["blur"] == {"mean": 0.0, "interval": None, "n": 12}
    for told in (page, markdown(found), text(found)):
        assert "The rows were measured by 2 protocols" in " ".join(told.split())
    again = Comparison(found.out, ["one", NAME])
    one, other = {"stamp": "s", "metrics": ["frechet"]}, {"stamp": "other", "metrics": ["clip"]}
    assert again.kept(f"{NAME}@4", other, "d") and not again.kept(f"{NAME}@4", one, "d") and not again.kept("one@1", one, "e")
    assert again.kept("one@1", one, "d")


MINE = {"name": "mine", "n": 4, "stamp": "s", "seeds": {"first": 0}}


def measured(protocol: dict[str, Any], digest: str = "d", **numbers: float) -> tuple[dict[str, Any], Seen]:
    metrics = unmeasured() | numbers | {"intervals": {key: [0, 1] for key in numbers}}
    values = {key: torch.full((4,), value) for key, value in numbers.items()}
    row = make_row("one@4", 4, 3.0, 8, 0.1, metrics, protocol, {"digest": digest})
    return row, Seen(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), values)


def test_a_row_is_measured_again_for_more_metrics_and_keeps_its_numbers(tmp_path: Path) -> None:
    """Their stamps are equal, for what is asked for changes no number."""
    some, more, every = ({**MINE, "metrics": asked} for asked in (["hps", "kid"], ["hps", "pickscore"], None))
    made = Comparison(tmp_path / "x.json", ["one"])
    made.add(*measured(some, hps=0.25, kid=0.5))
    assert made.kept("one@4", some, "d") and made.kept("one@4", {**some, "metrics": ["kid"]}, "d")
    assert not made.kept("one@4", more, "d") and not made.kept("one@4", every, "d")
    made.add(*measured(more, hps=0.25, pickscore=20.0))
    again = Comparison(made.out, ["one"])
    (row,) = again.rows
    assert row["protocol"]["metrics"] == ["hps", "kid", "pickscore"] and again.kept("one@4", some, "d") and again.kept("one@4", more, "d")
    assert {key: row["metrics"][key] for key in ("hps", "kid", "pickscore")} == {"hps": 0.25, "kid": 0.5, "pickscore": 20.0}
    seen = again.seen("one@4")
    assert set(row["metrics"]["intervals"]) == {"hps", "kid", "pickscore"} == set(seen.values if seen else {})
    made.add(*measured(every, hps=0.25))
    assert made.rows[0]["protocol"]["metrics"] is None and made.kept("one@4", more, "d") and made.kept("one@4", every, "d")
    made.add(*measured(some, "other weights", hps=0.3))
    assert made.rows[0]["metrics"]["pickscore"] is None and made.rows[0]["protocol"]["metrics"] == ["hps", "kid"]


def test_an_older_row_has_the_numbers_that_it_has(tmp_path: Path) -> None:
    """It does not say what it was asked for, and was taken to have all: what a protocol newly asked for was never measured."""
    old, more, every = MINE, {**MINE, "metrics": ["kid", "vendi"]}, {**MINE, "metrics": None}
    made = Comparison(tmp_path / "x.json", ["one"])
    made.add(*measured(old, hps=0.25, kid=0.5))
    assert (
        made.kept("one@4", {**MINE, "metrics": ["kid"]}, "d") and not made.kept("one@4", more, "d") and not made.kept("one@4", every, "d")
    )
    made.add(*measured(more, kid=0.5))  # no network for vendi here, which is known now
    assert made.kept("one@4", more, "d") and not made.kept("one@4", every, "d")
    assert made.rows[0]["protocol"]["metrics"] == ["kid", "vendi"] and made.rows[0]["metrics"]["hps"] == 0.25
    made.add(*measured(every, kid=0.5))
    assert made.kept("one@4", every, "d")


def test_values_of_groups_from_before_are_measured_again(tmp_path: Path) -> None:
    """An older file has a mean of each group, from which no gap of two rows comes; what is written now has each image and its group."""
    made, groups = Comparison(tmp_path / "x.json", ["one"]), torch.tensor([0, 0, 0, 1])
    row, seen = measured(MINE, clip=0.5)
    made.add(row, seen._replace(values={"clip": torch.ones(2)}))
    assert not made.kept("one@4", MINE, "d") and made.against() == []
    made.add(row, seen._replace(groups=groups))
    again = made.seen("one@4")
    assert made.kept("one@4", MINE, "d") and again is not None and again.groups is not None and again.groups.tolist() == groups.tolist()
    other, theirs = measured(MINE, "e", clip=0.0)
    made.add({**other, "name": "two@4"}, theirs._replace(groups=groups))
    (pair,) = made.against()
    assert pair["differences"]["clip"] == {"mean": -0.5, "interval": None, "n": 4}


def test_numbers_that_stay_keep_the_caution_about_sizes(tmp_path: Path) -> None:
    """A joined row was told to be of numbers that see no size, for those asked for now see none."""
    made = Comparison(tmp_path / "x.json", ["one"])
    for asked, seen in ({"lpips_diversity": ["lpips_diversity"]} | {"kid": []}).items():
        row, values = measured({**MINE, "metrics": [asked]}, **{asked: 0.5})
        for name, side in (("one@4", 16), ("two@4", 32)):
            made.add({**row, "name": name, "generation": {"digest": name, "size": [side, side], "as_made": seen}}, values)
    assert [row["generation"]["as_made"] for row in made.rows] == [["lpips_diversity"]] * 2
    assert sized(made.rows).startswith("Images as large as they are made are seen by lpips_diversity: ")


def test_what_a_protocol_names_is_shown(tmp_path: Path) -> None:
    """As HPDv2's does, whose three numbers are in no other table."""
    made = Comparison(tmp_path / "x.json", ["one", "two"])
    about = {"name": "hpsv2", "n": 4, "stamp": "s", "seeds": {"first": 0}, "metrics": ["hps"]}
    for name, by in (("one", 0.0), ("two", 0.5)):
        row, seen = measured(about, hps=0.25 + by, pickscore=20.0)
        made.add({**row, "name": f"{name}@4"}, seen)
    for told in (text(made), markdown(made)):
        assert told.count("HPS") == 2 and "0.750" in told and "+0.5" in told and "PickScore" not in told
    write_compared(made)
    assert made.out.with_suffix(".html").read_text().index("HPS") < made.out.with_suffix(".html").read_text().index("All measures")


@pytest.mark.slow
@needs_chromium
def test_the_page_fits_and_complains_of_nothing(found: Comparison, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        for width, dark in ((390, False), (768, True), (1280, False)):
            browser.open(write_compared(found)[1], width, dark)
            browser.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert browser.ask("document.documentElement.scrollWidth") == browser.ask("window.innerWidth") == width
            assert browser.complaints == [] and "taken" not in browser.ask("document.title")[:5]
            assert browser.ask("[...document.images].every(x => x.naturalWidth == 64)")
    finally:
        browser.close()
