"""The weights of a Hugging Face directory as our parameters, and our parameters as one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (NumPy's bfloat16)
import numpy as np

import galore_optax
from examples.flax_llama.model import Params, is_quantized
from examples.hf.names import Entry
from examples.hf.tensors import Tensor, read


def load(
    tensors: dict[str, Tensor],
    found: list[Entry],
    like: Params,
    told: Callable[[int], None] = lambda _: None,
) -> Params:
    """Reads the parameters of a model, one tensor at a time, into arrays of NumPy.

    Args:
      tensors: of the directory.
      found: which of them go where.
      like: shapes and dtypes of the parameters, quantized where they are to be.
      told: is called with the number of bytes after each tensor.

    Raises:
      UsageError: a file cannot be read.
    """
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    by_name = {entry.name: entry for entry in found}
    for name, theirs in read(tensors, by_name):
        entry = by_name[name]
        *parents, last = entry.path.split("/")
        node = params
        for key in parents:
            node = node[key]
        if is_quantized(node[last]):
            put(node[last], quantized(entry.ours(theirs), node[last]), entry.layer)
        else:
            target = node[last] if entry.layer is None else node[last][entry.layer]
            # A cast and a transposition at once, without a copy of either.
            target[...] = entry.ours(theirs)
        told(theirs.nbytes)
    return params


def quantized(matrix: np.ndarray, like: Any) -> Any:
    """A matrix in the codes of a stack of such."""
    dense = jnp.asarray(matrix, like.dtype)
    return _quantize(dense, scheme=like.scheme, block_size=like.block_size)


_quantize = jax.jit(galore_optax.quantize, static_argnames=("scheme", "block_size"))


def put(stack: Any, one: Any, layer: int | None) -> None:
    """Writes the codes of a layer into those of a stack."""
    for target, new in zip(jax.tree.leaves(stack), jax.tree.leaves(one), strict=True):
        target[layer] = np.asarray(new)


def tensor_of(entry: Entry, params: Params) -> np.ndarray:
    """One tensor as Hugging Face has it, dequantized."""
    node = params
    for key in entry.path.split("/"):
        node = node[key]
    ours = node if entry.layer is None else jax.tree.map(lambda x: x[entry.layer], node)
    dense = galore_optax.dequantize_params(ours)
    return np.ascontiguousarray(entry.theirs(np.asarray(dense)))
