"""Draws the random entries of bases, by a hash that is a handful of instructions in the program.

``jax.random`` is a cipher, Threefry: some hundred instructions wherever it is called. Each leaf
has a part of the program to itself, so that these would be most of what compiling an update takes;
and bases that are made again on every step need their numbers soon.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from galore_optax._types import DType


def key_of(seed: int | Int[Array, ""]) -> Key[Array, ""]:
    """Makes a key of a seed, the same one whatever ``jax_default_prng_impl`` says.

    Bases that are made again on every step must not become other ones where a run goes on under
    another setting.

    Args:
      seed: the seed, (), int.
    """
    return jax.random.key(seed, impl="threefry2x32")


def fold_in(key: Key[Array, ""], data: Int[Array, ""]) -> Key[Array, ""]:
    """Makes another key of a key and a number, as ``jax.random.fold_in`` does, by an addition.

    The new keys of neighbouring numbers are neighbours, which the hash below scatters.

    Args:
      key: the key of a matrix.
      data: the number, (), int.
    """
    words = jax.random.key_data(key)
    return jax.random.wrap_key_data(words + data.astype(words.dtype), impl=jax.random.key_impl(key))


def uniform(key: Key[Array, ""], shape: tuple[int, int], dtype: DType) -> Float[Array, "m n"]:
    """Returns independent entries, uniform in the open interval (-1, 1), never zero.

    Each is a hash of its place and the words of the key.

    Args:
      key: a key of any implementation.
      shape: the shape of the entries, (m, n), fewer than 2^32 of them.
      dtype: the dtype of the entries, float32 or float64, both to 23 bits.

    References:
      Wellons, `hash-prospector <https://github.com/skeeto/hash-prospector>`_, 2018: the
      integer hash with multipliers 7feb352d and 846ca68b.
    """
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    bits = row * jnp.uint32(shape[1]) + column
    for word in jax.random.key_data(key):
        bits ^= word
        bits = (bits ^ bits >> 16) * jnp.uint32(0x7FEB352D)
        bits = (bits ^ bits >> 15) * jnp.uint32(0x846CA68B)
        bits ^= bits >> 16
    return ((bits >> 9).astype(dtype) + 0.5) / 2**22 - 1
