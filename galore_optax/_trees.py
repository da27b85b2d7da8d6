"""Finds the leaves of trees of parameters and their paths, whatever boxes or codes they are in."""

from typing import cast

import jax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from galore_optax._quantized import is_quantized


def logical(tree: PyTree) -> PyTree:
    """Returns the tree with a ``jax.ShapeDtypeStruct`` in the place of each quantized array."""

    def stand_in(leaf: PyTree) -> PyTree:
        if not is_quantized(leaf):
            return leaf
        leaf = bare(leaf)  # each of its arrays may be in a box.
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    return jax.tree.map(stand_in, tree, is_leaf=is_quantized)


def leaves_with_paths(tree: PyTree) -> list[tuple[str, PyTree]]:
    """Returns the leaves of a tree and their paths, components joined by "/"."""
    return [(path_name(keys), leaf) for keys, leaf in leaves_with_keys(tree)]


def leaves_with_keys(tree: PyTree) -> list[tuple[KeyPath, PyTree]]:
    """Returns the leaves of a tree and the keys that lead to them.

    The keys are the same whether or not the leaf is in a box: an NNX variable, Linen's
    ``Partitioned``, a ``NamedArray`` of haliax. They must be, since leaves are boxed at init and
    may be unboxed at update.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [(path, leaf) for path, boxed in found for leaf in jax.tree.leaves(boxed)]


def bare(tree: PyTree) -> PyTree:
    """Returns a tree with what is in boxes in the place of each box.

    Arrays may be in them, or what a function of trees put in their places.
    """

    def content(node: PyTree) -> PyTree:
        if not _has_content(node):
            return node
        (only,), _ = jax.tree_util.default_registry.flatten_one_level(node)
        return only

    return jax.tree.map(content, tree, is_leaf=_has_content)


def beside(updates: PyTree, params: PyTree) -> PyTree:
    """Returns parameters without what stands where there is no gradient.

    A model as it is has functions, numbers and frozen arrays there, which Optax' own optimizers
    leave alone.

    Args:
      updates: gradients, None where there is none.
      params: the parameters, or None.
    """

    def is_none(x: object) -> bool:
        return x is None

    if params is None:
        return None
    try:
        return jax.tree.map(lambda g, p: None if g is None else p, updates, params, is_leaf=is_none)
    except ValueError:  # another structure, of which an error says more where it matters
        return params


def path_name(keys: KeyPath) -> str:
    """Returns the components of a path, joined by "/"."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def is_box(x: PyTree) -> bool:
    """Whether this is a box around one array: of NNX, of Linen, or a ``NamedArray`` of haliax."""
    return _has_content(x) and len(jax.tree.leaves(x)) == 1


def axis_names(x: PyTree) -> tuple[str, ...] | None:
    """Returns the names of the axes of a ``NamedArray`` of haliax, or None for anything else.

    Its later versions keep names, and the axes come of them and of the array that is in it.
    """
    if not hasattr(x, "array"):
        return None
    names = getattr(x, "axis_names", None)
    if names is None and isinstance(axes := getattr(x, "axes", None), tuple):
        names = tuple(getattr(axis, "name", None) for axis in axes)
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        return None
    return cast(tuple[str, ...], names)


def _has_content(x: PyTree) -> bool:
    named = hasattr(x, "get_metadata") or hasattr(x, "replace_boxed") or axis_names(x) is not None
    # With older versions of Flax a variable of NNX is itself a leaf, unless it is in a state.
    return named and not jax.tree_util.all_leaves([x])
