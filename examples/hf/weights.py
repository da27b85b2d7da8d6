"""The weights of a Hugging Face directory as our parameters, and our parameters as one."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (NumPy's bfloat16)
import numpy as np

import galore_optax
from examples.flax_llama.model import Params, is_quantized
from examples.flax_llama.weights_file import named
from examples.hf.names import Entry
from examples.hf.tensors import Tensor, read


def converted(
    tensors: dict[str, Tensor],
    found: list[Entry],
    like: Params,
    told: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Reads the tensors of a model one at a time, as arrays of ours.

    Args:
      tensors: of the directory.
      found: which of them go where.
      like: shapes and dtypes of the parameters, quantized where they are to be.
      told: is called with the number of bytes after each tensor.

    Yields:
      The path of an array, the layer of it or None for all, and the array, in the dtype of the
      file where it is not in codes.

    Raises:
      UsageError: a file cannot be read.
    """
    by_name = {entry.name: entry for entry in found}
    for name, theirs in read(tensors, by_name):
        entry = by_name[name]
        leaf = like
        for key in entry.path.split("/"):
            leaf = leaf[key]
        if is_quantized(leaf):
            for part, codes in named(quantized(entry.ours(theirs), leaf)).items():
                yield f"{entry.path}/{part}", entry.layer, np.asarray(codes)
        else:
            yield entry.path, entry.layer, entry.ours(theirs)
        told(theirs.nbytes)


def load(tensors: dict[str, Tensor], found: list[Entry], like: Params) -> Params:
    """The parameters of a model, in arrays of NumPy; see `converted`."""
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    arrays = named(params)
    for name, layer, array in converted(tensors, found, like):
        target = arrays[name] if layer is None else arrays[name][layer]
        # A cast and a transposition at once, without a copy of either.
        target[...] = array
    return params


def quantized(matrix: np.ndarray, like: Any) -> Any:
    """A matrix in the codes of a stack of such."""
    dense = jnp.asarray(matrix, like.dtype)
    return _quantize(dense, scheme=like.scheme, block_size=like.block_size)


_quantize = jax.jit(galore_optax.quantize, static_argnames=("scheme", "block_size"))


def tensor_of(entry: Entry, params: Params) -> np.ndarray:
    """One tensor as Hugging Face has it, dequantized."""
    node = params
    for key in entry.path.split("/"):
        node = node[key]
    ours = node if entry.layer is None else jax.tree.map(lambda x: x[entry.layer], node)
    dense = galore_optax.dequantize_params(ours)
    return np.ascontiguousarray(entry.theirs(np.asarray(dense)))
