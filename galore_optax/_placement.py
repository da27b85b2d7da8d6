"""Says where what belongs to a leaf lies on a mesh, by where the leaf itself lies.

There is one rule for each kind of array in a state:

- A low-rank gradient R, and a moment of its shape, is divided along the axis that is kept, and not
  along the r directions. It is divided over the mesh axes of both sides of its matrix, so that each
  device has as small a part of it as of that.
- A basis P is divided so along the axis that is projected, and gathered where it is used.
- Codes are divided as the array that they stand for, in whole blocks. Those of a flattened item are
  divided along their only axis.
- An array of whole matrices, or of the leaf's shape, lies as the leaf.
- All else has at most the axes over which matrices are stacked, and is divided along these.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from galore_optax._basis import Basis
from galore_optax._mesh_axes import fitting, has_explicit_axes, names_of
from galore_optax._quantized import is_quantized, placed
from galore_optax._sharding import auto_sharding
from galore_optax._subspace import Subspace
from galore_optax._transport import Held
from galore_optax._types import MeshAxes, Shape
from galore_optax._view import LeafView, MatrixView


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where what belongs to a projected leaf lies on a mesh.

    Attributes:
      view: the view of the leaf.
      leaf: the spec of the leaf: over which axes of the mesh each of its axes is divided.
      mesh: the mesh, whose sizes say what can be divided; where it is None, all can.
      shares: whether one side of a matrix may be divided over the mesh axes of both, and an axis
        that merges several over those of all. Else specs are names of which it is not known what
        they stand for, and a side has its own, those of its first axis.
      moments: where the moments of the shape of R lie that there are already, if this is known.
      bases: the same of stored bases of rows and of columns.
    """

    view: MatrixView
    leaf: PartitionSpec
    mesh: AbstractMesh | None
    shares: bool = True
    moments: PartitionSpec | None = None
    bases: tuple[PartitionSpec | None, PartitionSpec | None] = (None, None)

    @property
    def batch(self) -> tuple[MeshAxes, ...]:
        """What each batch axis is divided over."""
        return tuple(self.leaf[axis] for axis in self.view.batch_axes)

    @property
    def whole(self) -> PartitionSpec:
        """The spec of arrays of whole matrices."""
        return PartitionSpec(*self.batch, *self._sides)

    @property
    def low_rank(self) -> PartitionSpec:
        """The spec of R and of its moments."""
        if self.moments is not None:
            return self.moments
        m, n = (
            None if projected else self._divided(side)
            for side, projected in enumerate((self.view.left, self.view.right))
        )
        return PartitionSpec(*self.batch, m, n)

    def basis(self, side: int) -> PartitionSpec:
        """The spec of the stored basis of the rows, 0, or of the columns, 1."""
        if (there := self.bases[side]) is not None:
            return there
        return PartitionSpec(*self.batch, self._divided(side), None)

    def of_down(self, subspace: Subspace, moments: Held, basis: type[Basis]) -> PyTree:
        """Returns the specs of what the way down of a gradient returns, in the same order.

        Args:
          subspace: the subspaces as they are stored.
          moments: the moments that are moved along, as they are stored.
          basis: the type of the bases.
        """
        left, right = (
            basis.placed(self.batch, axis) if projected else None
            for axis, projected in zip(self._sides, (self.view.left, self.view.right), strict=True)
        )
        of_moments = {
            role: [self.of(moment, self.low_rank) for moment in held]
            for role, held in moments.items()
        }
        step = PartitionSpec()
        return self.subspace(subspace), of_moments, step, (left, right), self.low_rank

    def of_up(self, state: PyTree) -> PyTree:
        """Returns the specs of the update of a leaf, and of the state of its residual."""
        return self.leaf, self._of_residual(state)

    def subspace(self, subspace: Subspace) -> Subspace:
        """Returns the spec of each array in a subspace."""
        left, right, *others = subspace
        specs = (self.of(left, self.basis(0)), self.of(right, self.basis(1)))
        found = Subspace(*specs, *(self.of(field, None) for field in others))
        return found._replace(residual=self._of_residual(subspace.residual))

    def of(self, tree: PyTree, spec: PartitionSpec | None) -> PyTree:
        """Returns the spec of each array of a tree.

        Args:
          tree: what belongs to the leaf: arrays, in codes or not, or their shapes.
          spec: that of the arrays that have as many axes; others have batch axes at most.
        """

        def of_one(array: PyTree) -> PyTree:
            if spec is not None and len(array.shape) == len(spec):
                return lying(array, spec, self.mesh)
            batch = PartitionSpec(*self.batch)
            return jax.tree.map(lambda part: batch if np.ndim(part) else PartitionSpec(), array)

        return jax.tree.map(of_one, tree, is_leaf=is_quantized)

    def _divided(self, side: int) -> MeshAxes:
        """Returns what a side of a matrix is divided over where the other has r directions."""
        own, other = self._sides[side], self._sides[1 - side]
        if not self.shares:
            return own
        return fitting(self.mesh, (own, other), (self.view.m, self.view.n)[side])

    def _of_residual(self, state: PyTree) -> PyTree:
        return self.of(state, self.whole)

    @property
    def _sides(self) -> tuple[MeshAxes, MeshAxes]:
        return self._merged(self.view.reduction_axes), self._merged(self.view.output_axes)

    def _merged(self, axes: Shape) -> MeshAxes:
        """Returns what an axis of the matrix is divided over that merges axes of the leaf."""
        first, *others = (self.leaf[axis] for axis in axes)
        if not others or not self.shares:
            return first
        merged = tuple(name for entry in (first, *others) for name in names_of(entry))
        return merged if len(merged) > 1 else next(iter(merged), None)


def placement(view: LeafView, leaf: PyTree) -> Placement | None:
    """Returns the placement of what belongs to a leaf.

    None stands for a mesh without Explicit axes, and for a leaf that is not projected.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(view, MatrixView) or not has_explicit_axes(mesh):
        return None
    if is_quantized(leaf):
        leaf = jax.eval_shape(lambda x: x.dequantize(), leaf)
    typed = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    spec = getattr(typed.sharding, "spec", PartitionSpec())
    return Placement(view, padded(spec, len(view.shape)), mesh)


def following(place: Placement, subspace: Subspace, moments: Sequence[PyTree]) -> Placement:
    """Returns a placement by which the state of a leaf stays where it is.

    Trainers have rules of their own for where state lies, and types must agree with what is there.

    Args:
      place: the placement of the leaf by the rules of this library, on a mesh of Explicit axes.
      subspace: the subspaces as they are stored.
      moments: what the inner state has of the leaf.
    """
    shape = place.view.low_rank_shape
    like_r = (x for x in moments if not is_quantized(x) and np.shape(x) == shape)
    found = next((_spec_of(x) for x in like_r), None)
    bases = [
        _spec_of(x) if isinstance(x, jax.Array) and x.ndim == len(shape) else None
        for x in subspace[:2]
    ]
    return dataclasses.replace(place, moments=found, bases=(bases[0], bases[1]))


def _spec_of(array: jax.Array) -> PartitionSpec:
    return padded(jax.typeof(array).sharding.spec, array.ndim)


def placement_at_init(view: LeafView, leaf: PyTree) -> tuple[Placement, Mesh | AbstractMesh] | None:
    """Returns the placement of what belongs to an array on a mesh of Auto axes, and that mesh.

    None stands for what lies on no such mesh, or is traced, and for a leaf that is not projected.
    """
    sharding = None if is_quantized(leaf) else auto_sharding(leaf)
    if sharding is None or not isinstance(view, MatrixView):
        return None
    mesh = sharding.mesh
    return Placement(view, padded(sharding.spec, len(view.shape)), mesh.abstract_mesh), mesh


def lying(array: PyTree, spec: PartitionSpec, mesh: AbstractMesh | None) -> PyTree:
    """Returns the spec of each array that an array is made of, of which there are more in codes.

    Args:
      array: the array, or its shape.
      spec: where it lies itself, with an entry for each axis.
      mesh: the mesh, or None where anything can be divided.
    """
    if not is_quantized(array):
        return spec
    return placed(array, spec, mesh)


def padded(spec: PartitionSpec, axes: int) -> PartitionSpec:
    """Returns a spec with an entry for each of so many axes."""
    return PartitionSpec(*spec, *[None] * (axes - len(spec)))
