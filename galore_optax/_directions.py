"""Makes directions that are given beforehand, and selects some of them by their numbers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from galore_optax._types import DType

# The sum of four times the rows and an odd number up to twice the rows must fit in int32 twice.
_MOST_ROWS = 2**27


def cosines(numbers: Int[Array, " r"], size: int, dtype: DType) -> Float[Array, "size r"]:
    """Returns columns of the (size, size) orthonormal DCT-II matrix by their numbers.

    Raises:
      ValueError: there are so many rows that their numbers are too large for int32.
    """
    # The cosines are looked up in a table of one period, which is many times faster than to compute
    # them. The place in it, odd times number, is reduced as integers: some bits of the numbers at a
    # time, as many as int32 has room for.
    if size >= _MOST_ROWS:
        raise ValueError(f"cosines are of fewer than {_MOST_ROWS:,} rows; got {size:,}")
    odd, period = 2 * jnp.arange(size, dtype=jnp.int32)[:, None] + 1, 4 * size
    width = 31 - (6 * size).bit_length()
    numbers, place = numbers[None], jnp.zeros((size, 1), jnp.int32)
    for shift in reversed(range(0, size.bit_length(), width)):
        digits = (numbers >> shift) & (2**width - 1)
        place = ((place << width) + odd * digits) % period
    wave = jnp.cos(jnp.pi / (2 * size) * jnp.arange(period, dtype=float)).astype(dtype)
    scale = jnp.where(numbers == 0, 1.0, 2**0.5) / size**0.5
    return scale.astype(dtype) * wave[place]


def choose(
    weights: Float[Array, " m"], rank: int, old: Int[Array, " r"], first: Bool[Array, ""]
) -> Int[Array, " r"]:
    """Returns the numbers of the largest weights; one that stays chosen keeps its place.

    Args:
      weights: the weight of each direction, (m,).
      rank: how many to choose, r <= m.
      old: the numbers that were chosen before, (r,), int32.
      first: whether ``old`` means nothing, (), bool.

    Returns:
      The numbers that are chosen, (r,), int32.
    """
    _, best = jax.lax.top_k(weights, rank)
    chosen = jnp.zeros(weights.shape, bool).at[best].set(True)
    stays = chosen[old] & ~first
    arrives = chosen & ~jnp.zeros(weights.shape, bool).at[old].max(stays)
    arrivals = jnp.nonzero(arrives, size=rank, fill_value=0)[0].astype(jnp.int32)
    return jnp.where(stays, old, arrivals[jnp.cumsum(~stays) - 1])
