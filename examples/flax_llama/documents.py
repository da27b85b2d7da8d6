"""Where documents come from: the built-in novels, text and JSON-lines files, the Hugging Face hub.

Text in files and on the hub comes in shards, each read from start to end or on from a position.
"""

import hashlib
import itertools
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from examples.flax_llama import files, hub, paths
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
BY_NAME = "to train with valid_data=PATH, to evaluate with data=PATH"
OTHER_TEXT = f"name other text, {BY_NAME}"

# Of a directory that the tokenize command made.
META = "meta.json"

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
    """A part of a data set.

    Attributes:
      number: by which documents of it are held out; parts that are one file have one number.
    """

    @property
    def number(self) -> int: ...

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
    valid_data: str | Sequence[Path] | None = None,
) -> Sequence[Shard]:
    """The shards of "hf:NAME[:CONFIG[:SPLIT]]", or of files; see `paths.expand`.

    Args:
      data: what to open.
      split: of a Hugging Face data set, where `data` does not name one.
      reading: where the texts are, and what becomes of lines that have none.
      name: of the setting that names the data, for errors.
      valid_data: what is validated on, whose files are left out.

    Raises:
      UsageError: there is no such data set or file, or it is not one of text.
    """
    reading = reading or Reading()
    if isinstance(data, str) and data.startswith("hf:"):
        return hub.open_shards(data, split, reading, name)
    found = paths.expand(data, name)
    if valid_data is not None and is_of_files(valid_data):
        found = paths.apart(found, paths.expand(valid_data, "valid_data"))
    # They choose what is held out, which nothing is beside data to validate on.
    numbers = files.numbers(found) if valid_data is None else range(len(found))
    return [files.File(path, reading, number) for path, number in zip(found, numbers, strict=True)]


def is_of_files(data: str | Sequence[Path]) -> bool:
    """Whether data is in files that `paths.expand` finds."""
    if not isinstance(data, str):
        return True
    return data != BUILT_IN and not data.startswith("hf:") and not is_tokenized(data)


def is_tokenized(path: str) -> bool:
    """Whether this is a directory that the tokenize command made."""
    return os.path.isfile(os.path.join(path, META))  # of a long list too, which is no path


def is_held_out(number: int, document: int) -> bool:
    """Whether a document of local files is kept for validation: one in twenty, in every file.

    Args:
      number: of the file, one and the same wherever it is named again.
      document: its number in the file.
    """
    period = round(1 / HELD_OUT)
    return (number + document) % period == period - 1


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what is left."""
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def texts(shards: Sequence[Shard], *, held_out: bool | None = None) -> Iterator[Document]:
    """All documents in order; where asked, only those held out or only the others.

    Those held out come once each, however often their file is named.
    """
    mentions = Counter(shard.number for shard in shards) if held_out else Counter()
    seen = set()
    for shard in shards:
        for number, (document, _) in enumerate(shard.documents()):
            if held_out is not None and is_held_out(shard.number, number) != held_out:
                continue
            if mentions[shard.number] > 1:
                digest = hashlib.sha256(text_of(document).encode()).digest()
                place = (shard.number, number, digest)
                if place in seen:
                    continue
                seen.add(place)
            yield document


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
            if skip_held_out and is_held_out(shards[shard].number, number):
                continue
            text = text_of(document)
            yield text
            size += len(text)
            if size >= share:
                break
