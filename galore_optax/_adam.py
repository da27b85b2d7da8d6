"""Says what is known of the moments of an inner transformation, Adam's above all."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from galore_optax._arguments import check_rate
from galore_optax._errors import CombinationError
from galore_optax._ownership import Role
from galore_optax._types import Numeric, Scalar


class Betas(NamedTuple):
    """The decay rates of Adam's two moments."""

    b1: Numeric
    b2: Numeric

    def corrections(self, count: Scalar) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns 1 - b1^t and 1 - b2^t, by which moments that ``count`` steps made are divided."""
        return 1 - jnp.power(self.b1, count), 1 - jnp.power(self.b2, count)

    def bias(self, count: Scalar) -> Float[Array, ""]:
        """Returns by what the correction of both moments' bias divides Adam's update."""
        first, second = self.corrections(count)
        return first / jnp.sqrt(second)


class Trial(NamedTuple):
    """What the inner transformation did when it was tried on a leaf that is projected."""

    of_one: float  # what its first step makes of a gradient of 1.
    uses_params: bool  # whether that depends on the parameters.
    betas: Betas | None  # the decay rates where its moments are Adam's.
    afresh: float  # its second step with moments made zero, over its first one.


class Findings(NamedTuple):
    """What was found out about the inner transformation and one leaf that is projected."""

    roles: Mapping[Role, int]  # how many moments of each role it has.
    unknown: tuple[str, ...]  # the paths of what else it has of the moments' shape.
    others: tuple[str, ...]  # the paths of what it has of other shapes, numbers left out.
    trial: Callable[[], Trial | None]  # tries it; None where that was done, or cannot be done.


def check_scales_only(what: str, trial: Trial | None) -> None:
    """Raises an error where the inner transformation was seen to do more than to scale.

    Args:
      what: what needs one that only scales, for the message.
      trial: what it did when it was tried, if it was.

    Raises:
      CombinationError: it applies the learning rate, a sign, or decay.
    """
    if trial is None or (trial.of_one > 0 and not trial.uses_params):
        return
    reason = (
        "uses the parameters, as weight decay does"
        if trial.uses_params
        else f"makes {trial.of_one:.3g} of a gradient of 1, so that it has the learning rate or "
        "the sign already"
    )
    raise CombinationError(
        f"{what} needs an inner transformation that only scales, and this one {reason}",
        "Put decay and learning rate after galore(optax.scale_by_adam(), ...), or take a preset "
        "such as galore_adamw, which does so.",
    )


def check_decay(what: str, argument: str, given: Numeric | None, own: Numeric, remedy: str) -> None:
    """Raises an error where a decay rate that was given is not that of the moment.

    Args:
      what: what it was given to.
      argument: its name.
      given: it; anything but a number of Python is taken for right.
      own: the decay rate of the inner transformation's moment, to six digits.
      remedy: what to write instead.

    Raises:
      CombinationError: they differ.
    """
    if isinstance(given, int | float) and abs(given - own) > 0.05 * (1 - own) + 1e-5:
        raise CombinationError(
            f"{argument} of {what} is {given}, and the moments of the inner transformation decay "
            f"by {own:.4g}",
            f"Give {remedy}.",
        )


def check_betas(name: str, b1: object, b2: object) -> None:
    """Raises an error where the decay rates of moments cannot be right, as far as they are known.

    Raises:
      TypeError: one is neither a number nor None.
      ValueError: one is not in [0, 1).
    """
    for argument, value in (("b1", b1), ("b2", b2)):
        if value is not None:
            check_rate(f"{argument} of {name}", value)
