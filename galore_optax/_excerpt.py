"""Says what galore and low_bit must know where they get a part of the parameters at a time."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from galore_optax._view import LeafView, MatrixView


class Ordinal(NamedTuple):
    """Where the matrices of a leaf stand among all matrices that one galore projects."""

    first: int | Int[Array, ""]  # how many matrices stand before those of the leaf.
    total: int  # how many matrices there are.


Ordinals: TypeAlias = tuple[tuple[str, Ordinal], ...]
"""The paths of all leaves that are projected, each with where its matrices stand."""


Ranks: TypeAlias = tuple[tuple[str, int], ...]
"""The paths of all leaves that are projected, each with its rank."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Excerpt:
    """An excerpt of the parameters, such as one layer, and where it belongs.

    `galore_optax.layerwise` hands one to every ``update``, as the extra argument ``excerpt`` that
    Optax's wrappers pass on. Its arrays are arguments like any other, so that an ``update`` may be
    compiled by itself; all else is static, and part of what a compiled function is found by.

    Attributes:
      layer: the index of the layer whose leaves these are, each with a leading axis of size 1, or
        None where the leaves are whole.
      turn: an integer that no other layer has, and no leaf that is in no layer.
      layers: how many layers there are.
      ordinals: where the matrices of all leaves stand, also of those that are not in the excerpt.
      micro_batches: how many gradients make one step; a galore that accumulates must agree.
      complete: whether the gradient is the mean of all of them already.
      ranks: the ranks of all leaves, also of those that are not in the excerpt: where ranks go by
        role they depend on all of these, as does what is taken for a stack of vectors. None where
        they are not known, and the excerpt is seen by itself.
    """

    layer: Int[Array, ""] | None
    turn: Int[Array, ""] | int
    layers: int = dataclasses.field(metadata={"static": True})
    ordinals: Ordinals = dataclasses.field(metadata={"static": True})
    micro_batches: int = dataclasses.field(metadata={"static": True})
    complete: bool = dataclasses.field(metadata={"static": True})
    ranks: Ranks | None = dataclasses.field(default=None, metadata={"static": True})

    def ordinal(self, path: str, count: int) -> Ordinal:
        """Returns where the matrices of a leaf of the excerpt stand, ``count`` of them here."""
        first, total = dict(self.ordinals)[path]
        return Ordinal(first if self.layer is None else first + self.layer * count, total)

    def acknowledge(self, number: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the number as it is, but computed from the excerpt too.

        So what galore and low_bit keep in their states depends on the excerpt, by which layerwise
        sees that no wrapper around them has lost it.
        """
        return number + 0 * jnp.asarray(self.turn, number.dtype)


def ordinals(views: Sequence[LeafView]) -> Ordinals:
    """Returns where the matrices of each projected leaf stand among all matrices."""
    projected = [view for view in views if isinstance(view, MatrixView)]
    counts = [view.count for view in projected]
    firsts = itertools.accumulate(counts, initial=0)
    total = sum(counts)
    return tuple(
        (v.path, Ordinal(first, total)) for v, first in zip(projected, firsts, strict=False)
    )


def ranks(views: Sequence[LeafView]) -> Ranks:
    """Returns the rank of each projected leaf."""
    return tuple((view.path, view.rank) for view in views if isinstance(view, MatrixView))
