"""The subspaces of a leaf's matrices, how they are held, and the way into them and back."""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._directions import UnitVectors
from galore_optax._matrix import MatrixView, moment_dtype, ranging_dtype
from galore_optax._part import Layer
from galore_optax._quantized import is_quantized, quantize
from galore_optax._random import fold_in
from galore_optax.projectors import Projector, orient

ABSENT = optax.MaskedNode()
"""Stands in the state wherever there is nothing: no projector on that side, or no matrix."""


def is_absent(x: Any) -> bool:
    """Whether there is nothing here."""
    return isinstance(x, optax.MaskedNode)


class Subspace(NamedTuple):
    """The subspaces of a leaf's matrices, or trees of these over the leaves of the parameters.

    R = left^T G right, where an absent side is the identity, or a basis that is made again from
    its key whenever it is needed. Of a leaf that is not projected all is absent.
    """

    # P, (*batch, m, r), an array or a QuantizedArray; or numbers of directions, (*batch, r), int32.
    left: Any = ABSENT
    right: Any = ABSENT  # Q, (*batch, n, r), likewise.
    refreshes: Any = ABSENT  # (*batch,), int32: how often a gradient chose a matrix' subspace.
    due: Any = ABSENT  # (*batch,), int32: the step from which on it is to be chosen again.
    gaps: Any = ABSENT  # (*batch,), int32: the matrix' gap in units of T; lazy refresh only.
    similarities: Any = ABSENT  # (*batch, queue), float32, -inf where empty; lazy refresh only.
    energy: Any = ABSENT  # (*batch,), float32: |R|^2 / |G|^2 of the last step; diagnostics only.
    overlap: Any = ABSENT  # (*batch,), float32: |P_new^T P_old|^2 / r; diagnostics only.


class Bases(NamedTuple):
    """The bases of a leaf's matrices, ready for products; None on a side that is not projected."""

    left: jax.Array | UnitVectors | None  # (*batch, m, r)
    right: jax.Array | UnitVectors | None  # (*batch, n, r)


PROJECTOR_DTYPES = ("float32", "bfloat16", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Side:
    """One projected side of one matrix: how its basis is chosen, stored, and loaded.

    Attributes:
      projector: chooses the directions.
      stored_dtype: one of ``PROJECTOR_DTYPES``, or None for ``dtype``.
      size: m, the rows of the basis.
      rank: r, its columns.
      dtype: of the basis in use.
      key: of this side of the matrix.
    """

    projector: Projector
    stored_dtype: str | None
    size: int
    rank: int
    dtype: Any
    key: jax.Array

    def choose(self, matrix: jax.Array, stored: Any, refreshes: jax.Array) -> tuple[Any, jax.Array]:
        """Chooses a basis of the columns of a matrix, for a refresh after so many others.

        Returns:
          What the state holds of the new basis, and |P_new^T P_old|^2 / r, (): its overlap with
          the old one, of which ``stored`` is held.

        Raises:
          ValueError: the projector returns another shape.
        """
        selects, first = self.projector.directions is not None, refreshes == 0
        old = self._load_chosen(stored, refreshes)
        old = old if selects else old.astype(self.dtype)
        key = fold_in(self.key, refreshes + 1)
        new = self.projector(matrix, self.rank, key=key, old=old, first=first)
        if selects:
            return new, jnp.mean(jnp.any(new[:, None] == old, axis=1).astype(jnp.float32))
        if jnp.shape(new) != (self.size, self.rank):
            raise ValueError(
                f"projector must return a basis of shape {(self.size, self.rank)} for a matrix of "
                f"shape {matrix.shape} and rank {self.rank}; got {jnp.shape(new)}"
            )
        new = new.astype(self.dtype)
        if self.projector.stored:
            new = orient(new, old, first)
        # Lazy refresh decides by it; without it GPUs would round the operands to TF32.
        turned = jnp.matmul(new.T, old, precision=jax.lax.Precision.HIGHEST)
        return self._store(new), jnp.sum(turned**2) / self.rank

    def initial(self) -> Any:
        """What the state holds of a basis that no gradient chose."""
        if self.projector.directions is not None:
            return jnp.arange(self.rank, dtype=jnp.int32)
        return self._store(jnp.eye(self.size, self.rank, dtype=self.dtype))

    def load(self, stored: Any, refreshes: jax.Array) -> jax.Array | UnitVectors:
        """The basis as the last of so many refreshes left it, (m, r)."""
        chosen = self._load_chosen(stored, refreshes)
        return self.projector.basis(chosen, self.size, self.dtype)

    def _load_chosen(self, stored: Any, refreshes: jax.Array) -> jax.Array:
        """What the projector chose: a basis, in the dtype it is stored in, or numbers."""
        if not self.projector.stored:
            like = jax.ShapeDtypeStruct((self.size, self.rank), self.dtype)
            key = fold_in(self.key, refreshes)
            return self.projector(like, self.rank, key=key).astype(self.dtype)
        return stored.dequantize() if is_quantized(stored) else stored

    def _store(self, basis: jax.Array) -> Any:
        if not self.projector.stored:
            return ABSENT
        if self.stored_dtype in ("int8", "int4"):
            return quantize(basis, self.stored_dtype)
        return basis.astype(self.stored_dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class Sides:
    """The sides of a leaf's matrices.

    Attributes:
      view: of the leaf.
      projector: chooses the directions.
      stored_dtype: one of ``PROJECTOR_DTYPES``, or None for that of the moments.
      seed: of the keys of the matrices, which depend besides on its path and their place alone.
      layer: which layer of the leaf its matrices here are of, or None for those of all layers.
    """

    view: MatrixView
    projector: Projector
    stored_dtype: str | None
    seed: int | jax.Array
    layer: Layer | None = None

    @property
    def keys(self) -> jax.Array:
        """One for each side of each matrix, (count, 2)."""
        count, layer = self.view.count, self.layer
        total = count if layer is None else layer.count * count
        # Numbers, where the seed is one, instead of a part of the program for every leaf.
        with jax.ensure_compile_time_eval():
            key, path = jax.random.key(self.seed), zlib.crc32(self.view.path.encode())
            keys = jax.random.split(jax.random.fold_in(key, path), (total, 2))
        if layer is None:
            return keys
        return jax.lax.dynamic_slice_in_dim(keys, layer.index * count, count)

    def of_matrix(self, keys: jax.Array) -> tuple[Side | None, Side | None]:
        """The left and the right side of the matrix of these keys, None where not projected."""
        view = self.view
        dtype = moment_dtype(view.dtype)
        left, right = (
            Side(self.projector, self.stored_dtype, size, view.rank, dtype, key)
            for size, key in zip((view.m, view.n), keys, strict=True)
        )
        return left if view.left else None, right if view.right else None

    def load(self, subspace: Subspace) -> Bases:
        """The bases of all matrices of the leaf, ready for products."""
        stored = (subspace.left, subspace.right)

        def one(stored: Any, refreshes: jax.Array, key: jax.Array) -> Bases:
            pairs = zip(self.of_matrix(key), stored, strict=True)
            return Bases(*(None if side is None else side.load(x, refreshes) for side, x in pairs))

        batch = self.view.batch
        if not batch:
            return one(stored, subspace.refreshes, self.keys[0])
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), stored)
        loaded = jax.vmap(one)(flat, subspace.refreshes.ravel(), self.keys)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), loaded)


def check_projector_dtype(dtype: Any) -> str | None:
    """The name of a dtype that projectors can be kept in, or None."""
    if dtype is None or dtype in PROJECTOR_DTYPES:
        return dtype
    raise ValueError(
        f"projector_dtype must be one of {', '.join(PROJECTOR_DTYPES)}, or None; got {dtype!r}"
    )


def init_subspace(sides: Sides, queue: int, diagnostics: bool) -> Subspace:
    """Orthonormal subspaces that no gradient chose, due at step 0.

    Args:
      sides: of the leaf.
      queue: the number of similarities to keep, 0 without lazy refresh.
      diagnostics: whether to keep diagnostics.
    """
    batch = sides.view.batch

    def basis(side: Side | None) -> Any:
        if side is None:
            return ABSENT
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), side.initial())

    left, right = sides.of_matrix(jax.random.split(jax.random.key(0)))
    return Subspace(
        left=basis(left),
        right=basis(right),
        refreshes=jnp.zeros(batch, jnp.int32),
        due=jnp.zeros(batch, jnp.int32),
        gaps=jnp.ones(batch, jnp.int32) if queue else ABSENT,
        similarities=jnp.full((*batch, queue), -jnp.inf, jnp.float32) if queue else ABSENT,
        energy=jnp.zeros(batch, jnp.float32) if diagnostics else ABSENT,
        overlap=jnp.zeros(batch, jnp.float32) if diagnostics else ABSENT,
    )


def project(matrices: jax.Array, bases: Bases) -> jax.Array:
    """R = P^T G Q.

    Args:
      matrices: (*batch, m, n).
      bases: of the same leaf.

    Returns:
      (*batch, r or m, r or n), in at least float32. The operands of each product are in the dtype
      of ``matrices``, which is what makes bfloat16 gradients fast; sums are in float32.
    """
    low_rank = matrices.astype(moment_dtype(matrices.dtype))
    if isinstance(bases.left, UnitVectors):
        low_rank = bases.left.select(low_rank, axis=-2)
    elif bases.left is not None:
        low_rank = _product("...mr,...mn->...rn", bases.left, low_rank, matrices.dtype)
    if isinstance(bases.right, UnitVectors):
        low_rank = bases.right.select(low_rank, axis=-1)
    elif bases.right is not None:
        low_rank = _product("...mn,...nr->...mr", low_rank, bases.right, matrices.dtype)
    return low_rank


def project_back(
    low_rank: jax.Array, bases: Bases, operand_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """P u Q^T, the adjoint of :func:`project`.

    Args:
      low_rank: (*batch, r or m, r or n).
      bases: of the same leaf.
      operand_dtype: dtype of the operands of each product; float32 in place of float16.

    Returns:
      (*batch, m, n), in at least float32.
    """
    operand_dtype = ranging_dtype(operand_dtype)
    if isinstance(bases.left, UnitVectors):
        low_rank = bases.left.place(low_rank, axis=-2)
    elif bases.left is not None:
        low_rank = _product("...mr,...rn->...mn", bases.left, low_rank, operand_dtype)
    if isinstance(bases.right, UnitVectors):
        low_rank = bases.right.place(low_rank, axis=-1)
    elif bases.right is not None:
        low_rank = _product("...mr,...nr->...mn", low_rank, bases.right, operand_dtype)
    return low_rank


def captured_energy(matrices: jax.Array, low_rank: jax.Array) -> jax.Array:
    """|R|^2 / |G|^2 of each matrix, (*batch,), float32; 0 where G is zero."""
    matrices = matrices.astype(low_rank.dtype)
    # Squares of very large or small entries would over- or underflow.
    peak = jnp.max(jnp.abs(matrices), axis=(-2, -1), keepdims=True)
    peak = jnp.where(peak == 0, 1, peak)
    kept, all_of_it = (jnp.sum((x / peak) ** 2, axis=(-2, -1)) for x in (low_rank, matrices))
    return (kept / jnp.where(all_of_it == 0, 1, all_of_it)).astype(jnp.float32)


def _product(
    subscripts: str, a: jax.Array, b: jax.Array, operand_dtype: jax.typing.DTypeLike
) -> jax.Array:
    return jnp.einsum(
        subscripts,
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        preferred_element_type=moment_dtype(operand_dtype),
    )
