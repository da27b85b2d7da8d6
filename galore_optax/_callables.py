"""Tells functions and patterns from trees, and what functions can be called with."""

import inspect
import re
from collections.abc import Callable
from typing import TypeGuard

from jaxtyping import PyTree


def is_function(given: object, params: PyTree) -> TypeGuard[Callable[..., object]]:
    """Whether an argument that may be a function or a tree is a function.

    A model is often both: what has the type of the parameters is a tree like them.

    Args:
      given: the argument.
      params: the parameters.
    """
    return callable(given) and type(given) is not type(params)


def is_pattern(given: object) -> TypeGuard[str | re.Pattern[str]]:
    """Whether an argument is a regular expression of strings, compiled or not."""
    return isinstance(given, str) or (
        isinstance(given, re.Pattern) and isinstance(given.pattern, str)
    )


def takes(function: Callable[..., object], count: int, *, more: bool = False) -> bool:
    """Whether a function can be called with so many arguments by position, as far as is known.

    Args:
      function: the function.
      count: the number of arguments.
      more: whether it may need others behind them.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # such as for a function written in C
        return True
    try:
        (signature.bind_partial if more else signature.bind)(*[None] * count)
    except TypeError:
        return False
    return True
