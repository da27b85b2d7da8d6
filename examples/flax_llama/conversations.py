"""Conversations to fine-tune on, out of the layouts that examples come in.

`data_format` says which: "prompt", a prompt and its response in two fields; "chat", a list of
messages, as OpenAI and Hugging Face have them (role, content) or as ShareGPT does (from, value).
"""

import dataclasses
from typing import Any

from examples.flax_llama.fields import (
    BadLine,
    check_characters,
    names_of,
    objects_at,
    shown,
    value_at,
)

FORMATS = ("text", "prompt", "chat", "auto")
# Names of the fields of a prompt and of its response, of which an example has one pair.
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
# What Alpaca's instructions are about, below them.
INPUT = "input"
# What a template may show: descriptions beside the messages, and what a message calls.
TOOLS, CALLS = "tools", "tool_calls"
MESSAGES = ("messages", "conversations")
SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")
# What ShareGPT calls them.
SHARE_GPT = {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}}

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of fields; None where they are to be recognised."""

    prompt: str | None = None
    response: str | None = None
    messages: str | None = None

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of names that prompts and responses may have."""
        if self.prompt is None and self.response is None:
            return PAIRS
        return ((self.prompt or PAIRS[0][0], self.response or PAIRS[0][1]),)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, of which one at least is the assistant's."""

    # Each with "role" and, unless it calls a tool, "content".
    messages: list[Message]
    # The file and the line, or whatever else it comes from.
    where: str
    # Descriptions of tools that a template may show.
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """The places of the assistant's messages."""
        return [k for k, each in enumerate(self.messages) if each["role"] == "assistant"]

    @property
    def text(self) -> str:
        """All contents, one below the other."""
        return "\n".join(each.get("content", "") for each in self.messages)

    def shortened(self) -> "Conversation | None":
        """Without its oldest exchange, up to the next message of the user; None if that is all."""
        start = next(k for k, each in enumerate(self.messages) if each["role"] not in SYSTEM)
        users = [k for k, each in enumerate(self.messages) if each["role"] == "user" and k > start]
        if not users or self.answers[-1] < users[0]:
            return None
        return dataclasses.replace(self, messages=self.messages[:start] + self.messages[users[0] :])


def conversation_of(example: Any, where: str, data_format: str, fields: Fields) -> Conversation:
    """The conversation of an example.

    Raises:
      BadLine: there is none.
    """
    if data_format == "prompt":
        prompt, response = prompt_and_response(example, fields)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return Conversation(messages, where)
    return Conversation(messages_of(example, fields), where, objects_at(example, TOOLS) or None)


def prompt_and_response(example: Any, fields: Fields) -> tuple[str, str]:
    """The two texts of an example.

    Raises:
      BadLine: there are none, or the response is empty.
    """
    for names in fields.pairs:
        prompt, response = (value_at(example, name) for name in names)
        if not (isinstance(prompt, str) and isinstance(response, str)):
            continue
        more = value_at(example, INPUT) if names == PAIRS[-1] else None
        if not isinstance(more, str | None):
            raise BadLine(f"expected a string as '{INPUT}', or none, got {str(more)[:40]}")
        if more:
            prompt = f"{prompt}\n\n{more}"
        check_characters(prompt + response)
        if not response.strip():
            raise BadLine(f"an empty response, '{names[1]}'")
        return prompt, response
    expected = ", or ".join(f"'{prompt}' and '{response}'" for prompt, response in fields.pairs)
    raise BadLine(
        f"expected an object with the strings {expected}, got {shown(example)}",
        names_of(example, str),
    )


def messages_of(example: Any, fields: Fields) -> list[Message]:
    """The messages of an example.

    Raises:
      BadLine: there are none, one of them is none, or none is the assistant's.
    """
    names = MESSAGES if fields.messages is None else (fields.messages,)
    found = [value for name in names if isinstance(value := value_at(example, name), list)]
    if not found:
        expected = " or ".join(f"'{name}'" for name in names)
        raise BadLine(
            f"expected an object with a list {expected}, got {shown(example)}",
            names_of(example, list),
        )
    messages = [message_of(each, number) for number, each in enumerate(found[0], 1)]
    if not any(each["role"] == "assistant" for each in messages):
        raise BadLine("a conversation without a turn of the assistant, which has nothing to learn")
    return messages


def message_of(value: Any, number: int) -> Message:
    """A message with the names of Hugging Face, and without what is null.

    Raises:
      BadLine: it is none.
    """
    what = f"message {number}"
    if not isinstance(value, dict):
        raise BadLine(f"{what}: expected an object with role and content, got {str(value)[:40]}")
    message = {name: each for name, each in value.items() if each is not None}
    known: dict[str, str] = {role: role for role in ROLES}
    if "role" not in message:
        message["role"], known = message.pop("from", None), SHARE_GPT
        message |= {"content": message.pop("value")} if "value" in message else {}
    role = known.get(message["role"]) if isinstance(message["role"], str) else None
    if role is None:
        raise BadLine(
            f"{what}: the role {message['role']!r} is not known, expected one of {', '.join(known)}"
        )
    if CALLS in message:
        message[CALLS] = objects_at(message, CALLS)
    content = message.get("content", "" if message.get(CALLS) else None)
    if not isinstance(content, str):
        raise BadLine(f"{what}, of the {role}: expected a string as its content, got {content!r}")
    check_characters(content)
    if role == "assistant" and not (content.strip() or message.get(CALLS)):
        raise BadLine(f"{what}, of the {role}: an empty response")
    return message | {"role": role}


def format_of(example: Any, text_field: str, fields: Fields) -> tuple[str, str] | None:
    """Which format an example is in, and the fields that say so; None where none do."""
    lists = MESSAGES if fields.messages is None else (fields.messages,)
    for name in lists:
        if isinstance(value_at(example, name), list):
            return "chat", name
    for names in fields.pairs:
        if all(isinstance(value_at(example, name), str) for name in names):
            return "prompt", " and ".join(names)
    return ("text", text_field) if isinstance(value_at(example, text_field), str) else None
