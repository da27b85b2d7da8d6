"""What galore must know where it is given a part of the parameters at a time, such as one layer."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax


class Turn(NamedTuple):
    """The place of a leaf's matrices among all matrices of the tree."""

    first: int | jax.Array  # how many matrices come before the leaf's
    total: int  # how many there are


class Layer(NamedTuple):
    """The layer that leaves with a leading axis of size 1 are cut out of a stack for."""

    index: jax.Array  # (), int32
    count: int  # of layers


@dataclasses.dataclass(frozen=True)
class Part:
    """The leaves of one call of ``update`` as a part of all.

    Attributes:
      turns: by path, of all matrices of the whole tree.
      layer: which layer the leaves are of, or None where they are whole.
      turn: (), int32, another one for each layer, and for each leaf that is in none.
      micro_batches: gradients that make a step, which a galore that accumulates must agree with.
      complete: whether this gradient is the mean of all of them.
    """

    turns: Mapping[str, Turn]
    layer: Layer | None
    turn: jax.Array | int
    micro_batches: int
    complete: bool

    def turn_of(self, path: str, count: int) -> Turn:
        """The place of the matrices of a leaf of this part, which has so many here."""
        first, total = self.turns[path]
        return Turn(first if self.layer is None else first + self.layer.index * count, total)


_PART: contextvars.ContextVar[Part | None] = contextvars.ContextVar("galore_part", default=None)


@contextlib.contextmanager
def updating(part: Part) -> Iterator[None]:
    """Tells every galore ``update`` that is traced in this context what it is given."""
    token = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(token)


def current_part() -> Part | None:
    """What :func:`updating` was given, where it is running."""
    return _PART.get()
