"""Conversations of files and of the hub, all read and tokenized before anything is trained."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.flax_llama.conversations import FORMATS, Conversation, format_of
from examples.flax_llama.documents import (
    BUILT_IN,
    Shard,
    batched,
    is_tokenized,
    open_shards,
    texts,
)
from examples.flax_llama.fields import BadLine
from examples.flax_llama.files import File
from examples.flax_llama.packing import ConversationRows, Tokenized
from examples.flax_llama.paths import is_text
from examples.flax_llama.reading import Reading, Unrecognised
from examples.flax_llama.responses import ChatFormat, Encoded, Prompt, chat_format, num_bytes
from examples.flax_llama.tokenizer import Tokenizer
from examples.flax_llama.usage import UsageError
from examples.flax_llama.validation import DEFAULT_TOKENS, Valid, check_enough, first_targets

# Conversations tokenized at a time.
GROUP = 64
# Of those to validate on, so many are prompts that samples can be made for.
PROMPTS = 8


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What the first example of some data says of all."""

    data_format: str
    # In a line, which says why.
    said: str


def recognise(data: str | Sequence[Path], reading: Reading) -> Recognised:
    """The format of some data, by its first example.

    Raises:
      UsageError: it cannot be told; says which fields there are.
    """
    if data == BUILT_IN or (isinstance(data, str) and is_tokenized(data)):
        return Recognised("text", f"data={data} is text")
    shards = open_shards(data, reading=dataclasses.replace(reading, data_format="auto"))
    documents = itertools.chain.from_iterable(shard.documents() for shard in shards)
    first = next((document for document, _ in documents), None)
    if not isinstance(first, Unrecognised):
        return Recognised("text", f"data={data} is text")
    found = format_of(first.example, reading.text_field, reading.names)
    if found is None:
        names = ", ".join(first.example) if isinstance(first.example, dict) else "none"
        raise UsageError(
            f"data_format='auto': {first.where} says nothing of its format, it has the fields "
            f"{names}. Say data_format=FORMAT, one of {', '.join(FORMATS[:-1])}, and where it is: "
            "text_field=NAME; or prompt_field=NAME and response_field=NAME; or "
            "messages_field=NAME."
        )
    return Recognised(found[0], f"{first.where} has the format {found[0]}, by its {found[1]}")


def open_conversation_shards(
    data: str | Sequence[Path],
    reading: Reading,
    name: str = "data",
    split: str = "train",
    valid_data: str | Sequence[Path] | None = None,
) -> Sequence[Shard]:
    """The shards of some data, all of which has examples; arguments as of `open_shards`.

    Raises:
      UsageError: it has not, or it cannot be read.
    """
    needs = f"data_format={reading.data_format!r} needs JSON lines, or data of the hub"
    if data == BUILT_IN or (isinstance(data, str) and is_tokenized(data)):
        raise UsageError(f"{name}={data}: {needs}, and this is text.")
    given = {"split": split, "name": name, "valid_data": valid_data}
    shards = open_shards(data, reading=reading, **given)
    for shard in shards:
        if isinstance(shard, File) and is_text(shard.path):
            raise UsageError(f"{name}={shard.path}: {needs}, and this is text.")
    return shards


class Encoder:
    """Makes tokens of conversations, no more of each than a row has room for.

    Args:
      chat_format: how they are written.
      reading: what becomes of those that cannot be, or are too long.
      seq: targets of a row.
    """

    def __init__(self, chat_format: ChatFormat, reading: Reading, seq: int):
        self._format, self._reading, self._seq = chat_format, reading, seq

    def tokenize(
        self, conversations: Iterable[Conversation], enough: int | None = None
    ) -> tuple[Tokenized, list[Conversation]]:
        """Conversations in tokens, no more than it takes for `enough` targets; the first of them.

        Raises:
          UsageError: one cannot be written, or is too long, where that is an error.
        """
        reading, long = self._reading, Long(self._seq, self._reading.on_long)
        ids, counts = [np.empty(0, np.int32)], [np.empty(0, bool)]
        first: list[Conversation] = []
        total = targets = size = 0
        for group in batched(conversations, GROUP):
            for conversation, encoded in zip(group, self._format.encode_batch(group), strict=True):
                if isinstance(encoded, BadLine):
                    reading.leave_out(conversation.where, encoded)
                    continue
                total += 1
                whole = self._fitted(conversation, encoded, long)
                if whole is None:
                    continue
                conversation, encoded = whole
                ids.append(encoded.ids)
                counts.append(encoded.counts)
                targets += int(encoded.counts.sum())
                size += num_bytes(conversation, reading.loss_on)
                first += [conversation] * (len(first) < PROMPTS)
            if enough is not None and targets >= enough:
                break
        long.tell(total)
        ends = np.cumsum([len(each) for each in ids[1:]], dtype=np.int64)
        return Tokenized(np.concatenate(ids), np.concatenate(counts), ends, size), first

    def prompt_of(self, conversation: Conversation) -> Prompt:
        """The tokens that the last answer of a conversation is asked for with, and that answer.

        Raises:
          BadLine: it cannot be asked for.
        """
        return self._format.prompt_of(conversation)

    def prompts_of(self, conversations: Iterable[Conversation]) -> Iterator[Prompt]:
        """The same of all that can be asked for."""
        for conversation in conversations:
            with contextlib.suppress(BadLine):
                yield self.prompt_of(conversation)

    def _fitted(
        self, conversation: Conversation, encoded: Encoded, long: "Long"
    ) -> tuple[Conversation, Encoded] | None:
        """A conversation that fits into a row: itself, or what may be left of it, if anything."""
        if len(encoded.ids) <= self._seq + 1:
            return conversation, encoded
        long.add(conversation.where, len(encoded.ids))
        shorter = conversation.shortened() if self._reading.on_long == "cut" else None
        while shorter is not None:
            (found,) = self._format.encode_batch([shorter])
            if isinstance(found, Encoded) and len(found.ids) <= self._seq + 1:
                return shorter, found
            shorter = shorter.shortened()
        long.left_out += 1
        return None


class Long:
    """Conversations that are longer than a row."""

    def __init__(self, seq: int, on_long: str):
        self._seq, self._on_long = seq, on_long
        self._count = self._most = self.left_out = 0
        self._where = ""

    def add(self, where: str, tokens: int) -> None:
        self._count += 1
        if tokens > self._most:
            self._most, self._where = tokens, where

    def tell(self, total: int) -> None:
        """Says what became of them, and of how many.

        Raises:
          UsageError: there are some, and nobody said what is to become of them.
        """
        if not self._count:
            return
        are = "is" if self._count == 1 else "are"
        said = (
            f"{self._count:,} of {total:,} conversations {are} longer than {self._seq + 1:,} "
            f"tokens; the longest, {self._where}, has {self._most:,}"
        )
        if self._on_long == "error":
            raise UsageError(
                f"{said}. seq={self._most - 1} is enough for it; on_long='cut' leaves out the "
                "oldest exchanges of such, and on_long='skip' leaves them out."
            )
        cut = self._count - self.left_out
        became = [f"cut {cut:,} of them to their last exchanges"] if cut else []
        became += [f"left out {self.left_out:,}"] if self.left_out else []
        print(f"{said}: {' and '.join(became)}", file=sys.stderr)


def read_valid_conversations(
    conversations: Iterable[Conversation],
    encoder: Encoder,
    *,
    seq: int,
    packing: bool,
    num_tokens: int | None,
) -> Valid:
    """The rows of the first `num_tokens` targets of some conversations, of all by default.

    Raises:
      UsageError: there are fewer targets, or none.
    """
    tokenized, first = encoder.tokenize(conversations, num_tokens or DEFAULT_TOKENS)
    targets = int(tokenized.counts.sum())
    check_enough(targets, num_tokens, "conversations")
    source = ConversationRows(tokenized, seq=seq, packing=packing)
    rows = [source[index] for index in range(len(source))]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    valid = Valid(
        arrays["tokens"],
        arrays["mask"],
        tokenized.num_bytes / targets,
        arrays.get("segments"),
        tuple(encoder.prompts_of(first)),
    )
    return valid if num_tokens is None else first_targets(valid, num_tokens)


def open_valid_conversations(
    data: str | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    seq: int,
    packing: bool,
    num_tokens: int | None,
    reading: Reading,
    name: str = "valid_data",
) -> Valid:
    """Rows of other conversations than those of training; as `validation.open_valid` of text."""
    shards = open_conversation_shards(data, reading, name, split="validation")
    encoder = encoder_of(tokenizer, reading, seq)
    rows: dict[str, Any] = {"seq": seq, "packing": packing, "num_tokens": num_tokens}
    return read_valid_conversations(texts(shards), encoder, **rows)


def encoder_of(tokenizer: Tokenizer, reading: Reading, seq: int) -> Encoder:
    """What makes tokens of conversations.

    Raises:
      UsageError: the tokenizer cannot.
    """
    return Encoder(chat_format(tokenizer, reading.data_format, reading.loss_on), reading, seq)
