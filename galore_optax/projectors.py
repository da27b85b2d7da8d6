"""Chooses r directions: a basis of the column space of one matrix.

A projector is a function ``(matrix, rank) -> basis`` of one (m, n) matrix, float32 or wider, that
returns an (m, rank) basis; for the other side the caller passes the transpose. It may ask for
more by the names of its arguments: ``key``, a JAX key of this matrix and refresh; ``old``, the
(m, rank) basis that it replaces; ``first``, a bool scalar, whether no gradient chose ``old``;
``moments``, a dict of the moments in the old subspace by their role, ``"first"`` or ``"second"``,
a list of arrays (rank, n), or (rank, rank) where both sides are projected; ``step``, how many
updates are done, int32. The matrix is the gradient divided by a power of two, so that its largest
entry is near 1; the moments are in the same unit. Other keyword arguments are options of the
user's. Signs are settled afterwards.

The projectors that select among directions given beforehand, ``rows``, ``random_rows``,
``sampled_rows`` and ``dct``, return the numbers of these instead of a basis, (rank,) int32, and get
such numbers as ``old``. Only they may: a user's function must return a basis, also where it calls
one of them. What is made of the function's choice is the business of a type of basis, which its row
in the table `PROJECTORS` names.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.lax.linalg import SvdAlgorithm
from jaxtyping import Array, Bool, Float, Int, Key

from galore_optax._basis import Regenerated
from galore_optax._directions import choose, cosines
from galore_optax._numbered import Cosines, Rows, Sampled, WeightedRows
from galore_optax._orthonormalize import orthonormalize
from galore_optax._projector import Projector, resolve_projector
from galore_optax._random import uniform


def svd(matrix: Float[Array, "m n"], rank: int) -> Float[Array, "m r"]:
    """Returns the leading left singular vectors, exactly, by ``jax.lax.linalg.svd``.

    On CUDA that is the QR algorithm, which takes seconds for a large matrix; on a TPU it is a polar
    decomposition, which takes minutes to compile. Take ``power_iteration`` on both.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= min(m, n).

    Returns:
      The basis, (m, r), orthonormal, by falling singular value.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, equation (12).
    """

    def by(algorithm: SvdAlgorithm) -> Callable[[Array], Array]:
        return lambda x: jax.lax.linalg.svd(x, full_matrices=False, algorithm=algorithm)[0]

    # SvdAlgorithm.POLAR is five times as fast on CUDA, but for some matrices its vectors are wrong
    # there. For a 4096 x 4096 one with the spectrum of gradients 1024 vectors captured 0.57 of the
    # energy instead of 0.92 (benchmarks/results/gpu/refresh.json, H100, jax 0.11.2). Jacobi's, the
    # default up to 1024 rows and columns, are orthonormal to no more than 2.6e-4 (correct.json
    # beside it).
    vectors = jax.lax.platform_dependent(
        matrix, cuda=by(SvdAlgorithm.QR), default=by(SvdAlgorithm.DEFAULT)
    )
    return vectors[:, :rank]


def eigh(matrix: Float[Array, "m n"], rank: int) -> Float[Array, "m r"]:
    """Returns the leading left singular vectors, from the Gram matrix of the short side.

    They are exact up to round-off that is relative to the largest singular value: directions weaker
    than about 3e-4 of it are lost in float32.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= min(m, n).

    Returns:
      The basis, (m, r), orthonormal, by falling singular value.
    """
    m, n = matrix.shape
    if m <= n:
        return _leading_eigenvectors(_product(matrix, matrix.T), rank)
    right = _leading_eigenvectors(_product(matrix.T, matrix), rank)
    return orthonormalize(_product(matrix, right))


def randomized_svd(
    matrix: Float[Array, "m n"],
    rank: int,
    *,
    key: Key[Array, ""],
    oversampling: int = 8,
    power_iterations: int = 1,
) -> Float[Array, "m r"]:
    """Returns nearly the leading left singular vectors, from products with a random matrix.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= min(m, n).
      key: the key of the random matrix.
      oversampling: the number p of columns beyond r; r + p is cut to min(m, n).
      power_iterations: the number q of products with G G^T that sharpen the spectrum,
        orthonormalized between.

    Returns:
      The basis, (m, r), orthonormal, by falling singular value.

    References:
      Halko, Martinsson and Tropp, `Finding structure with randomness
      <https://arxiv.org/abs/0909.4061>`_, 2011, algorithms 4.4 and 5.1.
    """
    m, n = matrix.shape
    columns = min(rank + oversampling, m, n)
    sample = _product(matrix, uniform(key, (n, columns), matrix.dtype))
    for _ in range(power_iterations):
        sample = _product(matrix, orthonormalize(_product(matrix.T, orthonormalize(sample))))
    basis = orthonormalize(sample)
    compressed = _product(basis.T, matrix)
    return _product(basis, _leading_eigenvectors(_product(compressed, compressed.T), rank))


def power_iteration(
    matrix: Float[Array, "m n"],
    rank: int,
    *,
    key: Key[Array, ""],
    old: Float[Array, "m r"],
    first: Bool[Array, ""],
    iterations: int = 1,
) -> Float[Array, "m r"]:
    """Returns the old basis, turned towards the leading left singular vectors.

    Each iteration is two products, and the first one starts from the old basis: gradients turn
    slowly, so that it tracks their subspace. At the first refresh it starts from a random matrix
    and does one iteration more, which is a randomized SVD without oversampling.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= min(m, n).
      key: the key of the random matrix of the first refresh.
      old: the basis to start from, (m, r).
      first: whether to start from a random matrix instead, (), bool.
      iterations: the number of products with G G^T, orthonormalized after each.

    Returns:
      The basis, (m, r), orthonormal.
    """
    random = uniform(key, (matrix.shape[0], rank), matrix.dtype)
    start = jnp.where(first, random, old)

    def iterate(_: Int[Array, ""], basis: Float[Array, "m r"]) -> Float[Array, "m r"]:
        return orthonormalize(_product(matrix, _product(matrix.T, basis)))

    return jax.lax.fori_loop(0, iterations + jnp.where(first, 1, 0), iterate, start)


def momentum_iteration(
    matrix: Float[Array, "m n"],
    rank: int,
    *,
    old: Float[Array, "m r"],
    first: Bool[Array, ""],
    moments: Mapping[str, list[Array]],
    step: Int[Array, ""],
    b1: float,
    rho: float = 0.908,
) -> Float[Array, "m r"]:
    r"""Returns the old basis, turned towards a mean of the momentum and the gradient: LDAdam.

    It is one power iteration from the old basis with
    :math:`\rho P \hat m + (1 - \rho) G`, of which no more than its product with r columns is made:
    cheap enough for every step. At the first refresh the basis is that of :func:`svd`.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= min(m, n).
      old: the basis to start from, (m, r), orthonormal.
      first: whether to take the leading singular vectors instead, (), bool.
      moments: the moments in the old basis; the first one of the role ``"first"`` is m, (r, n).
      step: the number of updates done, (), int32, by which the bias of m is corrected.
      b1: the decay rate of the momentum; presets give that of their optimizer.
      rho: the weight of the momentum.

    Returns:
      The basis, (m, r), orthonormal.

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024, algorithm 1
    """
    momentum = moments["first"][0]

    def iterate() -> Float[Array, "m r"]:
        count = jnp.maximum(step, 1).astype(matrix.dtype)
        share = rho / (1 - jnp.asarray(b1, matrix.dtype) ** count)
        # The products with b = share P m + (1 - rho) G, P^T P being the identity.
        across = share * momentum.T + (1 - rho) * _product(matrix.T, old)
        inside = share * _product(old, _product(momentum, across))
        return orthonormalize(inside + (1 - rho) * _product(matrix, across))

    return jax.lax.cond(first, lambda: svd(matrix, rank), iterate)


def gaussian(
    matrix: Float[Array, "m n"] | jax.ShapeDtypeStruct, rank: int, *, key: Key[Array, ""]
) -> Float[Array, "m r"]:
    """Returns a basis of independent normal entries of variance 1/r.

    It is not orthonormal. It is regenerated, never stored.

    Args:
      matrix: a matrix, (m, n); only its shape and dtype matter.
      rank: the rank r.
      key: the key of the entries.

    Returns:
      The basis P, (m, r), with E[P P^T] = I.

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.
    """
    quantiles = uniform(key, (matrix.shape[0], rank), matrix.dtype)
    return (2 / rank) ** 0.5 * jax.lax.erf_inv(quantiles)


def orthonormal(
    matrix: Float[Array, "m n"] | jax.ShapeDtypeStruct, rank: int, *, key: Key[Array, ""]
) -> Float[Array, "m r"]:
    """Returns random orthonormal columns, without a factorization.

    They are columns drawn from the cosine transform, with the sign of each row flipped at random: a
    subsampled randomized trigonometric transform. They are regenerated, never stored.

    Args:
      matrix: a matrix, (m, n); only its shape and dtype matter.
      rank: the rank, r <= m.
      key: the key of the columns and signs.

    Returns:
      The basis, (m, r), orthonormal.

    References:
      Tropp, `Improved analysis of the subsampled randomized Hadamard transform
      <https://arxiv.org/abs/1011.1595>`_, 2011.
    """
    rows = matrix.shape[0]
    _check_columns("orthonormal", rank, rows)
    weights, signs = uniform(key, (2, rows), matrix.dtype)
    _, columns = jax.lax.top_k(weights, rank)
    return jnp.sign(signs)[:, None] * cosines(columns, rows, matrix.dtype)


def rows(
    matrix: Float[Array, "m n"], rank: int, *, old: Int[Array, " r"], first: Bool[Array, ""]
) -> Int[Array, " r"]:
    """Returns the numbers of the r rows of largest norm, whose unit vectors are the basis.

    Nothing is multiplied, at a refresh or on ordinary steps: the low-rank gradient is r rows of
    the gradient, and the state holds r numbers instead of a basis. A row that stays selected keeps
    its place, and so its moments. One that arrives goes on with those of a row that leaves, where
    Grass resets all: the gaps should be long, and not staggered (benchmarks/refresh_quality.py).

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= m.
      old: the numbers that are replaced, (r,), int32.
      first: whether ``old`` means nothing, (), bool.

    Returns:
      The numbers that are chosen, (r,), int32.

    References:
      Muhamed et al., `Grass <https://arxiv.org/abs/2406.17660>`_, 2024: its "top-r" selection.
    """
    _check_columns("rows", rank, matrix.shape[0])
    _check_numbers("rows", old)
    return choose(jnp.sum(matrix**2, axis=1), rank, old, first)


def random_rows(matrix: Float[Array, "m n"], rank: int, *, key: Key[Array, ""]) -> Int[Array, " r"]:
    """Returns the numbers of r different rows, drawn at random: FRUGAL's columns.

    Args:
      matrix: a matrix, (m, n); only its shape and dtype matter.
      rank: the rank, r <= m.
      key: the key of the draw.

    Returns:
      The numbers, (r,), int32.

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024: its "columns"
    """
    _check_columns("random_rows", rank, matrix.shape[0])
    weights = uniform(key, (1, matrix.shape[0]), matrix.dtype)
    return jax.lax.top_k(weights[0], rank)[1].astype(jnp.int32)


def sampled_rows(matrix: Float[Array, "m n"], rank: int, *, key: Key[Array, ""]) -> Sampled:
    r"""Draws r rows with replacement, each with a probability in proportion to its norm: Grass.

    The weight of row j is :math:`1 / \sqrt{r q_j}` with its probability q_j, so that the mean of
    P P^T is the identity: the low-rank gradient, taken back, is right on average. The norm is the
    probability that makes its variance least.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank r.
      key: the key of the draw.

    Returns:
      The numbers of the rows, and their weights, (r,) each.

    References:
      Muhamed et al., `Grass <https://arxiv.org/abs/2406.17660>`_, 2024: its "multinomial" selection
    """
    norms = jnp.sqrt(jnp.sum(matrix**2, axis=1))
    upper = jnp.cumsum(norms)
    # These are independent numbers in (0, the sum of all norms); a row is as wide as its norm.
    places = (uniform(key, (1, rank), matrix.dtype)[0] + 1) / 2 * upper[-1]
    numbers = jnp.minimum(jnp.searchsorted(upper, places, side="right"), len(norms) - 1)
    probabilities = norms[numbers] / upper[-1]
    return Sampled(numbers.astype(jnp.int32), (rank * probabilities) ** -0.5)


def dct(
    matrix: Float[Array, "m n"], rank: int, *, old: Int[Array, " r"], first: Bool[Array, ""]
) -> Int[Array, " r"]:
    """Returns the numbers of the r columns of the cosine transform (DCT-II) that capture most.

    This takes no factorization: it is a fast transform of the columns and a selection. The state
    holds the numbers, from which the basis is made again whenever it is needed. A column that stays
    selected keeps its place.

    Args:
      matrix: the gradient of one matrix, (m, n), float32 or float64.
      rank: the rank, r <= m.
      old: the numbers that are replaced, (r,), int32.
      first: whether ``old`` means nothing, (), bool.

    Returns:
      The numbers that are chosen, (r,), int32.

    References:
      Modoranu et al., `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025.
    """
    _check_columns("dct", rank, matrix.shape[0])
    _check_numbers("dct", old)
    transformed = jax.scipy.fft.dct(matrix, axis=0, norm="ortho")
    return choose(jnp.sum(transformed**2, axis=1), rank, old, first)


PROJECTORS: dict[str, Projector] = {
    "svd": Projector(svd),
    "eigh": Projector(eigh),
    "randomized_svd": Projector(randomized_svd),
    "power_iteration": Projector(power_iteration),
    "momentum_iteration": Projector(momentum_iteration, sides=1, reads=("first",)),
    "gaussian": Projector(gaussian, Regenerated, orthonormal=False, stands_still=False),
    "orthonormal": Projector(orthonormal, Regenerated, stands_still=False),
    "rows": Projector(rows, Rows),
    "random_rows": Projector(random_rows, Rows, stands_still=False),
    "sampled_rows": Projector(sampled_rows, WeightedRows, orthonormal=False, stands_still=False),
    "dct": Projector(dct, Cosines),
}


def resolve(projector: str | Callable[..., Array], options: Mapping[str, object]) -> Projector:
    """Returns the projector of that name, or of the user's function, with options.

    A function of this module stands for its row in the table, with its type of basis.

    Raises:
      ValueError: there is no projector of that name, or an option is out of range.
      TypeError: neither a name nor a function, or it does not take an option.
    """
    return resolve_projector(projector, options, PROJECTORS)


def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    # Without this precision GPUs and TPUs would round the operands to TF32 or bfloat16.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _leading_eigenvectors(gram: Float[Array, "m m"], rank: int) -> Float[Array, "m r"]:
    return jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def _check_columns(name: str, rank: int, size: int) -> None:
    if rank > size:
        raise ValueError(f"rank of {name} must be at most the {size} rows; got {rank}")


def _check_numbers(name: str, old: Array) -> None:
    if not jnp.issubdtype(old.dtype, jnp.integer):
        raise TypeError(
            f"{name} returns numbers of directions and needs such numbers as old, (r,) int32; got "
            f"{old.dtype}{list(old.shape)}. Pass projector={name!r}: a function around it must "
            "return a basis."
        )
