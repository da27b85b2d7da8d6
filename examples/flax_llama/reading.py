"""How a document is taken out of an example, and what becomes of a line that has none."""

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from examples.flax_llama.conversations import FORMATS, Fields, conversation_of
from examples.flax_llama.fields import LINES, BadLine, string_at
from examples.flax_llama.usage import UsageError, one_line, one_of, parse_json

ON_BAD_LINE = ("error", "skip")
ON_LONG = ("error", "cut", "skip")
LOSS_ON = ("responses", "last", "all")
# So many of the lines that are left out are shown, and of the fields that they have.
SHOWN = 5
DEEP = "too many objects or lists in each other"
# What the documents of each format are called, and the settings that name their fields.
CALLED = {
    "text": ("text", ("text_field",)),
    "prompt": ("prompt with a response", ("prompt_field", "response_field")),
    "chat": ("conversation", ("messages_field",)),
}


class Unrecognised(NamedTuple):
    """An example of which nobody has said yet what format it is in."""

    example: Any
    where: str


# A text, a `Conversation` or an `Unrecognised`: the format says which.
Document = Any


@dataclasses.dataclass(frozen=True)
class Reading:
    """What all files of some data share: where the documents are, and the lines that have none.

    Attributes:
      text_field: of JSON lines and of examples from the hub; a dot goes into an object.
      on_bad_line: "error", or "skip" to leave out and count what is no document.
      max_bad_lines: that many are left out; one more is an error.
      data_format: "text", "prompt", "chat"; with "auto", examples are read as they are.
      prompt_field: of format prompt; by default one of those that are usual.
      response_field: likewise.
      messages_field: of format chat, likewise.
      loss_on: of conversations, what is to be learnt: all "responses", the "last" one, or "all".
      on_long: at a conversation longer than a row: "error", "cut" its oldest exchanges, or "skip".
      bad_lines: the reasons of those left out, by file and line, each once however often the file
        is read.
      fields: how many of them have fields of that name, which could be meant.
    """

    text_field: str = "text"
    on_bad_line: str = "error"
    max_bad_lines: int = 100
    data_format: str = "text"
    prompt_field: str | None = None
    response_field: str | None = None
    messages_field: str | None = None
    loss_on: str = "responses"
    on_long: str = "error"
    bad_lines: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    fields: Counter[str] = dataclasses.field(default_factory=Counter, compare=False)

    def __post_init__(self) -> None:
        choices = {"on_bad_line": ON_BAD_LINE, "data_format": FORMATS}
        for name, values in {**choices, "loss_on": LOSS_ON, "on_long": ON_LONG}.items():
            one_of(name, getattr(self, name), values)
        for name in ("text_field", "prompt_field", "response_field", "messages_field"):
            field = getattr(self, name)
            if field is not None and not all(field.split(".")):
                raise UsageError(
                    f"{name}={field!r}: expected the name of a field, or several with dots "
                    "between, as in meta.content."
                )
        if self.max_bad_lines < 0:
            raise UsageError(f"max_bad_lines={self.max_bad_lines}: expected 0 or more.")

    @property
    def names(self) -> Fields:
        """The names of the fields of conversations."""
        return Fields(self.prompt_field, self.response_field, self.messages_field)

    def read_line(self, line: bytes, where: str) -> Document | None:
        """The document of a line of JSON, None where there is none and it is left out.

        Raises:
          UsageError: there is none, and it is not to be left out.
        """
        try:
            # Decoded here: of bytes, it would guess other encodings from where there are zeros.
            example = parse_json(line.decode())
        except UnicodeDecodeError as error:
            return self.leave_out(where, f"not UTF-8: {error}")
        except ValueError as error:
            return self.leave_out(where, f"not JSON: {error}{LINES}")
        return self.read(example, where)

    def read(self, example: Any, where: str) -> Document | None:
        """The same of an example."""
        try:
            if self.data_format == "auto":
                return Unrecognised(example, where)
            if self.data_format == "text":
                return string_at(example, self.text_field)
            return conversation_of(example, where, self.data_format, self.names)
        except BadLine as reason:
            return self.leave_out(where, reason)
        except RecursionError:
            return self.leave_out(where, DEEP)

    def leave_out(self, where: str, reason: BadLine | str) -> None:
        """Counts what is no document, where that is asked for.

        Raises:
          UsageError: it is not, or there are too many.
        """
        if where in self.bad_lines:
            return
        fields = [one_line(x) for x in reason.fields] if isinstance(reason, BadLine) else []
        reason = one_line(str(reason))
        is_first = bool(fields) and not self.fields
        self.fields.update(fields)
        if self.on_bad_line == "error":
            raise UsageError(
                f"{where}: {reason}. {self._could_name()}on_bad_line='skip' leaves out such lines."
            )
        self.bad_lines[where] = reason
        if len(self.bad_lines) > self.max_bad_lines:
            first = next(iter(self.bad_lines))
            raise UsageError(
                f"{where}: {reason}. {self._could_name()}That is one more than "
                f"max_bad_lines={self.max_bad_lines}; the first is {first}."
            )
        if len(self.bad_lines) <= SHOWN:
            print(f"left out {where}: {reason}", file=sys.stderr)
        if is_first:
            print(self._could_name(as_flags=True).rstrip(), file=sys.stderr)

    def _could_name(self, *, as_flags: bool = False) -> str:
        """What may have been meant by the fields, in a sentence; else nothing."""
        names = ", ".join(name for name, _ in self.fields.most_common(SHOWN))
        if not names:
            return ""
        settings = CALLED[self.data_format][1]
        flags = [f"--{name.replace('_', '-')} NAME" for name in settings]
        told = flags if as_flags else [f"{name}=NAME" for name in settings]
        return f"{' and '.join(told)} could name {names}. "

    def summary(self) -> str:
        """How many lines were left out, in a sentence, and what may have been meant instead."""
        count = len(self.bad_lines)
        lines = "line that is" if count == 1 else "lines that are"
        what = CALLED[self.data_format][0]
        return f"Left out {count} {lines} no {what}. {self._could_name(as_flags=True)}".rstrip()

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


def reading_of(config: Any, **given: Any) -> Reading:
    """How the data of a run's configuration is read, but for what is given and not None."""
    names = [field.name for field in dataclasses.fields(Reading) if field.compare]
    own = {name: getattr(config, name) for name in names}
    return Reading(**own | {name: value for name, value in given.items() if value is not None})
