"""Values of arguments that are names in a table, or objects of the user's own."""

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def resolve(
    argument: str,
    given: object,
    table: Mapping[str, Value],
    kind: type[Value],
) -> Value:
    """Returns the value of that name, or the one that is given.

    Args:
      argument: the name of the argument, for errors.
      given: what the user gave for it.
      table: the values that have names.
      kind: the protocol of the values.

    Raises:
      ValueError: there is no value of that name.
      TypeError: it is neither a name nor a value.
    """
    listed = ", ".join(table)
    if isinstance(given, str):
        if given not in table:
            raise ValueError(f"{argument} must be one of {listed}; got {given!r}")
        return table[given]
    if isinstance(given, type) or not isinstance(given, kind):
        like = type(next(iter(table.values()))).__name__
        raise TypeError(
            f"{argument} must be a name ({listed}), or an object with the members of {like}; got "
            f"{given!r}"
        )
    return given
