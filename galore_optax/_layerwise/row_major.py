"""Gives what is read from a stack and written to it the layout that arguments have."""

from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, Sharding
from jaxtyping import Array

from galore_optax._layout import with_layout


@jax.custom_batching.custom_vmap
def row_major(x: Array) -> Array:
    """Returns an array as it is, row-major in memory.

    Free to choose, XLA gives some whole stacks the layout that a product inside the loop prefers,
    or reads them once more after they are written: a second copy of the stack either way.
    """
    return _of_each_device(x)


# Each device gives its part of a sharded array the layout by itself, since XLA's partitioner
# gathers what has a layout. Under vmap all is done at once, since JAX does not batch what says how
# it is partitioned.
row_major.def_vmap(lambda _, batched, x: (row_major(x), batched[0]))


def _constrained(x: Array) -> Array:
    return with_layout(x, range(x.ndim))


def _partition(
    mesh: Mesh, arguments: tuple[jax.ShapeDtypeStruct, ...], result: jax.ShapeDtypeStruct
) -> tuple[Mesh, Callable[[Array], Array], Sharding | None, tuple[Sharding | None]]:
    """Computes each device's part from the same part of the argument."""
    sharding = arguments[0].sharding
    return mesh, _constrained, sharding, (sharding,)


_of_each_device = custom_partitioning(_constrained)
_of_each_device.def_partition(partition=_partition, sharding_rule="... -> ...")
