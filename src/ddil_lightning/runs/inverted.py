"""What ddil-invert has found, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from ddil_lightning.evaluation.table import Table, cell, values_of

Row = Mapping[str, Any]

PAPER = "0.60 to 0.61 for PD with DDIL, 0.63 for Stable Diffusion 1.5, 0.45 for LCM"
COLUMNS = {
    "similarity": "similarity",
    "similarity_others": "to others",
    "lpips": "LPIPS",
    "lpips_diversity": "diversity",
    "attribute_accuracy": "attributes",
    "all_right": "all right",
}
NOTE = (
    "similarity: cosine of an image's features and its reference's, and to the other references; LPIPS: distance from the reference; "
    f"diversity: LPIPS of all pairs of a prompt's images. The paper's diversity (appendix F) is {PAPER}."
)
SHOWN = 16


def text(found: Mapping[str, Any]) -> str:
    """Everything for a terminal: some prompts, a row a sampler, and what was recovered."""
    parts = [_prompts(found["prompts"]), _losses(found["prompts"], found["protocol"]["search"]), _rows(found["rows"]).text(), f"{NOTE}\n"]
    return "\n".join([*parts, *([] if found["recovery"] is None else [_recovery(found["recovery"]) + "\n"])])


def _prompts(prompts: Sequence[Row]) -> str:
    lines = [
        line
        for p in prompts[:SHOWN]
        for line in (_said(p["caption"] or p["image"], p["caption_loss"]), _said(f"    {p['prompt']}", p["loss"]))
    ]
    more = len(prompts) - SHOWN
    return "\n".join([*lines, *([f"and {more} more"] if more > 0 else []), ""])


def _losses(prompts: Sequence[Row], search: Row) -> str:
    """How well prompts denoise their images on average: those that the search began with, found, and had to find."""
    means = {"random words": mean(p["trace"][0] for p in prompts)}
    if search["updates"]:  # the trace goes on with the passes
        means["after our PH2P"] = mean(p["trace"][-1 - search["passes"]] for p in prompts)
    if search["passes"]:
        means["after exchanges"] = mean(p["loss"] for p in prompts)
    if all(p["caption_loss"] is not None for p in prompts):
        means["true captions"] = mean(p["caption_loss"] for p in prompts)
    return f"mean loss: {', '.join(f'{name} {cell(value)}' for name, value in means.items())}\n"


def _said(prompt: str, loss: float | None) -> str:
    return prompt if loss is None else f"{prompt}   (loss {cell(loss)})"


def _rows(rows: Sequence[Row]) -> Table:
    keys = [key for key in COLUMNS if any(values_of(row).get(key) is not None for row in rows)]
    lines = [[row["name"], *(cell(row[k]) for k in ("steps", "nfe")), *(cell(values_of(row).get(k), 3) for k in keys)] for row in rows]
    return Table(["pipeline", "steps", "NFE", *(COLUMNS[key] for key in keys)], lines)


def _recovery(recovery: Mapping[str, Any]) -> str:
    """What was recovered of the scenes, beside chance: in the words of the prompts, and in the teacher's images of them."""
    teacher = recovery["images"][0]
    table = [_line("words of the prompts", recovery["words"]), _line("the teacher's images of them", teacher)]
    shares = ", ".join(f"{name} {cell(value, 2)}" for name, value in recovery["words"]["by"].items() if value is not None)
    seen = ", ".join(f"{name} {cell(value, 2)}" for name, value in teacher["by"].items() if value is not None)
    head = ["recovered", "attributes", "by chance", "all of them", "by chance"]
    return f"{Table(head, table).text()}in words: {shares}\nin images: {seen}"


def _line(name: str, found: Row) -> list[str]:
    chance = found["chance"] or {}
    return [name, *(cell(value, 3) for key in ("attributes", "all") for value in (found[key], chance.get(key)))]
