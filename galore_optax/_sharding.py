"""Parameters on a mesh of Explicit axes: where their state lies, and what is computed in Auto."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from galore_optax._matrix import MatrixView
from galore_optax._quantized import is_quantized
from galore_optax._subspace import Bases, Subspace


def is_explicit(tree: Any) -> bool:
    """Whether any array lies on a mesh with Explicit axes."""
    return _explicit_mesh(tree) is not None


def check_mesh(tree: Any) -> None:
    """Raises where arrays lie on a mesh with Explicit axes that is not the current one."""
    mesh = _explicit_mesh(tree)
    if mesh is not None and not jax.sharding.get_abstract_mesh().explicit_axes:
        raise ValueError(
            f"galore was given arrays on a mesh with Explicit axes, {dict(mesh.shape)}, outside of "
            "that mesh: call init and update, or the jitted functions that do, under "
            "jax.set_mesh(mesh)"
        )


def in_auto(function: Callable[..., Any], places: Any, *arguments: Any) -> Any:
    """Calls a function, inside of which no type says how things are sharded.

    Under Explicit axes a factorization wants a whole matrix, and a product over a sharded axis
    wants to be told how its result is sharded: XLA decides that instead, as under Auto axes.

    Args:
      function: which uses no other arrays than its arguments.
      places: None for a mesh without Explicit axes; else the specs of what the function returns, of
        the same structure or a prefix of it.
      *arguments: of the function; those that are no arrays are constants.
    """
    if places is None:
        return function(*arguments)
    leaves, treedef = jax.tree.flatten(arguments)

    def call(arrays: list[jax.Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
        return function(*treedef.unflatten(filled))

    arrays = [x for x in leaves if isinstance(x, jax.Array)]
    return jax.sharding.auto_axes(call, out_sharding=places)(arrays)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where what belongs to a projected leaf lies on a mesh with Explicit axes.

    Moments are sharded as their matrices, but for the axis that is projected. Bases are sharded
    along that one, and gathered where they are used.

    Attributes:
      view: of the leaf.
      leaf: over which axes of the mesh each of its axes is sharded.
    """

    view: MatrixView
    leaf: PartitionSpec

    @property
    def batch(self) -> tuple[Any, ...]:
        """Of the batch axes."""
        return tuple(self.leaf[axis] for axis in self.view.batch_axes)

    @property
    def low_rank(self) -> PartitionSpec:
        """Of R and of its moments."""
        m, n = self._sides
        return PartitionSpec(
            *self.batch, None if self.view.left else m, None if self.view.right else n
        )

    def of_projection(self, subspace: Subspace, dense: bool) -> tuple[Any, ...]:
        """Of a subspace, the step, bases as they are used, and R.

        Args:
          subspace: as it is stored.
          dense: whether bases are used as matrices; else by the numbers of rows.
        """

        def used(present: bool, axis: Any) -> PartitionSpec | None:
            spec = PartitionSpec(*self.batch, *((axis, None) if dense else (None,)))
            return spec if present else None

        left, right = self._sides
        bases: Any = (used(self.view.left, left), used(self.view.right, right))
        return self.subspace(subspace), PartitionSpec(), Bases(*bases), self.low_rank

    def subspace(self, subspace: Subspace) -> Subspace:
        """Of each array in it."""

        def of(axis: Any, stored: Any) -> Any:
            # Codes are in blocks, and numbers of directions few.
            dense = isinstance(stored, jax.Array) and stored.ndim == len(self.batch) + 2
            spec = PartitionSpec(*self.batch, *((axis, None) if dense else ()))
            return jax.tree.map(lambda _: spec, stored)

        bases = [of(*pair) for pair in zip(self._sides, subspace[:2], strict=True)]
        return Subspace(*bases, *(of(None, field) for field in subspace[2:]))

    @property
    def _sides(self) -> tuple[Any, Any]:
        return self._merged(self.view.reduction_axes), self._merged(self.view.output_axes)

    def _merged(self, axes: tuple[int, ...]) -> Any:
        """Of axes of the leaf that are one of the matrix: of the first, if it is the only one."""
        first, *others = (self.leaf[axis] for axis in axes)
        return None if any(others) else first


def placement(view: Any, leaf: Any) -> Placement | None:
    """Where what belongs to a leaf lies; None without Explicit axes, or if it is not projected."""
    if not isinstance(view, MatrixView) or not jax.sharding.get_abstract_mesh().explicit_axes:
        return None
    if is_quantized(leaf):
        leaf = jax.eval_shape(lambda x: x.dequantize(), leaf)
    typed = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    spec = getattr(typed.sharding, "spec", ())
    return Placement(view, PartitionSpec(*spec, *[None] * (len(view.shape) - len(spec))))


def reshard(tree: Any, specs: Any) -> Any:
    """The tree, sharded as said."""
    return jax.tree.map(jax.sharding.reshard, tree, specs)


def _explicit_mesh(tree: Any) -> Any:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.typeof(leaf).sharding.mesh.explicit_axes:
            return jax.typeof(leaf).sharding.mesh
    return None
