"""Turns the learning rate of a tuned AdamW into one for a preset, by the size of updates."""

import math
import numbers
from typing import overload

import optax

from galore_optax._residual import Residual
from galore_optax._residuals import RESIDUALS, Sign
from galore_optax._tables import resolve


@overload
def learning_rate_from_adamw(
    learning_rate: float,
    rank: int | float,
    scale: int | float = ...,
    residual: str | Residual = ...,
) -> float: ...
@overload
def learning_rate_from_adamw(
    learning_rate: optax.Schedule,
    rank: int | float,
    scale: int | float = ...,
    residual: str | Residual = ...,
) -> optax.Schedule: ...
def learning_rate_from_adamw(
    learning_rate: float | optax.Schedule,
    rank: int | float,
    scale: int | float = 0.25,
    residual: str | Residual = "discard",
) -> float | optax.Schedule:
    r"""Returns the learning rate with which a preset moves matrices as far as AdamW does.

    An entry of Adam's update is of the size of the learning rate. With the update in a subspace
    of a share q = r / m of the directions, the root of the mean square of an entry of the matrix is
    :math:`\alpha \sqrt q`, which is made up for:

    .. math::
      \eta = \frac{\eta_{AdamW}}{\alpha \sqrt{q + \beta^2 (1 - q)}}

    Here beta is the size of what `Sign` adds outside of the subspace. What other residuals add
    has no size that is known beforehand, and counts for nothing. Other parameters than the
    projected ones get the same learning rate, as in all presets.

    It is a heuristic, for a start without a sweep; docs/choosing.md says how close it came, and
    where.

    Args:
      learning_rate: that of AdamW, for the matrices that will be projected; a number or a schedule.
      rank: the rank as a fraction of the matrices' short side, in (0, 1], such as 128 / 512; of
        `galore_optax.apollo_mini_adamw` 1 / 512.
      scale: alpha, as the preset gets it; sqrt(128) by default in `galore_optax.apollo_mini_adamw`,
        and 1 in `galore_optax.apollo_adamw`.
      residual: as the preset gets it; ``"sign"`` for `galore_optax.frugal_adamw`.

    Returns:
      A number, or a schedule.

    Raises:
      ValueError: rank or scale out of range, or an unknown residual.

    Examples:
      >>> import galore_optax
      >>> galore_optax.learning_rate_from_adamw(1e-3, rank=128 / 512, scale=0.25)
      0.008
    """
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real) or not 0 < float(rank) <= 1:
        raise ValueError(
            "rank of learning_rate_from_adamw must be a fraction of the matrices' short side, in "
            f"(0, 1], such as 128 / 512; got {rank!r}"
        )
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < scale < math.inf:
        raise ValueError(
            f"scale of learning_rate_from_adamw must be a finite number above 0; got {scale!r}"
        )
    rule = resolve("residual", residual, RESIDUALS, Residual)
    outside = rule.beta**2 * (1 - rank) if isinstance(rule, Sign) else 0.0
    size = scale * math.sqrt(rank + outside)
    if callable(learning_rate):
        return lambda count: learning_rate(count) / size
    return learning_rate / size
