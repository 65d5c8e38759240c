"""Every notebook runs from top to bottom, as a reader would run it."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # not the reader's own profile
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [out.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in data for data in shown), "a notebook shows a picture"
    assert not any("Traceback" in str(data) for data in shown)


def test_notebooks_are_stored_without_outputs_of_a_machine() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
        text = path.read_text()
        assert not errors and "/home/" not in text and "/root/" not in text
