"""How a text is taken out of an example, and what becomes of a line that has none."""

import contextlib
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from examples.flax_llama.usage import UsageError, one_of

ON_BAD_LINE = ("error", "skip")
# So many of the lines that are left out are shown, and of the fields that they have.
SHOWN = 5
LINES = "; of JSON files each line is read as an object of its own"


class BadLine(ValueError):
    """There is no text here; the message says why.

    Attributes:
      fields: the names of those that could be meant, since they have a string.
    """

    def __init__(self, reason: str, fields: list[str] | None = None):
        super().__init__(reason)
        self.fields = fields or []


@dataclasses.dataclass(frozen=True)
class Reading:
    """What all files of some data share: where the text is, and the lines that have none.

    Attributes:
      text_field: of JSON lines and of examples from the hub; a dot goes into an object.
      on_bad_line: "error", or "skip" to leave out and count what is no text.
      max_bad_lines: that many are left out; one more is an error.
      bad_lines: the reasons of those left out, by file and line, each once however often the file
        is read.
      fields: how many of them have a string in a field of that name.
    """

    text_field: str = "text"
    on_bad_line: str = "error"
    max_bad_lines: int = 100
    bad_lines: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    fields: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)

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
            raise BadLine(f"not JSON: {error}{LINES}") from error
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
            raise BadLine(
                f"expected an object with a string '{self.text_field}', got {str(example)[:60]}"
                + ("" if isinstance(example, dict) else LINES),
                string_fields(example),
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
        if where in self.bad_lines:
            return
        fields = reason.fields if isinstance(reason, BadLine) else []
        is_first = bool(fields) and not self.fields
        self.fields.update(fields)
        if self.on_bad_line == "error":
            raise UsageError(
                f"{where}: {reason}. {self._could_name('text_field=NAME')}on_bad_line='skip' "
                "leaves out such lines."
            )
        self.bad_lines[where] = str(reason)
        if len(self.bad_lines) > self.max_bad_lines:
            first = next(iter(self.bad_lines))
            raise UsageError(
                f"{where}: {reason}. {self._could_name('text_field=NAME')}That is one more than "
                f"max_bad_lines={self.max_bad_lines}; the first is {first}."
            )
        if len(self.bad_lines) <= SHOWN:
            print(f"left out {where}: {reason}", file=sys.stderr)
        if is_first:
            print(self._could_name("--text-field NAME").rstrip(), file=sys.stderr)

    def _could_name(self, flag: str) -> str:
        """What may have been meant by the field of the text, in a sentence; else nothing."""
        names = ", ".join(name for name, _ in self.fields.most_common(SHOWN))
        return f"{flag} could name {names}. " if names else ""

    def summary(self) -> str:
        """How many lines were left out, in a sentence, and what may have been meant instead."""
        count = len(self.bad_lines)
        lines = "line that is" if count == 1 else "lines that are"
        return f"Left out {count} {lines} no text. {self._could_name('--text-field NAME')}".rstrip()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Where data turns out to be too little, says also what was left out of it.

        Raises:
          UsageError: as it was, and with that.
        """
        try:
            yield
        except UsageError as error:
            if not 0 < len(self.bad_lines) <= self.max_bad_lines:
                raise
            raise UsageError(f"{error} {self.summary()}") from error


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
