"""Lists the keyword arguments of galore, which all presets take, once for all of them."""

import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import TypedDict, TypeVar

import jax
import optax
from jaxtyping import Array

from galore_optax._arguments import checks_arguments
from galore_optax._galore import galore
from galore_optax._ranks import RankSpec
from galore_optax._refresh import Gap, Refresh
from galore_optax._residual import Residual
from galore_optax._select import DimensionNumbersSpec, ExcludeSpec, Selection
from galore_optax._transport import Transport
from galore_optax._types import Scalar

Preset = TypeVar("Preset", bound=Callable[..., optax.GradientTransformationExtraArgs])


class GaloreOptions(TypedDict, total=False):
    """The keyword arguments of `galore_optax.galore`, for type checkers."""

    rank: RankSpec
    update_proj_gap: Gap
    scale: Scalar
    projector: str | Callable[..., Array]
    projector_options: Mapping[str, object] | None
    projector_dtype: str | None
    refresh: str | Refresh
    stagger: bool
    transport: str | Transport
    residual: str | Residual
    side: str
    exclude: ExcludeSpec
    weight_dimension_numbers: DimensionNumbersSpec
    accumulation_steps: int | None
    seed: int | Array
    diagnostics: bool


def selection_of(options: GaloreOptions) -> Selection:
    """Returns what decides, for galore with these options, how leaves are seen."""
    default = Selection()
    return Selection(
        options.get("rank", default.rank),
        options.get("side", default.side),
        options.get("exclude", default.exclude),
        options.get("weight_dimension_numbers", default.weight_dimension_numbers),
    )


def shows_galore_options(defaults: GaloreOptions | None = None) -> Callable[[Preset], Preset]:
    """Decorates a preset whose last parameter is ``**options: Unpack[GaloreOptions]``.

    Its signature then has the keyword arguments of galore instead, with galore's defaults or the
    given ones: ``help`` shows them, and ``optax.inject_hyperparams`` binds arguments by name. Its
    own arguments are checked.

    Args:
      defaults: the defaults that differ from galore's.
    """

    def decorate(preset: Preset) -> Preset:
        signature = inspect.signature(preset)
        *own, _ = signature.parameters.values()
        options = [
            parameter.replace(default=(defaults or {}).get(name, parameter.default))
            for name, parameter in inspect.signature(galore).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        checked = checks_arguments(preset)
        vars(checked)["__signature__"] = signature.replace(parameters=[*own, *options])
        return checked

    return decorate


def check_accumulation(name: str, options: GaloreOptions) -> None:
    """Raises an error where gradients would be averaged at rank r.

    What comes after galore, such as a schedule, would take each of them for a step.
    """
    steps = options.get("accumulation_steps")
    if steps is not None and steps != 1:
        raise ValueError(
            f"accumulation_steps of {name} must be 1, since what follows galore in it counts "
            f"steps; got {steps!r}. Put optax.MultiSteps around it instead."
        )


def warn_of_calls(name: str, learning_rate: object, options: GaloreOptions) -> None:
    """Warns where a schedule around a preset may take each gradient of a step for a step.

    Args:
      name: the name of the preset.
      learning_rate: what it was given for a learning rate; an array under
        ``optax.inject_hyperparams``, which evaluates schedules itself.
      options: the arguments of galore.
    """
    steps = options.get("accumulation_steps") or 1
    is_known = isinstance(steps, numbers.Integral)  # galore raises an error for anything else.
    if is_known and steps > 1 and isinstance(learning_rate, jax.Array):
        warnings.warn(
            f"the learning rate of {name} is an array, as optax.inject_hyperparams makes it: if it "
            f"comes of a schedule, that counts gradients, {steps} for each step. Give the schedule "
            f"to {name} itself, which counts steps. To read or set it in the state, use "
            "inject_learning_rate=True of the presets of AdamW, or put "
            "optax.inject_hyperparams(...) inside galore.",
            UserWarning,
            stacklevel=4,
        )
