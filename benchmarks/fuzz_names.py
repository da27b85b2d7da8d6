"""The names in which the code of a drawn configuration is evaluated.

A configuration is Python: what a failure prints runs after ``from benchmarks.fuzz_names import *``.
"""

import collections
import dataclasses
import functools
import re
import zlib
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import galore_optax
from galore_optax import DimensionNumbers

__all__ = [
    "DimensionNumbers",
    "Equinox",
    "Node",
    "Pair",
    "Struct",
    "array",
    "boxed",
    "by_path",
    "collections",
    "flax",
    "functools",
    "galore_optax",
    "jax",
    "jnp",
    "nnx",
    "nnx_state",
    "np",
    "optax",
    "re",
    "twice",
]


class Pair(NamedTuple):
    """A NamedTuple of two trees."""

    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    """A dataclass of two trees."""

    kernel: Any
    rest: Any


@flax.struct.dataclass
class Struct:
    """A dataclass of Flax, with something that is no leaf."""

    kernel: Any
    name: str = flax.struct.field(pytree_node=False, default="struct")


try:
    import equinox  # pyrefly: ignore[missing-import]

    class Equinox(equinox.Module):
        """A module of Equinox, which can be called and has something that is no leaf."""

        weight: Any
        bias: Any
        size: int = equinox.field(static=True, default=1)

        def __call__(self, x):
            return x

except ImportError:

    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["size"]
    )
    @dataclasses.dataclass
    class Equinox:
        """What stands for a module of Equinox where that is not installed."""

        weight: Any
        bias: Any
        size: int = 1

        def __call__(self, x):
            return x


def array(*shape: int, dtype: str = "float32") -> jax.Array:
    """Returns random numbers, the same for the same shape and dtype."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, dtype)).encode()))
    return jnp.asarray(rng.standard_normal(shape), dtype)


def nnx_state(tree: dict[str, Any]) -> nnx.State:
    """Returns a state of NNX with a parameter for each leaf."""
    return nnx.State(jax.tree.map(nnx.Param, tree))


def boxed(tree: Any) -> Any:
    """Returns the tree with each leaf in a box of Linen, as ``nn.with_partitioning`` makes them."""
    return jax.tree.map(lambda x: flax.linen.Partitioned(x, (None,) * np.ndim(x)), tree)


def twice(leaf: jax.Array) -> dict[str, jax.Array]:
    """Returns a tree that has the same array in two places."""
    return {"first": leaf, "tied": leaf}


def by_path(choose: Any, tree: Any) -> Any:
    """Returns a tree of what a function makes of the path, a string, of each leaf."""
    return jax.tree.map_with_path(lambda path, _: choose(jax.tree_util.keystr(path)), tree)
