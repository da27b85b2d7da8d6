"""Tokenized documents: in memory, or in a directory that the tokenize command made.

Such a directory holds `tokens.bin`, all documents one after the other; `ends.bin`, where each ends;
`meta.json`; and the tokenizer's file.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from examples.flax_llama.documents import HELD_OUT, META, OTHER_TEXT
from examples.flax_llama.tokenizer import Tokenizer, load_tokenizer
from examples.flax_llama.usage import UsageError, cannot_be_read, parse_json
from examples.flax_llama.writing import make_directory, naming

TOKENS = "tokens.bin"
ENDS = "ends.bin"
# In meta.json: the CRC-32 of what is in each file, and bytes of tokens that are summed.
SUMS, SUMMED = "crc32", 1 << 30
# Bytes that are read at once.
PIECE = 1 << 22
# Likewise, where it is so.
ALIKE = "files_that_begin_alike"
DTYPES = ("uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Documents as one array of tokens."""

    # (T,) of an integer type.
    ids: np.ndarray
    # (D,) int64: the number of tokens up to the end of each document.
    ends: np.ndarray
    # Bytes of UTF-8 per token.
    bytes_per_token: float
    # Whether they are of files of which some begin alike, so that documents may be there twice.
    alike: bool = False

    @classmethod
    def join(cls, documents: list[np.ndarray], num_bytes: int) -> "Tokens":
        """One array out of an array for each document, and the bytes of UTF-8 they have."""
        ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
        return cls(np.concatenate(documents), ends, num_bytes / int(ends[-1]))

    def split(self) -> tuple["Tokens", "Tokens"]:
        """The first documents, to train on, and the last ones, with about 5 % of the tokens.

        Raises:
          UsageError: the documents are too few, or the last ones are among the first.
        """
        held_out = int(np.searchsorted(self.ends, len(self.ids) * (1 - HELD_OUT))) + 1
        if held_out >= len(self.ends):
            raise UsageError(
                f"The last of {len(self.ends)} documents has more than {HELD_OUT:.0%} of the "
                f"tokens, too many to validate on: {OTHER_TEXT}."
            )
        if self.alike and self._repeats(held_out):
            raise UsageError(
                "The last documents are among those before them too, since files of the data that "
                f"was tokenized were named more than once: {OTHER_TEXT}."
            )
        cut = self.ends[held_out - 1]
        return (
            Tokens(self.ids[:cut], self.ends[:held_out], self.bytes_per_token),
            Tokens(self.ids[cut:], self.ends[held_out:] - cut, self.bytes_per_token),
        )

    def _repeats(self, first: int) -> bool:
        """Whether a document from some place on is before it too.

        The few last ones are remembered, by their digests.
        """
        starts = [0, *self.ends[:-1].tolist()]

        def digests(places: slice) -> Iterator[bytes]:
            for a, b in zip(starts[places], self.ends[places], strict=True):
                yield hashlib.blake2b(self.ids[a:b].tobytes(), digest_size=16).digest()

        last = set(digests(slice(first, None)))
        return any(digest in last for digest in digests(slice(first)))


def load_tokens(directory: Path) -> tuple[Tokens, Tokenizer]:
    """The tokens, as a memory map, and their tokenizer.

    Raises:
      UsageError: the directory is not what `write_tokens` wrote.
    """
    try:
        meta = parse_json((directory / META).read_text())
        dtype, count, documents = meta["dtype"], meta["tokens"], meta["documents"]
        num_bytes, alike = meta["bytes"], bool(meta.get(ALIKE))
        sums = meta.get(SUMS)
        damaged = sums is not None and sums[META] != sum_of(meta)
    except PermissionError as error:
        raise cannot_be_read(str(directory / META), error) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{directory / META} is not of the tokenize command: {error!r}") from error
    tokenizer = load_tokenizer(directory, None)
    if dtype not in DTYPES or np.iinfo(dtype).max < tokenizer.vocab_size - 1:
        raise UsageError(
            f"{directory / META}: dtype={dtype!r} cannot hold the tokenizer's "
            f"{tokenizer.vocab_size} ids: expected {smallest_dtype(tokenizer.vocab_size)}."
        )
    ids, ends = (
        memory_map(directory / name, kind, size)
        for name, kind, size in ((TOKENS, dtype, count), (ENDS, "int64", documents))
    )
    if ends[-1] != count:
        raise UsageError(f"{directory / ENDS} is not of {TOKENS}: run the tokenize command again.")
    for name in (META, ENDS, TOKENS, tokenizer.file_name) if sums is not None else ():
        # Of more tokens than are read in a second, nobody waits for the sum.
        if name != META and (name != TOKENS or ids.nbytes <= SUMMED):
            damaged = crc32_of(directory / name) != sums[name]
        if damaged:
            raise UsageError(
                f"{directory / name} is damaged, or was changed: run the tokenize command again."
            )
    return Tokens(ids, ends, num_bytes / count, alike), tokenizer


def crc32_of(path: Path) -> int:
    """The CRC-32 of a file, which is read in pieces."""
    found = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            found = zlib.crc32(piece, found)
    return found


def sum_of(meta: dict[str, Any]) -> int:
    """The checksum of what is in meta.json but for that."""
    sums = {name: value for name, value in meta[SUMS].items() if name != META}
    return zlib.crc32(json.dumps(meta | {SUMS: sums}, sort_keys=True).encode())


def smallest_dtype(vocab_size: int) -> str:
    """The smaller type that holds all ids."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def memory_map(path: Path, dtype: str, count: int) -> np.ndarray:
    """The array of a file that must have exactly `count` entries."""
    size = path.stat().st_size if path.is_file() else 0
    expected = count * np.dtype(dtype).itemsize
    if size != expected or count < 1:
        raise UsageError(
            f"{path} has {size} bytes where {META} says {count} x {dtype}, {expected} bytes: "
            "run the tokenize command again."
        )
    try:
        return np.memmap(path, dtype, mode="r")
    except OSError as error:
        raise cannot_be_read(str(path), error) from error


def check_new(path: Path) -> None:
    """Raises UsageError where something would be overwritten."""
    if path.exists():
        raise UsageError(f"out={path} exists: name another one or delete it.")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write to that gets its name at the end, and disappears on an error."""
    check_new(path)
    make_directory(path.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with naming(path):
            yield partial
        partial.chmod(0o755)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial)
        raise


def write_tokens(
    directory: Path,
    groups: Iterable[list[str]],
    tokenizer: Tokenizer,
    *,
    alike: bool = False,
) -> Tokens:
    """Writes documents, each ended by the tokenizer's `eos_id`, and returns them as a memory map.

    Args:
      directory: new one.
      groups: the documents.
      tokenizer: of them.
      alike: whether some of the files that they are from begin alike.

    Raises:
      UsageError: the directory exists, a document cannot be read, or there are none; nothing is
        left of the directory.
    """
    dtype = smallest_dtype(tokenizer.vocab_size)
    tokens = documents = num_bytes = 0
    sums = {TOKENS: 0, ENDS: 0}
    with new_directory(directory) as partial:
        with open(partial / TOKENS, "wb") as tokens_file, open(partial / ENDS, "wb") as ends_file:
            for texts in groups:
                encoded = tokenizer.encode_documents(texts)
                ends = tokens + np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
                written = np.concatenate(encoded).astype(dtype).tobytes(), ends.tobytes()
                for file, name, data in zip((tokens_file, ends_file), sums, written, strict=True):
                    file.write(data)
                    sums[name] = zlib.crc32(data, sums[name])
                tokens = int(ends[-1])
                documents += len(texts)
                num_bytes += sum(len(text.encode()) for text in texts)
        if tokens == 0:
            raise UsageError("There are no documents to tokenize.")
        meta: dict[str, Any] = {
            "dtype": dtype,
            "tokens": tokens,
            "documents": documents,
            "bytes": num_bytes,
        }
        meta |= {ALIKE: True} if alike else {}
        tokenizer.save(partial)
        sums[tokenizer.file_name] = zlib.crc32((partial / tokenizer.file_name).read_bytes())
        meta[SUMS] = sums
        meta[SUMS] = sums | {META: sum_of(meta)}
        (partial / META).write_text(json.dumps(meta, indent=2) + "\n")
    return load_tokens(directory)[0]
