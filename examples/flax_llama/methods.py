"""The optimizers in GaLore: what each of them is, and the settings that it has of its own."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import galore_optax

# Presets of the library, each of them also with moments in 8 bits. All take the arguments of
# `optax.adamw`, and know the decay rates of its moments, which some settings need.
ADAMW = (
    *("galore_adamw", "fira_adamw", "apollo_adamw", "apollo_mini_adamw"),
    *("ldadamw", "tracked_adamw", "frugal_adamw", "grass_adamw", "dct_adamw"),
)
ADAMW_8BIT = (*(f"{name}_8bit" for name in ADAMW), "q_galore_adamw")
OTHERS = ("galore_adafactor", "galore_lion", "galore_sgd", "flora", "galore_muon")

IN_GALORE: dict[str, Callable[..., Any]] = {
    name: getattr(galore_optax, name) for name in (*ADAMW, *ADAMW_8BIT, *OTHERS)
}


def defaults(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The defaults of the keyword arguments of `galore_optax.galore`, as a function has them."""
    found = inspect.signature(function).parameters
    names = inspect.signature(galore_optax.galore).parameters.keys() - {"inner"}
    return {name: found[name].default for name in names}


GALORE = defaults(galore_optax.galore)


def own(optimizer: str) -> dict[str, Any]:
    """The arguments of GaLore for which an optimizer has a default that is not GaLore's.

    They are read from the signature of the library's preset, so that no number stands twice.
    """
    if optimizer not in IN_GALORE:
        return {}
    found = defaults(IN_GALORE[optimizer])
    return {name: value for name, value in found.items() if value != GALORE[name]}


def in_8_bits(optimizer: str) -> bool:
    """Whether the moments of an optimizer are in 8 bits."""
    return optimizer in ADAMW_8BIT or optimizer == "adamw_8bit"
