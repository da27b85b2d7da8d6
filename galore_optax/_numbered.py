"""Defines bases of which the state holds the numbers of directions, instead of these."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from galore_optax._basis import Basis, Dense, Side
from galore_optax._directions import cosines
from galore_optax._storage import Storage, Stored
from galore_optax._types import DType, MeshAxes
from galore_optax._view import moment_dtype


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """What types of bases share of which the state holds the numbers of directions, (r,), int32."""

    numbers: PyTree

    def keep(self, storage: Storage) -> Stored:
        """Returns the numbers of the directions."""
        del storage
        return self.numbers

    def choice(self, side: Side) -> Int[Array, " r"]:
        """Returns the numbers of the directions."""
        del side
        return self.numbers

    def squares(self, low_rank: Float[Array, "a b"], side: Side) -> Float[Array, " k"]:
        """Returns the squared norms of the vectors of R, since directions are orthonormal."""
        return jnp.sum(low_rank**2, axis=side.axis)

    def turned(self, old: Basis, side: Side) -> Float[Array, "r r"]:
        """Returns C, which only says which direction was which before."""
        return (self.numbers[:, None] == old.choice(side)[None]).astype(side.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cosines(_Numbered, Dense):
    """Columns of the cosine transform, of which the state holds the numbers.

    Attributes:
      matrix: P, (m, r).
      numbers: which columns they are, (r,), int32, all different.
    """

    @classmethod
    def initial(cls, side: Side) -> Cosines:
        """Returns the first columns."""
        return cls._of(jnp.arange(side.rank, dtype=jnp.int32), side)

    @classmethod
    def chosen(
        cls, choice: Int[Array, " r"], old: Basis, side: Side, first: Bool[Array, ""]
    ) -> Cosines:
        """Returns the columns of which the projector chose the numbers."""
        del old, first
        return cls._of(choice, side)

    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> Cosines:
        """Returns the columns of which the state holds the numbers; see :meth:`Dense.load`."""
        del storage, again
        return cls._of(stored, side)

    @classmethod
    def _of(cls, numbers: Int[Array, " r"], side: Side) -> Cosines:
        return cls(cosines(numbers, side.size, side.dtype), numbers)

    @classmethod
    def placed(cls, batch: tuple[MeshAxes, ...], axis: MeshAxes) -> PyTree:
        """Returns a basis of specs; see :meth:`Dense.placed`."""
        return cls(PartitionSpec(*batch, axis, None), PartitionSpec(*batch, None))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows(_Numbered):
    """A basis of unit vectors, with which nothing is multiplied: products with it only move rows.

    Attributes:
      numbers: for each column the row in which its one stands, (r,), int32, all different.
    """

    @classmethod
    def initial(cls, side: Side) -> Rows:
        """Returns the first rows."""
        return cls(jnp.arange(side.rank, dtype=jnp.int32))

    @classmethod
    def chosen(
        cls, choice: Int[Array, " r"], old: Basis, side: Side, first: Bool[Array, ""]
    ) -> Rows:
        """Returns the rows of which the projector chose the numbers."""
        del old, side, first
        return cls(choice)

    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> Rows:
        """Returns the rows of which the state holds the numbers; see :meth:`Dense.load`."""
        del side, storage, again
        return cls(stored)

    def down(self, matrix: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns the rows of a matrix that are selected, or its columns."""
        del dtype
        numbers = jnp.expand_dims(self.numbers, 1 - side.axis)
        matrix = matrix.astype(moment_dtype(matrix.dtype))
        return jnp.take_along_axis(matrix, numbers, side.axis, mode="promise_in_bounds")

    def up(self, low_rank: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns a matrix whose selected rows, or columns, are given, and whose others are zero.

        This is the adjoint of :meth:`down`.
        """
        del dtype
        # This is for each of the m rows the column that selects it, or r where none does. To look
        # up what is read, rather than what is written, fuses with what the update is added to.
        columns = jnp.full(side.size, side.rank, self.numbers.dtype)
        columns = columns.at[self.numbers].set(jnp.arange(side.rank, dtype=self.numbers.dtype))
        columns = jnp.expand_dims(columns, 1 - side.axis)
        # What is looked up is kept; XLA would rather keep several arrays of which it is made.
        low_rank = jax.lax.optimization_barrier(low_rank)
        return jnp.take_along_axis(low_rank, columns, side.axis, mode="fill", fill_value=0)

    def moves(self) -> bool:
        """Returns that products with the basis only move numbers."""
        return True

    @classmethod
    def placed(cls, batch: tuple[MeshAxes, ...], axis: MeshAxes) -> PyTree:
        """Returns a basis of specs; see :meth:`Dense.placed`."""
        del axis
        return cls(PartitionSpec(*batch, None))


class Sampled(NamedTuple):
    """Rows that were drawn at random, some perhaps more than once, and their weights."""

    numbers: PyTree  # the row of each direction, (r,), int32.
    weights: PyTree  # by what the entry of that row is multiplied, (r,).


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedRows:
    """A basis of unit vectors with weights, among which a vector may be there more than once.

    Attributes:
      sampled: the rows in which the entries other than zero stand, and these entries.
    """

    sampled: Sampled

    @classmethod
    def initial(cls, side: Side) -> WeightedRows:
        """Returns the first rows, with weights of one."""
        numbers = jnp.arange(side.rank, dtype=jnp.int32)
        return cls(Sampled(numbers, jnp.ones(side.rank, side.dtype)))

    @classmethod
    def chosen(
        cls, choice: Sampled, old: Basis, side: Side, first: Bool[Array, ""]
    ) -> WeightedRows:
        """Returns the rows that the projector drew."""
        del old, first
        return cls(Sampled(choice.numbers, choice.weights.astype(side.dtype)))

    @classmethod
    def load(
        cls, stored: Stored, side: Side, storage: Storage, again: Callable[[], PyTree]
    ) -> WeightedRows:
        """Returns the rows that the state holds; see :meth:`Dense.load`."""
        del side, storage, again
        return cls(stored)

    def keep(self, storage: Storage) -> Stored:
        """Returns the numbers of the rows and their weights."""
        del storage
        return self.sampled

    def choice(self, side: Side) -> Sampled:
        """Returns what the projector drew."""
        del side
        return self.sampled

    def down(self, matrix: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns the rows of a matrix that were drawn, or its columns, times their weights."""
        rows = Rows(self.sampled.numbers).down(matrix, side, dtype)
        return rows * jnp.expand_dims(self.sampled.weights, 1 - side.axis).astype(rows.dtype)

    def up(self, low_rank: Float[Array, "a b"], side: Side, dtype: DType) -> Float[Array, "c d"]:
        """Returns the sum of what is given for each row, times its weights.

        This is the adjoint of :meth:`down`.
        """
        del dtype
        weighted = low_rank * jnp.expand_dims(self.sampled.weights, 1 - side.axis)
        rows = weighted if side.axis == 0 else weighted.T
        zeros = jnp.zeros((side.size, rows.shape[1]), weighted.dtype)
        summed = zeros.at[self.sampled.numbers].add(rows)
        return summed if side.axis == 0 else summed.T

    def squares(self, low_rank: Float[Array, "a b"], side: Side) -> Float[Array, " k"]:
        """Returns the squared norms of the vectors of P R, or R P^T; see :meth:`Dense.squares`."""
        return jnp.sum(self.up(low_rank, side, low_rank.dtype) ** 2, axis=side.axis)

    def turned(self, old: Basis, side: Side) -> Float[Array, "r r"]:
        """Returns C = P_new^T P_old."""
        before, now = old.choice(side), self.sampled
        alike = now.numbers[:, None] == before.numbers[None]
        return jnp.where(alike, now.weights[:, None] * before.weights[None], 0)

    def moves(self) -> bool:
        """Returns that products with the basis do more, since there are weights."""
        return False

    @classmethod
    def placed(cls, batch: tuple[MeshAxes, ...], axis: MeshAxes) -> PyTree:
        """Returns a basis of specs; see :meth:`Dense.placed`."""
        del axis
        return cls(Sampled(PartitionSpec(*batch, None), PartitionSpec(*batch, None)))
