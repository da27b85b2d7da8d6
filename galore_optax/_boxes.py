"""Takes trees out of the boxes of trainers, and puts them back.

A box is an ``nnx.Variable``, an ``AxisMetadata`` of Linen such as ``nn.Partitioned``, or a
``NamedArray`` of haliax: a node around one array that says, among other things, by names how its
axes are sharded. Flax hands parameters over in boxes at one time and without at another. Here
everything is computed without; what comes in a box goes out in the same one.

Flax, haliax and the trainers that are built on them shard optimizer state by these names. The state
of galore has other axes than the parameters: its boxes have names for those that it has.
"""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._axis_names import KEYS, Names, names_in, naming
from galore_optax._parts import parts
from galore_optax._placement import padded
from galore_optax._specs import specs_of
from galore_optax._trees import axis_names, bare, is_box, logical
from galore_optax._types import Params, State
from galore_optax._view import LeafView


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

    Where it is known what names stand for, they say of each array what
    :func:`state_partition_specs` says; else each axis has the names of its own side of a matrix.

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
    named = [None if box is None else names_in(box) for box in boxes]
    names = [
        padded(PartitionSpec() if of_leaf is None else of_leaf, len(leaf.shape))
        for of_leaf, leaf in zip(named, leaves, strict=True)
    ]
    by_path = {view.path: [view] for view in views}
    known = naming([box for box in boxes if box is not None], leaves)
    own = _flat(specs_of(state, inside, by_path, names, None, shares=False))
    places = own
    if known is not None:
        specs = [known.axes(of_leaf) for of_leaf in names]
        places = _flat(specs_of(state, inside, by_path, specs, known.mesh))
    of_arrays = [
        (part.owner, part.array.shape)
        for part in parts(state, inside)
        for _ in jax.tree.leaves(part.array)
    ]
    arrays, treedef = jax.tree.flatten(state)
    for i, ((owner, shape), spec) in enumerate(zip(of_arrays, places, strict=True)):
        box = None if owner is None else boxes[owner]
        if owner is None or box is None:
            continue
        if named[owner] is not None:
            axes = arrays[i].ndim
            of_array = padded(own[i], axes)
            if known is not None:
                several = axis_names(box) is None
                of_array = known.names(padded(spec, axes), of_array, names[owner], several)
            arrays[i] = _in_box(box, arrays[i], of_array)
        elif shape == arrays[i].shape == leaves[owner].shape:
            arrays[i] = jax.tree.structure(box).unflatten([arrays[i]])
    return treedef.unflatten(arrays)


def _flat(specs: PyTree) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _in_box(box: PyTree, array: PyTree, names: Names) -> PyTree:
    """Returns an array in a box like another one, with names of its own axes."""
    if axis_names(box) is not None:
        # Each axis must have a name of its own, those too that are not divided.
        of_axes = [name or f"galore_{i}" for i, name in enumerate(names)]
        axis = type(box.axes[0])
        axes = tuple(axis(name, size) for name, size in zip(of_axes, array.shape, strict=True))
        return type(box)(array, axes)
    entries = tuple(names)
    if not hasattr(box, "get_metadata"):
        return jax.tree.structure(box).unflatten([array]).replace(names=entries)
    new = jax.tree.structure(box).unflatten([array])
    for key in KEYS:
        old = box.get_metadata().get(key)
        if isinstance(old, NamedSharding):
            new.set_metadata(key, NamedSharding(old.mesh, names))
        elif old is not None:
            new.set_metadata(key, names if isinstance(old, PartitionSpec) else entries)
    return new
