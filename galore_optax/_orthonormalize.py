"""Orthonormal columns, mostly from products."""

import jax
import jax.numpy as jnp


def orthonormalize(matrix: jax.Array) -> jax.Array:
    """An orthonormal basis whose first k columns span those of the matrix, for every k.

    The Q of a QR factorization, by Cholesky factorization of the Gram matrix, twice (CholeskyQR2):
    nearly all of it is matrix products, which run well on any device and under any sharding. The
    columns are scaled to one length first, which is most of what a power iteration needs. Where
    the matrix is too ill-conditioned for it all the same, ``jnp.linalg.qr`` does the work.

    Args:
      matrix: (m, r), m >= r, float32 or float64.

    Returns:
      (m, r), in the same dtype. Of a matrix without full rank, or with columns of zeros,
      orthonormal all the same.

    References:
      Fukaya et al., `CholeskyQR2 <https://doi.org/10.1109/ScalA.2014.11>`_, 2014.
    """
    lengths = jnp.linalg.norm(matrix, axis=0)
    scaled = matrix / jnp.where(lengths > 0, lengths, 1)
    once, _ = _cholesky_qr(scaled)
    twice, gram = _cholesky_qr(once)
    # The second pass is exact where the first one came near; not a number compares as false.
    near = jnp.all(jnp.abs(gram - jnp.eye(*gram.shape, dtype=gram.dtype)) < 0.1)
    return jax.lax.cond(near, lambda: twice, lambda: jnp.linalg.qr(scaled)[0])


def _cholesky_qr(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A more orthonormal basis of the same columns, and the Gram matrix of what was given."""
    gram = jnp.matmul(matrix.T, matrix, precision=jax.lax.Precision.HIGHEST)
    lower = jnp.linalg.cholesky(gram)  # not a number where it is not positive definite
    # Solved for the transpose: solvers return columns one after the other in memory, which for
    # the basis itself would be another layout than that of all other arrays.
    solution = jax.lax.linalg.triangular_solve(lower, matrix.T, left_side=True, lower=True)
    return solution.T, gram
