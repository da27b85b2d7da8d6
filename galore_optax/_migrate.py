"""Makes states of earlier versions of the library states of this one.

The layout of `GaloreState` has a version, which the state carries. A release that changes the
layout raises `VERSION`, and adds a row here: how a state of the version before is laid out, and how
it becomes one of the next.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from galore_optax._accumulate import Accumulator
from galore_optax._state import VERSION, GaloreState, is_galore_state
from galore_optax._subspace import ABSENT, Subspace, is_absent
from galore_optax._types import State


class _Subspace1(NamedTuple):
    """`Subspace` in version 1."""

    left: PyTree
    right: PyTree
    refreshes: PyTree
    due: PyTree
    gaps: PyTree
    similarities: PyTree
    energy: PyTree
    overlap: PyTree


class _GaloreState1(NamedTuple):
    """`GaloreState` in version 1, from before galore_optax 0.1.0."""

    step: PyTree
    subspace: _Subspace1
    inner: PyTree
    accumulator: PyTree


class _Accumulator1(NamedTuple):
    """`Accumulator` in version 1."""

    count: PyTree
    mean: PyTree


def _from_1(state: State) -> GaloreState:
    # A NamedTuple that was pickled comes back as one of this version's, with defaults at its end.
    subspace = Subspace(*state.subspace)
    absent = jax.tree.map(lambda _: ABSENT, subspace.refreshes, is_leaf=is_absent)
    subspace = subspace._replace(residual=absent, transport=absent)
    accumulator = state.accumulator
    if not is_absent(accumulator):
        accumulator = Accumulator(*accumulator[:2], whole=jnp.zeros([], jnp.int32))
    version = jnp.asarray(2, jnp.int32)
    return GaloreState(state.step, subspace, state.inner, accumulator, version)


def _to_1(state: GaloreState) -> State:
    subspace = _Subspace1(*state.subspace[: len(_Subspace1._fields)])
    accumulator = state.accumulator
    if not is_absent(accumulator):
        accumulator = _Accumulator1(accumulator.count, accumulator.mean)
    return _GaloreState1(state.step, subspace, state.inner, accumulator)


class _Change(NamedTuple):
    """What changed from one version of the layout to the next."""

    forward: Callable[[State], State]  # takes a state to the next version.
    back: Callable[[State], State]  # takes the shapes of a state back to the version before.


_CHANGES: dict[int, _Change] = {1: _Change(_from_1, _to_1)}


def migrate(state: State) -> State:
    """Makes a state that an earlier version of the library saved one of this version.

    Args:
      state: any optimizer state, with galore anywhere in it, whose arrays are not traced.

    Returns:
      The state, with which training goes on as it would have before. A state of this version, or
      without galore, is returned as it is.

    Raises:
      ValueError: the state is of a later version.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(1e-3, rank=2)
      >>> old = galore_optax.as_version(tx.init({"kernel": jnp.eye(4, 8)}), 1)
      >>> galore_optax.migrate(old).version.item()
      2
    """

    def forward(node: State) -> State:
        if not _is_of_any_version(node):
            return node
        for version in range(_version_of(node), VERSION):
            node = _CHANGES[version].forward(node)
        return node

    return jax.tree.map(forward, state, is_leaf=_is_of_any_version)


def as_version(like: State, version: int) -> State:
    """Says how an earlier version of the library laid out a state, for a checkpoint to be read.

    Args:
      like: the state of this version, or its ``jax.ShapeDtypeStruct``, shardings included.
      version: the version of the layout; 1 is from before galore_optax 0.1.0.

    Returns:
      What the saved state looks like; hand what is restored to :func:`migrate`.

    Raises:
      ValueError: there is no such version.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(1e-3, rank=2)
      >>> like = jax.eval_shape(tx.init, {"kernel": jnp.eye(4, 8)})
      >>> saved = galore_optax.as_version(like, 1)  # restore to this, then migrate
      >>> len(jax.tree.leaves(like)) - len(jax.tree.leaves(saved))
      1
    """
    if isinstance(version, bool) or version not in range(1, VERSION + 1):
        raise ValueError(f"version must be from 1 to {VERSION}; got {version!r}")

    def back(node: State) -> State:
        if is_galore_state(node):
            for number in range(VERSION - 1, version - 1, -1):
                node = _CHANGES[number].back(node)
        return node

    return jax.tree.map(back, like, is_leaf=is_galore_state)


def _is_of_any_version(node: object) -> bool:
    return isinstance(node, GaloreState | _GaloreState1)


def _version_of(state: State) -> int:
    """Returns the version of a state, which may be of any version.

    Raises:
      ValueError: it is later than this one.
    """
    if isinstance(state, _GaloreState1) or is_absent(state.version):
        return 1
    version = int(state.version)
    if version > VERSION:
        raise ValueError(
            f"the state has version {version}, and this galore_optax knows versions up to "
            f"{VERSION}: install the galore_optax that made it, or a later one"
        )
    return version
