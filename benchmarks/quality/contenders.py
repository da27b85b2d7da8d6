"""The optimizers that are compared, each a function that builds it, in one table."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import optax

import galore_optax

Make = Callable[..., optax.GradientTransformation]

# Decay rates of the moments of all contenders, and what is added to the root of the second.
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
# Updates from one choice of subspaces to the next.
GAP = 50
# The published factor of the projected-back update.
SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer, and where the sweep of its learning rate begins.

    Attributes:
      make: function of a learning rate, of ADAM, and of `rank` and `weight_dimension_numbers` of
        `galore_optax.galore`. Updates must be proportional to the learning rate, which is an
        argument of the compiled program: one of 1 goes in here.
      lr: peak learning rate in the middle of the first five, 0.01 times a power of two, so that
        the rates of one contender are rates of another.
      ratio: factor of it for the layers' matrices, likewise, which is then swept too; None for 1.
      ranked: whether the rank makes a difference.
      scale: the factor of the projected-back update.
      residual: what becomes of the gradient outside of the subspace.
    """

    make: Make
    lr: float
    ratio: float | None = None
    ranked: bool = True
    scale: float = SCALE
    residual: str = "discard"

    def lr_from_adamw(self, lr: float, rank: int | None, hidden: int) -> float:
        """The rate that the library's rule makes of AdamW's for the matrices."""
        fraction = (rank or 1) / hidden
        return galore_optax.learning_rate_from_adamw(lr, fraction, self.scale, self.residual)


def adamw(learning_rate: optax.ScalarOrSchedule, **options: Any) -> optax.GradientTransformation:
    """Optax' own, which knows nothing of subspaces."""
    return optax.adamw(learning_rate, **{k: options[k] for k in ADAM}, weight_decay=0.0)


def preset(make: Callable[..., optax.GradientTransformation], **method: Any) -> Make:
    """A preset of the library with these arguments, and without weight decay."""
    return functools.partial(make, weight_decay=0.0, **{"update_proj_gap": GAP} | method)


galore = functools.partial(preset, galore_optax.galore_adamw, scale=SCALE)
fira = functools.partial(preset, galore_optax.fira_adamw, scale=SCALE)

CONTENDERS = {
    "adamw": Contender(adamw, lr=0.04, ratio=0.0625, ranked=False),
    "galore": Contender(galore(), lr=0.02),
    "fira": Contender(fira(), lr=0.02),
    "fira, as its code": Contender(
        fira(residual=galore_optax.NormScaled(beta=1 / SCALE, subtract="scaled")), lr=0.02
    ),
    "fira, rotate": Contender(fira(transport="rotate"), lr=0.02),
    "apollo": Contender(preset(galore_optax.apollo_adamw), lr=0.02, scale=1.0),
    "apollo-mini": Contender(
        lambda lr, rank, **options: preset(galore_optax.apollo_mini_adamw)(lr, **options),
        lr=0.08,
        ratio=0.0625,
        ranked=False,
        scale=math.sqrt(128),
    ),
    "ldadam, no feedback": Contender(
        preset(galore_optax.ldadamw, update_proj_gap=1, scale=SCALE), lr=0.02
    ),
    "tracked": Contender(preset(galore_optax.tracked_adamw, update_proj_gap=1), lr=0.02),
    "frugal": Contender(preset(galore_optax.frugal_adamw, scale=SCALE), lr=0.02, residual="sign"),
}
# What all others are compared to.
ADAMW, GALORE = "adamw", "galore"
# AdamW as it is usually tuned, for the rule that makes our learning rate of its; no contender.
ONE_RATE = "adamw, one rate"
BUILDERS = CONTENDERS | {ONE_RATE: Contender(adamw, lr=0.01, ranked=False)}
