"""Says what happens to the part of the gradient that lies outside of the subspace.

A residual is a small frozen object like `Discard`. It makes the update of one matrix of what the
inner transformation makes of its low-rank gradient, and may use the gradient itself, and a state of
its own for each matrix. The table `RESIDUALS` names them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, PyTree

from galore_optax._subspace import ABSENT
from galore_optax._types import DType, Scalar

Up: TypeAlias = Callable[[Float[Array, "a b"]], Float[Array, "m n"]]
"""Takes something of the shape of R back to the shape of the matrix: P R, R Q^T, or P R Q^T."""


class Projected(NamedTuple):
    """The gradient of one matrix in the subspace, and what became of it there."""

    psi: Float[Array, "a b"]  # what the inner transformation makes of R.
    low_rank: Float[Array, "a b"] | None  # R, where the residual uses the gradient.
    gradient: Float[Array, "m n"] | None  # G, likewise.


@runtime_checkable
class Residual(Protocol):
    """What every residual can do; `Discard` says what each member means."""

    @property
    def uses_gradient(self) -> bool: ...
    def initial(self, m: int, n: int, dtype: DType) -> PyTree: ...
    def update(
        self, projected: Projected, up: Up, scale: Scalar, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]: ...


@dataclasses.dataclass(frozen=True)
class Discard:
    """Leaves out what lies outside of the subspace, as published.

    Attributes:
      uses_gradient: whether the residual is to see R and G; where it is not, these need not be
        kept until the inner transformation is done.
    """

    uses_gradient: bool = False

    def initial(self, m: int, n: int, dtype: DType) -> PyTree:
        """Returns the first state of an (m, n) matrix: arrays, or nothing.

        Args:
          m: the number of rows of the matrix.
          n: the number of its columns.
          dtype: the dtype of the moments.
        """
        del m, n, dtype
        return ABSENT

    def update(
        self, projected: Projected, up: Up, scale: Scalar, state: PyTree
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """Returns the update of a matrix, and the next state.

        Args:
          projected: the gradient in the subspace, and what became of it.
          up: takes something of the shape of R back to the shape of the matrix.
          scale: alpha, the factor of the whole update.
          state: the state that the residual keeps of the matrix.
        """
        return up(scale * projected.psi), state


RESIDUALS: dict[str, Residual] = {"discard": Discard()}
