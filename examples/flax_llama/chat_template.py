"""Templates of chats, which turn messages into text, as the `transformers` library renders them.

What people write in messages may spell the name of a special token, which is no such token. In a
template's text the two cannot be told apart, so that a name in a message is written as a character
of a private area of Unicode while the template is rendered, and as itself afterwards.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from examples.flax_llama.conversations import Message
from examples.flax_llama.fields import BadLine, check_characters
from examples.flax_llama.usage import UsageError, first_line

# From the first character to the last one of the area; the first two are around what is generated.
PRIVATE = "[\U000f0000-\U000fffff]"
BEGIN, END, FIRST = "\U000f0000", "\U000f0001", 0xF0002

# From a character of a text up to another one.
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A text that a template made of messages."""

    text: str
    # What is of the assistant, by the template's own tag `generation`.
    generated: list[Span]
    # Names of special tokens that stand in messages, and are no such tokens.
    literal: list[Span]


class GenerationTag(Extension):
    """The tag `{% generation %}`, around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, which in jinja itself is for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A template in jinja's language, which may come from anywhere, and can reach nothing.

    Args:
      source: the template.
      tokens: the names of special tokens that it may use, such as `bos_token`.
      special: the names of all special tokens.
      now: the time that the template is told.
      name: of the file that it is from, for errors.

    Raises:
      UsageError: it is no template.
    """

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str],
        special: Collection[str],
        now: datetime,
        name: str,
    ):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        functions = {"raise_exception": raise_exception, "strftime_now": now.strftime}
        self._tokens = dict(tokens)
        names = filter(None, special)
        self._literal = re.compile("|".join([*map(re.escape, names), PRIVATE]))
        try:
            self._template = environment.from_string(source, functions)
        except jinja2.TemplateError as error:
            raise UsageError(f"{name}: the chat template is none: {error}.") from error
        # Whether it says itself what the assistant says.
        self.has_tag = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))

    def render(
        self, messages: list[Message], tools: list[Any] | None, *, ask: bool = False
    ) -> Rendered:
        """The text of messages.

        Args:
          messages: of a conversation.
          tools: that it may show.
          ask: end with what an answer of the assistant comes after (`add_generation_prompt`).

        Raises:
          BadLine: the template refuses them; says why in its words.
        """
        stand_ins: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            return stand_ins.setdefault(match[0], chr(FIRST + len(stand_ins)))

        hidden = functools.partial(self._literal.sub, hide)
        try:
            marked = self._template.render(
                messages=in_strings(messages, hidden),
                tools=in_strings(tools, hidden),
                documents=None,
                add_generation_prompt=ask,
                **self._tokens,
            )
        # A template is a program, which may fail in any way.
        except Exception as error:
            raise BadLine(f"the chat template refuses it: {first_line(error)}") from error
        found = unmarked(marked, {short: name for name, short in stand_ins.items()})
        check_characters(found.text)
        return found


def in_strings(value: Any, change: Callable[[str], str]) -> Any:
    """What JSON has, with all strings in it changed, but for the names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: in_strings(each, change) for name, each in value.items()}
    return [in_strings(each, change) for each in value] if isinstance(value, list) else value


def unmarked(marked: str, names: dict[str, str]) -> Rendered:
    """A rendered text without marks, and with names in place of what stood for them."""
    found = Rendered("", [], [])
    pieces: list[str] = []
    length = start = 0
    for piece in re.split(f"({PRIVATE})", marked):
        if piece == BEGIN:
            start = length
        elif piece == END:
            found.generated.append((start, length))
        else:
            text = names.get(piece, piece)
            if piece in names:
                found.literal.append((length, length + len(text)))
            pieces.append(text)
            length += len(text)
    return dataclasses.replace(found, text="".join(pieces))
