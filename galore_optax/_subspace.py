"""What the state holds of the subspace of a matrix, or of a leaf's matrices, or of all leaves."""

from typing import NamedTuple

import optax
from jaxtyping import PyTree

ABSENT = optax.MaskedNode()
"""Stands in the state wherever there is nothing: no projector on that side, or no matrix."""


def is_absent(x: object) -> bool:
    """Whether there is nothing here."""
    return isinstance(x, optax.MaskedNode)


class Subspace(NamedTuple):
    """The subspaces of a leaf's matrices, or trees of these over the leaves of the parameters.

    R = left^T G right, where an absent side is the identity, or a basis that is made again from
    its key whenever it is needed. For a leaf that is not projected all fields are absent.
    """

    # P, (*batch, m, r), an array or a QuantizedArray; or numbers of directions, (*batch, r), int32.
    left: PyTree = ABSENT
    right: PyTree = ABSENT  # Q, (*batch, n, r), in one of the same forms.
    refreshes: PyTree = ABSENT  # (*batch,), int32: how often a gradient chose a matrix' subspace.
    due: PyTree = ABSENT  # (*batch,), int32: the step from which on to choose the subspace again.
    gaps: PyTree = ABSENT  # (*batch,), int32: the matrix' gap in units of T; lazy refresh only.
    similarities: PyTree = ABSENT  # (*batch, queue), float32, -inf where empty; lazy refresh only.
    energy: PyTree = ABSENT  # (*batch,), float32: |R|^2 / |G|^2 of the last step; diagnostics only.
    overlap: PyTree = ABSENT  # (*batch,), float32: |P_new^T P_old|^2 / r; diagnostics only.
    residual: PyTree = ABSENT  # what the residual keeps of a matrix, (*batch, ...) each.
    transport: PyTree = ABSENT  # what the transport keeps of a matrix, likewise.
