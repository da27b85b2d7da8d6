"""Where documents come from: the built-in novels, text and JSON-lines files, the Hugging Face hub.

Text in files and on the hub comes in shards, each read from start to end or on from a position.
"""

import itertools
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from examples.flax_llama import files, hub
from examples.flax_llama.conversations import Conversation
from examples.flax_llama.reading import Document, Reading

T = TypeVar("T")

# The name of the built-in text.
BUILT_IN = "austen"
TEXT = Path(__file__).parent / "data" / "austen.txt.xz"
# Each is a line of the text exactly once, where the novel begins.
TITLES = (
    "EMMA",
    "MANSFIELD PARK",
    "NORTHANGER ABBEY",
    "Persuasion",
    "PRIDE AND PREJUDICE",
    "SENSE AND SENSIBILITY",
)
HELD_OUT = 0.05
# Where that is not enough.
OTHER_TEXT = "name other text, to train with valid_data=PATH, to evaluate with data=PATH"

# How many shards a tokenizer is trained on: each costs a request where it comes from a network.
SAMPLED_SHARDS = 32

# What to give `Shard.documents` to go on after a document; can be written as JSON.
Position = Any


def read_split() -> tuple[list[str], list[str]]:
    """The six novels as (training parts, held-out parts)."""
    text = lzma.decompress(TEXT.read_bytes()).decode()
    novels = re.split(rf"^(?=(?:{'|'.join(TITLES)})$)", text, flags=re.MULTILINE)[1:]
    cuts = [round(len(novel) * (1 - HELD_OUT)) for novel in novels]
    train = [novel[:cut] for novel, cut in zip(novels, cuts, strict=True)]
    valid = [novel[cut:] for novel, cut in zip(novels, cuts, strict=True)]
    return train, valid


class Shard(Protocol):
    """A part of a data set."""

    def documents(self, position: Position | None = None) -> Iterator[tuple[Document, Position]]:
        """Every document, or those after a position, each with the position after it.

        Raises:
          UsageError: something cannot be read; names the file and the line.
        """
        ...


def open_shards(
    data: str | Sequence[Path],
    *,
    split: str = "train",
    reading: Reading | None = None,
    name: str = "data",
) -> Sequence[Shard]:
    """The shards of "hf:NAME[:CONFIG[:SPLIT]]", or of files; see `files.expand`.

    Args:
      data: what to open.
      split: of a Hugging Face data set, where `data` does not name one.
      reading: where the texts are, and what becomes of lines that have none.
      name: of the setting that names the data, for errors.

    Raises:
      UsageError: there is no such data set or file, or it is not one of text.
    """
    reading = reading or Reading()
    if isinstance(data, str) and data.startswith("hf:"):
        return hub.open_shards(data, split, reading, name)
    return [files.File(path, reading) for path in files.expand(data, name)]


def is_held_out(shard: int, document: int) -> bool:
    """Whether a document of local files is kept for validation: one in twenty, in every file."""
    period = round(1 / HELD_OUT)
    return (shard + document) % period == period - 1


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def texts(shards: Iterable[Shard], *, held_out: bool | None = None) -> Iterator[Document]:
    """All documents in order; where asked, only those held out or only the others."""
    for shard, source in enumerate(shards):
        for number, (text, _) in enumerate(source.documents()):
            if held_out is None or is_held_out(shard, number) == held_out:
                yield text


def text_of(document: Document) -> str:
    """All text of a document."""
    return document.text if isinstance(document, Conversation) else document


def sample(shards: Sequence[Shard], characters: int, *, skip_held_out: bool) -> Iterator[str]:
    """The first texts of shards spread over all, with about so many characters together."""
    step = -(-len(shards) // SAMPLED_SHARDS)
    share = characters / len(shards[::step])
    for shard in range(0, len(shards), step):
        size = 0
        for number, (document, _) in enumerate(shards[shard].documents()):
            if skip_held_out and is_held_out(shard, number):
                continue
            text = text_of(document)
            yield text
            size += len(text)
            if size >= share:
                break
