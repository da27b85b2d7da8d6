"""Executes the notebooks, and stores them with what they print and draw.

python -m benchmarks.notebooks
python -m benchmarks.notebooks 02_why_low_rank 03_memory

What differs from one execution to the next is left out: counts, times, and what names the machine.
`executed.json` says which sources were executed, so that a change of one that was not is noticed;
the pictures that docs/notebooks.md shows are written beside it.
"""

import argparse
import base64
import contextlib
import copy
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
EXECUTED = NOTEBOOKS / "executed.json"
PICTURES = NOTEBOOKS / "pictures"
# The last line of a notebook's first cell of code, and what tests make of it: everything that
# takes long is then as short as it can be and still be drawn.
FULL, QUICK = "QUICK = False", "QUICK = True"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Of each notebook the picture, counted from 0, that docs/notebooks.md shows.
SHOWN = {
    "01_quickstart": 0,
    "02_why_low_rank": 1,
    "03_memory": 0,
    "04_methods": 1,
    "05_finetune": 0,
}
# More are not told apart in what is drawn here, and take three times the bytes.
COLORS = 256


def paths() -> list[Path]:
    """All notebooks, in the order in which they are read."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Makes "python3" the interpreter that runs this, whatever kernels the machine has."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        write_kernel_spec(str(Path(directory) / "kernels" / "python3"))
        os.environ |= {"JUPYTER_PATH": directory, "IPYTHONDIR": str(Path(directory) / "ipython")}
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # those of small SVDs wait for each other
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def execute(notebook: Any, *, quick: bool = False, timeout: int = 3600) -> Any:
    """The same notebook with the outputs of a fresh kernel, which starts in the repository.

    Args:
      notebook: as `read` returns it; it is not changed.
      quick: whether with fewer steps.
      timeout: seconds that a cell may take.

    Raises:
      ValueError: the first cell of code does not end with `QUICK = False`.
      RuntimeError: a cell wrote to stderr; the message has what it wrote.
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = copy.deepcopy(notebook)
    first = code_cells(notebook)[0]
    if not first.source.endswith(f"\n{FULL}"):
        raise ValueError(f"expected a first cell of code that ends with {FULL!r}: {first.source}")
    if quick:
        first.source = first.source.removesuffix(FULL) + QUICK
    place = {"metadata": {"path": str(ROOT)}}
    with own_kernel():
        NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=place).execute()
    for cell in code_cells(notebook):
        told = "".join(o.text for o in cell.outputs if o.get("name") == "stderr")
        if told:
            raise RuntimeError(f"{cell.source}\n\nwrote to stderr:\n{told}")
    return notebook


def normalised(notebook: Any) -> Any:
    """The same notebook without what differs between executions, and with small pictures."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    for cell in code_cells(notebook):
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if "image/png" in output.get("data", ()):
                small = fewer_colors(base64.b64decode(output.data["image/png"]))
                output.data = nbformat.from_dict({"image/png": base64.b64encode(small).decode()})
    return notebook


def fewer_colors(png: bytes) -> bytes:
    """The same picture with a palette, which it may have already, and nothing about its writer."""
    picture = Image.open(io.BytesIO(png))
    if picture.mode == "P":
        return png
    made = io.BytesIO()
    few = picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
    few.save(made, "PNG", optimize=True)
    return made.getvalue()


def pictures(notebook: Any) -> list[bytes]:
    """The pictures of a notebook with outputs, PNG, in order."""
    return [
        base64.b64decode(output.data["image/png"])
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", ())
    ]


def digest(notebook: Any) -> str:
    """A hash of all that is executed."""
    sources = json.dumps([cell.source for cell in code_cells(notebook)])
    return hashlib.sha256(sources.encode()).hexdigest()


def store(path: Path, notebook: Any) -> None:
    """Writes an executed notebook, its picture for the site, and that these are its sources."""
    notebook = normalised(notebook)
    nbformat.write(notebook, path)
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{path.stem}.png").write_bytes(pictures(notebook)[SHOWN[path.stem]])
    executed = json.loads(EXECUTED.read_text()) if EXECUTED.exists() else {}
    executed[path.stem] = digest(notebook)
    known = {path.stem for path in paths()}
    kept = {name: executed[name] for name in sorted(executed) if name in known}
    EXECUTED.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; by default all")
    parser.add_argument("--quick", action="store_true", help="try them out, and store nothing")
    args = parser.parse_args()
    known = {path.stem: path for path in paths()}
    unknown = set(args.names) - known.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    for name in args.names or known:
        path = known[name]
        began = time.monotonic()
        notebook = execute(read(path), quick=args.quick)
        print(f"{name:20} {time.monotonic() - began:5.0f} s", flush=True)
        if not args.quick:
            store(path, notebook)


if __name__ == "__main__":
    main()
