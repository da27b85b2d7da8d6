"""Lists the keyword arguments of galore, which all presets take, once for all of them."""

import inspect
from collections.abc import Callable, Mapping
from typing import TypedDict, TypeVar

import optax
from jaxtyping import Array

from galore_optax._galore import galore
from galore_optax._ranks import RankSpec
from galore_optax._refresh import Gap, Refresh
from galore_optax._residual import Residual
from galore_optax._select import DimensionNumbersSpec, ExcludeSpec
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


def shows_galore_options(defaults: GaloreOptions | None = None) -> Callable[[Preset], Preset]:
    """Decorates a preset whose last parameter is ``**options: Unpack[GaloreOptions]``.

    Its signature then has the keyword arguments of galore instead, with galore's defaults or the
    given ones: ``help`` shows them, and ``optax.inject_hyperparams`` binds arguments by name.

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
        vars(preset)["__signature__"] = signature.replace(parameters=[*own, *options])
        return preset

    return decorate
