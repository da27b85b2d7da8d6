"""Directions that are given beforehand, of which a basis selects some by their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# So that four times the rows, an odd number up to twice the rows, and a factor of 2 fit into int32.
_MOST_ROWS = 2**27


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UnitVectors:
    """An (m, r) basis of unit vectors, or a batch of them: products with it only move rows.

    Attributes:
      numbers: (*batch, r), int32, all different: the row of each column's one.
      size: m.
      dtype: of the basis.
    """

    numbers: jax.Array
    size: int = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    def select(self, matrices: jax.Array, axis: int) -> jax.Array:
        """The selected rows or columns.

        Args:
          matrices: (*batch, m, n), or (*batch, n, m).
          axis: of the m, -2 or -1.

        Returns:
          (*batch, r, n), or (*batch, n, r).
        """
        return jnp.take_along_axis(
            matrices, _along(self.numbers, axis), axis, mode="promise_in_bounds"
        )

    def place(self, selected: jax.Array, axis: int) -> jax.Array:
        """The adjoint of :meth:`select`: puts them in their places, and zeros elsewhere."""

        def invert(numbers: jax.Array) -> jax.Array:
            """For each of the m the column that selects it, r where none does."""
            rank = numbers.shape[0]
            columns = jnp.full(self.size, rank, numbers.dtype)
            return columns.at[numbers].set(jnp.arange(rank, dtype=numbers.dtype))

        for _ in self.numbers.shape[:-1]:
            invert = jax.vmap(invert)
        # What is read, rather than what is written, is looked up: that is fused with what the
        # update is added to.
        columns = _along(invert(self.numbers), axis)
        return jnp.take_along_axis(selected, columns, axis, mode="fill", fill_value=0)


def cosines(numbers: jax.Array, size: int, dtype: Any) -> jax.Array:
    """Columns of the (size, size) orthonormal DCT-II matrix, (size, r), by their numbers, (r,)."""
    # From a table of one period, which is many times faster than cosines. The place in it, odd
    # times number, is reduced as integers: some bits of the numbers at a time, for which int32 has
    # room.
    if size >= _MOST_ROWS:
        raise ValueError(f"cosines are of fewer than {_MOST_ROWS:,} rows; got {size:,}")
    odd, period = 2 * jnp.arange(size)[:, None] + 1, 4 * size
    width = 31 - (6 * size).bit_length()
    place = jnp.zeros((size, 1), jnp.int32)
    for shift in reversed(range(0, size.bit_length(), width)):
        digits = (numbers >> shift) & (2**width - 1)
        place = ((place << width) + odd * digits) % period
    wave = jnp.cos(jnp.pi / (2 * size) * jnp.arange(period)).astype(dtype)
    scale = jnp.where(numbers == 0, 1.0, 2**0.5) / size**0.5
    return scale.astype(dtype) * wave[place]


def choose(weights: jax.Array, rank: int, old: jax.Array, first: jax.Array) -> jax.Array:
    """The numbers of the largest weights; one that stays chosen keeps its place.

    Args:
      weights: (m,).
      rank: r <= m.
      old: (r,), int32, the numbers that were chosen before.
      first: (), bool, whether ``old`` means nothing.

    Returns:
      (r,), int32.
    """
    _, best = jax.lax.top_k(weights, rank)
    chosen = jnp.zeros(weights.shape, bool).at[best].set(True)
    stays = chosen[old] & ~first
    arrives = chosen & ~jnp.zeros(weights.shape, bool).at[old].max(stays)
    arrivals = jnp.nonzero(arrives, size=rank, fill_value=0)[0]
    return jnp.where(stays, old, arrivals[jnp.cumsum(~stays) - 1]).astype(jnp.int32)


def _along(numbers: jax.Array, axis: int) -> jax.Array:
    return jnp.expand_dims(numbers, -1 if axis == -2 else -2)
