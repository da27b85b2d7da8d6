"""Says what happens to the moments of a matrix when its subspace is chosen again.

A rule is a small frozen object like `Keep`. It gets the moments of one matrix and how the basis
turned, inside of the conditional in which the subspace is chosen, so that nothing is moved on other
steps. The table `TRANSPORTS` names the rules.
"""

import dataclasses
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float

from galore_optax._refresh import Clock
from galore_optax._storage import Stored

Moments: TypeAlias = dict[str, list[Float[Array, "a b"]]]
"""The moments of one matrix by their role (`_ownership.Role`), each of the shape of R."""

Held: TypeAlias = dict[str, list[Stored]]
"""The same moments as the state holds them, those of one matrix or of a stack of matrices."""


class Turned(NamedTuple):
    """How the bases of a matrix turned: C = P_new^T P_old of each side that is projected."""

    left: Float[Array, "r r"] | None
    right: Float[Array, "r r"] | None


@runtime_checkable
class Transport(Protocol):
    """What every rule of transport can do; `Keep` says what each member means."""

    @property
    def moves(self) -> tuple[str, ...]: ...
    def move(
        self, moments: Moments, turned: Turned, clock: Clock, first: Bool[Array, ""]
    ) -> Moments: ...


@dataclasses.dataclass(frozen=True)
class Keep:
    """Leaves the moments as they are, as published: their coordinates are taken for new ones.

    Attributes:
      moves: the roles of the moments that the rule wants to see; others stay as they are, and are
        not handed to it.
    """

    moves: tuple[str, ...] = ()

    def move(
        self, moments: Moments, turned: Turned, clock: Clock, first: Bool[Array, ""]
    ) -> Moments:
        """Returns the moments in the new subspace.

        Args:
          moments: the moments of the roles in ``moves``, in float32 or wider.
          turned: how the bases turned, C = P_new^T P_old of each side.
          clock: the time of this refresh.
          first: whether no gradient chose the old basis.
        """
        del turned, clock, first
        return moments


TRANSPORTS: dict[str, Transport] = {"keep": Keep()}
