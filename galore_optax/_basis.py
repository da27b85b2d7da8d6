"""Defines what a basis of one side of a matrix is: how it is kept, loaded, and multiplied with.

A type of basis is a class like `Dense`, which the table of projectors names. It says what the state
holds of a basis (:meth:`Dense.keep`), how the basis comes of that again (:meth:`Dense.load`), and
what its products are (:meth:`Dense.down`, :meth:`Dense.up`, :meth:`Dense.turned`). All of it is
about one matrix; stacks of matrices are mapped over elsewhere. Bases of which the numbers of
directions are kept are in `_numbered.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from galore_optax._storage import Storage, Stored
from galore_optax._types import DType, MeshAxes
from galore_optax._view import moment_dtype


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of a matrix that is projected.

    Attributes:
      axis: 0 where the rows are projected, 1 where the columns are.
      size: m, the number of rows or columns.
      rank: r, how many directions are kept of them.
      dtype: the dtype of the basis in use.
    """

    axis: int
    size: int
    rank: int
    dtype: DType


@runtime_checkable
class Basis(Protocol):
    """What every type of basis can do; `Dense` says what each member means."""

    @classmethod
    def initial(cls, side: Side) -> Basis: ...
    @classmethod
    def chosen(cls, choice: PyTree, old: Basis, side: Side, first: Bool[Array, ""]) -> Basis: ...
    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> Basis: ...
    def keep(self, storage: Storage) -> Stored: ...
    def choice(self, side: Side) -> PyTree: ...
    def down(self, matrix: Array, side: Side, dtype: DType) -> Array: ...
    def up(self, low_rank: Array, side: Side, dtype: DType) -> Array: ...
    def squares(self, low_rank: Array, side: Side) -> Array: ...
    def turned(self, old: Basis, side: Side) -> Array: ...
    def moves(self) -> bool: ...
    @classmethod
    def placed(cls, batch: tuple[MeshAxes, ...], axis: MeshAxes) -> PyTree: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A basis that is a matrix, and is kept.

    Attributes:
      matrix: P, (m, r), in the dtype in which it is stored.
    """

    matrix: PyTree

    @classmethod
    def initial(cls, side: Side) -> Dense:
        """Returns an orthonormal basis that no gradient chose."""
        return cls(jnp.eye(side.size, side.rank, dtype=side.dtype))

    @classmethod
    def chosen(
        cls, choice: Float[Array, "m r"], old: Basis, side: Side, first: Bool[Array, ""]
    ) -> Dense:
        """Returns the basis that a projector chose to replace another one.

        Args:
          choice: what the projector returned.
          old: the basis that is replaced.
          side: the side of the matrix that the basis is for.
          first: whether no gradient chose ``old``.

        Raises:
          ValueError: the projector returned something of another shape.
        """
        if np.shape(choice) != (side.size, side.rank):
            raise ValueError(
                f"projector must return a basis of shape {(side.size, side.rank)} for a matrix "
                f"with {side.size} rows and rank {side.rank}; got {np.shape(choice)}"
            )
        return cls(orient(choice.astype(side.dtype), old.choice(side), first))

    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> Dense:
        """Returns the basis of which the state holds ``stored``.

        Args:
          stored: what :meth:`keep` returned.
          side: the side of the matrix that the basis is for.
          storage: the form, and so the number of bits, in which the basis is held.
          again: a function that makes the projector choose as it did at the last refresh, without a
            matrix.
        """
        del side, again
        return cls(storage.load(stored))

    def keep(self, storage: Storage) -> Stored:
        """Returns what the state holds of the basis."""
        return storage.keep(self.matrix)

    def choice(self, side: Side) -> Float[Array, "m r"]:
        """Returns what the projector chose, for the next choice to start from."""
        return self.matrix.astype(side.dtype)

    def down(self, matrix: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns a matrix with its ``side.axis`` projected: P^T G, or G P.

        Args:
          matrix: the matrix, with m rows or columns.
          side: the side to project.
          dtype: the dtype of the operands; sums are at least in float32.
        """
        if side.axis == 0:
            return _product("mr,mn->rn", self.matrix, matrix, dtype)
        return _product("mn,nr->mr", matrix, self.matrix, dtype)

    def up(self, low_rank: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns P R, or R P^T: the adjoint of :meth:`down`, with the same arguments."""
        if side.axis == 0:
            return _product("mr,rn->mn", self.matrix, low_rank, dtype)
        return _product("mr,nr->mn", low_rank, self.matrix, dtype)

    def squares(self, low_rank: Float[Array, "a b"], side: Side) -> Float[Array, " k"]:
        """Returns the squared norms of the vectors of P R, or R P^T, along the side.

        Args:
          low_rank: R, with r rows or columns.
          side: the side that is projected.
        """
        # The matrix need not be orthonormal: codes are rounded, and random entries only nearly so.
        basis = self.matrix.astype(side.dtype)
        gram = jnp.matmul(basis.T, basis, precision=jax.lax.Precision.HIGHEST)
        vectors = low_rank if side.axis == 0 else low_rank.T
        product = jnp.matmul(gram, vectors, precision=jax.lax.Precision.HIGHEST)
        return jnp.sum(vectors * product, axis=0)

    def turned(self, old: Basis, side: Side) -> Float[Array, "r r"]:
        """Returns C = P_new^T P_old, which takes coordinates in the old basis to the new one."""
        # Lazy refresh decides by it; without the precision GPUs would round the operands to TF32.
        return jnp.matmul(
            self.matrix.T,
            old.choice(side),
            precision=jax.lax.Precision.HIGHEST,
        )

    def moves(self) -> bool:
        """Returns whether products with the basis only move numbers."""
        return False

    @classmethod
    def placed(cls, batch: tuple[MeshAxes, ...], axis: MeshAxes) -> PyTree:
        """Returns a basis with a ``PartitionSpec`` in the place of each array.

        Args:
          batch: the mesh axes that each axis along which matrices are stacked is sharded over.
          axis: the mesh axes that the side of the matrix is sharded over.
        """
        return cls(PartitionSpec(*batch, axis, None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regenerated(Dense):
    """A random basis, of which the state holds nothing: it is made again from the matrix' key."""

    @classmethod
    def chosen(
        cls, choice: Float[Array, "m r"], old: Basis, side: Side, first: Bool[Array, ""]
    ) -> Regenerated:
        """Returns the basis as the projector chose it, since its signs are made again with it."""
        del old, first
        return cls(choice.astype(side.dtype))

    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> Regenerated:
        """Returns the basis that the projector chooses again; see :meth:`Dense.load`."""
        del stored, storage
        return cls(again().astype(side.dtype))

    def keep(self, storage: Storage) -> Stored:
        """Returns nothing."""
        del storage
        return optax.MaskedNode()


def orient(
    new: Float[Array, "m r"], old: Float[Array, "m r"], first: Bool[Array, ""]
) -> Float[Array, "m r"]:
    """Gives every basis vector the sign that keeps moments meaningful across a refresh.

    Singular vectors have no sign of their own, but the moments that are kept do. At the first
    refresh the entry of largest magnitude of each vector becomes positive; later each vector
    takes the sign that makes the diagonal of new^T old non-negative.

    Args:
      new: the new basis.
      old: the basis it replaces.
      first: whether ``old`` was never chosen from a gradient.

    Returns:
      The columns of ``new``, some of them negated.
    """
    # The entry of largest magnitude is negative where the least entry exceeds the largest entry in
    # magnitude: where their sum is negative.
    peaks = jnp.max(new, axis=0) + jnp.min(new, axis=0)
    reference = jnp.where(first, peaks, jnp.sum(new * old, axis=0))
    return jnp.where(reference < 0, -new, new)


def _product(
    subscripts: str, a: Shaped[Array, ...], b: Shaped[Array, ...], operand_dtype: DType
) -> Float[Array, "a b"]:
    return jnp.einsum(
        subscripts,
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        preferred_element_type=moment_dtype(operand_dtype),
    )
