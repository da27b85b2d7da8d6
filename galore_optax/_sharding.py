"""Computes on a mesh of Explicit axes what needs Auto axes, and says what is wrong with a mesh."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from galore_optax._mesh_axes import has_explicit_axes, names_of
from galore_optax._quantized import is_quantized
from galore_optax._types import DType, MeshAxes, Params, State, Updates

Result = TypeVar("Result")


def check_mesh(tree: PyTree) -> None:
    """Raises where arrays lie on a mesh with Explicit axes that is not the current one."""
    current = jax.sharding.get_abstract_mesh()
    for mesh in _explicit_meshes(tree):
        if jax.__version_info__ < (0, 7):
            raise ValueError(
                f"arrays on a mesh with Explicit axes, {dict(mesh.shape)}, need jax 0.7; this is "
                f"{jax.__version__}: make the mesh with axes of AxisType.Auto"
            )
        if not has_explicit_axes(current) or mesh.shape != current.shape:
            there = f", on {dict(current.shape)}" if current.axis_names else ""
            raise ValueError(
                f"galore was given arrays on a mesh with Explicit axes, {dict(mesh.shape)}, "
                f"outside of that mesh{there}: call init and update, or the jitted functions that "
                "do, under jax.set_mesh(mesh)"
            )


def shaped(leaf: PyTree, *, item: bool = False) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of an array, and how an Explicit mesh divides it.

    Args:
      leaf: the array, or its ``jax.ShapeDtypeStruct``.
      item: whether it is one entry along the leading axis that is described, instead of all.
    """
    given = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    sharding = given.sharding
    if isinstance(sharding, NamedSharding) and has_explicit_axes(sharding.mesh.abstract_mesh):
        spec = PartitionSpec(*sharding.spec[1:]) if item else sharding.spec
        sharding = NamedSharding(sharding.mesh, spec)
    else:
        sharding = None
    return jax.ShapeDtypeStruct(
        given.shape[1:] if item else given.shape, given.dtype, sharding=sharding
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


def under_auto(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation whose arithmetic knows no Explicit axes, and leaves all in place.

    It is for those whose products do not say how their results are sharded.
    """
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        places = None
        if has_explicit_axes(jax.sharding.get_abstract_mesh()):
            places = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))

        def update_of(
            updates: Updates, state: State, params: Params | None, extra: dict[str, PyTree]
        ) -> tuple[Updates, State]:
            return tx.update(updates, state, params, **extra)

        return in_auto(update_of, places, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def each_its_own(
    function: Callable[..., Result], divided: Sequence[MeshAxes], stacked: Sequence[bool]
) -> Callable[..., Result]:
    """Returns a function of stacks by which each device works on those of its part of the stacks.

    Else a loop over a stack that is divided over devices would gather all of it on each of them.

    Args:
      function: a function of stacks, which returns stacks; axes of its arguments and results that
        stack come first.
      divided: what each of these axes is divided over on the current mesh.
      stacked: which arguments are stacks; the others are on every device.
    """
    axes = frozenset(itertools.chain.from_iterable(map(names_of, divided)))
    if not axes:
        return function
    spec = PartitionSpec(*divided)
    return jax.shard_map(
        function,
        in_specs=tuple(spec if stack else PartitionSpec() for stack in stacked),
        out_specs=spec,
        axis_names=axes,
        check_vma=False,
    )


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
    return sharding if is_named and not has_explicit_axes(sharding.mesh.abstract_mesh) else None


def put(tree: PyTree, specs: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns a tree whose arrays lie on a mesh of Auto axes as the specs say."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def zeros_like(leaf: PyTree, dtype: DType | None = None) -> Array:
    """Returns zeros in the place of a leaf, with the sharding of its type.

    What a traced function makes of an array that it closes over may have lost that.

    Args:
      leaf: an array, which may be in codes, or its ``jax.ShapeDtypeStruct``.
      dtype: the dtype of the zeros, or None for that of the leaf.
    """
    like = shaped(leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf))
    zeros = jnp.zeros(like.shape, like.dtype if dtype is None else dtype)
    return zeros if like.sharding is None else jax.sharding.reshard(zeros, like.sharding.spec)


def _explicit_meshes(tree: PyTree) -> Iterator[AbstractMesh]:
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and has_explicit_axes(jax.typeof(leaf).sharding.mesh):
            yield jax.typeof(leaf).sharding.mesh
