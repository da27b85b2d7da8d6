"""Reads what users say of where parameters lie: meshes, and trees of specs or of shardings."""

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._mesh_axes import names_of
from galore_optax._placement import padded
from galore_optax._trees import bare, leaves_with_paths, logical, path_name
from galore_optax._types import MeshAxes, Params, Shape


def checked_mesh(mesh: Mesh | AbstractMesh | None) -> AbstractMesh | None:
    """Returns a mesh as an abstract one; where it is None, that of ``jax.set_mesh``, if any.

    Raises:
      TypeError: it is no mesh.
    """
    if mesh is None:
        current = jax.sharding.get_abstract_mesh()
        return current if current.axis_names else None
    if isinstance(mesh, Mesh):
        return mesh.abstract_mesh
    if not isinstance(mesh, AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, or None; got {mesh!r}")
    return mesh


def checked_shardings(
    shardings: PyTree, params: Params
) -> tuple[list[PartitionSpec], Mesh | AbstractMesh]:
    """Returns the spec of each leaf of the parameters, and the mesh that all of them are on.

    Args:
      shardings: a tree of ``NamedSharding``, or of None for what is on every device; None for
        those that the parameters have.
      params: the parameters, or their shapes.

    Raises:
      TypeError: one is no ``NamedSharding``.
      ValueError: shardings of another tree, or on several meshes, or on none.
    """
    if shardings is None:
        found = [_sharding_of(path, leaf) for path, leaf in leaves_with_paths(logical(params))]
    else:
        found = _like(params, bare(shardings), "shardings")
    first: tuple[str, NamedSharding] | None = None
    for (path, _), sharding in zip(leaves_with_paths(logical(params)), found, strict=True):
        if sharding is None:
            continue
        if not isinstance(sharding, NamedSharding):
            raise TypeError(
                f"shardings must be jax.sharding.NamedSharding; {path!r} has {sharding!r}"
            )
        first = first or (path, sharding)
        if sharding.mesh != first[1].mesh:
            raise ValueError(
                f"shardings must be on one mesh; that of {first[0]!r} is on {first[1].mesh}, and "
                f"that of {path!r} on {sharding.mesh}"
            )
    if first is None:
        raise ValueError("shardings must have at least one NamedSharding, which says the mesh")
    return [PartitionSpec() if x is None else x.spec for x in found], first[1].mesh


def checked_specs(specs: PyTree, params: Params, mesh: AbstractMesh | None) -> list[PartitionSpec]:
    """Returns the spec of each leaf of the parameters, with an entry for each axis."""
    found = []
    for (path, leaf), given in zip(
        leaves_with_paths(logical(params)), _like(params, bare(specs), "specs"), strict=True
    ):
        spec, shape = PartitionSpec() if given is None else given, np.shape(leaf)
        if not isinstance(spec, PartitionSpec):
            hint = ", which state_shardings takes" if isinstance(spec, NamedSharding) else ""
            raise TypeError(
                f"specs must be jax.sharding.PartitionSpec; {path!r} has {spec!r}{hint}"
            )
        if getattr(spec, "unreduced", None) or getattr(spec, "reduced", None):
            raise ValueError(
                f"the spec {spec} of {path!r} is of sums that are not added up yet: give that of "
                "what they add up to"
            )
        if len(spec) > len(shape):
            raise ValueError(f"the spec {spec} of {path!r} has more axes than its shape {shape}")
        if PartitionSpec.UNCONSTRAINED in spec:
            raise ValueError(f"the spec {spec} of {path!r} leaves an axis open: name its mesh axes")
        names = [name for axes in spec for name in names_of(axes)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the spec {spec} of {path!r} has the mesh axis {twice!r} twice")
        for size, axes in zip(shape, spec, strict=False):
            _check_divides(path, shape, size, axes, mesh)
        found.append(padded(spec, len(shape)))
    return found


def _check_divides(
    path: str, shape: Shape, size: int, axes: MeshAxes, mesh: AbstractMesh | None
) -> None:
    if mesh is None:
        return
    parts = 1
    for axis in names_of(axes):
        if axis not in mesh.shape:
            raise ValueError(
                f"the spec of {path!r} has the mesh axis {axis!r}; the mesh has "
                f"{', '.join(map(repr, mesh.axis_names))}"
            )
        parts *= mesh.shape[axis]
    if size % parts:
        raise ValueError(
            f"the spec of {path!r} divides an axis of {size} of its shape {shape} over {axes!r}, "
            f"which are {parts} devices: leave it whole, by None"
        )


def _like(params: Params, tree: PyTree, name: str) -> list[PyTree]:
    """Returns the entry of a tree for each leaf of the parameters."""
    found: list[PyTree] = []

    def spread(entry: PyTree, part: PyTree) -> None:
        found.extend([entry] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(spread, tree, logical(params), is_leaf=_is_entry)
    except ValueError as error:
        raise ValueError(
            f"{name} must have the structure of the parameters, or be a prefix of it: "
            f"{_difference(params, tree) or error}"
        ) from error
    return found


def _difference(params: Params, tree: PyTree) -> str | None:
    """Returns where a tree is neither that of the parameters nor a prefix; None for its nodes."""
    paths = [path for path, _ in leaves_with_paths(logical(params))]
    entries = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_entry)
    given = [path_name(keys) for keys, _ in entries]

    def holds(outer: str, inner: str) -> bool:
        return outer in ("", inner) or inner.startswith(f"{outer}/")

    for entry in given:
        if inside := next((path for path in paths if path != entry and holds(path, entry)), None):
            return f"{inside!r} is one parameter and has several entries; P('x', None) is one"
        if not any(holds(entry, path) for path in paths):
            return f"there is no parameter {entry!r}"
    missing = next((x for x in paths if not any(holds(entry, x) for entry in given)), None)
    return None if missing is None else f"there is nothing for {missing!r}"


def _is_entry(x: object) -> bool:
    return x is None or isinstance(x, PartitionSpec | NamedSharding)


def _sharding_of(path: str, leaf: PyTree) -> NamedSharding:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"state_shardings needs parameters with a NamedSharding, or shardings; {path!r} has "
            f"{sharding!r}"
        )
    return sharding
