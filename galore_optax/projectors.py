"""Which r directions: a basis of the column space of one matrix.

A projector is a function ``(matrix, rank) -> basis`` of one (m, n) matrix, float32 or wider, that
returns an (m, rank) basis; for the other side the caller passes the transpose. It may ask for
more by the names of its arguments: ``key``, a JAX key of this matrix and refresh; ``old``, the
(m, rank) basis that it replaces; ``first``, a bool scalar, whether no gradient chose ``old``. Its
other keyword arguments are options of the user's. Signs are settled afterwards by :func:`orient`.

Those that select among directions given beforehand, ``rows`` and ``dct``, return the numbers of
these instead of a basis, (rank,) int32, and get such numbers as ``old``. Only these two may: a
function of the user's, one around them too, returns a basis.
"""

import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._directions import UnitVectors, choose, cosines
from galore_optax._orthonormalize import orthonormalize
from galore_optax._random import uniform


def svd(matrix: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors, exactly, by ``jnp.linalg.svd``.

    On CUDA, beyond 1024 rows or columns, that is the QR algorithm, in whose place the polar
    decomposition is taken (cuSOLVER's ``gesvdp``, "much faster" by its manual, since it is mostly
    products; it perturbs no singular values but those near zero). On a TPU it is the polar
    decomposition already, and takes minutes to compile: take ``power_iteration`` there.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= min(m, n).

    Returns:
      (m, r), orthonormal, by falling singular value.

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, equation (12).
    """

    def default(matrix: jax.Array) -> jax.Array:
        return jnp.linalg.svd(matrix, full_matrices=False)[0]

    def polar(matrix: jax.Array) -> jax.Array:
        algorithm = jax.lax.linalg.SvdAlgorithm.POLAR
        return jax.lax.linalg.svd(matrix, full_matrices=False, algorithm=algorithm)[0]

    if max(matrix.shape) <= 1024:  # Jacobi's algorithm on CUDA, which is fast there
        return default(matrix)[:, :rank]
    return jax.lax.platform_dependent(matrix, cuda=polar, default=default)[:, :rank]


def eigh(matrix: jax.Array, rank: int) -> jax.Array:
    """The leading left singular vectors, from the Gram matrix of the short side.

    Exact up to round-off that is relative to the largest singular value: directions weaker than
    about 3e-4 of it are lost in float32.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= min(m, n).

    Returns:
      (m, r), orthonormal, by falling singular value.
    """
    m, n = matrix.shape
    if m <= n:
        return _leading_eigenvectors(_product(matrix, matrix.T), rank)
    right = _leading_eigenvectors(_product(matrix.T, matrix), rank)
    return orthonormalize(_product(matrix, right))


def randomized_svd(
    matrix: jax.Array,
    rank: int,
    *,
    key: jax.Array,
    oversampling: int = 8,
    power_iterations: int = 1,
) -> jax.Array:
    """Nearly the leading left singular vectors, from products with a random matrix.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= min(m, n).
      key: of the random matrix.
      oversampling: p, columns beyond r; r + p is cut to min(m, n).
      power_iterations: q, products with G G^T that sharpen the spectrum, orthonormalized between.

    Returns:
      (m, r), orthonormal, by falling singular value.

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
    matrix: jax.Array,
    rank: int,
    *,
    key: jax.Array,
    old: jax.Array,
    first: jax.Array,
    iterations: int = 1,
) -> jax.Array:
    """The old basis, turned towards the leading left singular vectors.

    Two products per iteration, with the old basis for a start: gradients turn slowly, so that it
    tracks their subspace. At the first refresh it starts from a random matrix and does one
    iteration more, which is a randomized SVD without oversampling.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= min(m, n).
      key: of the random matrix of the first refresh.
      old: (m, r), the basis to start from.
      first: (), bool, whether to start from a random matrix instead.
      iterations: products with G G^T, orthonormalized after each.

    Returns:
      (m, r), orthonormal.
    """
    random = uniform(key, (matrix.shape[0], rank), matrix.dtype)
    start = jnp.where(first, random, old)

    def iterate(_: Any, basis: jax.Array) -> jax.Array:
        return orthonormalize(_product(matrix, _product(matrix.T, basis)))

    return jax.lax.fori_loop(0, iterations + jnp.where(first, 1, 0), iterate, start)


def gaussian(matrix: jax.Array, rank: int, *, key: jax.Array) -> jax.Array:
    """Independent normal entries of variance 1/r. Not orthonormal; regenerated, never stored.

    Args:
      matrix: (m, n); only its shape and dtype matter.
      rank: r.
      key: of the entries.

    Returns:
      (m, r), P with E[P P^T] = I.

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, algorithm 1.
    """
    quantiles = uniform(key, (matrix.shape[0], rank), matrix.dtype)
    return (2 / rank) ** 0.5 * jax.lax.erf_inv(quantiles)


def orthonormal(matrix: jax.Array, rank: int, *, key: jax.Array) -> jax.Array:
    """Random orthonormal columns, without a factorization. Regenerated, never stored.

    Columns drawn from the cosine transform, with the sign of each row flipped at random: a
    subsampled randomized trigonometric transform.

    Args:
      matrix: (m, n); only its shape and dtype matter.
      rank: r <= m.
      key: of the columns and signs.

    Returns:
      (m, r), orthonormal.

    References:
      Tropp, `Improved analysis of the subsampled randomized Hadamard transform
      <https://arxiv.org/abs/1011.1595>`_, 2011.
    """
    rows = matrix.shape[0]
    _check_columns("orthonormal", rank, rows)
    weights, signs = uniform(key, (2, rows), matrix.dtype)
    _, columns = jax.lax.top_k(weights, rank)
    return jnp.sign(signs)[:, None] * cosines(columns, rows, matrix.dtype)


def rows(matrix: jax.Array, rank: int, *, old: jax.Array, first: jax.Array) -> jax.Array:
    """The numbers of the r rows of largest norm, whose unit vectors are the basis.

    Nothing is multiplied, at a refresh or on ordinary steps: the low-rank gradient is r rows of
    the gradient, and the state holds r numbers instead of a basis. A row that stays selected keeps
    its place, and so its moments. One that arrives goes on with those of a row that leaves, where
    Grass resets all: the gaps should be long, and not staggered (benchmarks/quality.py).

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= m.
      old: (r,), int32, the numbers that are replaced.
      first: (), bool, whether ``old`` means nothing.

    Returns:
      (r,), int32.

    References:
      Muhamed et al., `Grass <https://arxiv.org/abs/2406.17660>`_, 2024: its "top-r" selection.
    """
    _check_columns("rows", rank, matrix.shape[0])
    _check_numbers("rows", old)
    return choose(jnp.sum(matrix**2, axis=1), rank, old, first)


def dct(matrix: jax.Array, rank: int, *, old: jax.Array, first: jax.Array) -> jax.Array:
    """The numbers of the r columns of the cosine transform (DCT-II) that capture most.

    No factorization: a fast transform of the columns and a selection. The state holds the numbers,
    from which the basis is made again whenever it is needed. A column that stays selected keeps
    its place.

    Args:
      matrix: (m, n), float32 or float64.
      rank: r <= m.
      old: (r,), int32, the numbers that are replaced.
      first: (), bool, whether ``old`` means nothing.

    Returns:
      (r,), int32.

    References:
      Modoranu et al., `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025.
    """
    _check_columns("dct", rank, matrix.shape[0])
    _check_numbers("dct", old)
    transformed = jax.scipy.fft.dct(matrix, axis=0, norm="ortho")
    return choose(jnp.sum(transformed**2, axis=1), rank, old, first)


PROJECTORS: dict[str, Callable[..., jax.Array]] = {
    "svd": svd,
    "eigh": eigh,
    "randomized_svd": randomized_svd,
    "power_iteration": power_iteration,
    "gaussian": gaussian,
    "orthonormal": orthonormal,
    "rows": rows,
    "dct": dct,
}
_REGENERATED = (gaussian, orthonormal)
_DIRECTIONS: tuple[tuple[Callable[..., jax.Array], Callable[..., Any]], ...] = (
    (rows, UnitVectors),
    (dct, cosines),
)
_SUPPLIED = ("key", "old", "first")
_LEAST = {"oversampling": 0, "power_iterations": 0, "iterations": 1}


@dataclasses.dataclass(frozen=True)
class Projector:
    """A projector with its options; made by :func:`resolve`.

    Attributes:
      function: the projector.
      needs: which of ``key``, ``old`` and ``first`` it asks for.
      stored: whether what it chooses is kept in the state. Otherwise that is made again, whenever
        it is needed, from the key of its refresh.
      directions: ``(numbers, m, dtype) -> basis`` where it chooses numbers of directions, (r,)
        int32; None where it makes the basis itself.
    """

    function: Callable[..., jax.Array]
    needs: tuple[str, ...]
    stored: bool
    directions: Callable[..., Any] | None

    @property
    def is_dense(self) -> bool:
        """Whether its bases are used as matrices."""
        return self.directions is not UnitVectors

    def __call__(self, matrix: Any, rank: int, **supplied: Any) -> jax.Array:
        """What it chooses for a matrix; ``supplied`` is all that a projector may ask for."""
        return self.function(matrix, rank, **{name: supplied[name] for name in self.needs})

    def basis(self, chosen: jax.Array, size: int, dtype: Any) -> jax.Array | UnitVectors:
        """The (size, r) basis that was chosen."""
        return chosen if self.directions is None else self.directions(chosen, size, dtype)


def resolve(projector: str | Callable[..., jax.Array], options: Mapping[str, Any]) -> Projector:
    """The projector of that name, or the user's function, with options.

    Raises:
      ValueError: there is no projector of that name, or an option is out of range.
      TypeError: neither a name nor a function, or it does not take an option.
    """
    if isinstance(projector, str):
        if projector not in PROJECTORS:
            raise ValueError(f"projector must be one of {', '.join(PROJECTORS)}; got {projector!r}")
        projector = PROJECTORS[projector]
    if not callable(projector):
        raise TypeError(
            f"projector must be a name ({', '.join(PROJECTORS)}) or a function "
            f"(matrix, rank) -> basis; got {projector!r}"
        )
    name = getattr(projector, "__name__", repr(projector))
    try:
        taken = list(inspect.signature(projector).parameters)
    except ValueError:  # some built-in functions have no signature
        taken = []
    possible = [x for x in taken[2:] if x not in _SUPPLIED]
    for option, value in options.items():
        if option not in possible:
            raise TypeError(
                f"projector_options has {option!r}, which {name} does not take; it takes "
                f"{', '.join(possible) or 'no options'}"
            )
        least = _LEAST.get(option)
        if least is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(
                f"{option} of {name} must be an int of at least {least}; got {value!r}"
            )
    return Projector(
        functools.partial(projector, **options),
        tuple(x for x in _SUPPLIED if x in taken[2:]),
        stored=projector not in _REGENERATED,
        directions=next((made for chooses, made in _DIRECTIONS if chooses is projector), None),
    )


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


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Without it GPUs and TPUs would round the operands to TF32 or bfloat16.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _leading_eigenvectors(gram: jax.Array, rank: int) -> jax.Array:
    return jnp.linalg.eigh(gram)[1][:, ::-1][:, :rank]


def _check_columns(name: str, rank: int, size: int) -> None:
    if rank > size:
        raise ValueError(f"rank of {name} must be at most the {size} rows; got {rank}")


def _check_numbers(name: str, old: jax.Array) -> None:
    if not jnp.issubdtype(old.dtype, jnp.integer):
        raise TypeError(
            f"{name} returns numbers of directions and needs such numbers as old, (r,) int32; got "
            f"{old.dtype}{list(old.shape)}. Pass projector={name!r}: a function around it must "
            "return a basis."
        )
