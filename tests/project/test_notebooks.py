"""Every notebook runs from top to bottom, as a reader would run it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddil_lightning.packaged import find_config
from ddil_lightning.training.optimisation import Optimizer

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


SLOW = ("covariate_shift", "your_own_method", "evaluate_a_pipeline")
"""Each trains twice; the others are in the ordinary tests."""


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow if p.stem in SLOW else (), id=p.stem) for p in NOTEBOOKS])
def test_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the reader's own profile
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in data for data in shown), "a notebook shows a picture"
    assert not any("Traceback" in str(data) for data in shown)


def test_the_method_of_the_notebook_is_the_one_of_contributing() -> None:
    cells = json.loads((NOTEBOOKS[0].parent / "your_own_method.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = ["".join(c["source"]) for c in cells if "".join(c["source"]).startswith("%%writefile direct.py\n")]
    text = (NOTEBOOKS[0].parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert cell.partition("\n")[2].strip() in text


def test_two_methods_of_the_notebook_differ_in_what_it_says_alone() -> None:
    """LCM's config reflects and does not clip, and the text said that both were trained alike."""
    cells = json.loads((NOTEBOOKS[0].parent / "your_own_method.ipynb").read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells]
    (mine,) = [yaml.safe_load(code.partition("\n")[2]) for code in codes if code.startswith("%%writefile mine.yaml\n")]
    (told,) = [dict(re.findall(r'"(model\.[\w.]+|data\.\w+)=([^"]+)"', code)) for code in codes if 'toy2d/lcm_ddil.yaml", *same' in code]
    lcm = yaml.safe_load(find_config("toy2d/lcm_ddil.yaml").read_text(encoding="utf-8"))

    def of(config: dict[str, Any], more: dict[str, str]) -> dict[str, Any]:
        own = config["model"]["init_args"]
        given = {f"model.{k}": v for k, v in own.items()} | {f"model.optimizer.{k}": v for k, v in own["optimizer"].items()}
        given |= {f"model.pipeline.{k}": v for k, v in own["pipeline"]["init_args"].items()} | {
            "data.batch_size": config["data"]["batch_size"]
        }
        usual = {"model.reflect": "off", "model.optimizer.clip": Optimizer().clip}
        names = ("updates", "ema", "reflect", *(f"optimizer.{k}" for k in ("lr", "warmup", "final_lr", "clip")))
        names += tuple(f"pipeline.{k}" for k in ("problem", "scale", "guidance", "width", "members"))
        found = {**usual, **given, **more}
        return {name: str(found[name]) for name in ("data.batch_size", *(f"model.{name}" for name in names))}

    assert of(mine, {}) == of(lcm, told)


def test_notebooks_are_stored_without_outputs_of_a_machine() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
        text = path.read_text()
        assert not errors and "/home/" not in text and "/root/" not in text
