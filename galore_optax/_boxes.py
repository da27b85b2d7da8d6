"""Takes trees out of Flax's boxes, and puts them back.

A box is an ``nnx.Variable``, or an ``AxisMetadata`` of Linen such as ``nn.Partitioned``: a node
around one array that says, among other things, by names how its axes are sharded. Flax hands
parameters over in boxes at one time and without at another. Here everything is computed without;
what comes in a box goes out in the same one.

Flax and the trainers that are built on it shard optimizer state by these names. The state of galore
has other axes than the parameters: its boxes have the names of those that it has.
"""

import math
import sys
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._mesh_axes import names_of
from galore_optax._parts import parts
from galore_optax._placement import padded
from galore_optax._specs import specs_of
from galore_optax._trees import bare, is_box, logical
from galore_optax._types import MeshAxes, Params, State
from galore_optax._view import LeafView

# Where an ``nnx.Variable`` has its names; the last is read by ``nnx.Optimizer``.
_KEYS = ("out_sharding", "sharding_names", "sharding", "optimizer_sharding")


def boxed_like(tree: PyTree, like: PyTree) -> PyTree:
    """Returns a tree with its leaves in the boxes of another one.

    Args:
      tree: a tree without boxes.
      like: one that is the same without its boxes, which need not have any.
    """
    treedef = jax.tree.structure(like)
    leaves = jax.tree.leaves(tree)
    return treedef.unflatten(leaves) if treedef.num_leaves == len(leaves) else tree


def boxed_state(state: State, params: Params, views: Sequence[LeafView]) -> State:
    """Returns a new state with what belongs to a parameter in a box like that of the parameter.

    Args:
      state: the state that an ``init`` makes for the parameters without boxes.
      params: the parameters.
      views: how these are seen.
    """
    nodes = jax.tree.leaves(logical(params), is_leaf=is_box)
    boxes = [node if is_box(node) else None for node in nodes for _ in jax.tree.leaves(node)]
    if not any(box is not None for box in boxes):
        return state
    inside = bare(params)
    leaves = jax.tree.leaves(logical(inside))
    names = [_names_in(box) for box in boxes]
    specs = [
        padded(PartitionSpec() if of_leaf is None else of_leaf, len(leaf.shape))
        for of_leaf, leaf in zip(names, leaves, strict=True)
    ]
    mesh = _mesh_of_names(specs, boxes)
    by_path = {view.path: [view] for view in views}
    places = specs_of(state, inside, by_path, specs, mesh, shares=False)
    of_arrays = [
        (part.owner, part.array.shape)
        for part in parts(state, inside)
        for _ in jax.tree.leaves(part.array)
    ]
    arrays, treedef = jax.tree.flatten(state)
    found = jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, PartitionSpec))
    for i, ((owner, shape), spec) in enumerate(zip(of_arrays, found, strict=True)):
        box = None if owner is None else boxes[owner]
        if owner is None or box is None:
            continue
        if names[owner] is not None:
            arrays[i] = _in_box(box, arrays[i], spec)
        elif shape == arrays[i].shape == leaves[owner].shape:
            arrays[i] = jax.tree.structure(box).unflatten([arrays[i]])
    return treedef.unflatten(arrays)


def _names_in(box: PyTree) -> PartitionSpec | None:
    """Returns the names of the axes of what is in a box, or None where it has none."""
    if box is None:
        return None
    if hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = next((metadata[key] for key in _KEYS if metadata.get(key) is not None), None)
    else:
        names = getattr(box, "names", None)
    if isinstance(names, NamedSharding):
        names = names.spec
    return PartitionSpec(*names) if isinstance(names, PartitionSpec | tuple | list) else None


def _in_box(box: PyTree, array: PyTree, names: PartitionSpec) -> PyTree:
    """Returns an array in a box like another one, with names of its own axes."""
    axes = tuple(padded(names, array.ndim))
    new = jax.tree.structure(box).unflatten([array])
    if not hasattr(box, "get_metadata"):
        return new.replace(names=axes)
    for key in _KEYS:
        if (old := box.get_metadata().get(key)) is not None:
            value = NamedSharding(old.mesh, names) if isinstance(old, NamedSharding) else axes
            new.set_metadata(key, value)
    return new


def _mesh_of_names(specs: Sequence[PartitionSpec], boxes: Sequence[PyTree]) -> AbstractMesh | None:
    """Returns a mesh whose axes are the names in boxes, each of the size that its axes have.

    A name is that of an axis of the mesh, or the rules of Flax say which axes it stands for. None
    says that this is not known of all names.

    Args:
      specs: the names of each leaf of the parameters.
      boxes: their boxes.
    """
    mesh: Mapping[str, int] = jax.sharding.get_abstract_mesh().shape
    rules = _rules_in_context()
    for box in boxes:
        given = getattr(box, "mesh", None)
        mesh = mesh or (given.shape if given is not None else {})
        of_box = getattr(box, "rules", None) or getattr(box, "sharding_rules", None)
        rules |= dict(of_box or ())

    def size(name: str) -> int:
        axes: MeshAxes = name if name in mesh else rules[name]
        return math.prod(mesh[axis] for axis in names_of(axes))

    names = sorted({name for spec in specs for axes in spec for name in names_of(axes)})
    try:
        return AbstractMesh(tuple(map(size, names)), tuple(names))
    except KeyError:
        return None


def _rules_in_context() -> dict[str, MeshAxes]:
    """Returns the rules that Flax was given for names of axes, which it has if it is there."""
    spmd = sys.modules.get("flax.core.spmd")
    return dict(spmd.get_logical_axis_rules() or ()) if spmd is not None else {}
