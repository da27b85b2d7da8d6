"""Says what the arguments of presets must be, where Optax does not: one rule for each name."""

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from galore_optax._callables import takes
from galore_optax._types import Mask, Params

Preset = TypeVar("Preset", bound=Callable[..., object])


def checks_arguments(preset: Preset) -> Preset:
    """Decorates a preset, which then raises an error where an argument cannot be right.

    Galore checks its own arguments itself.
    """
    signature = inspect.signature(preset)

    @functools.wraps(preset)
    def checked(*args: object, **kwargs: object) -> object:
        given = signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if name in RULES:
                RULES[name](name, value)
        return preset(*args, **kwargs)

    return cast(Preset, checked)


def is_bool(value: object) -> bool:
    """Whether a value is a bool, of Python or of NumPy."""
    return isinstance(value, bool | np.bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number, or an array that is one; its value need not be known."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        dtype = value.dtype
        is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
        return np.shape(value) == () and is_real
    return isinstance(value, numbers.Real) and not is_bool(value)


def known(number: object, at_runtime: float) -> float:
    """Returns what is a number, as :func:`is_number` says, or `at_runtime` where that is hidden."""
    try:
        return float(cast(float, number))
    except jax.errors.ConcretizationTypeError:
        return at_runtime


def mask_of(name: str, mask: Mask | None) -> Mask | None:
    """Returns a mask that says, once parameters are there, when it does not fit them.

    Args:
      name: of the argument.
      mask: a tree of bools, a function that makes one of the parameters, or None.
    """
    if mask is None or callable(mask):
        return mask

    def fitting(params: Params) -> PyTree:
        try:
            jax.tree.map(lambda flag, subtree: None, mask, params)
        except ValueError as error:
            raise ValueError(
                f"{name} must be a tree of bools with the structure of the parameters, or a prefix "
                f"of it: {error}"
            ) from error
        return mask

    return fitting


def static_hint(value: object) -> str:
    """Returns what to add to the error of an argument that must not be an array."""
    if isinstance(value, jax.Array):
        return ". Under optax.inject_hyperparams, name it in static_args."
    return ""


def check_bool(name: str, value: object) -> None:
    """Raises an error where an argument is no bool."""
    if not is_bool(value):
        raise TypeError(f"{name} must be a bool; got {value!r}")


def _number(name: str, value: object, or_else: str = "") -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number{or_else}; got {value!r}")
    if not math.isfinite(known(value, 0.0)):
        raise ValueError(f"{name} must be finite; got {value!r}")


def _number_or_schedule(name: str, value: object) -> None:
    if callable(value):
        if not takes(value, 1):
            raise TypeError(f"{name} must be a number or a schedule of the step; got {value!r}")
        return
    _number(name, value, " or a schedule of the step")


def _not_negative(name: str, value: object) -> None:
    _number(name, value)
    if known(value, 0.0) < 0:
        raise ValueError(f"{name} must be at least 0; got {value!r}")


def _positive(name: str, value: object) -> None:
    _number(name, value)
    if known(value, 1.0) <= 0:
        raise ValueError(f"{name} must be above 0; got {value!r}")


def check_rate(name: str, value: object) -> None:
    """Raises an error where an argument cannot be the decay rate of a moment."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1); got {value!r}")
    if not 0 <= known(value, 0.0) < 1:
        # Of 0.999 bfloat16 makes 1.
        hint = ". Give optax.inject_hyperparams hyperparam_dtype=jnp.float32, if that rounded it."
        raise ValueError(
            f"{name} must be in [0, 1); got {value!r}{hint if isinstance(value, jax.Array) else ''}"
        )


def _dtype(name: str, value: object) -> None:
    if isinstance(value, jax.Array):
        # optax.inject_hyperparams calls a dtype as if it were a schedule, which gives a number.
        value = value.dtype
    try:
        found = jnp.dtype(cast(jax.typing.DTypeLike, value))
    except TypeError:
        raise TypeError(f"{name} must be a floating-point dtype; got {value!r}") from None
    if not jnp.issubdtype(found, jnp.inexact):
        raise ValueError(f"{name} must be a floating-point dtype; got {value!r}")


def _mask(name: str, value: object) -> None:
    must_be = (
        f"{name} must be a tree of bools with the structure of the parameters, or a function that "
        "makes one of them"
    )
    if callable(value):
        if not takes(value, 1):
            raise TypeError(f"{must_be}; got {value!r}")
        return
    wrong = [flag for flag in jax.tree.leaves(value) if not is_bool(flag)]
    if wrong:
        raise TypeError(f"{must_be}; got a leaf {wrong[0]!r}")


def _positive_int(name: str, value: object) -> None:
    if not is_number(value) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
        raise TypeError(f"{name} must be a positive int; got {value!r}")
    if known(value, 1.0) < 1:
        raise ValueError(f"{name} must be at least 1; got {value!r}")


def _static_int(name: str, value: object) -> None:
    if is_bool(value) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{name} must be an int, since it decides the shapes of the state; got {value!r}"
            + static_hint(value)
        )


def _tables(name: str, value: object) -> None:
    if value not in TABLES:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, TABLES))}; got {value!r}"
            + static_hint(value)
        )


def _optional(rule: Callable[[str, object], None]) -> Callable[[str, object], None]:
    return lambda name, value: None if value is None else rule(name, value)


TABLES = ("adam", "factored")
"""What the moments of embeddings and heads may be."""

RULES: dict[str, Callable[[str, object], None]] = {
    **dict.fromkeys(("learning_rate", "weight_decay"), _number_or_schedule),
    "weight_decay_rate": _optional(_number_or_schedule),
    **dict.fromkeys(("b1", "b2", "beta", "adam_b1", "adam_b2"), check_rate),
    "momentum": _optional(_not_negative),
    **dict.fromkeys(("eps", "eps_root"), _not_negative),
    **dict.fromkeys(("decay_rate", "decay_offset"), _number),
    "clipping_threshold": _optional(_positive),
    **dict.fromkeys(("mu_dtype", "accumulator_dtype"), _optional(_dtype)),
    "dtype_momentum": _dtype,
    **dict.fromkeys(("mask", "weight_decay_mask"), _optional(_mask)),
    **dict.fromkeys(
        ("nesterov", "inject_learning_rate", "factored", "multiply_by_parameter_scale"), check_bool
    ),
    "ns_steps": _positive_int,
    "tables": _tables,
    "min_dim_size_to_factor": _static_int,
}
"""By the name of an argument what raises an error where its value cannot be right."""
