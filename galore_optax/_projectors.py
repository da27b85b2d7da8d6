"""Which r directions: bases of the row and column space of one matrix.

A projector is a function ``(matrix, rank) -> (left, right)`` of one (m, n) matrix in float32 or
wider, returning an (m, rank) basis of its rows' space and an (n, rank) basis of its columns'.
The caller takes what the side asks for; under ``jit`` the other is never computed. Signs are
settled afterwards by :func:`orient`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Projector = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


def svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The leading singular vectors, exactly.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= min(m, n).

    Returns:
      The first r left singular vectors, (m, r), and the first r right ones, (n, r).

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, equation (12).
    """
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], vt[:rank].T


PROJECTORS: dict[str, Projector] = {"svd": svd}


def resolve(projector: str | Projector) -> Projector:
    """The function of that name, or the function itself.

    Raises:
      ValueError: there is no projector of that name.
      TypeError: neither a name nor a function.
    """
    if isinstance(projector, str):
        if projector not in PROJECTORS:
            raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}; got {projector!r}")
        return PROJECTORS[projector]
    if not callable(projector):
        raise TypeError(
            f"projector must be a name ({', '.join(PROJECTORS)}) or a function "
            f"(matrix, rank) -> (left, right); got {projector!r}"
        )
    return projector


def orient(new: jax.Array, old: jax.Array, first: jax.Array) -> jax.Array:
    """Gives every basis vector the sign that keeps moments meaningful across a refresh.

    Singular vectors have no sign of their own, but the moments that are kept do. At the first
    refresh the entry of largest magnitude of each vector becomes positive; later each vector
    takes the sign that makes the diagonal of new^T old non-negative.

    Args:
      new: (m, r), the new basis.
      old: (m, r), the basis it replaces.
      first: (), bool, whether ``old`` was never chosen from a gradient.

    Returns:
      (m, r), the columns of ``new``, some of them negated.
    """
    # The entry of largest magnitude is negative where the least exceeds the largest in magnitude.
    peaks = jnp.max(new, axis=0) + jnp.min(new, axis=0)
    reference = jnp.where(first, peaks, jnp.sum(new * old, axis=0))
    return jnp.where(reference < 0, -new, new)
