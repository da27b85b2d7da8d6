"""Makes the columns of a matrix orthonormal, mostly by products of matrices."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from galore_optax._random import key_of, uniform

# A pass is the last one if it starts with a Gram matrix that is nearer than this to the identity,
# in the 1-norm.
_NEAR = 0.5
_MOST_PASSES = 40

# The loop carries the basis, the shift, whether it is done, and how many passes there were.
_Carry: TypeAlias = tuple[
    Float[Array, "m r"], Float[Array, ""], Bool[Array, ""], Int[Array, ""] | int
]


def orthonormalize(matrix: Float[Array, "m r"]) -> Float[Array, "m r"]:
    """Returns an orthonormal basis whose first k columns span those of the matrix, for every k.

    It is the Q of a QR factorization, by Cholesky factorizations of Gram matrices: nearly all of it
    is products of matrices, which run well on any device and under any sharding. The columns are
    scaled to one length first, which is most of what a power iteration needs; then two passes do,
    as in CholeskyQR2. Where directions are too weak for the factorization a shift of the Gram
    matrix lets it pass, which makes them some hundred times stronger, and there are more passes.

    Args:
      matrix: the matrix, (m, r), m >= r, float32 or float64.

    Returns:
      The basis, (m, r), in the same dtype. Of a matrix without full rank, or with columns of zeros,
      it is orthonormal all the same: some round-off is added first that has full rank.

    References:
      Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of ill-conditioned
      matrices <https://arxiv.org/abs/1809.11085>`_, 2018.
    """
    m, r = matrix.shape
    epsilon = jnp.finfo(matrix.dtype).eps
    lengths = jnp.linalg.norm(matrix, axis=0, keepdims=True)
    scaled = matrix / jnp.where(lengths > 0, lengths, 1)
    scaled += 10 * epsilon / m**0.5 * uniform(key_of(0), (m, r), matrix.dtype)
    eye = jnp.eye(r, dtype=matrix.dtype)

    def go_on(carry: _Carry) -> Bool[Array, ""]:
        _, _, done, passes = carry
        return ~done & (passes < _MOST_PASSES)

    def again(carry: _Carry) -> _Carry:
        basis, shift, _, passes = carry
        gram = _product(basis.T, basis)
        # The norm bounds the eigenvalues. Where it is not a number, this is false.
        near = jnp.all(jnp.sum(jnp.abs(gram - eye), axis=0) < _NEAR)
        lower = jnp.linalg.cholesky(gram + jnp.where(near, 0, shift) * eye)
        inverse = jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)
        new = _product(basis, inverse.T)
        # The factor is not a number where the shifted matrix is not positive definite.
        sound = jnp.all(jnp.isfinite(inverse))
        new, shift = jnp.where(sound, new, basis), jnp.where(sound, shift, 10 * shift)
        return new, shift, near & sound, passes + 1

    first = scaled, jnp.asarray(4 * r * epsilon, matrix.dtype), jnp.asarray(False), 0
    return jax.lax.while_loop(go_on, again, first)[0]


def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
