"""Computes norms of gradients and updates, and the factor that clips a gradient to a norm."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from galore_optax._layerwise.settings import Gradient, Leaf
from galore_optax._types import DType, Updates
from galore_optax._view import moment_dtype


def norm_dtype(leaves: Sequence[Leaf]) -> DType:
    """Returns the dtype in which the norms of these leaves' gradients and the loss are computed."""
    return moment_dtype(jnp.result_type(*(leaf.dtype for leaf in leaves)))


def summed(gradient: Gradient) -> Array:
    """Returns a gradient as one array."""
    return gradient[0] + gradient[1] if isinstance(gradient, tuple) else gradient


def squared_norm(arrays: Updates, dtype: DType) -> Float[Array, ""]:
    """Returns the square of the norm of all arrays together."""
    zero = jnp.zeros([], dtype)
    return sum((jnp.sum(jnp.square(x.astype(dtype))) for x in jax.tree.leaves(arrays)), zero)


def clip_factor(square: Float[Array, ""], limit: float | None) -> Float[Array, ""]:
    """Returns the factor that makes a gradient no longer than the limit.

    Args:
      square: the square of the gradient's norm.
      limit: the greatest norm, or None for any.
    """
    if limit is None:
        return jnp.ones_like(square)
    norm = jnp.sqrt(square)
    return jnp.where(norm < limit, 1, jnp.asarray(limit, square.dtype) / norm)
