"""Computes on a mesh of Explicit axes what needs Auto axes, and says what is wrong with a mesh."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, PyTree

from galore_optax._quantized import is_quantized

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


def reshard(tree: PyTree, specs: PyTree) -> PyTree:
    """Returns a tree whose arrays are sharded as the specs say."""
    return jax.tree.map(jax.sharding.reshard, tree, specs)


def auto_sharding(leaf: PyTree) -> NamedSharding | None:
    """Returns the sharding of an array on a mesh of Auto axes, of several devices; else None.

    It is None for what is traced too, of which no sharding is known.
    """
    if is_quantized(leaf):
        return auto_sharding(leaf.codes)
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    sharding = leaf.sharding
    is_named = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1
    return sharding if is_named and not sharding.mesh.abstract_mesh.explicit_axes else None


def put(tree: PyTree, specs: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns a tree whose arrays lie on a mesh of Auto axes as the specs say."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


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
