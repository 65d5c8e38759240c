"""Every notebook runs from top to bottom, as a reader would run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_notebooks_are_stored_without_outputs_of_a_machine() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
        text = path.read_text()
        assert not errors and "/home/" not in text and "/root/" not in text
