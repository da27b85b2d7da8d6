"""Says how a leaf is seen: as a batch of matrices, one or both axes projected, or as it is."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact, Shaped

from galore_optax._types import DType, Shape


class DimensionNumbers(NamedTuple):
    """Which axes of a leaf form its matrix; all other axes are batch axes.

    It is the counterpart of ``optax.contrib.MuonDimensionNumbers``, which is accepted as well.

    Attributes:
      reduction_axis: the axis or axes contracted with the layer's input; merged in the order
        given they are the rows m of the matrix.
      output_axis: the axis or axes of the layer's output, which are the columns n of the matrix.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


@dataclasses.dataclass(frozen=True)
class Unprojected:
    """A leaf that goes through the inner transformation at full size.

    Attributes:
      path: the leaf's path, components joined by "/".
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      reason: why it is not projected.
    """

    path: str = dataclasses.field(compare=False)
    shape: Shape
    dtype: jnp.dtype
    reason: str


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A projected leaf, seen as a batch of (m, n) matrices.

    Views are equal where leaves are seen alike, whatever their paths: what is traced and compiled
    for one leaf serves for all others like it.

    Attributes:
      path: the leaf's path, components joined by "/".
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      batch_axes: the axes over which the matrices are stacked, in the leaf's order.
      reduction_axes: the axes that are merged into the m rows.
      output_axes: the axes that are merged into the n columns.
      rank: the rank r, with 0 < r < min(m, n).
      left: whether the rows are projected, by an (m, r) basis.
      right: whether the columns are projected, by an (n, r) basis.
    """

    path: str = dataclasses.field(compare=False)
    shape: Shape
    dtype: jnp.dtype
    batch_axes: Shape
    reduction_axes: Shape
    output_axes: Shape
    rank: int
    left: bool
    right: bool

    @property
    def batch(self) -> Shape:
        """The sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return math.prod(self.batch)

    @property
    def m(self) -> int:
        """The number of rows of a matrix."""
        return math.prod(self.shape[axis] for axis in self.reduction_axes)

    @property
    def n(self) -> int:
        """The number of columns of a matrix."""
        return math.prod(self.shape[axis] for axis in self.output_axes)

    @property
    def short(self) -> int:
        """The length of the shorter side of a matrix."""
        return min(self.m, self.n)

    @property
    def low_rank_shape(self) -> Shape:
        """The shape of the low-rank gradient R, and so of the moments: (*batch, r or m, r or n)."""
        return (
            *self.batch,
            self.rank if self.left else self.m,
            self.rank if self.right else self.n,
        )

    @property
    def _order(self) -> Shape:
        return self.batch_axes + self.reduction_axes + self.output_axes

    def to_matrices(self, leaf: Shaped[Array, "..."]) -> Shaped[Array, "*batch m n"]:
        """Returns the leaf as a batch of matrices."""
        return leaf.transpose(self._order).reshape(*self.batch, self.m, self.n)

    def from_matrices(self, matrices: Shaped[Array, "*batch m n"]) -> Shaped[Array, "..."]:
        """Returns the leaf from which :meth:`to_matrices` makes these matrices."""
        transposed = tuple(self.shape[axis] for axis in self._order)
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        return matrices.reshape(transposed).transpose(inverse)


LeafView: TypeAlias = MatrixView | Unprojected


def moment_dtype(dtype: DType) -> jnp.dtype:
    """Returns the dtype of factorizations and moments: the leaf's own, but at least float32."""
    dtype = jnp.dtype(dtype)
    is_narrow = not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if is_narrow else dtype


def ranging_dtype(dtype: DType) -> jnp.dtype:
    """Returns the dtype, or float32 in place of one with fewer exponents, such as float16.

    Squares of gradients, and updates after the learning rate, are smaller than what such dtypes
    can represent.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.dtype(dtype)
    few = jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp
    return jnp.dtype(jnp.float32 if few else dtype)


def wide(array: ArrayLike) -> Inexact[Array, "..."]:
    """Returns an array in the dtype that its moments have: its own, but at least float32."""
    array = jnp.asarray(array)
    return array.astype(moment_dtype(array.dtype))


def unit_of(
    array: Float[Array, "..."], axis: int | None = None, *, keepdims: bool = False
) -> Float[Array, "..."]:
    """Returns by what to divide an array before its entries are squared, lest that overflow.

    It is the largest magnitude along an axis, or of all; 1 where that is zero or not finite.
    """
    peak = jnp.max(jnp.abs(array), axis, keepdims=keepdims)
    return jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
