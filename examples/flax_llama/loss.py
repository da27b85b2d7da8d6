"""Cross entropy over a large vocabulary, in chunks, so that all logits never exist at once.

The logits of 16 sequences of 256 tokens over a vocabulary of 32000 are half a gigabyte in float32,
and automatic differentiation holds two arrays of that size. Here a chunk of positions at a time is
taken from logits to loss and, under differentiation, on to the gradients: that of x has no
vocabulary axis, that of the head no axis of tokens, and nothing is computed twice.

Sizes: B batch, S sequence, N chunks, C positions of a chunk, D hidden, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp

from examples.flax_llama.model import Llama
from examples.flax_llama.tables import zeros_after

MAX_TOKENS = 1024
MAX_CHUNKS = 16


def chunk_size(batch: int, seq: int, hidden: int) -> int:
    """Positions per chunk.

    D tokens, at most 1024, make the chunk's logits (tokens, V) as large as the gradient of the head
    (D, V): fewer save little memory, and cost time, since every chunk reads and writes that
    gradient once. For the same reason there are never more than 16 chunks.
    """
    tokens = min(hidden, MAX_TOKENS)
    return min(seq, max(math.ceil(tokens / batch), math.ceil(seq / MAX_CHUNKS)))


def split(x_BxSx: jax.Array, chunk: int) -> jax.Array:
    """(B, S, ...) to (N, B, C, ...), filled up with zeros.

    Chunks are cut along the sequence, not along all B*S tokens: where the batch is sharded over
    devices, every device has its part of every chunk, and no token moves.
    """
    B, S, *rest = x_BxSx.shape
    N = math.ceil(S / chunk)
    padding = [(0, 0), (0, N * chunk - S)] + [(0, 0)] * len(rest)
    return jnp.moveaxis(jnp.pad(x_BxSx, padding).reshape(B, N, chunk, *rest), 1, 0)


def join(x_NxBxCx: jax.Array, seq: int) -> jax.Array:
    """Undoes `split`."""
    N, B, C, *rest = x_NxBxCx.shape
    return jnp.moveaxis(x_NxBxCx, 0, 1).reshape(B, N * C, *rest)[:, :seq]


def chunk_losses(
    x_BxCxD: jax.Array, head_DxV: jax.Array, labels_BxC: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Losses (B, C), and what their gradient needs: exp(logits), its sum, where the labels are."""
    logits = jnp.einsum("bcd,dv->bcv", x_BxCxD, head_DxV, preferred_element_type=jnp.float32)
    logits -= logits.max(axis=-1, keepdims=True)
    exp_BxCxV = jnp.exp(logits)
    sum_BxC = exp_BxCxV.sum(axis=-1)
    # Compared instead of indexed: a label outside of the vocabulary, as paddings often are, is
    # nowhere, and gives a finite loss for its weight of zero to remove.
    is_label = labels_BxC[:, :, None] == jnp.arange(head_DxV.shape[1])
    losses_BxC = jnp.log(sum_BxC) - logits.sum(axis=-1, where=is_label)
    return losses_BxC, (exp_BxCxV, sum_BxC, is_label)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy_sum(x_BxSxD, head_DxV, labels_BxS, weights_BxS, chunk):
    losses_BxS = token_cross_entropy(x_BxSxD, head_DxV, labels_BxS, chunk=chunk)
    return jnp.sum(losses_BxS * weights_BxS)


def _forward(x_BxSxD, head_DxV, labels_BxS, weights_BxS, chunk):
    head = head_DxV.astype(x_BxSxD.dtype)

    def step(carry, inputs):
        total, dhead_DxV = carry
        x_BxCxD, labels_BxC, weights_BxC = inputs
        losses_BxC, (exp, total_exp, is_label) = chunk_losses(x_BxCxD, head, labels_BxC)
        softmax = exp * (weights_BxC / total_exp)[:, :, None]
        dlogits = softmax - jnp.where(is_label, weights_BxC[:, :, None], 0.0)
        dlogits = dlogits.astype(x_BxCxD.dtype)
        dx_BxCxD = jnp.einsum("bcv,dv->bcd", dlogits, head)
        dhead_DxV += jnp.einsum("bcd,bcv->dv", x_BxCxD, dlogits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(losses_BxC * weights_BxC), dhead_DxV), dx_BxCxD

    start = jnp.zeros((), jnp.float32), zeros_after(x_BxSxD, head_DxV.shape, jnp.float32)
    inputs = [split(array, chunk) for array in (x_BxSxD, labels_BxS, weights_BxS)]
    (total, dhead_DxV), dx_NxBxCxD = jax.lax.scan(step, start, inputs)
    return total, (join(dx_NxBxCxD, x_BxSxD.shape[1]), dhead_DxV.astype(head_DxV.dtype))


def _backward(chunk, gradients, cotangent):
    dx, dhead = ((cotangent * d).astype(d.dtype) for d in gradients)
    return dx, dhead, None, None


_cross_entropy_sum.defvjp(_forward, _backward)


def cross_entropy_sum(
    x_BxSxD: jax.Array,
    head_DxV: jax.Array,
    labels_BxS: jax.Array,
    weights_BxS: jax.Array,
    *,
    chunk: int | None = None,
) -> jax.Array:
    """Sum over tokens of weight * cross entropy of softmax(x @ head), in nats, float32 scalar.

    Matrices are multiplied in the dtype of x; logits, losses and the sum that is the gradient of
    the head are float32. The gradients are those of x and of the head, computed with the loss: the
    weights are constants, and second derivatives do not exist.

    Args:
      x_BxSxD: hidden states, float32 or bfloat16.
      head_DxV: the output layer's kernel.
      labels_BxS: the right tokens; where the weight is zero, any number.
      weights_BxS: of the tokens, bool or float; zero removes one.
      chunk: positions of the sequence at a time; `chunk_size` of the shapes by default.
    """
    chunk = chunk or chunk_size(*x_BxSxD.shape)
    weights_BxS = weights_BxS.astype(jnp.float32)
    return _cross_entropy_sum(x_BxSxD, head_DxV, labels_BxS, weights_BxS, chunk)


def token_cross_entropy(
    x_BxSxD: jax.Array, head_DxV: jax.Array, labels_BxS: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """Cross entropy of each token, float32 (B, S), in chunks too; not made for differentiation."""
    chunk = chunk or chunk_size(*x_BxSxD.shape)
    head = head_DxV.astype(x_BxSxD.dtype)
    losses_NxBxC = jax.lax.map(
        lambda inputs: chunk_losses(inputs[0], head, inputs[1])[0],
        (split(x_BxSxD, chunk), split(labels_BxS, chunk)),
    )
    return join(losses_NxBxC, labels_BxS.shape[1])


def loss_sum(
    model: Llama,
    tokens_BxS1: jax.Array,
    mask_BxS: jax.Array,
    segments_BxS1: jax.Array | None = None,
) -> jax.Array:
    """Summed cross entropy, float32 scalar, of tokens 1..S of each row where the mask is True."""
    x_BxSxD = model.hidden(tokens_BxS1[:, :-1], inputs_of(segments_BxS1))
    return cross_entropy_sum(x_BxSxD, model.head_DxV, tokens_BxS1[:, 1:], mask_BxS)


def token_losses(
    model: Llama, tokens_BxS1: jax.Array, segments_BxS1: jax.Array | None = None
) -> jax.Array:
    """Cross entropy in nats, float32 (B, S), of tokens 1..S of each row given those before."""
    x_BxSxD = model.hidden(tokens_BxS1[:, :-1], inputs_of(segments_BxS1))
    return token_cross_entropy(x_BxSxD, model.head_DxV, tokens_BxS1[:, 1:])


def inputs_of(segments_BxS1: jax.Array | None) -> jax.Array | None:
    """The segments of all tokens but the last one, which is a target alone."""
    return None if segments_BxS1 is None else segments_BxS1[:, :-1]
