"""The embedding's rows, and gradients of the size of a table, which are not there too early.

Sizes: B batch, S sequence, T = B S tokens, D hidden, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros that are not made before there is x: of a vocabulary's size, they take memory.

    Not a number where the first entry of x is not finite, which is all that keeps XLA from knowing
    them for zeros.
    """
    return jnp.broadcast_to((0 * x.ravel()[0]).astype(dtype), shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(embedding_VxD: jax.Array, tokens_BxS: jax.Array, alone: bool) -> jax.Array:
    """The rows of some tokens, whose gradient takes no memory before it is there.

    On a device that is `alone`, what a token has in several places is added up in float32, and each
    row of the gradient is written once. Several ones would have to send each other the gradients of
    all tokens for that: there, they add up in the table's dtype.
    """
    del alone
    return embedding_VxD[tokens_BxS]


def _look_up(embedding_VxD: jax.Array, tokens_BxS: jax.Array, alone: bool) -> tuple[jax.Array, Any]:
    return look_up(embedding_VxD, tokens_BxS, alone), (tokens_BxS, embedding_VxD.shape)


def _gradient(alone: bool, saved: Any, dx_BxSxD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BxS, shape = saved
    zeros_VxD = zeros_after(dx_BxSxD, shape, dx_BxSxD.dtype)
    if not alone:
        return zeros_VxD.at[tokens_BxS].add(dx_BxSxD), None
    order_T = jnp.argsort(tokens_BxS.ravel())
    tokens_T = tokens_BxS.ravel()[order_T]
    is_first_T = jnp.concatenate([jnp.ones(1, bool), tokens_T[1:] != tokens_T[:-1]])
    place_T = jnp.cumsum(is_first_T) - 1
    T = len(tokens_T)
    dx_TxD = dx_BxSxD.reshape(T, -1)[order_T].astype(jnp.float32)
    sums_TxD = jax.ops.segment_sum(dx_TxD, place_T, T, indices_are_sorted=True)
    # There are fewer sums than tokens: behind them come zeros, for a row that there is not.
    rows_T = jnp.full(T, shape[0]).at[place_T].set(tokens_T, indices_are_sorted=True)
    return zeros_VxD.at[rows_T].set(sums_TxD.astype(zeros_VxD.dtype), mode="drop"), None


look_up.defvjp(_look_up, _gradient)
