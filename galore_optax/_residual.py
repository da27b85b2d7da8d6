"""Says what happens to the part of the gradient that lies outside of the subspace.

A residual is a small frozen object like `Discard`. It makes the update of one matrix of what the
inner transformation makes of its low-rank gradient, and may use the gradient itself, and a state of
its own for each matrix. The other residuals are in `_residuals.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, PyTree

from galore_optax._adam import Betas, Findings
from galore_optax._subspace import ABSENT
from galore_optax._types import DType, Scalar, Step

Up: TypeAlias = Callable[[Float[Array, "a b"]], Float[Array, "m n"]]
"""Takes something of the shape of R back to the shape of the matrix: P R, R Q^T, or P R Q^T."""


Squares: TypeAlias = Callable[[Float[Array, "a b"]], Float[Array, " k"]]
"""Returns the squared norms of the columns, or rows, of what `Up` returns, without making that.

It is for matrices with one side projected: the vectors are those along that side."""


class Projected(NamedTuple):
    """The gradient of one matrix in the subspace, and what became of it there."""

    psi: Float[Array, "a b"]  # what the inner transformation makes of R.
    low_rank: Float[Array, "a b"] | None  # R, where the residual uses the gradient.
    gradient: Float[Array, "m n"] | None  # G, likewise.


class Way(NamedTuple):
    """What a residual needs on the way up beside the gradient and its state."""

    up: Up
    squares: Squares
    axis: int | None  # the axis of the matrix that is projected; None where both are.
    scale: Scalar  # alpha, the factor of the whole update.
    count: Step  # how many steps the moments are made of, this one included.


@runtime_checkable
class Residual(Protocol):
    """What every residual can do; `Discard` says what each member means."""

    @property
    def uses_gradient(self) -> bool: ...
    @property
    def absorbs(self) -> bool: ...
    @property
    def scales_only(self) -> bool: ...
    @property
    def asks(self) -> str | None: ...
    @property
    def wants_betas(self) -> bool: ...
    def with_betas(self, betas: Betas) -> "Residual": ...
    @property
    def sides(self) -> int: ...
    def check(self, found: Findings) -> None: ...
    def initial(self, m: int, n: int, dtype: DType) -> PyTree: ...
    def absorb(
        self, gradient: Float[Array, "m n"], state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]: ...
    def turned(self, state: PyTree, lost: Float[Array, "m n"]) -> PyTree: ...
    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]: ...


@dataclasses.dataclass(frozen=True)
class Discard:
    """Leaves out what lies outside of the subspace, as published."""

    @property
    def uses_gradient(self) -> bool:
        """Whether :meth:`update` is to see R and G.

        Where it is not, these need not be kept until the inner transformation is done.
        """
        return False

    @property
    def absorbs(self) -> bool:
        """Whether the state is added to the gradient on the way down, by :meth:`absorb`."""
        return False

    @property
    def scales_only(self) -> bool:
        """Whether the inner transformation may only scale: without learning rate, sign or decay."""
        return False

    @property
    def asks(self) -> str | None:
        """What to give instead, where the residual must be told the decay rates of moments."""
        return None

    @property
    def wants_betas(self) -> bool:
        """Whether they are to be found out by trying the inner transformation."""
        return False

    def with_betas(self, betas: Betas) -> "Discard":
        """Returns the residual for an inner transformation with these decay rates of moments."""
        del betas
        return self

    @property
    def sides(self) -> int:
        """How many sides of a matrix may be projected, at most."""
        return 2

    def check(self, found: Findings) -> None:
        """Raises a CombinationError where it cannot go with the inner transformation.

        Args:
          found: what was found out about it.
        """
        del found

    def initial(self, m: int, n: int, dtype: DType) -> PyTree:
        """Returns the first state of an (m, n) matrix: arrays, or nothing.

        Args:
          m: the number of rows of the matrix.
          n: the number of its columns.
          dtype: the dtype of the moments.
        """
        del m, n, dtype
        return ABSENT

    def absorb(
        self, gradient: Float[Array, "m n"], state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the gradient to go down with, and the state; called where ``absorbs``."""
        return gradient, state

    def turned(self, state: PyTree, lost: Float[Array, "m n"]) -> PyTree:
        """Returns the state after a refresh; called where ``absorbs``.

        Args:
          state: the state of the matrix.
          lost: what the first moment lost, P_old m_old - P_new m_new.
        """
        del lost
        return state

    def update(
        self, projected: Projected, way: Way, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state.

        Args:
          projected: the gradient in the subspace, and what became of it.
          way: how to take something of the shape of R back, which side is projected, the scale,
            and the age of the moments.
          state: the state that the residual keeps of the matrix.
        """
        return way.up(way.scale * projected.psi), state
