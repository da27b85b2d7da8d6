"""The notebooks run from a fresh kernel, and are stored without what that leaves in them."""

import pathlib

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def own_kernel(tmp_path, monkeypatch):
    """Makes "python3" the interpreter that runs this, whatever kernels the machine has."""
    write_kernel_spec(str(tmp_path / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


@pytest.mark.ci
@pytest.mark.long("a notebook in a kernel of its own")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end_and_draws_its_pictures(path, own_kernel):
    notebook = nbformat.read(path, as_version=4)
    # Its training takes most of its time, and is no longer than it must be to be drawn.
    for cell in notebook.cells:
        cell.source = cell.source.replace('"steps": 150', '"steps": 20')
    place = {"metadata": {"path": str(path.parents[1])}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", ())
    ]
    shown = sum(cell.source.count("plt.show()") for cell in notebook.cells)
    assert len(pictures) == shown > 0
    errors = [
        o for cell in notebook.cells for o in cell.get("outputs", ()) if o.get("name") == "stderr"
    ]
    assert errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.metadata == {} for cell in notebook.cells)
