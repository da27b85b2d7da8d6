"""Cuts arrays in blocks, and puts them together again: how codes lie in memory and on a mesh."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from galore_optax._layout import with_layout
from galore_optax._mesh_axes import fitting, names_of
from galore_optax._types import Shape


def to_blocks(
    array: Shaped[Array, "..."],
    item_shape: Shape,
    block_size: int,
    where: PartitionSpec | None = None,
    *,
    fill: int = 0,
) -> Shaped[Array, "*blocks size"]:
    """Cuts (*batch, *item) in (..., blocks, block size), the last one filled up.

    Args:
      array: the array.
      item_shape: its shape without batch axes.
      block_size: the number of elements of a block.
      fill: what the last block of a flattened item is filled up with.
      where: where the codes lie that are made of it, if it lies on a mesh of Explicit axes; None
        for where :func:`stored_spec` says.
    """
    array = jnp.asarray(array)
    stored = stored_shape(item_shape, block_size)
    if where is None:
        typed = jax.typeof(array).sharding
        where = stored_spec(item_shape, block_size, typed.spec, typed.mesh)

    def cut(array: Shaped[Array, "..."]) -> Shaped[Array, "*blocks size"]:
        if stored != item_shape:
            batch = array.shape[: array.ndim - len(item_shape)]
            size = math.prod(item_shape)
            array = array.reshape(*batch, size)
            padding = [(0, 0)] * len(batch) + [(0, stored[0] - size)]
            array = jnp.pad(array, padding, constant_values=fill)
        return split(array, block_size)

    return _lying(cut, array, PartitionSpec(*where, None))


def from_blocks(
    blocks: Shaped[Array, "*blocks size"],
    item_shape: Shape,
    block_size: int,
    where: PartitionSpec | None = None,
) -> Shaped[Array, "..."]:
    """Undoes :func:`to_blocks`.

    Args:
      blocks: the blocks.
      item_shape: the shape of the array without batch axes.
      block_size: the number of elements of a block.
      where: where the array shall lie, if the blocks are on a mesh of Explicit axes; None for
        where the blocks lie, those of a flattened item along its first axis if that can be divided.
    """
    stored = stored_shape(item_shape, block_size)
    if where is None:
        *others, last = _spec(blocks)[:-1]
        of_item = [last]
        if stored != item_shape:
            sizes = jax.typeof(blocks).sharding.mesh.shape
            parts = math.prod(sizes[axis] for axis in names_of(last))
            divides = stored[0] == math.prod(item_shape) and item_shape[0] % parts == 0
            of_item = [last if divides else None, *[None] * (len(item_shape) - 1)]
        where = PartitionSpec(*others, *of_item[: len(item_shape)])

    def put_together(blocks: Shaped[Array, "*blocks size"]) -> Shaped[Array, "..."]:
        array = merge(blocks)
        if stored == item_shape:
            return array
        return array[..., : math.prod(item_shape)].reshape(*array.shape[:-1], *item_shape)

    return _lying(put_together, blocks, where)


def spread(scales: Shaped[Array, "*blocks"], block_size: int) -> Shaped[Array, "*blocks size"]:
    """Returns the scale of its block for each element."""
    return jnp.broadcast_to(scales[..., None], (*scales.shape, block_size))


def is_divided(array: Shaped[Array, "..."]) -> bool:
    """Whether an array lies on several devices by its type."""
    return any(_spec(array))


def stored_shape(item_shape: Shape, block_size: int) -> Shape:
    """Returns the shape in which the codes of an item are kept, before packing."""
    if item_shape and item_shape[-1] % block_size == 0:
        return item_shape
    return (-(-math.prod(item_shape) // block_size) * block_size,)


def stored_spec(
    item_shape: Shape, block_size: int, spec: PartitionSpec, mesh: AbstractMesh | None
) -> PartitionSpec:
    """Returns where the codes of an array lie on a mesh: where it lies itself, in whole blocks.

    Mesh axes that do not divide the blocks of the axis that they divide in the array divide
    another axis of an item, if they can.

    Args:
      item_shape: the shape of the array without batch axes.
      block_size: the number of elements of a block.
      spec: that of the array, with an entry for each axis.
      mesh: the mesh, or None where anything can be divided.
    """
    cut = len(spec) - len(item_shape)
    stored, wanted = stored_shape(item_shape, block_size), tuple(map(names_of, spec[cut:]))
    if stored != item_shape:
        wanted = (tuple(itertools.chain.from_iterable(wanted)),)
    counts = (*stored[:-1], stored[-1] // block_size)
    axes = [fitting(mesh, [names], count) for names, count in zip(wanted, counts, strict=True)]
    for k, count in enumerate(counts):
        used = set(itertools.chain.from_iterable(map(names_of, axes)))
        left = [name for name in itertools.chain.from_iterable(wanted) if name not in used]
        axes[k] = fitting(mesh, [axes[k], *left], count)
    return PartitionSpec(*spec[:cut], *axes)


def split(array: Shaped[Array, "*leading all"], size: int) -> Shaped[Array, "*leading blocks size"]:
    """Splits the last axis in blocks."""
    count = array.shape[-1] // size
    over = _spec(array)[-1]
    if over is not None:
        mesh = jax.typeof(array).sharding.mesh.shape
        if count % math.prod(mesh[axis] for axis in names_of(over)):
            array = _gathered(array, [array.ndim - 1])
    return _rows_last(array.reshape(*array.shape[:-1], count, size))


def merge(blocks: Shaped[Array, "*leading blocks size"]) -> Shaped[Array, "*leading all"]:
    """Undoes :func:`split`."""
    blocks = _rows_last(blocks)
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def lying_as(old: PyTree, new: PyTree) -> PyTree:
    """Returns arrays that lie on a mesh of Explicit axes where as many others do."""

    def put(before: Array, now: Array) -> Array:
        spec = jax.typeof(before).sharding.spec
        return now if jax.typeof(now).sharding.spec == spec else jax.sharding.reshard(now, spec)

    # Static attributes may differ: what is updated by rows has but one of them.
    leaves, treedef = jax.tree.flatten(new)
    return treedef.unflatten(map(put, jax.tree.leaves(old), leaves))


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


def _lying(
    function: Callable[[Array], Array], array: Array, where: PartitionSpec
) -> Shaped[Array, "..."]:
    """Returns a function of an array, which under Explicit axes lies somewhere else than it.

    How it gets there is left to XLA, since no rule of types says it.
    """
    if not any(_spec(array)) and not any(where):
        return function(array)
    return cast(Array, jax.sharding.auto_axes(function, out_sharding=where)(array))


def _spec(array: Shaped[Array, "..."]) -> PartitionSpec:
    """Returns the axes of an Explicit mesh that each axis is sharded over; None elsewhere."""
    return jax.typeof(array).sharding.spec
