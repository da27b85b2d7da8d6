"""A number of each array, by which a bit that has flipped on the disk is noticed.

It is computed where the array lies, and is the same however that is divided over devices: sums of
integers come out the same in any order.
"""

from typing import Any

import jax
import jax.numpy as jnp

# Odd, so that no change of an entry is lost when it is multiplied by such a number, and large, so
# that those of neighbouring places differ in all of their bits.
FACTOR = 2654435761
UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
    """The sum of all entries' bits, each times an odd number of its place, uint32 scalar."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    if size == 8:
        # Two halves, on an axis of their own.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, UNSIGNED[size]).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, length in enumerate(bits.shape):
        place = place * length + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (place * jnp.uint32(FACTOR) | 1), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a tree, by its path."""
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): checksum(x)
        for path, x in jax.tree.leaves_with_path(tree)
    }
    return {name: int(value) for name, value in jax.device_get(found).items()}


def differing(stored: dict[str, int], tree: Any) -> list[str]:
    """The paths of the arrays that are not those of which `checksums` said this."""
    found = checksums(tree)
    return [name for name, value in stored.items() if found.get(name) != value]
