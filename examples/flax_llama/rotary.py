"""Rotary position embedding (arXiv:2104.09864), plain and stretched to longer sequences.

Sizes in the suffixes of names: N kinds of layers, S sequence, H heads, K size of a head, K2 half.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.flax_llama.architecture import Kind, Rope


class Rotation(NamedTuple):
    """The angles of S positions, float32; those of several kinds of layers have an axis before."""

    cos_Sx1xK2: jax.Array
    sin_Sx1xK2: jax.Array


def frequencies(rope: Rope, head_size: int, length: jax.Array) -> jax.Array:
    """By what angle each pair of entries of a head turns from a position to the next, (K/2,).

    Args:
      rope: which embedding.
      head_size: K.
      length: of the sequence so far, which "dynamic" alone depends on.
    """
    exponent_K2 = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    theta, context = rope.theta, rope.context or 1
    if rope.kind == "dynamic":
        longer = jnp.maximum(length, context) / context
        theta *= (rope.factor * longer - (rope.factor - 1)) ** (head_size / (head_size - 2))
    frequency_K2 = theta ** (-exponent_K2)
    if rope.kind in ("plain", "dynamic"):
        return frequency_K2
    # How much of the stretched frequency each pair has, and how much of its own.
    if rope.kind == "linear":
        share_K2 = jnp.ones_like(frequency_K2)
    elif rope.kind == "llama3":
        turns_K2 = context * frequency_K2 / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        share_K2 = jnp.clip((rope.high_freq_factor - turns_K2) / span, 0, 1)
    else:
        share_K2 = yarn_ramp(rope, head_size)
    return frequency_K2 * (1 - share_K2) + frequency_K2 / rope.factor * share_K2


def yarn_ramp(rope: Rope, head_size: int) -> jax.Array:
    """0 for the pairs that turn `beta_fast` times in the context, 1 for those of `beta_slow`."""
    context = rope.context or 1

    def pair(turns: float) -> float:
        """Which pair turns that often, as a fraction of the head's size."""
        longest = math.log(context / (2 * math.pi * turns))
        return head_size * longest / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001
    return jnp.clip((jnp.arange(head_size // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)


def rotation(position_S: jax.Array, head_size: int, rope: Rope | None) -> Rotation:
    """Angles of the positions, computed once for the queries and keys of all layers of a kind."""
    if rope is None:
        shape = (*position_S.shape, 1, head_size // 2)
        return Rotation(jnp.ones(shape), jnp.zeros(shape))
    frequency_K2 = frequencies(rope, head_size, position_S[-1] + 1)
    angle_Sx1xK2 = position_S.astype(jnp.float32)[:, None, None] * frequency_K2
    angles = Rotation(jnp.cos(angle_Sx1xK2), jnp.sin(angle_Sx1xK2))
    if rope.attention_factor == 1:
        return angles
    return jax.tree.map(lambda x: x * rope.attention_factor, angles)


def rotations(position_S: jax.Array, head_size: int, kinds: Sequence[Kind]) -> Rotation:
    """The angles for each kind of layers, stacked."""
    each = [rotation(position_S, head_size, kind.rope) for kind in kinds]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def rope(x_BxSxHxK: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates the pairs of entry i of a head and entry i + K/2, as in Hugging Face's LLaMA."""
    cos, sin = angles
    a, b = jnp.split(x_BxSxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BxSxHxK.dtype)
