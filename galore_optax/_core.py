"""What happens to the gradient of one matrix, on its way down into the subspace and up again.

Here the five nouns meet: the projector chooses a basis when the refresh is due, the storage holds
it, the transport moves the moments along, and the residual makes the update of what the inner
transformation returns. What runs when a refresh is due is in `_choose.py`. All arrays are those of
one (m, n) matrix. Stacks of matrices, trees, layers and meshes are the business of `_leaf.py` and
`_update.py`, which call what is here.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from galore_optax._adam import Betas
from galore_optax._basis import Basis, Dense, Regenerated, Side
from galore_optax._errors import CombinationError
from galore_optax._projector import Projector
from galore_optax._random import fold_in
from galore_optax._refresh import Refresh
from galore_optax._residual import Discard, Projected, Residual, Way
from galore_optax._storage import Storage, Stored
from galore_optax._subspace import ABSENT, Subspace
from galore_optax._transport import Transport
from galore_optax._types import DType, Scalar, Step
from galore_optax._view import MatrixView, moment_dtype, ranging_dtype, unit_of


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
        if self.refresh.watches and not self.projector.stands_still:
            raise CombinationError(
                'refresh="lazy" is for subspaces that can stand still; those of the projector '
                f"{self.projector.name} are random ones",
                'Use refresh="periodic" with it.',
            )
        if self.transport.needs_orthonormal and not self.projector.orthonormal:
            raise CombinationError(
                f"transport={type(self.transport).__name__} is for bases of orthonormal vectors; "
                f"those of the projector {self.projector.name} are not",
                'Use transport="project" or another projector.',
            )

    def with_betas(self, betas: Betas | None) -> "Method":
        """Returns the method for an inner transformation with these decay rates of moments."""
        if betas is None:
            return self
        return dataclasses.replace(self, residual=self.residual.with_betas(betas))

    @property
    def sees(self) -> tuple[str, ...]:
        """The roles of the moments that the projector or the transport wants to see."""
        of_projector = ("first", "second") if "moments" in self.projector.needs else ()
        of_residual = ("first",) if self.residual.absorbs else ()
        return tuple(dict.fromkeys((*of_projector, *of_residual, *self.transport.moves)))

    def made_with(self, seed: int | Array) -> PyTree:
        """Returns what decides the meaning of a state and does not show in its arrays, as keys.

        The same numbers may be those of rows or of cosines. Of a random basis that is made again
        there is nothing at all, and it goes by the projector and the seed. The limiters of two
        residuals remember the norms of different things.

        Args:
          seed: that of the random numbers; one that is an array is not known.

        Returns:
          A dict without arrays, or `ABSENT` where there is nothing to say.
        """
        said, basis = {}, self.projector.basis
        if issubclass(basis, Regenerated):
            said["projector"] = self.projector.name
            if not isinstance(seed, jax.Array):
                said["seed"] = str(seed)
        elif basis is not Dense:
            said["basis"] = basis.__name__
        if jax.tree.leaves(jax.eval_shape(lambda: self.residual.initial(1, 1, jnp.float32))):
            said["residual"] = type(self.residual).__name__
        return {f"{name}={value}": ABSENT for name, value in said.items()} or ABSENT


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
    return method.refresh.initial()._replace(
        left=left,
        right=right,
        energy=energy,
        overlap=overlap,
        residual=method.residual.initial(matrix.m, matrix.n, matrix.dtype),
        transport=method.transport.initial(),
    )


def load(
    subspace: Subspace, keys: Key[Array, "2"] | None, *, matrix: Matrix, method: Method
) -> Bases:
    """Makes the bases of a matrix ready for products, from what the state holds of them."""
    pairs = zip(matrix.sides, (subspace.left, subspace.right), strict=True)
    return Bases(
        *(
            None if side is None else load_side(stored, subspace.refreshes, keys, side, method)
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
    kept: Subspace,
    scale: Scalar,
    step: Step,
    *,
    matrix: Matrix,
    method: Method,
    dtype: DType,
    rounded: DType | None = None,
) -> tuple[Float[Array, "m n"], PyTree]:
    """Returns the update of a matrix, without weight decay, and the next state of the residual.

    Args:
      projected: the gradient in the subspace, and what the inner transformation makes of it.
      bases: the bases of the matrix, from :func:`load`.
      kept: what the residual and the transport keep of the matrix, all else being absent.
      scale: alpha, the factor of the whole update.
      step: the number of updates done before this one.
      matrix: what is static about the matrix.
      method: the answers to the five questions.
      dtype: the dtype of the operands of products; float16 is replaced by float32.
      rounded: the dtype to which the caller rounds the update as it is; None where it adds
        something first.
    """
    psi = method.transport.correct(projected.psi, kept.transport, step)
    if type(method.residual) is not Discard:  # which adds something to what comes back.
        rounded = None
    back = functools.partial(project_back, bases=bases, matrix=matrix, dtype=dtype, rounded=rounded)

    def squares(low_rank: Float[Array, "a b"]) -> Float[Array, " k"]:
        [(side, basis)] = [(s, b) for s, b in zip(matrix.sides, bases, strict=True) if s and b]
        return basis.squares(low_rank, side)

    axes = [side.axis for side in matrix.sides if side is not None]
    count = method.transport.count(kept.transport, step)
    alpha = jnp.asarray(scale, psi.dtype)
    way = Way(back, squares, axes[0] if len(axes) == 1 else None, alpha, count)
    return method.residual.update(projected._replace(psi=psi), way, kept.residual)


def project_back(
    low_rank: Float[Array, "a b"],
    bases: Bases,
    matrix: Matrix,
    dtype: DType,
    rounded: DType | None = None,
) -> Float[Array, "m n"]:
    """Returns P u Q^T, the adjoint of :func:`down`, in at least float32.

    With bases that only move numbers it is in the dtype ``rounded``, if that is given: the numbers
    are rounded before they are moved, when there are fewer of them.
    """
    for side, basis in zip(matrix.sides, bases, strict=True):
        if side is not None and basis is not None:
            if rounded is not None and basis.moves():
                low_rank = low_rank.astype(rounded)
            low_rank = basis.up(low_rank, side, ranging_dtype(dtype))
    return low_rank


def captured_energy(
    gradient: Float[Array, "m n"], low_rank: Float[Array, "a b"]
) -> Float[Array, ""]:
    """Returns |R|^2 / |G|^2, in float32; 0 where G is zero."""
    gradient = gradient.astype(low_rank.dtype)
    # Squares of very large or small entries would over- or underflow.
    unit = unit_of(gradient)
    kept, all_of_it = (jnp.sum((x / unit) ** 2) for x in (low_rank, gradient))
    return (kept / jnp.where(all_of_it == 0, 1, all_of_it)).astype(jnp.float32)


def load_side(
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
