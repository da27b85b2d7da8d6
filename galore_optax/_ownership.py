"""Finds which leaf of an optimizer's state belongs to which parameter, and what it is there for.

The state of an Optax transformation holds trees that look like the parameters, each under a field
such as ``mu``. A leaf is found by the keys on the way to it, not by their names alone: the
parameter ``{"mu": ...}`` has the key of a dict, the moment ``state.mu`` that of a named tuple.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey
from jaxtyping import PyTree

from galore_optax._arguments import static_hint
from galore_optax._callables import takes
from galore_optax._trees import leaves_with_keys, logical, path_name
from galore_optax._types import Params, Shape, State
from galore_optax._view import LeafView, MatrixView

Role: TypeAlias = Literal["first", "second", "curvature"]
"""A first moment is linear in the gradients: an average of them, or of their differences. A second
moment is one of their squares, and never negative. A curvature estimates the diagonal of the
Hessian, and may be negative."""

Stacked: TypeAlias = Callable[[str, Shape], int]
"""Returns how many leading axes of a parameter are stacks of layers, from its path and shape."""

_ROLES: Mapping[str, Role] = {
    "mu": "first",
    "trace": "first",
    "m": "first",
    "nu": "second",
    "v": "second",
}

# These fields are not what their names say: Adan's v averages differences of gradients; in SM3
# nu is the momentum, and mu holds for each axis of a leaf a maximum over the other axes.
_ROLES_IN: Mapping[type, Mapping[str, Role | None]] = {
    optax.ScaleByAdanState: {"v": "first"},
    optax.EmaState: {"ema": "first"},
    optax.ScaleBySM3State: {"mu": None, "nu": "first"},
    optax.contrib.SophiaState: {"nu": "curvature"},
}

# What is below these fields goes by the names of arguments, which parameters may have too.
_HYPERPARAMETERS = (GetAttrKey("hyperparams"), GetAttrKey("hyperparams_states"))

FEWEST = 16  # the fewest elements of an item: with fewer, the scales take much of what codes save


@dataclasses.dataclass(frozen=True)
class Owned:
    """One leaf of a state; a quantized array is one leaf.

    Attributes:
      path: the path of the leaf in the state, components joined by "/".
      field: the path of the outermost part of the state that looks like the parameters and holds
        the leaf; for a leaf outside of all such parts, its own path.
      owner: the position of its parameter among the leaves of the parameters, or None for what all
        of them share, such as a step counter.
      role: the role of the moment that it is part of, or None where it is part of none.
      batch_axes: how many of its leading axes are batch axes, over which matrices are stacked.
      size: the number of its elements; where the batch axes were told, by a view or by
        ``stacked``, and not presumed, that of one item behind them.
    """

    path: str
    field: str
    owner: int | None
    role: Role | None
    batch_axes: int
    size: int

    @property
    def name(self) -> str:
        """The last component of the field: the name that the state has for it."""
        return self.field.rpartition("/")[2]


def ownership(
    state: State,
    params: Params,
    views: Sequence[LeafView] | None = None,
    stacked: Stacked | None = None,
) -> list[Owned]:
    """Says of each leaf of a state whose it is, in the order in which the state is flattened.

    Only keys, shapes and dtypes are looked at, so that arrays, quantized ones and
    ``jax.ShapeDtypeStruct`` will all do, in boxes of Flax or outside of them.

    Args:
      state: the state of any transformation.
      params: the parameters that the transformation sees, or gradients like them.
      views: how galore sees each leaf of the parameters, where it is known. A leaf of the state
        with the shape of a low-rank gradient has the batch axes of the view.
      stacked: returns how many leading axes of a parameter are batch axes, where the caller says
        so.

    Raises:
      TypeError: ``stacked`` does not return an int.
      ValueError: ``stacked`` does not return a number of axes that the parameter has.
    """
    owners = leaves_with_keys(logical(params))
    by_keys = {keys: i for i, (keys, _) in enumerate(owners)}
    leaves = leaves_with_keys(logical(state))
    fields = _fields([keys for keys, _ in leaves], by_keys)
    roles = _roles_by_type(state)
    owned = []
    for (keys, leaf), (end, owner) in zip(leaves, fields, strict=True):
        field, shape = keys[:end], np.shape(leaf)
        told = None
        if owner is not None:
            owner_keys, parameter = owners[owner]
            if not owner_keys and _is_shared(leaf, parameter):
                owner = None
            elif views is not None:
                told = _of_view(shape, views[owner])
            elif stacked is not None:
                told = _of_stack(shape, stacked, path_name(owner_keys), np.shape(parameter))
        name = path_name(field)
        role = roles[field] if field in roles else _ROLES.get(name.rpartition("/")[2])
        batch_axes = presumed_batch_axes(shape) if told is None else told
        size = math.prod(shape[told or 0 :])
        owned.append(Owned(path_name(keys), name, owner, role, batch_axes, size))
    return owned


def moments_of(owned: Sequence[Owned], owner: int) -> dict[Role, list[int]]:
    """Returns the positions of a parameter's moments among the leaves of the state, by role.

    A chain may hold several of one role, and none of another.
    """
    positions: dict[Role, list[int]] = {}
    for i, leaf in enumerate(owned):
        if leaf.owner == owner and leaf.role is not None:
            positions.setdefault(leaf.role, []).append(i)
    return positions


def check_stacked(stacked: object) -> None:
    """Raises an error where an argument ``stacked`` cannot be right."""
    if stacked is not None and not (callable(stacked) and takes(stacked, 2)):
        raise TypeError(
            "stacked must be a function of a path and a shape, which returns a number of leading "
            f"axes, or None; got {stacked!r}{static_hint(stacked)}"
        )


def stacked_axes(stacked: Stacked, path: str, shape: Shape) -> int:
    """Returns how many leading axes of a parameter are batch axes, as the caller says.

    Raises:
      TypeError: ``stacked`` does not return an int.
      ValueError: ``stacked`` does not return a number of axes that the parameter has.
    """
    axes = stacked(path, shape)
    if isinstance(axes, bool) or not isinstance(axes, numbers.Integral):
        raise TypeError(f"stacked({path!r}, {shape}) must be a number of axes; got {axes!r}")
    if not 0 <= axes <= len(shape):
        raise ValueError(
            f"stacked({path!r}, {shape}) must be between 0 and the {len(shape)} axes of that "
            f"shape; got {axes}"
        )
    return int(axes)


def presumed_batch_axes(shape: Shape) -> int:
    """Returns how many leading axes are taken for batch axes if nobody says: all but the last two.

    What is behind them is an item. Where it is so small that nothing would be gained by keeping it
    in codes of its own, no axis is taken for a batch axis.
    """
    axes = max(0, len(shape) - 2)
    return axes if math.prod(shape[axes:]) >= FEWEST else 0


def _fields(
    paths: Sequence[KeyPath], by_keys: Mapping[KeyPath, int]
) -> list[tuple[int, int | None]]:
    """Returns for each leaf of a state the number of keys that lead to its field, and its owner.

    A field is the outermost part of the state whose leaves all have the keys of parameters, so
    that a parameter called "v" is not taken for a moment. Elsewhere it is the leaf itself.
    """

    def owner_below(path: KeyPath, end: int) -> int | None:
        if any(key in _HYPERPARAMETERS for key in path):
            return None
        rest = path[end:]
        # Behind the parameter's own keys there may be positions in a list that is kept for it.
        while rest not in by_keys and rest and isinstance(rest[-1], SequenceKey):
            rest = rest[:-1]
        return by_keys.get(rest)

    mirrors: dict[KeyPath, bool] = {}
    for path in paths:
        for end in range(len(path) + 1):
            belongs = owner_below(path, end) is not None
            mirrors[path[:end]] = mirrors.get(path[:end], True) and belongs
    ends = [
        next((end for end in range(len(path)) if mirrors[path[:end]]), len(path)) for path in paths
    ]
    return [(end, owner_below(path, end)) for path, end in zip(paths, ends, strict=True)]


def _is_shared(leaf: PyTree, parameter: PyTree) -> bool:
    """Whether a leaf is shared, where the only parameter has no keys by which to tell its own."""
    is_number = not np.shape(leaf)
    counts = not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return is_number and (counts or bool(np.shape(parameter)))


def _roles_by_type(state: State) -> dict[KeyPath, Role | None]:
    """Returns the roles of fields whose names mislead, by the keys that lead to them."""
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: type(x) in _ROLES_IN)
    return {
        (*keys, GetAttrKey(name)): role
        for keys, node in found
        for name, role in _ROLES_IN.get(type(node), {}).items()
    }


def _of_view(shape: Shape, view: LeafView) -> int | None:
    is_projected = isinstance(view, MatrixView) and shape == view.low_rank_shape
    return len(view.batch) if is_projected else None


def _of_stack(shape: Shape, stacked: Stacked, path: str, whole: Shape) -> int | None:
    """Returns the batch axes of a leaf that begins with those of its parameter, else None."""
    axes = stacked_axes(stacked, path, whole)
    return axes if shape[:axes] == whole[:axes] else None
