"""Says what happens to the moments of a matrix when its subspace is chosen again.

A rule is a small frozen object like `Keep`. It gets the moments of one matrix and how the basis
turned, inside of the conditional in which the subspace is chosen, so that nothing is moved on other
steps. The other rules are in `_transports.py`.
"""

import dataclasses
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from galore_optax._adam import Betas, Findings
from galore_optax._refresh import Clock
from galore_optax._storage import Stored
from galore_optax._subspace import ABSENT
from galore_optax._types import Step

Moments: TypeAlias = dict[str, list[Float[Array, "a b"]]]
"""The moments of one matrix by their role (`_ownership.Role`), each of the shape of R."""

Held: TypeAlias = dict[str, list[Stored]]
"""The same moments as the state holds them, those of one matrix or of a stack of matrices."""


class Turn(NamedTuple):
    """A refresh of one matrix: how its bases turned, and when."""

    left: Float[Array, "r r"] | None  # C = P_new^T P_old of the left side, if that is projected.
    right: Float[Array, "r r"] | None  # the same of the right side.
    clock: Clock  # the time of this refresh.
    first: Bool[Array, ""]  # whether no gradient chose the old bases.

    def take(self, low_rank: Float[Array, "a b"]) -> Float[Array, "a b"]:
        """Returns coordinates in the new bases of what has these coordinates in the old ones."""
        for axis, turn in enumerate((self.left, self.right)):
            if turn is not None:
                matrix = low_rank if axis == 0 else low_rank.T
                # Without this precision GPUs and TPUs would round the operands.
                turned = jnp.matmul(turn, matrix, precision=jax.lax.Precision.HIGHEST)
                low_rank = turned if axis == 0 else turned.T
        return low_rank

    def squared(self) -> "Turn":
        """Returns the same with the square of every entry of C."""
        left, right = (None if turn is None else turn**2 for turn in (self.left, self.right))
        return self._replace(left=left, right=right)


@runtime_checkable
class Transport(Protocol):
    """What every rule of transport can do; `Keep` says what each member means."""

    @property
    def moves(self) -> tuple[str, ...]: ...
    @property
    def needs_orthonormal(self) -> bool: ...
    @property
    def asks(self) -> str | None: ...
    def with_betas(self, betas: Betas) -> "Transport": ...
    def initial(self) -> PyTree: ...
    def check(self, found: Findings) -> None: ...
    def move(self, moments: Moments, state: PyTree, turn: Turn) -> tuple[Moments, PyTree]: ...
    def count(self, state: PyTree, step: Step) -> Step: ...
    def correct(
        self, psi: Float[Array, "a b"], state: PyTree, step: Step
    ) -> Float[Array, "a b"]: ...


@dataclasses.dataclass(frozen=True)
class Keep:
    """Leaves the moments as they are, as published: their coordinates are taken for new ones."""

    @property
    def moves(self) -> tuple[str, ...]:
        """The roles of the moments that the rule moves; it is not handed others."""
        return ()

    @property
    def needs_orthonormal(self) -> bool:
        """Whether the rule is only for bases of orthonormal vectors."""
        return False

    @property
    def asks(self) -> str | None:
        """What to give instead, where the rule must still be told the decay rates of moments."""
        return None

    def with_betas(self, betas: Betas) -> "Keep":
        """Returns the rule for an inner transformation with these decay rates of moments.

        Those that the user gave stay.
        """
        del betas
        return self

    def initial(self) -> PyTree:
        """Returns the first state that the rule keeps of a matrix: arrays, or nothing."""
        return ABSENT

    def check(self, found: Findings) -> None:
        """Raises a CombinationError where the rule cannot go with the inner transformation.

        Args:
          found: what was found out about it.
        """
        del found

    def move(self, moments: Moments, state: PyTree, turn: Turn) -> tuple[Moments, PyTree]:
        """Returns the moments in the new subspace, and the next state.

        Args:
          moments: the moments of the roles in ``moves``, in float32 or wider.
          state: the state that the rule keeps of the matrix.
          turn: how the bases turned, and when.
        """
        del turn
        return moments, state

    def count(self, state: PyTree, step: Step) -> Step:
        """Returns how many steps the moments are made of, this one included.

        Args:
          state: the state that the rule keeps of the matrix.
          step: the number of updates done before this one.
        """
        del state
        return step + 1

    def correct(self, psi: Float[Array, "a b"], state: PyTree, step: Step) -> Float[Array, "a b"]:
        """Returns what the inner transformation would have returned had it known of the rule.

        Args:
          psi: what the inner transformation makes of R.
          state: the state that the rule keeps of the matrix.
          step: the number of updates done before this one.
        """
        del state, step
        return psi
