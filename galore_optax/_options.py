"""The keyword arguments of galore, which all presets take; written once for all of them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

import jax
import optax

from galore_optax._galore import galore
from galore_optax._matrix import ExcludeSpec, RankSpec
from galore_optax._refresh import Lazy

Preset = TypeVar("Preset", bound=Callable[..., optax.GradientTransformationExtraArgs])


class GaloreOptions(TypedDict, total=False):
    """The keyword arguments of `galore_optax.galore`, for type checkers."""

    rank: RankSpec
    update_proj_gap: int | jax.Array | optax.Schedule
    scale: float | jax.Array
    projector: str | Callable[..., jax.Array]
    projector_options: Mapping[str, Any] | None
    projector_dtype: str | None
    refresh: str | Lazy
    stagger: bool
    side: str
    exclude: ExcludeSpec
    weight_dimension_numbers: Any
    accumulation_steps: int | None
    seed: int | jax.Array
    diagnostics: bool


def shows_galore_options(defaults: GaloreOptions | None = None) -> Callable[[Preset], Preset]:
    """Decorates a preset whose last parameter is ``**options: Unpack[GaloreOptions]``.

    Its signature has the keyword arguments of galore instead, with their defaults or the given
    ones: ``help`` shows them, and ``optax.inject_hyperparams`` binds arguments by name.
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
