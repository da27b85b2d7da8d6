"""Parameters on a mesh of Explicit axes: where their state lies, and how an update is computed."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from galore_optax._matrix import MatrixView
from galore_optax._subspace import Subspace


def is_explicit(tree: Any) -> bool:
    """Whether the types of arrays say over which axes of a mesh they are sharded.

    Raises:
      ValueError: they do, and that mesh is not the current one.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    explicit = [mesh for mesh in meshes if mesh.explicit_axes]
    if explicit and not jax.sharding.get_abstract_mesh().explicit_axes:
        raise ValueError(
            "galore was given arrays on a mesh of Explicit axes, "
            f"{dict(explicit[0].shape)}, outside of that mesh: call init and update, or the "
            "jitted functions that do, under jax.set_mesh(mesh)"
        )
    return bool(explicit)


def in_auto(update: Callable[..., Any]) -> Callable[..., Any]:
    """The update of a transformation, inside which no type says how things are sharded.

    Under Explicit axes a factorization wants a whole matrix, and products want to be told what
    comes of sharded sums: XLA decides instead, as under Auto axes. What goes in and out is sharded
    as ever: updates as the gradients, the new state as the old one.
    """

    def run(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        if not is_explicit(updates):
            return update(updates, state, params, **extra_args)
        # Only arrays are arguments; others, such as functions for a line search, are constants.
        leaves, treedef = jax.tree.flatten((updates, state, params, extra_args))

        def call(arrays: list[jax.Array]) -> Any:
            given = iter(arrays)
            filled = [next(given) if isinstance(x, jax.Array) else x for x in leaves]
            *arguments, extra_args = treedef.unflatten(filled)
            return update(*arguments, **extra_args)

        places = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        arrays = [x for x in leaves if isinstance(x, jax.Array)]
        return jax.sharding.auto_axes(call, out_sharding=places)(arrays)

    return run


def place_low_rank(low_rank: jax.Array, view: MatrixView, leaf: jax.Array) -> jax.Array:
    """Moments are sharded as their matrices are, but for the axis that is projected."""
    batch, m, n = _matrix_spec(view, leaf)
    return _reshard(low_rank, (*batch, None if view.left else m, None if view.right else n))


def place_subspace(subspace: Subspace, view: MatrixView, leaf: jax.Array) -> Subspace:
    """Bases are sharded along the axis that they project, and gathered where they are used."""
    batch, m, n = _matrix_spec(view, leaf)

    def basis(stored: Any, axis: Any) -> Any:
        # Codes are in blocks, and numbers of directions few.
        matrices = isinstance(stored, jax.Array) and stored.ndim == len(batch) + 2
        spec = (*batch, axis) if matrices else batch
        return jax.tree.map(lambda x: _reshard(x, spec), stored)

    return Subspace(
        basis(subspace.left, m),
        basis(subspace.right, n),
        *(jax.tree.map(lambda x: _reshard(x, batch), field) for field in subspace[2:]),
    )


def _matrix_spec(view: MatrixView, leaf: jax.Array) -> tuple[tuple[Any, ...], Any, Any]:
    """Over which axes of the mesh batch, rows and columns are sharded; merged axes are not."""
    spec = jax.typeof(leaf).sharding.spec
    rows, columns = (
        spec[axes[0]] if len(axes) == 1 else None
        for axes in (view.reduction_axes, view.output_axes)
    )
    return tuple(spec[axis] for axis in view.batch_axes), rows, columns


def _reshard(x: jax.Array, spec: tuple[Any, ...]) -> jax.Array:
    return jax.sharding.reshard(x, PartitionSpec(*spec, *[None] * (x.ndim - len(spec))))
