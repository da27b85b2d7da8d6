"""Says of every array of an optimizer's state whose it is, and what it is there for."""

import dataclasses

import jax
from jaxtyping import PyTree

from galore_optax._ownership import ownership
from galore_optax._quantized import is_quantized
from galore_optax._state import GaloreState, is_galore_state
from galore_optax._subspace import Subspace, is_absent
from galore_optax._types import Params, State


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a state; one in codes is one part.

    Attributes:
      array: the array, or its shape.
      path: the path of the array in the state.
      owner: the position of its parameter among the leaves of the parameters, or None for what all
        of them share, such as a step counter.
      field: the field of the innermost `GaloreState` that holds it, such as ``"inner"``, or that
        of its `Subspace`, such as ``"left"``; None outside of galore.
    """

    array: PyTree
    path: str
    owner: int | None
    field: str | None


def parts(state: State, params: Params) -> list[Part]:
    """Returns the parts of a state, in the order in which it is flattened.

    Args:
      state: the state of any transformation, or its shapes.
      params: the parameters that it was made for.
    """
    owned = ownership(jax.tree.map(_listed, state, is_leaf=is_galore_state), params)
    fields = jax.tree.leaves(_marked(state, None))
    return [
        Part(mark.array, own.path, own.owner, mark.field)
        for mark, own in zip(fields, owned, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class _Mark:
    """Stands in the place of an array, and has it."""

    array: PyTree
    field: str | None


def _marked(state: State, field: str | None) -> State:
    def mark(node: State) -> State:
        if not isinstance(node, GaloreState):
            return _Mark(node, field)
        subspace = {name: _marked(x, name) for name, x in node.subspace._asdict().items()}
        others = {name: _marked(x, name) for name, x in node._asdict().items()}
        return GaloreState(**{**others, "subspace": Subspace(**subspace)})

    return jax.tree.map(mark, state, is_leaf=lambda x: is_galore_state(x) or is_quantized(x))


def _listed(node: State) -> State:
    """Returns a state of galore with lists of what residual and transport keep of each parameter.

    Positions in a list are behind the parameter's own keys, by which its owner is found.
    """
    if not is_galore_state(node):
        return node
    old = node.subspace
    residual, transport = (
        jax.tree.map(lambda _, own: jax.tree.leaves(own), old.refreshes, kept, is_leaf=is_absent)
        for kept in (old.residual, old.transport)
    )
    return node._replace(subspace=old._replace(residual=residual, transport=transport))
