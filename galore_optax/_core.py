"""What happens to the gradient of one matrix, on its way down into the subspace and up again.

Here the five nouns meet: the projector chooses a basis when the refresh is due, the storage holds
it, the transport moves the moments along, and the residual makes the update of what the inner
transformation returns. All arrays are those of one (m, n) matrix. Stacks of matrices, trees,
layers and meshes are the business of `_leaf.py` and `_update.py`, which call what is here.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from galore_optax._basis import Basis, Side
from galore_optax._random import fold_in
from galore_optax._refresh import Clock, Refresh
from galore_optax._residual import Projected, Residual
from galore_optax._storage import Storage, Stored
from galore_optax._subspace import ABSENT, Subspace, is_absent
from galore_optax._transport import Held, Moments, Transport, Turned
from galore_optax._types import DType, Scalar
from galore_optax._view import MatrixView, moment_dtype, ranging_dtype, wide
from galore_optax.projectors import Projector

# With which power of the gradients the moments of each role grow. It says by what to divide them
# where the gradient is divided by its unit.
_DEGREES: Mapping[str, int] = {"first": 1, "second": 2, "curvature": 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Holds one answer to each of the five questions, for all matrices alike.

    Attributes:
      projector: the rule that chooses the directions.
      refresh: the rule that says when they are chosen again.
      transport: the rule that says what happens to the moments then.
      residual: the rule that says what happens to the gradient outside of the subspace.
      storage: the form, and so the number of bits, in which bases are held between steps.
      diagnostics: whether the state holds what `galore_optax.metrics` reports.
    """

    projector: Projector
    refresh: Refresh
    transport: Transport
    residual: Residual
    storage: Storage
    diagnostics: bool

    def __post_init__(self):
        if self.refresh.watches and not self.projector.basis.stands_still():
            raise ValueError(
                'refresh="lazy" is for subspaces that can stand still; those of the projector '
                f'{self.projector.name} are random ones. Use refresh="periodic" with it.'
            )

    @property
    def sees(self) -> tuple[str, ...]:
        """The roles of the moments that the projector or the transport wants to see."""
        of_projector = ("first", "second") if "moments" in self.projector.needs else ()
        return tuple(dict.fromkeys((*of_projector, *self.transport.moves)))


class Bases(NamedTuple):
    """The bases of a matrix, ready for products; None on a side that is not projected."""

    left: Basis | None
    right: Basis | None


class Matrix(NamedTuple):
    """What is known of a matrix from its shape and dtype alone, and so is static under jit."""

    sides: tuple[Side | None, Side | None]  # the left and the right side; None if not projected.
    m: int  # the number of rows.
    n: int  # the number of columns.
    dtype: DType  # the dtype of factorizations and moments.


def matrix_of(view: MatrixView) -> Matrix:
    """Returns what is known of each matrix of a leaf."""
    dtype = moment_dtype(view.dtype)
    left, right = Side(0, view.m, view.rank, dtype), Side(1, view.n, view.rank, dtype)
    return Matrix(
        (left if view.left else None, right if view.right else None), view.m, view.n, dtype
    )


def initial(matrix: Matrix, method: Method) -> Subspace:
    """Returns an orthonormal subspace that no gradient chose, and that is due at step 0."""
    left, right = (
        ABSENT if side is None else method.projector.basis.initial(side).keep(method.storage)
        for side in matrix.sides
    )
    energy, overlap = (
        jnp.zeros([], jnp.float32) if method.diagnostics else ABSENT for _ in range(2)
    )
    residual = method.residual.initial(matrix.m, matrix.n, matrix.dtype)
    counters = method.refresh.initial()
    return counters._replace(
        left=left, right=right, energy=energy, overlap=overlap, residual=residual
    )


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


def load(
    subspace: Subspace, keys: Key[Array, "2"] | None, *, matrix: Matrix, method: Method
) -> Bases:
    """Makes the bases of a matrix ready for products, from what the state holds of them."""
    pairs = zip(matrix.sides, (subspace.left, subspace.right), strict=True)
    return Bases(
        *(
            None if side is None else _load(stored, subspace.refreshes, keys, side, method)
            for side, stored in pairs
        )
    )


def down(gradient: Float[Array, "m n"], bases: Bases, *, matrix: Matrix) -> Float[Array, "a b"]:
    """Returns the low-rank gradient R = P^T G Q.

    Args:
      gradient: the gradient G of the matrix.
      bases: the bases of the matrix, from :func:`load`.
      matrix: what is static about the matrix.

    Returns:
      R, (r or m, r or n), in at least float32. The operands of each product are in the dtype of
      the gradient, which is what makes bfloat16 gradients fast; sums are in float32.
    """
    low_rank = gradient
    for side, basis in zip(matrix.sides, bases, strict=True):
        if side is not None and basis is not None:
            low_rank = basis.down(low_rank, side, gradient.dtype)
    return low_rank.astype(moment_dtype(gradient.dtype))


def up(
    projected: Projected,
    bases: Bases,
    state: PyTree,
    scale: Scalar,
    *,
    matrix: Matrix,
    method: Method,
    dtype: DType,
) -> tuple[Float[Array, "m n"], PyTree]:
    """Returns the update of a matrix, without weight decay, and the next state of the residual.

    Args:
      projected: the gradient in the subspace, and what the inner transformation makes of it.
      bases: the bases of the matrix, from :func:`load`.
      state: the state that the residual keeps of the matrix.
      scale: alpha, the factor of the whole update.
      matrix: what is static about the matrix.
      method: the answers to the five questions.
      dtype: the dtype of the operands of products; float16 is replaced by float32.
    """
    back = functools.partial(project_back, bases=bases, matrix=matrix, dtype=dtype)
    return method.residual.update(projected, back, scale, state)


def project_back(
    low_rank: Float[Array, "a b"], bases: Bases, matrix: Matrix, dtype: DType
) -> Float[Array, "m n"]:
    """Returns P u Q^T, the adjoint of :func:`down`, in at least float32."""
    for side, basis in zip(matrix.sides, bases, strict=True):
        if side is not None and basis is not None:
            low_rank = basis.up(low_rank, side, ranging_dtype(dtype))
    return low_rank


def captured_energy(
    gradient: Float[Array, "m n"], low_rank: Float[Array, "a b"]
) -> Float[Array, ""]:
    """Returns |R|^2 / |G|^2, in float32; 0 where G is zero."""
    gradient = gradient.astype(low_rank.dtype)
    # Squares of very large or small entries would over- or underflow.
    peak = jnp.max(jnp.abs(gradient))
    peak = jnp.where(peak == 0, 1, peak)
    kept, all_of_it = (jnp.sum((x / peak) ** 2) for x in (low_rank, gradient))
    return (kept / jnp.where(all_of_it == 0, 1, all_of_it)).astype(jnp.float32)


def _unit(gradient: Float[Array, "m n"], peak: Float[Array, ""]) -> Float[Array, ""]:
    """Returns a power of two about as large as the largest entry of a gradient.

    The gradient is divided by it, since products of entries could over- or underflow. Division by
    a power of two is exact.
    """
    dtype = moment_dtype(gradient.dtype)
    limits = jnp.finfo(dtype)
    power = jax.lax.reduce_precision(peak.astype(dtype) / 2, limits.nexp, 0)
    return jnp.maximum(power, limits.tiny)


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
    turns = Turned(left and left[1], right and right[1])
    moved = {role: in_old[role] for role in method.transport.moves if role in in_old}
    in_new = method.transport.move(moved, turns, clock, first) if moved else {}
    if jax.tree.map(jnp.shape, in_new) != jax.tree.map(jnp.shape, moved):
        raise ValueError(
            "a transport must return as many moments as it gets, of the same roles and shapes, "
            f"{jax.tree.map(jnp.shape, moved)}; got {jax.tree.map(jnp.shape, in_new)}"
        )
    held = moments | {role: list(map(_held_like, moments[role], in_new[role])) for role in moved}
    return _if_sound((new, held), (old, moments))


def _choose_side(
    gradient: Float[Array, "m n"],
    stored: Stored,
    side: Side,
    *,
    refreshes: Int[Array, ""],
    moments: Moments,
    keys: Key[Array, "2"] | None,
    method: Method,
) -> tuple[Stored, Float[Array, "r r"]]:
    """Returns the basis that a gradient chooses, as the state holds it, and C = P_new^T P_old."""
    old = _load(stored, refreshes, keys, side, method)
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
    )
    new = method.projector.basis.chosen(choice, old, side, first)
    return new.keep(method.storage), new.turned(old, side)


def _load(
    stored: Stored,
    refreshes: Int[Array, ""],
    keys: Key[Array, "2"] | None,
    side: Side,
    method: Method,
) -> Basis:
    """Returns the basis of one side, as the last of ``refreshes`` refreshes left it."""

    def again() -> Array:
        like = jax.ShapeDtypeStruct((side.size, side.rank), side.dtype)
        key = None if keys is None else fold_in(keys[side.axis], refreshes)
        return method.projector(like, side.rank, key=key)

    return method.projector.basis.load(stored, side, method.storage, again)


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
