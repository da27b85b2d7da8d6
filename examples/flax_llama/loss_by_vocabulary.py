"""Cross entropy in chunks of the vocabulary, for steps with little memory.

`loss` goes from the logits of some tokens, over the whole vocabulary, to the gradients, and sums
that of the head over tokens: a float32 array of the head's size. Here a chunk of the vocabulary at
a time is compared with all tokens, so that a chunk of the head's gradient is one product, written
at once in the head's own dtype. The logits are computed twice, first for the sums of their
exponentials: four products with the head instead of three. A head that is the embedding is taken
as it lies, (V, D): turned round, it and its gradient would be in memory once more.

Sizes: B batch, S sequence, T = B S tokens, D hidden, V vocabulary, C entries of a chunk.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.flax_llama.tables import zeros_after

MAX_LOGITS = 2**23
MULTIPLE = 128
# A part of a head, by the axis of it that is the vocabulary.
PARTS = ("cd", "dc")
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def vocabulary_chunk(tokens: int, vocabulary: int) -> int:
    """Entries per chunk: at most 2^23 logits, 32 MiB, and an eighth of all, but at least 1024."""
    most = max(min(MAX_LOGITS // tokens, vocabulary // 8), 8 * MULTIPLE)
    even = math.ceil(vocabulary / math.ceil(vocabulary / most))
    return min(vocabulary, MULTIPLE * math.ceil(even / MULTIPLE))


class Chunk(NamedTuple):
    """The logits of all tokens for a part of the vocabulary.

    Attributes:
      start: the number of its first entry.
      head: the head's part, (D, C) or (C, D).
      logits_TxC: float32.
      is_label_TxC: where an entry is the token's label.
      is_new_C: which entries no chunk before has; the last chunk may begin in the one before.
    """

    start: jax.Array
    head: jax.Array
    logits_TxC: jax.Array
    is_label_TxC: jax.Array
    is_new_C: jax.Array


def _chunks(
    x_TxD: jax.Array, head: jax.Array, labels_T: jax.Array, size: int, axis: int
) -> tuple[int, Callable[[jax.Array], Chunk]]:
    """How many chunks there are, and the function from the number of one to the chunk."""
    V = head.shape[axis]

    def chunk(i: jax.Array) -> Chunk:
        start = jnp.minimum(i * size, V - size)
        part = jax.lax.dynamic_slice_in_dim(head, start, size, axis).astype(x_TxD.dtype)
        logits = _einsum(f"td,{PARTS[axis]}->tc", x_TxD, part)
        entries = start + jnp.arange(size)
        return Chunk(start, part, logits, labels_T[:, None] == entries, entries >= i * size)

    return math.ceil(V / size), chunk


def _losses(
    x_TxD: jax.Array, head: jax.Array, labels_T: jax.Array, size: int, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, and the logarithm of the sum of its logits' exponentials."""
    count, chunk = _chunks(x_TxD, head, labels_T, size, axis)

    def add(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most, total, of_label = so_far
        own = chunk(i)
        logits = jnp.where(own.is_new_C, own.logits_TxC, -jnp.inf)
        new_most = jnp.maximum(most, logits.max(axis=1))
        total = total * jnp.exp(most - new_most) + jnp.exp(logits - new_most[:, None]).sum(axis=1)
        is_label = own.is_label_TxC & own.is_new_C
        return new_most, total, of_label + own.logits_TxC.sum(axis=1, where=is_label)

    zeros = jnp.zeros(x_TxD.shape[0], jnp.float32)
    most, total, of_label = jax.lax.fori_loop(0, count, add, (zeros - jnp.inf, zeros, zeros))
    log_sum = most + jnp.log(total)
    return log_sum - of_label, log_sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_by_vocabulary(
    x_BxSxD: jax.Array,
    head: jax.Array,
    labels_BxS: jax.Array,
    weights_BxS: jax.Array,
    axis: int = 1,
) -> jax.Array:
    """What `loss.cross_entropy_sum` returns, whose arguments and gradients these are.

    The vocabulary is the `axis` of the head: 1 of a kernel (D, V), 0 of an embedding (V, D).
    """
    return _forward(x_BxSxD, head, labels_BxS, weights_BxS, axis, gradients=False)[0]


def _forward(x_BxSxD, head, labels_BxS, weights_BxS, axis, gradients=True):
    x_TxD, labels_T = x_BxSxD.reshape(-1, x_BxSxD.shape[-1]), labels_BxS.reshape(-1)
    weights_T = weights_BxS.reshape(-1).astype(jnp.float32)
    size = vocabulary_chunk(len(x_TxD), head.shape[axis])
    losses_T, log_sum_T = _losses(x_TxD, head, labels_T, size, axis)
    total = jnp.sum(losses_T * weights_T)
    if not gradients:
        return total, None
    count, chunk = _chunks(x_TxD, head, labels_T, size, axis)

    def add(i: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_TxD, dhead = so_far
        own = chunk(i)
        softmax = jnp.exp(own.logits_TxC - log_sum_T[:, None])
        dlogits = (weights_T[:, None] * (softmax - own.is_label_TxC)).astype(x_TxD.dtype)
        part = _einsum(f"td,tc->{PARTS[axis]}", x_TxD, dlogits).astype(dhead.dtype)
        new = jnp.where(own.is_new_C, dlogits, 0)
        dx_TxD += _einsum(f"tc,{PARTS[axis]}->td", new, own.head)
        return dx_TxD, jax.lax.dynamic_update_slice_in_dim(dhead, part, own.start, axis)

    start = jnp.zeros(x_TxD.shape, jnp.float32), zeros_after(total, head.shape, head.dtype)
    dx_TxD, dhead = jax.lax.fori_loop(0, count, add, start)
    return total, (dx_TxD.astype(x_BxSxD.dtype).reshape(x_BxSxD.shape), dhead)


def _backward(axis, gradients, cotangent):
    del axis
    dx, dhead = ((cotangent * d).astype(d.dtype) for d in gradients)
    return dx, dhead, None, None


cross_entropy_by_vocabulary.defvjp(_forward, _backward)
