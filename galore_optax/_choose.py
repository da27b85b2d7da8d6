"""Chooses the subspace of one matrix again, and takes the moments along.

This is the part of the core that runs where a refresh is due, inside of a conditional.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from galore_optax._basis import Side
from galore_optax._core import Matrix, Method, load, load_side, project_back
from galore_optax._random import fold_in
from galore_optax._refresh import Clock
from galore_optax._storage import Storage, Stored
from galore_optax._subspace import ABSENT, Subspace, is_absent
from galore_optax._transport import Held, Moments, Turn
from galore_optax._types import Step
from galore_optax._view import moment_dtype, wide

# With which power of the gradients the moments of each role grow. It says by what to divide them
# where the gradient is divided by its unit.
_DEGREES: Mapping[str, int] = {"first": 1, "second": 2, "curvature": 1}


def refresh(
    gradient: Float[Array, "m n"],
    subspace: Subspace,
    moments: Held,
    clock: Clock,
    keys: Key[Array, "2"] | None,
    *,
    matrix: Matrix,
    method: Method,
    force: bool,
) -> tuple[Subspace, Held]:
    """Chooses a subspace again if that is due, and moves the moments to it.

    A gradient that is zero or not finite chooses none: the old subspace stays, and stays due.

    Args:
      gradient: the gradient G of the matrix.
      subspace: the subspace as the state holds it.
      moments: the moments that the method wants to see, by role, as the state holds them; mostly
        there are none.
      clock: the step, the gap T and the phase of the matrix.
      keys: one key for each side, or None where the projector draws no random numbers.
      matrix: what is static about the matrix.
      method: the answers to the five questions.
      force: whether to take the subspace as due in any case.

    Returns:
      The subspace and the moments, in the form in which they were given.
    """
    # This takes one pass over the matrix. jnp.max alone loses a nan on the CPU.
    peak = jnp.max(jnp.where(jnp.isnan(gradient), jnp.inf, jnp.abs(gradient)))
    usable = (peak > 0) & (peak < jnp.inf)
    due = usable if force else usable & (clock.step >= subspace.due)

    def again() -> tuple[Subspace, Held]:
        return _choose(gradient, peak, subspace, moments, clock, keys, matrix, method)

    return jax.lax.cond(due, again, lambda: (subspace, moments))


def _choose(
    gradient: Float[Array, "m n"],
    peak: Float[Array, ""],
    old: Subspace,
    moments: Held,
    clock: Clock,
    keys: Key[Array, "2"] | None,
    matrix: Matrix,
    method: Method,
) -> tuple[Subspace, Held]:
    """Returns the subspace that a gradient chooses, and the moments as they are held in it."""
    first = old.refreshes == 0
    in_old = {role: [_moment(stored) for stored in held] for role, held in moments.items()}
    unit = _unit(gradient, peak)
    choose = functools.partial(
        _choose_side,
        gradient.astype(unit.dtype) / unit,
        refreshes=old.refreshes,
        step=clock.step,
        moments={role: [_in_units(x, unit, role) for x in in_old[role]] for role in in_old},
        keys=keys,
        method=method,
    )
    left, right = (
        None if side is None else choose(stored, side)
        for side, stored in zip(matrix.sides, (old.left, old.right), strict=True)
    )
    sides = [side for side in matrix.sides if side is not None]
    turned = [chosen[1] for chosen in (left, right) if chosen is not None]
    overlaps = [jnp.sum(c**2) / side.rank for c, side in zip(turned, sides, strict=True)]
    overlap = jnp.where(first, 0.0, sum(overlaps) / len(sides)).astype(jnp.float32)
    chance = sum(side.rank / side.size for side in sides) / len(sides)
    new = old._replace(
        left=ABSENT if left is None else left[0],
        right=ABSENT if right is None else right[0],
        refreshes=old.refreshes + 1,
    )
    new = method.refresh.next(new, clock, (overlap - chance) / (1 - chance))
    if not is_absent(old.overlap):
        new = new._replace(overlap=overlap)
    turn = Turn(left and left[1], right and right[1], clock, first)
    in_new, state = _moved(in_old, old.transport, turn, method)
    new = new._replace(transport=state)
    if method.residual.absorbs:
        lost = _lost(in_old["first"], in_new["first"], old, new, keys, matrix, method)
        new = new._replace(residual=lost)
    moved = method.transport.moves
    held = moments | {
        role: list(map(_held_like, held, in_new[role]))
        for role, held in moments.items()
        if role in moved
    }
    return _if_sound((new, held), (old, moments))


def _choose_side(
    gradient: Float[Array, "m n"],
    stored: Stored,
    side: Side,
    *,
    refreshes: Int[Array, ""],
    step: Step,
    moments: Moments,
    keys: Key[Array, "2"] | None,
    method: Method,
) -> tuple[Stored, Float[Array, "r r"]]:
    """Returns the basis that a gradient chooses, as the state holds it, and C = P_new^T P_old."""
    old = load_side(stored, refreshes, keys, side, method)
    first = refreshes == 0
    if side.axis == 1:
        gradient, moments = gradient.T, jax.tree.map(jnp.transpose, moments)
    choice = method.projector(
        gradient,
        side.rank,
        key=None if keys is None else fold_in(keys[side.axis], refreshes + 1),
        old=old.choice(side),
        first=first,
        moments=moments,
        step=step,
    )
    new = method.projector.basis.chosen(choice, old, side, first)
    return new.keep(method.storage), new.turned(old, side)


def _moved(
    moments: Moments,
    state: PyTree,
    turn: Turn,
    method: Method,
) -> tuple[Moments, PyTree]:
    """Returns all moments, those that the transport moves moved, and its next state.

    Raises:
      ValueError: the transport loses moments, or changes their shapes.
    """
    moved = {role: moments[role] for role in method.transport.moves if role in moments}
    if not moved:
        return moments, state
    new, state = method.transport.move(moved, state, turn)
    if jax.tree.map(np.shape, new) != jax.tree.map(np.shape, moved):
        raise ValueError(
            "a transport must return as many moments as it gets, of the same roles and shapes, "
            f"{jax.tree.map(np.shape, moved)}; got {jax.tree.map(np.shape, new)}"
        )
    return moments | new, state


def _lost(
    in_old: list[Float[Array, "a b"]],
    in_new: list[Float[Array, "a b"]],
    old: Subspace,
    new: Subspace,
    keys: Key[Array, "2"] | None,
    matrix: Matrix,
    method: Method,
) -> Float[Array, "m n"]:
    """Returns what the first moment lost in a refresh, P_old m_old - P_new m_new."""
    before, after = (
        project_back(moment, load(s, keys, matrix=matrix, method=method), matrix, matrix.dtype)
        for [moment], s in ((in_old, old), (in_new, new))
    )
    return before - after


def _unit(gradient: Float[Array, "m n"], peak: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a power of two about as large as the largest entry of a gradient.

    The gradient is divided by it, since products of entries could over- or underflow. Division by
    a power of two is exact.
    """
    dtype = moment_dtype(gradient.dtype)
    limits = jnp.finfo(dtype)
    power = jax.lax.reduce_precision(peak.astype(dtype) / 2, limits.nexp, 0)
    return jnp.maximum(power, limits.tiny)


def _if_sound(new: tuple[Subspace, Held], old: tuple[Subspace, Held]) -> tuple[Subspace, Held]:
    """Returns the old subspace and moments where the new bases are not finite."""
    bases = jax.tree.leaves((new[0].left, new[0].right))
    floats = [x for x in bases if jnp.issubdtype(x, jnp.floating)]
    sound = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats], bool))
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)


def _moment(stored: Stored) -> Float[Array, "a b"]:
    """Returns a moment as transport sees it, in at least float32."""
    return wide(Storage.of(stored).load(stored))


def _held_like(stored: Stored, moment: Float[Array, "a b"]) -> Stored:
    """Returns a moment held in the same way as ``stored``, the moment that it replaces."""
    storage = Storage.of(stored)
    # A second moment that became 0 would divide by epsilon alone.
    return storage.keep(moment.astype(stored.dtype), keep_positive=storage.codec == "unsigned")


def _in_units(
    moment: Float[Array, "a b"], unit: Float[Array, ""], role: str
) -> Float[Array, "a b"]:
    """Returns a moment as it would be of gradients that were divided by the unit."""
    inverse = 1 / unit
    for _ in range(_DEGREES[role]):  # the square of the unit could over- or underflow
        moment = moment * inverse
    return moment
