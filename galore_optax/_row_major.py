"""The layout that arguments have, for what is read from a stack and written to it."""

from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint


@jax.custom_batching.custom_vmap
def row_major(x: jax.Array) -> jax.Array:
    """An array as it is, row-major in memory.

    Free to choose, XLA gives some whole stacks the layout that a product inside the loop prefers,
    or reads them once more after they are written: a second copy of the stack either way.
    """
    return _of_each_device(x)


# Each device's part of a sharded array by itself, and under vmap all at once: XLA's partitioner
# gathers what has a layout, and JAX does not batch what says how it is partitioned.
row_major.def_vmap(lambda _, batched, x: (row_major(x), batched[0]))


def _constrained(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _partition(mesh: Any, arguments: Any, result: Any) -> Any:
    sharding = arguments[0].sharding
    return mesh, _constrained, sharding, (sharding,)


_of_each_device = custom_partitioning(_constrained)
_of_each_device.def_partition(partition=_partition, sharding_rule="... -> ...")
