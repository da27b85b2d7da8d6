"""Values of a config.json, of which each must be what it should be."""

import math
from typing import Any

from examples.flax_llama.usage import UsageError

# What must be so, since nothing else is supported.
ONLY = {
    **{"partial_rotary_factor": 1.0, "final_logit_softcapping": None},
    **{"attn_logit_softcapping": None, "use_bidirectional_attention": False},
}


def check_only(given: dict[str, Any]) -> None:
    """Raises UsageError where a value is not the only one that is supported."""
    for name, value in ONLY.items():
        if given.get(name, value) not in (value, None):
            raise UsageError(f"{name}={given[name]!r} is not supported, only {value!r}.")


def whole(config: dict[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name}={value!r}: expected a positive whole number.")
    return value


def flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name}={value!r}: expected true or false.")
    return bool(value)


def share(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise UsageError(f"{name}={value!r}: expected at least 0 and less than 1.")
    return float(value)


def positive(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UsageError(f"{name}={value!r}: expected a positive number.")
    return float(value)
