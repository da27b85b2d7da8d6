"""Parameters in one safetensors file, written and read an array at a time.

Orbax, which saves the checkpoints of runs, copies all parameters before it writes them. What is
imported need not be in memory at all.
"""

import contextlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from examples.flax_llama.usage import UsageError, cannot_be_read, read_object

FILE = "weights.safetensors"
# The checksums of the arrays in it, of each layer apart.
SUMS = "weights.json"
# What the format calls the dtypes that parameters, their codes and scales have.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8"}


def named(tree: Any) -> dict[str, Any]:
    """The arrays of a tree, codes and scales too, by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


class Writer:
    """Writes arrays, or single layers of them, to their places in a file, in any order."""

    def __init__(self, file: BinaryIO, like: Any):
        self._file, self._like = file, named(like)
        self.sums: dict[str, dict[str, int]] = {name: {} for name in self._like}
        self._starts, header, end = {}, {}, 0
        for name, leaf in self._like.items():
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            header[name] = {
                "dtype": DTYPES[leaf.dtype.name],
                "shape": list(leaf.shape),
                "data_offsets": [end, end + size],
            }
            self._starts[name] = end
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        self._data = file.tell()
        file.truncate(self._data + end)

    def put(self, name: str, layer: int | None, array: np.ndarray) -> None:
        leaf = self._like[name]
        shape = leaf.shape if layer is None else leaf.shape[1:]
        ours = np.ascontiguousarray(array, leaf.dtype)
        if ours.shape != shape:
            raise ValueError(f"{name} has the shape {shape}, not {ours.shape}")
        self._file.seek(self._data + self._starts[name] + (layer or 0) * ours.nbytes)
        data = ours.view(np.uint8).data
        self.sums[name]["all" if layer is None else str(layer)] = zlib.crc32(data)
        self._file.write(data)


@contextlib.contextmanager
def writing(directory: Path, like: Any) -> Iterator[Writer]:
    """A writer of the file in a directory, of parameters with these shapes and dtypes."""
    with open(directory / FILE, "wb") as file:
        writer = Writer(file, like)
        yield writer
        file.flush()
        os.fsync(file.fileno())
    (directory / SUMS).write_text(json.dumps(writer.sums, indent=1) + "\n")


def read_weights(directory: Path, like: Any) -> Any:
    """Reads the file in a directory.

    Args:
      directory: with the file.
      like: shapes, dtypes and shardings of the parameters.

    Raises:
      UsageError: it is cut or damaged, cannot be read, or holds other arrays.
    """
    path, sums = directory / FILE, read_object(directory / SUMS)
    try:
        # By calls: the pages of a mapped file would count as memory in use.
        with safe_open(path, framework="numpy", backend="pread") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wanted = {name: leaf.shape for name, leaf in named(like).items()}
            if there != wanted:
                odd = sorted({k for k, _ in there.items() ^ wanted.items()})
                raise UsageError(f"{path} does not fit its settings: {odd[0]} is not as they say.")
            arrays = [
                jax.device_put(checked(path, name, file.get_tensor(name), sums), leaf.sharding)
                for name, leaf in named(like).items()
            ]
    except SafetensorError as error:
        raise UsageError(f"{path} is cut or damaged: {error}.") from error
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def checked(path: Path, name: str, array: np.ndarray, sums: dict[str, Any]) -> np.ndarray:
    """An array, if its checksums are those that were written."""
    saved = sums.get(name)
    layers = {"all": array} if saved is None or "all" in saved else dict(enumerate(array))
    found = {
        str(k): zlib.crc32(np.ascontiguousarray(x).view(np.uint8).data) for k, x in layers.items()
    }
    if found != saved:
        raise UsageError(f"{name} in {path} is not what was imported: its checksum is another.")
    return array
