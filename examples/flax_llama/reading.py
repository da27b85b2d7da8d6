"""How a text is taken out of an example, and what becomes of a line that has none."""

import dataclasses
import json
import sys
from typing import Any

from examples.flax_llama.usage import UsageError, one_of

ON_BAD_LINE = ("error", "skip")
# So many of the lines that are left out are shown.
SHOWN = 5


class BadLine(ValueError):
    """There is no text here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What all files of some data share: where the text is, and the lines that have none.

    Attributes:
      text_field: of JSON lines and of examples from the hub; a dot goes into an object.
      on_bad_line: "error", or "skip" to leave out and count what is no text.
      max_bad_lines: that many are left out; one more is an error.
      bad_lines: the reasons of those left out, by file and line, each once however often the file
        is read.
    """

    text_field: str = "text"
    on_bad_line: str = "error"
    max_bad_lines: int = 100
    bad_lines: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        one_of("on_bad_line", self.on_bad_line, ON_BAD_LINE)
        if not all(self.text_field.split(".")):
            raise UsageError(
                f"text_field={self.text_field!r}: expected the name of a field, or several with "
                "dots between, as in meta.content."
            )
        if self.max_bad_lines < 0:
            raise UsageError(f"max_bad_lines={self.max_bad_lines}: expected 0 or more.")

    def text_of_line(self, line: bytes) -> str:
        """The text of a line of JSON.

        Raises:
          BadLine: there is none.
        """
        try:
            example = json.loads(line)
        except UnicodeDecodeError as error:
            raise BadLine(f"not UTF-8: {error}") from error
        except ValueError as error:
            raise BadLine(f"not JSON: {error}") from error
        return self.text_of(example)

    def text_of(self, example: Any) -> str:
        """The text of an example, in the field of that name.

        Raises:
          BadLine: there is none.
        """
        value = example
        for name in self.text_field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, str):
            others = string_fields(example)
            raise BadLine(
                f"expected an object with a string '{self.text_field}', got {str(example)[:60]}"
                + (f"; text_field=NAME could name {', '.join(others[:5])}" if others else "")
            )
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON escapes promise nothing
            raise BadLine("half a surrogate pair, which is no character") from error
        return value

    def leave_out(self, where: str, reason: BadLine | str) -> None:
        """Counts what is no text, where that is asked for.

        Raises:
          UsageError: it is not, or there are too many.
        """
        if self.on_bad_line == "error":
            raise UsageError(f"{where}: {reason}. on_bad_line='skip' leaves out such lines.")
        if where in self.bad_lines:
            return
        self.bad_lines[where] = str(reason)
        if len(self.bad_lines) > self.max_bad_lines:
            first = next(iter(self.bad_lines))
            raise UsageError(
                f"{where}: {reason}. That is one more than max_bad_lines={self.max_bad_lines}; "
                f"the first is {first}."
            )
        if len(self.bad_lines) <= SHOWN:
            print(f"left out {where}: {reason}", file=sys.stderr)

    def summary(self) -> str:
        """How many lines were left out, in a sentence."""
        count = len(self.bad_lines)
        return f"Left out {count} {'line that is' if count == 1 else 'lines that are'} no text."


def string_fields(example: Any, prefix: str = "") -> list[str]:
    """The dotted names of all fields that have a string."""
    if not isinstance(example, dict):
        return []
    found = []
    for name, value in example.items():
        if isinstance(value, str):
            found.append(f"{prefix}{name}")
        else:
            found += string_fields(value, f"{prefix}{name}.")
    return found
