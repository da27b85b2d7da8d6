"""What is said of settings that cannot work."""

from typing import Any


class UsageError(ValueError):
    """A setting that cannot work; the message says what would."""


def one_of(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r}: expected one of {', '.join(choices)}.")


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name}={value}: expected at least 1.")


def cannot_be_read(what: str, error: OSError) -> UsageError:
    """What to say of a file that the system does not let us read, whatever is in it."""
    return UsageError(f"{what} cannot be read: {error.strerror or error}.")
