"""What all commands have in common: signals and errors answered in a line, and an exit status."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from examples.flax_llama.config import UsageError
from examples.flax_llama.interrupts import answered, raising
from examples.flax_llama.usage import file_and_reason

# A setting of a message and its value, if it has one: name='value', name=True, name=value, name.
SETTING = r"(?<![\w/.'-])({names})(?:=('[^']*'|\"[^\"]*\"|True\b|False\b)|(=)|(?![\w/]|\.\w))"


@contextlib.contextmanager
def program(
    *settings: Callable[..., Any],
    errors: tuple[type[Exception], ...] = (),
    status: int = 1,
    at_once: bool = True,
) -> Iterator[None]:
    """Runs a command: an error that a user can do something about is a line that names the flags.

    Args:
      settings: functions and dataclasses whose arguments are the command's flags.
      errors: of which a line is enough, besides those of usage and of the operating system.
      status: with which the program exits after one of them.
      at_once: Ctrl-C and SIGTERM are answered at once, even where nothing can be cleaned up.
    """
    hide_abandoned()
    flags = {name: default for each in settings for name, default in defaults(each).items()}
    with answered() if at_once else raising():
        try:
            yield
        except (UsageError, OSError, *errors) as error:
            said = f"{file_and_reason(error)}." if isinstance(error, OSError) else str(error)
            line = f"error: {as_typed(said, flags)}"
            if status == 1:
                raise SystemExit(line) from None
            print(line, file=sys.stderr)
            raise SystemExit(status) from None
        except KeyboardInterrupt as error:
            print("Interrupted.", file=sys.stderr)
            number = getattr(error, "number", signal.SIGINT)
            raise SystemExit(128 + number) from None


@functools.cache
def hide_abandoned() -> None:
    """Silences reads and writes that Orbax does not wait for after one has failed.

    They complain of their event loop, which is closed, or that nobody has retrieved their errors;
    the error of the first is told.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


def defaults(settings: Callable[..., Any]) -> dict[str, Any]:
    """The defaults of the arguments of a function or of the fields of a dataclass, by name."""
    if dataclasses.is_dataclass(settings):
        return {field.name: field.default for field in dataclasses.fields(settings)}
    return {name: each.default for name, each in inspect.signature(settings).parameters.items()}


def as_typed(message: str, flags: dict[str, Any]) -> str:
    """A message whose settings are written as on the command line, not as in Python.

    A setting is what has a value, such as rank=4, or a name of several words. Other words may be
    English: a message that means the flag says resume=True.

    Args:
      message: of an error.
      flags: the default of each setting, by name.
    """

    def typed(match: re.Match[str]) -> str:
        name, value, equals = match.groups()
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            # "lr" alone may be a word; "lr=0.5" is not, nor is "weight_decay".
            return f"{flag} " if equals else flag if "_" in name else name
        if value in ("True", "False"):
            if not isinstance(flags[name], bool):
                return f"{flag} {value}"
            return flag if value == "True" else f"--no-{flag[2:]}"
        return f"{flag} {shlex.quote(value[1:-1])}"

    names = "|".join(sorted(flags, key=len, reverse=True))
    return re.sub(SETTING.format(names=names), typed, message)


def as_flags(settings: Any, base: Any) -> list[str]:
    """The words with which a command line says what differs between two dataclasses."""
    words = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(base, field.name):
            flag = f"--{field.name.replace('_', '-')}"
            if isinstance(field.default, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            elif isinstance(value, tuple):
                words += [flag, *value]
            else:
                whole = isinstance(value, float) and value.is_integer()
                words += [flag, str(int(value) if whole else value)]
    return words
