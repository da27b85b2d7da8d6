"""Keeps inputs of layers for the backward pass: of which layers, and in how many bits."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from galore_optax._layerwise.row_major import row_major
from galore_optax._layerwise.spaces import to_device
from galore_optax._quantized import is_quantized
from galore_optax._storage import Storage
from galore_optax._types import Params

MEMORIES = ("device", "pinned_host")

Activations: TypeAlias = PyTree
"""What one layer returns and the next one takes: a floating-point array, or a tree with such.

Other arrays in the tree are handed on without a gradient. The gradient of one is a tree with None
in their places.
"""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How the inputs of layers are kept.

    Attributes:
      storage: how each floating-point array of an input is held; others are held as they are.
      every: of how many layers in a row the first one's input is kept. Those of the others are
        computed again.
      memory: where they are held: "device", or "pinned_host", of the machine that it is in.
    """

    storage: Storage
    every: int
    memory: str

    def keep(self, x: Activations) -> PyTree:
        """Returns what is held of the input of a layer; no block of codes straddles two rows."""

        def held(array: Array) -> PyTree:
            if not jnp.issubdtype(array.dtype, jnp.floating) or not array.ndim:
                return array
            return self.storage.keep(array, batch_axes=array.ndim - 1)

        kept = jax.tree.map(held, x)
        if self.memory == "device":
            return kept
        return jax.device_put(kept, jax.memory.Space.Host)

    def load(self, kept: PyTree, like: Activations) -> Activations:
        """Returns the input that is held, in the dtypes of another one."""
        if self.memory != "device":
            kept = jax.device_put(kept, jax.memory.Space.Device)

        def loaded(held: PyTree, of: Array) -> Array:
            array = self.storage.load(held)
            return array if array.dtype == of.dtype else array.astype(of.dtype)

        return jax.tree.map(loaded, kept, like, is_leaf=is_quantized)

    def in_groups(self, stacked: Params) -> Params:
        """Returns stacks of layers with an axis of groups before that of a group's layers."""
        if self.every == 1:
            return stacked
        return jax.tree.map(lambda x: x.reshape(-1, self.every, *x.shape[1:]), stacked)


def one_of(tree: PyTree, index: Int[Array, ""] | int, axis: int = 0) -> PyTree:
    """Returns one entry of each array of a tree along an axis, without that axis.

    What lies in the memory of the machine is copied to the device, one entry of it.
    """

    def cut(x: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
        return row_major(to_device(own))

    return jax.tree.map(cut, tree)
