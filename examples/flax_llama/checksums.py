"""Checksums of what a checkpoint has, by which a bit that has flipped on disk is found.

Files are compressed, so that most damage is seen when they are read; what is not becomes a wrong
number that nobody notices. The checksum of an array is of its numbers, not of files: it is computed
where the array is, by each device of its part, and does not depend on how the array is divided.
"""

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from examples.flax_llama.optimizer_state import arrays
from examples.flax_llama.spaces import is_on_host, to_device

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # those of 8 bytes are two.


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of each array of a tree, by its path."""
    found = jax.device_get(_all(jax.tree.leaves(tree)))
    return dict(zip(arrays(tree), map(int, found), strict=True))


def of_json(value: Any) -> int:
    """The checksum of what is saved as JSON."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def check(found: dict[str, int], saved: dict[str, int]) -> None:
    """Raises an error where something is not what was saved.

    Args:
      found: checksums by the names of what there is.
      saved: those that were saved; of what has none there, nothing is known.

    Raises:
      ValueError: a checksum is another; what it is of is named.
    """
    if wrong := [name for name in found if found[name] != saved.get(name, found[name])]:
        others = f" (nor are {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]} is not what was saved{others}: its checksum is another")


@jax.jit
def _all(leaves: list[Array]) -> list[UInt32[Array, ""]]:
    return [checksum(leaf) for leaf in leaves]


def checksum(array: Array) -> UInt32[Array, ""]:
    """The sum, modulo 2^32, of a hash of each number and of its place.

    The hash is one-to-one in a number of up to 32 bits, so that a single one that is wrong always
    changes the sum. Numbers of 64 bits are two such.
    """
    if is_on_host(array):
        # An entry at a time, so that not all of it comes to the device.
        size = math.prod(array.shape[1:])

        def add(i: Array, total: UInt32[Array, ""]) -> UInt32[Array, ""]:
            entry = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
            return total + _checksum(to_device(entry), i.astype(jnp.uint32) * jnp.uint32(size))

        return jax.lax.fori_loop(0, array.shape[0], add, jnp.uint32(0))
    return _checksum(array, jnp.uint32(0))


def _checksum(array: Array, first: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """The checksum of an array of which the first number has that place."""
    narrow = array.dtype == jnp.bool or array.dtype in (jnp.int4, jnp.uint4)
    array = array.astype(jnp.uint8) if narrow else array
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    place, stride = first, 1
    for axis in reversed(range(bits.ndim)):
        numbers = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place, stride = place + numbers * jnp.uint32(stride), stride * bits.shape[axis] % 2**32
    mixed = bits + place * jnp.uint32(0x9E3779B9)
    # Each of these can be undone: shifts of the upper bits onto lower ones, and odd factors.
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed, dtype=jnp.uint32)
