"""Cross entropy in chunks of the vocabulary, for steps with little memory.

`loss` goes from the logits of some tokens, over the whole vocabulary, to the gradients, and sums
that of the head over tokens: a float32 array of the head's size. Here a chunk of the vocabulary at
a time is compared with all tokens, so that a chunk of the head's gradient is one product, written
at once in the head's own dtype. The logits are computed twice, first for the sums of their
exponentials: four products with the head instead of three.

Sizes: B batch, S sequence, T = B S tokens, D hidden, V vocabulary, C entries of a chunk.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.flax_llama.tables import zeros_after

MAX_LOGITS = 2**23
MULTIPLE = 128


def vocabulary_chunk(tokens: int, vocabulary: int) -> int:
    """Entries per chunk: at most 2^23 logits, 32 MiB, and an eighth of all, but at least 1024."""
    most = max(min(MAX_LOGITS // tokens, vocabulary // 8), 8 * MULTIPLE)
    even = math.ceil(vocabulary / math.ceil(vocabulary / most))
    return min(vocabulary, MULTIPLE * math.ceil(even / MULTIPLE))


class Chunk(NamedTuple):
    """The logits of all tokens for a part of the vocabulary.

    Attributes:
      start: the number of its first entry.
      head_DxC: the head's part.
      logits_TxC: float32.
      is_label_TxC: where an entry is the token's label.
      is_new_C: which entries no chunk before has; the last chunk may begin in the one before.
    """

    start: jax.Array
    head_DxC: jax.Array
    logits_TxC: jax.Array
    is_label_TxC: jax.Array
    is_new_C: jax.Array


def _chunks(
    x_TxD: jax.Array, head_DxV: jax.Array, labels_T: jax.Array, size: int
) -> tuple[int, Callable[[jax.Array], Chunk]]:
    """How many chunks there are, and the function from the number of one to the chunk."""
    V = head_DxV.shape[1]

    def chunk(i: jax.Array) -> Chunk:
        start = jnp.minimum(i * size, V - size)
        head = jax.lax.dynamic_slice_in_dim(head_DxV, start, size, 1).astype(x_TxD.dtype)
        logits = jnp.einsum("td,dc->tc", x_TxD, head, preferred_element_type=jnp.float32)
        entries = start + jnp.arange(size)
        return Chunk(start, head, logits, labels_T[:, None] == entries, entries >= i * size)

    return math.ceil(V / size), chunk


def _losses(
    x_TxD: jax.Array, head_DxV: jax.Array, labels_T: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token, and the logarithm of the sum of its logits' exponentials."""
    count, chunk = _chunks(x_TxD, head_DxV, labels_T, size)

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


@jax.custom_vjp
def cross_entropy_by_vocabulary(
    x_BxSxD: jax.Array, head_DxV: jax.Array, labels_BxS: jax.Array, weights_BxS: jax.Array
) -> jax.Array:
    """What `loss.cross_entropy_sum` returns, whose arguments and gradients these are."""
    return _forward(x_BxSxD, head_DxV, labels_BxS, weights_BxS, gradients=False)[0]


def _forward(x_BxSxD, head_DxV, labels_BxS, weights_BxS, gradients=True):
    x_TxD, labels_T = x_BxSxD.reshape(-1, x_BxSxD.shape[-1]), labels_BxS.reshape(-1)
    weights_T = weights_BxS.reshape(-1).astype(jnp.float32)
    size = vocabulary_chunk(len(x_TxD), head_DxV.shape[1])
    losses_T, log_sum_T = _losses(x_TxD, head_DxV, labels_T, size)
    total = jnp.sum(losses_T * weights_T)
    if not gradients:
        return total, None
    count, chunk = _chunks(x_TxD, head_DxV, labels_T, size)

    def add(i: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dx_TxD, dhead_DxV = so_far
        own = chunk(i)
        softmax = jnp.exp(own.logits_TxC - log_sum_T[:, None])
        dlogits = (weights_T[:, None] * (softmax - own.is_label_TxC)).astype(x_TxD.dtype)
        dhead = jnp.einsum("td,tc->dc", x_TxD, dlogits, preferred_element_type=jnp.float32)
        new = jnp.where(own.is_new_C, dlogits, 0)
        dx_TxD += jnp.einsum("tc,dc->td", new, own.head_DxC, preferred_element_type=jnp.float32)
        return dx_TxD, jax.lax.dynamic_update_slice_in_dim(
            dhead_DxV, dhead.astype(dhead_DxV.dtype), own.start, 1
        )

    start = jnp.zeros(x_TxD.shape, jnp.float32), zeros_after(total, head_DxV.shape, head_DxV.dtype)
    dx_TxD, dhead_DxV = jax.lax.fori_loop(0, count, add, start)
    return total, (dx_TxD.astype(x_BxSxD.dtype).reshape(x_BxSxD.shape), dhead_DxV)


def _backward(gradients, cotangent):
    dx, dhead = ((cotangent * d).astype(d.dtype) for d in gradients)
    return dx, dhead, None, None


cross_entropy_by_vocabulary.defvjp(_forward, _backward)
