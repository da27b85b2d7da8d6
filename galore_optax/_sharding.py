"""Says where state lies on a mesh of Explicit axes, and computes there what needs Auto axes."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, PyTree

from galore_optax._basis import Basis
from galore_optax._quantized import is_quantized
from galore_optax._subspace import Subspace
from galore_optax._transport import Held
from galore_optax._types import MeshAxes, Shape
from galore_optax._view import LeafView, MatrixView

Result = TypeVar("Result")


def is_explicit(tree: PyTree) -> bool:
    """Whether any array lies on a mesh with Explicit axes."""
    return _explicit_mesh(tree) is not None


def check_mesh(tree: PyTree) -> None:
    """Raises an error where arrays lie on a mesh with Explicit axes that is not the current one."""
    mesh = _explicit_mesh(tree)
    if mesh is not None and not jax.sharding.get_abstract_mesh().explicit_axes:
        raise ValueError(
            f"galore was given arrays on a mesh with Explicit axes, {dict(mesh.shape)}, outside of "
            "that mesh: call init and update, or the jitted functions that do, under "
            "jax.set_mesh(mesh)"
        )


def in_auto(function: Callable[..., Result], places: PyTree, *arguments: PyTree) -> Result:
    """Calls a function inside of which no type says how arrays are sharded.

    Under Explicit axes a factorization wants a whole matrix, and a product over a sharded axis
    wants to be told how its result is sharded: XLA decides that instead, as under Auto axes.

    Args:
      function: the function to call; it must use no other arrays than its arguments.
      places: None for a mesh without Explicit axes; else the specs of what the function returns, of
        the same structure or a prefix of it.
      *arguments: the arguments of the function; those that are no arrays are constants.
    """
    if places is None:
        return function(*arguments)
    leaves, treedef = jax.tree.flatten(arguments)

    def call(arrays: list[Array]) -> Result:
        given = iter(arrays)
        filled = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
        return function(*treedef.unflatten(filled))

    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return cast(Result, jax.sharding.auto_axes(call, out_sharding=places)(arrays))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where what belongs to a projected leaf lies on a mesh with Explicit axes.

    Moments are sharded as their matrices, but for the axis that is projected. Bases are sharded
    along that one, and gathered where they are used.

    Attributes:
      view: the view of the leaf.
      leaf: the spec of the leaf: over which axes of the mesh each of its axes is sharded.
    """

    view: MatrixView
    leaf: PartitionSpec

    @property
    def batch(self) -> tuple[MeshAxes, ...]:
        """What each batch axis is sharded over."""
        return tuple(self.leaf[axis] for axis in self.view.batch_axes)

    @property
    def low_rank(self) -> PartitionSpec:
        """The spec of R and of its moments."""
        m, n = self._sides
        return PartitionSpec(
            *self.batch, None if self.view.left else m, None if self.view.right else n
        )

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
            role: [self._of(self.low_rank, moment) for moment in held]
            for role, held in moments.items()
        }
        step = PartitionSpec()
        return self.subspace(subspace), of_moments, step, (left, right), self.low_rank

    def of_up(self, state: PyTree) -> PyTree:
        """Returns the specs of the update of a leaf, and of the state of its residual."""
        return self.leaf, self._of_residual(state)

    def subspace(self, subspace: Subspace) -> Subspace:
        """Returns the spec of each array in a subspace."""
        bases = [
            self._of(PartitionSpec(*self.batch, axis, None), stored)
            for axis, stored in zip(self._sides, subspace[:2], strict=True)
        ]
        others = Subspace(*bases, *(self._of(None, field) for field in subspace[2:]))
        return others._replace(residual=self._of_residual(subspace.residual))

    def _of_residual(self, state: PyTree) -> PyTree:
        """Returns specs of what a residual keeps: arrays of whole matrices lie as these do."""
        whole = PartitionSpec(*self.batch, *self._sides)
        return jax.tree.map(lambda x: self._of(whole, x), state)

    def _of(self, dense: PartitionSpec | None, tree: PyTree) -> PyTree:
        """Returns ``dense`` for an array of whole matrices, and specs of batch axes for all else.

        All else is not worth sharding further, or cannot be: codes are in blocks, and numbers of
        directions are few.
        """
        is_matrix = isinstance(tree, jax.Array) and tree.ndim == len(self.batch) + 2
        spec = dense if is_matrix and dense is not None else PartitionSpec(*self.batch)
        return jax.tree.map(lambda _: spec, tree)

    @property
    def _sides(self) -> tuple[MeshAxes, MeshAxes]:
        return self._merged(self.view.reduction_axes), self._merged(self.view.output_axes)

    def _merged(self, axes: Shape) -> MeshAxes:
        """Returns what an axis of the matrix is sharded over that merges several axes of the leaf.

        That is what the first of these axes is sharded over, or None where another one is sharded.
        """
        first, *others = (self.leaf[axis] for axis in axes)
        return None if any(others) else first


def placement(view: LeafView, leaf: PyTree) -> Placement | None:
    """Returns the placement of what belongs to a leaf.

    None stands for a mesh without Explicit axes, and for a leaf that is not projected.
    """
    if not isinstance(view, MatrixView) or not jax.sharding.get_abstract_mesh().explicit_axes:
        return None
    if is_quantized(leaf):
        leaf = jax.eval_shape(lambda x: x.dequantize(), leaf)
    typed = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    spec = getattr(typed.sharding, "spec", ())
    return Placement(view, PartitionSpec(*spec, *[None] * (len(view.shape) - len(spec))))


def reshard(tree: PyTree, specs: PyTree) -> PyTree:
    """Returns a tree whose arrays are sharded as the specs say."""
    return jax.tree.map(jax.sharding.reshard, tree, specs)


def zeros_like(leaf: PyTree) -> Array:
    """Returns zeros in the place of a leaf, which may be in codes, with the sharding of its type.

    What a traced function makes of an array that it closes over may have lost that.
    """
    array = jnp.asarray(leaf)
    zeros, sharding = jnp.zeros_like(array), jax.typeof(array).sharding
    return jax.sharding.reshard(zeros, sharding.spec) if sharding.mesh.explicit_axes else zeros


def _explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.typeof(leaf).sharding.mesh.explicit_axes:
            return jax.typeof(leaf).sharding.mesh
    return None
