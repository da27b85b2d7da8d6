"""Takes trees out of Flax's boxes, and puts them back.

A box is an ``nnx.Variable``, or an ``AxisMetadata`` of Linen such as ``nn.Partitioned``: a node
around one array that says how it is sharded, among other things. Flax hands parameters over in
boxes at one time and without at another. Here everything is computed without; what comes in a box
goes out in the same one.
"""

import jax
from jaxtyping import PyTree

from galore_optax._ownership import ownership
from galore_optax._quantized import is_quantized
from galore_optax._trees import bare, is_box, logical
from galore_optax._types import Params, State


def boxed_like(tree: PyTree, like: PyTree) -> PyTree:
    """Returns a tree with its leaves in the boxes of another one.

    Args:
      tree: a tree without boxes.
      like: one that is the same without its boxes, which need not have any.
    """
    treedef = jax.tree.structure(like)
    leaves = jax.tree.leaves(tree)
    return treedef.unflatten(leaves) if treedef.num_leaves == len(leaves) else tree


def boxed_state(state: State, params: Params) -> State:
    """Returns a new state with what has a parameter's shape in the box of that parameter.

    Args:
      state: the state that an ``init`` makes for the parameters without boxes.
      params: the parameters.
    """
    nodes = jax.tree.leaves(logical(params), is_leaf=is_box)
    boxes = [node if is_box(node) else None for node in nodes for _ in jax.tree.leaves(node)]
    if not any(box is not None for box in boxes):
        return state
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
    for i, owned in enumerate(ownership(state, bare(params))):
        box = None if owned.owner is None else boxes[owned.owner]
        if box is not None and not is_quantized(leaves[i]):
            (inside,) = jax.tree.leaves(box)
            if inside.shape == leaves[i].shape:
                leaves[i] = jax.tree.structure(box).unflatten([leaves[i]])
    return treedef.unflatten(leaves)
