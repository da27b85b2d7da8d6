"""The tensors of a model directory: one safetensors file, or many with an index."""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from examples.flax_llama.usage import UsageError, cannot_be_read, parse_json

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The dtypes that weights are taken from; what is in fewer bits has scales beside it.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Numbers that are looked at at once, so that this takes no memory.
PART = 2**20


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet.

    Attributes:
      file: that holds it.
      shape: of it.
      dtype: NumPy's name, or that of the file where weights are none of such.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """What tensors a model directory has, by name; of each file the header alone is read.

    Raises:
      UsageError: there is no such directory or file in it, a file is cut or damaged, the index
        names a file that is missing, or says what is not in it, or two files have the same tensor,
        or there is a file for all beside an index of others.
    """
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory with a model.")
    index = directory / INDEX
    if not index.is_file():
        if not (directory / FILE).is_file():
            raise UsageError(
                f"{directory} has neither {FILE} nor {INDEX}: expected the directory of a model "
                "in safetensors."
            )
        return header(directory / FILE)
    places = read_index(index)
    if (directory / FILE).exists() and FILE not in places.values():
        raise UsageError(
            f"{directory} has both {FILE} and {INDEX}, which does not name it: remove the one that "
            "is not of the model."
        )
    found: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        path = directory / name
        if not os.path.isfile(path):  # of a name that no file can have too
            raise UsageError(f"{index} names {name}, which is missing.")
        new = header(path)
        if twice := sorted(found.keys() & new.keys()):
            raise UsageError(f"{twice[0]} is in {found[twice[0]].file} and in {path}.")
        found |= new
    for name, place in sorted(places.items()):
        if name not in found or found[name].file.name != place:
            raise UsageError(f"{index} says that {name} is in {place}, where it is not.")
    return found


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index."""
    try:
        places = parse_json(path.read_text())["weight_map"]
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not an index of safetensors: {error!r}") from error
    if not (
        isinstance(places, dict)
        and places
        and all(isinstance(v, str) and Path(v).name == v for v in places.values())
    ):
        raise UsageError(f"{path}: expected names of files beside it in weight_map.")
    return places


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Tensor(path, tuple(x.get_shape()), DTYPES.get(x.get_dtype(), str(x.get_dtype())))
            for name, x in slices.items()
        }


def read(tensors: dict[str, Tensor], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Reads some tensors, one at a time, in the order of the files that hold them.

    Nothing of a file is kept in memory but the tensor that is yielded.

    Raises:
      UsageError: a file cannot be read any more, or a number is not finite; names the tensor.
    """
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(tensors[name].file, []).append(name)
    for path, of_file in by_file.items():
        with opened(path) as file:
            for name in of_file:
                array = file.get_tensor(name)
                if array.dtype == np.float64:
                    # Nothing is kept in more than 32 bits.
                    with np.errstate(over="ignore"):
                        array = array.astype(np.float32)
                if not is_finite(array):
                    raise UsageError(f"{name} in {path} has a number that is not finite.")
                yield name, array


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is infinite or none at all: those have all bits of infinity's exponent."""
    if "float" not in array.dtype.name:
        return True
    exponent = np.array(np.inf, array.dtype).view(f"u{array.itemsize}")
    bits = array.reshape(-1).view(exponent.dtype)
    parts = (bits[start : start + PART] for start in range(0, bits.size, PART))
    return not any(((part & exponent) == exponent).any() for part in parts)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, read by calls; pages of a mapped one would count as memory in use."""
    try:
        with safe_open(path, framework="numpy", backend="pread") as file:
            yield file
    except SafetensorError as error:
        raise UsageError(f"{path} is cut or damaged: {error}.") from error
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
