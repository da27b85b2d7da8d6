"""The subspaces of a leaf's matrices, and the way into them and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._matrix import MatrixView, moment_dtype

ABSENT = optax.MaskedNode()
"""Stands in the state wherever there is nothing: no projector on that side, or no matrix."""


def is_absent(x: Any) -> bool:
    """Whether there is nothing here."""
    return isinstance(x, optax.MaskedNode)


class Subspace(NamedTuple):
    """The subspaces of a leaf's matrices, or trees of these over the leaves of the parameters.

    R = left^T G right, where an absent side is the identity. Of a leaf that is not projected all
    is absent.
    """

    left: Any = ABSENT  # P, (*batch, m, r), float32 (float64 for float64 leaves), or ABSENT.
    right: Any = ABSENT  # Q, (*batch, n, r), likewise.
    refreshes: Any = ABSENT  # (*batch,), int32: how often a gradient chose a matrix' subspace.
    due: Any = ABSENT  # (*batch,), int32: the step from which on it is to be chosen again.


def init_subspace(view: MatrixView) -> Subspace:
    """An orthonormal subspace that no gradient chose, due at step 0."""

    def basis(shape: tuple[int, ...] | None) -> Any:
        if shape is None:
            return ABSENT
        return jnp.broadcast_to(jnp.eye(*shape[-2:], dtype=moment_dtype(view.dtype)), shape)

    left, right = basis_shapes(view)
    return Subspace(
        left=basis(left),
        right=basis(right),
        refreshes=jnp.zeros(view.batch, jnp.int32),
        due=jnp.zeros(view.batch, jnp.int32),
    )


def basis_shapes(view: MatrixView) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Shapes of the left and the right basis of a leaf, None for an absent one."""
    return (
        (*view.batch, view.m, view.rank) if view.left else None,
        (*view.batch, view.n, view.rank) if view.right else None,
    )


def project(matrices: jax.Array, subspace: Subspace) -> jax.Array:
    """R = P^T G Q.

    Args:
      matrices: (*batch, m, n).
      subspace: of the same leaf.

    Returns:
      (*batch, r or m, r or n), in at least float32. The operands of each product are in the dtype
      of ``matrices``, which is what makes bfloat16 gradients fast; sums are in float32.
    """
    low_rank = matrices.astype(moment_dtype(matrices.dtype))
    if not is_absent(subspace.left):
        low_rank = _product("...mr,...mn->...rn", subspace.left, low_rank, matrices.dtype)
    if not is_absent(subspace.right):
        low_rank = _product("...mn,...nr->...mr", low_rank, subspace.right, matrices.dtype)
    return low_rank


def project_back(
    low_rank: jax.Array, subspace: Subspace, operand_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """P u Q^T, the adjoint of :func:`project`.

    Args:
      low_rank: (*batch, r or m, r or n).
      subspace: of the same leaf.
      operand_dtype: dtype of the operands of each product.

    Returns:
      (*batch, m, n), in at least float32.
    """
    if not is_absent(subspace.left):
        low_rank = _product("...mr,...rn->...mn", subspace.left, low_rank, operand_dtype)
    if not is_absent(subspace.right):
        low_rank = _product("...mr,...nr->...mn", low_rank, subspace.right, operand_dtype)
    return low_rank


def _product(
    subscripts: str, a: jax.Array, b: jax.Array, operand_dtype: jax.typing.DTypeLike
) -> jax.Array:
    return jnp.einsum(
        subscripts,
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        preferred_element_type=moment_dtype(operand_dtype),
    )
