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

    Attributes:
      left: P, (*batch, m, r), an array or a `QuantizedArray`; or numbers of directions,
        (*batch, r), int32.
      right: Q, (*batch, n, r), in one of the same forms.
      refreshes: how often a gradient chose a matrix' subspace, (*batch,), int32.
      due: the step from which on to choose the subspace again, (*batch,), int32.
      gaps: the matrix' gap in units of T, (*batch,), int32; with lazy refreshes only.
      similarities: the last ones, -inf where empty, (*batch, queue), float32; with lazy refreshes
        only.
      energy: |R|^2 / |G|^2 of the last step, (*batch,), float32; with diagnostics only.
      overlap: |P_new^T P_old|^2 / r, (*batch,), float32; with diagnostics only.
      residual: what the residual keeps of a matrix, (*batch, ...) each.
      transport: what the transport keeps of a matrix, likewise.
    """

    left: PyTree = ABSENT
    right: PyTree = ABSENT
    refreshes: PyTree = ABSENT
    due: PyTree = ABSENT
    gaps: PyTree = ABSENT
    similarities: PyTree = ABSENT
    energy: PyTree = ABSENT
    overlap: PyTree = ABSENT
    residual: PyTree = ABSENT
    transport: PyTree = ABSENT
