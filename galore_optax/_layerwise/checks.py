"""Checks that the update of a transformation can be divided, by what its outputs depend on."""

from collections.abc import Iterator, Sequence

import jax
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from galore_optax._jaxpr import Inputs
from galore_optax._low_bit import LowBitState
from galore_optax._state import GaloreState
from galore_optax._trees import path_name


def check_independent(
    updates: PyTree[Inputs],
    state: PyTree[Inputs],
    names: Sequence[str],
    in_blocks: Sequence[bool],
    layered: Sequence[bool],
) -> None:
    """Raises an error where the update of a leaf, or its state, depends on another's gradient.

    Args:
      updates: for each update the inputs that it depends on, of which the first are the gradients.
      state: for each leaf of the next state the inputs that it depends on.
      names: the paths of the gradients.
      in_blocks: for each gradient whether it is one of the blocks.
      layered: for each leaf of the state whether it has an axis of layers.

    Raises:
      ValueError: the transformation cannot be divided.
    """

    def check(what: str, depends: Inputs, allowed: int) -> None:
        found = [names[i] for i in sorted(depends) if i < len(names)]
        if len(found) == 1 and not allowed:
            raise ValueError(
                f"{what} depends on the gradients of {found[0]} and has no axis of layers: "
                "layerwise needs a state of its own for each layer"
            )
        if len(found) > allowed:
            raise ValueError(
                f"the transformation needs all gradients at once: {what} depends on the "
                f"gradient of {' and '.join(found[:2])}. Clip by layerwise(clip_norm=...) "
                "instead of optax.clip_by_global_norm; leave out optax.apply_if_finite and "
                "whatever else measures the whole gradient."
            )

    for name, depends in zip(names, jax.tree.leaves(updates, is_leaf=is_inputs), strict=True):
        check(f"the update of {name}", depends, 1)
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_inputs)
    for (path, depends), has_layers in zip(found, layered, strict=True):
        of_blocks = any(i < len(names) and in_blocks[i] for i in depends)
        allowed = 0 if of_blocks and not has_layers else 1
        check(f"the state's {path_name(path)}", depends, allowed)


def check_acknowledged(state: PyTree[Inputs], excerpt: int) -> None:
    """Raises an error where a wrapper did not pass on the excerpt that ``update`` was given.

    Args:
      state: for each leaf of the next state the inputs that it depends on; see
        `galore_optax._excerpt.Excerpt.acknowledge`.
      excerpt: the position of the excerpt among the inputs.

    Raises:
      ValueError: the state of a galore or of a low_bit does not depend on the excerpt.
    """
    for path, node in _states_of_this_library(state):
        number = node.step if isinstance(node, GaloreState) else node.rounds
        if any(excerpt not in depends for depends in jax.tree.leaves(number, is_leaf=is_inputs)):
            name = "galore" if isinstance(node, GaloreState) else "low_bit"
            where = f", which keeps the state's {path_name(path)}," if path else ""
            raise ValueError(
                f"a wrapper around {name}{where} drops the extra arguments of update, by which "
                "layerwise says which layer it updates. Make the wrapper an "
                "optax.GradientTransformationExtraArgs whose update is "
                "update(updates, state, params=None, **extra_args), and pass **extra_args on"
            )


def check_undivided(stacked: PyTree[jax.ShapeDtypeStruct]) -> None:
    """Raises an error where an Explicit mesh divides the axis of layers.

    Args:
      stacked: the blocks, with their places.

    Raises:
      ValueError: it does.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        over = leaf.sharding and leaf.sharding.spec[0]
        if over is not None:
            raise ValueError(
                f"the axis of layers of {path_name(path)} is divided over the mesh axis {over!r}: "
                "layerwise goes over the layers one by one. Divide another axis of it."
            )


def is_inputs(x: object) -> bool:
    """Whether this is a set of inputs; a predicate for ``is_leaf``."""
    return isinstance(x, frozenset)


def _states_of_this_library(
    state: PyTree,
) -> Iterator[tuple[KeyPath, GaloreState | LowBitState]]:
    """Yields the path and the state of every galore and low_bit, also inside of one another."""

    def is_one(x: object) -> bool:
        return isinstance(x, GaloreState | LowBitState)

    for path, node in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_one):
        if is_one(node):
            yield path, node
            for rest, inner in _states_of_this_library(node.inner):
                yield (*path, jax.tree_util.GetAttrKey("inner"), *rest), inner
