"""Reads the names that boxes give to the axes of arrays, and what they stand for on a mesh.

A name is that of an axis of the mesh, or a logical one, as "embed" and "mlp". Rules say over which
axes of the mesh a logical one is divided: Flax's, or the mapping of haliax. Both are read where the
packages have them in the context, and no package is imported for it.
"""

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._mesh_axes import names_of
from galore_optax._trees import axis_names
from galore_optax._types import MeshAxes

Names: TypeAlias = PartitionSpec
"""An entry for each axis of an array: a name, several, or None."""

# Where an ``nnx.Variable`` has its names; the last is read by ``nnx.Optimizer``.
KEYS = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")

_TOLD: ContextVar[Mesh | AbstractMesh | None] = ContextVar("mesh_of_names", default=None)


@contextlib.contextmanager
def mesh_of_names(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Says what the mesh is, to code that has no other way to know."""
    token = _TOLD.set(mesh)
    try:
        yield
    finally:
        _TOLD.reset(token)


def names_in(box: PyTree) -> Names | None:
    """Returns the names of the axes of what is in a box, or None where it has none."""
    if (of_axes := axis_names(box)) is not None:
        return PartitionSpec(*of_axes)
    if hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = next((metadata[key] for key in KEYS if metadata.get(key) is not None), None)
    else:
        names = getattr(box, "names", None)
    if isinstance(names, NamedSharding):
        names = names.spec
    return PartitionSpec(*names) if isinstance(names, PartitionSpec | tuple | list) else None


@dataclasses.dataclass(frozen=True)
class Naming:
    """What names stand for.

    Attributes:
      mesh: the mesh.
      rules: names and the axes of the mesh that each stands for; of several rules for a name the
        first counts whose axes no other axis of the array is divided over.
    """

    mesh: AbstractMesh
    rules: Sequence[tuple[str, MeshAxes]]

    def axes(self, names: Names) -> PartitionSpec:
        """Returns over which axes of the mesh, of more than one device, an array is divided."""
        used: set[str] = set()
        found: list[MeshAxes] = []
        for entry in names:
            axes = tuple(axis for name in names_of(entry) for axis in self._axes(name, used))
            used.update(axes)
            found.append(axes if len(axes) > 1 else next(iter(axes), None))
        return PartitionSpec(*found)

    def names(self, spec: PartitionSpec, own: Names, names: Names, several: bool) -> Names:
        """Returns what to call the axes of an array that lies as a spec says.

        An axis keeps its own name where this stands for the same axes of the mesh; or else it has
        another name of the parameter that does, or these axes themselves, which Flax takes in a
        tuple. Where it can have no more than one name, for haliax, it has the one of all names that
        divides most.

        Args:
          spec: the spec.
          own: the name of each axis, or None.
          names: those of the parameter.
          several: whether an axis can have several names.
        """
        found: list[MeshAxes] = []
        for axes, name in zip(map(names_of, spec), own, strict=True):
            same = [entry for entry in (name, *names) if self._alone(entry) == axes]
            if name in same or (axes and same):
                found.append(same[0])
            else:
                found.append((axes or None) if several else self._largest(axes))
        return PartitionSpec(*found)

    def _largest(self, axes: tuple[str, ...]) -> str | None:
        sizes = {
            name: math.prod(self.mesh.shape[axis] for axis in found)
            for name, found in ((name, self._alone(name)) for name, _ in self.rules)
            if found and set(axes).issuperset(found)
        }
        return max(sizes, key=sizes.__getitem__, default=None)

    def _alone(self, entry: MeshAxes) -> tuple[str, ...]:
        return names_of(self.axes(PartitionSpec(entry))[0])

    def _axes(self, name: str, used: Collection[str]) -> tuple[str, ...]:
        """Returns what a name stands for in an array of which other axes are divided already."""
        choices = [axes for alias, axes in self.rules if alias == name]
        if not choices and name in self.mesh.shape:
            choices = [name]
        for axes in choices:
            many = tuple(axis for axis in names_of(axes) if self.mesh.shape.get(axis, 1) > 1)
            if not set(used) & set(many):
                return many
        return ()


def naming(boxes: Sequence[PyTree], arrays: Sequence[PyTree]) -> Naming | None:
    """Returns what the names in some boxes stand for, or None where it is not known.

    The mesh is the one that :func:`mesh_of_names` was told, that of ``jax.set_mesh`` or of ``with
    mesh:``, or the one that is in a box or that an array lies on.

    Args:
      boxes: the boxes.
      arrays: what is in them.
    """
    found = (
        _TOLD.get(),
        jax.sharding.get_abstract_mesh(),
        *(getattr(box, "mesh", None) for box in boxes),
        *(getattr(getattr(array, "sharding", None), "mesh", None) for array in arrays),
        _mesh_that_was_entered(),
    )
    mesh = next((x for x in found if isinstance(x, Mesh | AbstractMesh) and x.axis_names), None)
    if mesh is None:
        return None
    rules = list(_rules_of_flax())
    for box in boxes:
        of_box = getattr(box, "rules", None) or getattr(box, "sharding_rules", None)
        rules += [rule for rule in of_box or () if rule not in rules]
    if any(axis_names(box) is not None for box in boxes):
        rules += _mapping_of_haliax().items()
    return Naming(mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh, tuple(rules))


def _mesh_that_was_entered() -> Mesh | None:
    """Returns the mesh of ``with mesh:``, which JAX discourages and trainers still write."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pxla = getattr(jax.interpreters, "pxla", None)
        resources = getattr(pxla, "thread_resources", None)
    return None if resources is None else resources.env.physical_mesh


def _rules_of_flax() -> Sequence[tuple[str, MeshAxes]]:
    spmd = sys.modules.get("flax.core.spmd")
    return () if spmd is None else tuple(spmd.get_logical_axis_rules() or ())


def _mapping_of_haliax() -> Mapping[str, MeshAxes]:
    partitioning = sys.modules.get("haliax.partitioning")
    mapping = None if partitioning is None else partitioning.current_thread_local_mapping()
    return mapping or {}
