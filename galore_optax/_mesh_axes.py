"""Counts with the axes of a mesh: which of them divide an axis of an array."""

import itertools
from collections.abc import Sequence

from jax.sharding import AbstractMesh, AxisType

from galore_optax._types import MeshAxes


def fitting(mesh: AbstractMesh | None, axes: Sequence[MeshAxes], count: int) -> MeshAxes:
    """Returns those of some mesh axes that divide a number of rows, blocks or the like.

    Args:
      mesh: the mesh, or None where anything can be divided.
      axes: the mesh axes, in the order in which they are tried.
      count: the number to be divided.
    """
    chosen: list[str] = []
    parts = 1
    for axis in itertools.chain.from_iterable(map(names_of, axes)):
        size = 1 if mesh is None else mesh.shape[axis]
        if axis not in chosen and count % (parts * size) == 0:
            chosen.append(axis)
            parts *= size
    return tuple(chosen) if len(chosen) > 1 else next(iter(chosen), None)


def has_explicit_axes(mesh: AbstractMesh) -> bool:
    """Whether types say how arrays are divided over the mesh, or over some of its axes."""
    return AxisType.Explicit in (mesh.axis_types or ())


def names_of(axes: MeshAxes) -> tuple[str, ...]:
    """Returns the names of the mesh axes that one axis of an array is divided over."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
