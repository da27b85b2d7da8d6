"""The notebooks run from a fresh kernel, and are stored as they were executed."""

import json
import re

import nbformat
import pytest

from benchmarks import notebooks

NOTEBOOKS = notebooks.paths()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def shown(notebook):
    """How many pictures the code of a notebook shows."""
    return sum(cell.source.count("plt.show()") for cell in notebooks.code_cells(notebook))


@pytest.mark.ci
@pytest.mark.long("a notebook in a kernel of its own")
@each
def test_a_notebook_runs_to_its_end_and_draws_its_pictures(path):
    notebook = notebooks.execute(notebooks.read(path), quick=True)
    assert len(notebooks.pictures(notebook)) == shown(notebook) > 0


@pytest.mark.plain
@each
def test_a_notebook_is_stored_as_it_was_executed(path):
    notebook = notebooks.read(path)
    nbformat.validate(notebook)
    assert json.loads(notebooks.EXECUTED.read_text())[path.stem] == notebooks.digest(notebook)
    assert len(notebooks.pictures(notebook)) == shown(notebook) > 0
    outputs = [output for cell in notebooks.code_cells(notebook) for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"display_data", "execute_result", "stream"}
    assert all(o.name == "stdout" for o in outputs if o.output_type == "stream")


@pytest.mark.plain
@each
def test_a_stored_notebook_has_nothing_of_its_execution_but_outputs(path):
    stored = path.read_text()
    assert len(stored) < 400_000
    assert nbformat.writes(notebooks.normalised(notebooks.read(path))) + "\n" == stored
    notebook = json.loads(stored)
    assert notebook["metadata"] == notebooks.METADATA
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    printed = [
        "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
    ]
    # Paths of machines, addresses of objects.
    assert not re.search(r"/home/|/tmp/|/root/|/work/|\bat 0x", "\n".join(printed))


@pytest.mark.plain
@each
def test_links_of_a_notebook_lead_to_files(path):
    prose = "\n".join(
        cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown"
    )
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert targets
    assert all((path.parent / target).exists() for target in targets)


@pytest.mark.plain
@each
def test_the_site_shows_a_picture_of_a_notebook(path):
    picture = notebooks.PICTURES / f"{path.stem}.png"
    stored = notebooks.pictures(notebooks.read(path))
    assert picture.read_bytes() == stored[notebooks.SHOWN[path.stem]]
    page = (notebooks.ROOT / "docs" / "notebooks.md").read_text()
    assert f"](../notebooks/{path.name})" in page
    assert f"](../notebooks/pictures/{picture.name})" in page


def cells(*sources):
    """A notebook of code, which is read as if from a file."""
    new = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    return nbformat.reads(nbformat.writes(new), as_version=4)


@pytest.mark.plain
def test_a_changed_source_is_noticed_and_changed_outputs_are_not():
    notebook = cells("x = 1", "x")
    before = notebooks.digest(notebook)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="1")]
    assert notebooks.digest(notebook) == before
    notebook.cells[1].source = "x + 1"
    assert notebooks.digest(notebook) != before


@pytest.mark.plain
def test_a_notebook_that_has_no_quick_way_is_refused():
    with pytest.raises(ValueError, match="QUICK = False"):
        notebooks.execute(cells("import jax"), quick=True)


@pytest.mark.ci
@pytest.mark.long("a kernel")
def test_what_a_notebook_says_on_stderr_is_an_error():
    notebook = cells("import sys\n\nQUICK = False", "print(f'{QUICK=}', file=sys.stderr)")
    with pytest.raises(RuntimeError, match="wrote to stderr:\nQUICK=True"):
        notebooks.execute(notebook, quick=True)
    assert notebook.cells[1].outputs == []
