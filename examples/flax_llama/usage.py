"""What is said of settings that cannot work, and of files that cannot be read or written."""

import errno
import functools
import json
import os
import sys
from pathlib import Path
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


@functools.cache
def say_once(line: str) -> None:
    """Says something on stderr, once in a process however often there is reason to."""
    print(line, file=sys.stderr)


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
      ValueError: it is none, or too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("too many objects or lists in each other") from error


def one_line(text: str) -> str:
    """A text with what would end a line, or could not be seen, written as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
      UsageError: it cannot be read, or is none.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path}: expected an object of JSON.")
    return found


def first_line(error: Exception) -> str:
    """The beginning and the end of an error's first line, where the reason may be."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-110:]}"


def reason(error: Exception) -> str:
    """Why something could not be written, in a few words; libraries have errors of their own."""
    if os.strerror(errno.ENOSPC) in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or first_line(error)


def file_and_reason(error: OSError) -> str:
    """The same of an error of the operating system, and the file that it is about, if known."""
    return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
