"""Cuts arrays in blocks, and puts them together again: how codes lie in memory and on a mesh."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Shaped

from galore_optax._layout import with_layout
from galore_optax._types import Shape


def to_blocks(
    array: Shaped[Array, "..."], item_shape: Shape, block_size: int
) -> Float32[Array, "*blocks size"]:
    """Cuts (*batch, *item) in (..., blocks, block size), float32, padded with zeros."""
    array = jnp.asarray(array)
    stored = stored_shape(item_shape, block_size)
    if stored != item_shape:
        batch = array.shape[: array.ndim - len(item_shape)]
        array = _gathered(array, range(len(batch), array.ndim))
        size = math.prod(item_shape)
        array = array.reshape(*batch, size)
        array = jnp.pad(array, [(0, 0)] * len(batch) + [(0, stored[0] - size)])
    return split(array, block_size).astype(jnp.float32)


def from_blocks(
    blocks: Float[Array, "*blocks size"], item_shape: Shape, block_size: int
) -> Float[Array, "..."]:
    """Undoes :func:`to_blocks`."""
    array = merge(blocks)
    if stored_shape(item_shape, block_size) == item_shape:
        return array
    array = _gathered(array, [array.ndim - 1])
    return array[..., : math.prod(item_shape)].reshape(*array.shape[:-1], *item_shape)


def stored_shape(item_shape: Shape, block_size: int) -> Shape:
    """Returns the shape in which the codes of an item are kept, before packing."""
    if item_shape and item_shape[-1] % block_size == 0:
        return item_shape
    return (-(-math.prod(item_shape) // block_size) * block_size,)


def split(array: Shaped[Array, "*leading all"], size: int) -> Shaped[Array, "*leading blocks size"]:
    """Splits the last axis in blocks."""
    count = array.shape[-1] // size
    over = _spec(array)[-1]
    if over is not None:
        mesh = jax.typeof(array).sharding.mesh.shape
        if count % math.prod(mesh[axis] for axis in (over if isinstance(over, tuple) else (over,))):
            array = _gathered(array, [array.ndim - 1])
    return _rows_last(array.reshape(*array.shape[:-1], count, size))


def merge(blocks: Shaped[Array, "*leading blocks size"]) -> Shaped[Array, "*leading all"]:
    """Undoes :func:`split`."""
    blocks = _rows_last(blocks)
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _rows_last(blocks: Shaped[Array, "*blocks size"]) -> Shaped[Array, "*blocks size"]:
    """Gives blocks (..., rows, blocks, size) a layout that suits a TPU: rows fill its lanes.

    Its tiles are of 128 elements of the last axis in memory and 8 or more of the one before. With
    rows last a block is a run of whole tiles: to split an axis in blocks moves nothing, and what
    is computed fuses. Without it float32 arrays of full size are moved, several at a time.
    """
    last = blocks.ndim - 3
    if last < 0 or blocks.shape[last] < 128:
        return blocks
    order = (*range(last), last + 1, last + 2, last)
    return jax.lax.platform_dependent(
        blocks, tpu=lambda x: with_layout(x, order), default=lambda x: x
    )


def _gathered(array: Shaped[Array, "*shape"], axes: Sequence[int]) -> Shaped[Array, "*shape"]:
    """Unshards some axes of an array, which under Explicit sharding could not be reshaped."""
    spec = _spec(array)
    if all(spec[axis] is None for axis in axes):
        return array
    kept = [None if axis in axes else name for axis, name in enumerate(spec)]
    return jax.sharding.reshard(array, PartitionSpec(*kept))


def _spec(array: Shaped[Array, "..."]) -> PartitionSpec:
    """Returns the axes of an Explicit mesh that each axis is sharded over; None elsewhere."""
    return jax.typeof(array).sharding.spec
