"""Documents in text files and in files of JSON lines, plain or compressed."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.flax_llama.compressed import Damaged, compression, decompressed
from examples.flax_llama.paths import is_json
from examples.flax_llama.reading import Document, Reading
from examples.flax_llama.usage import UsageError, cannot_be_read

# A text file is cut into documents of this many bytes, each up to the next end of a line.
PIECE = 1 << 14
CONTINUATION = {bytes([byte]) for byte in range(0x80, 0xC0)}
# What some programs begin a file of UTF-8 with, and what begins a file of another encoding.
MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {b"\xff\xfe": "UTF-16 or UTF-32", b"\xfe\xff": "UTF-16"}
# What compressed files begin with, whatever they are called.
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ": ".xz"}


@dataclasses.dataclass(frozen=True)
class File:
    """A text file, or one of JSON lines with a document each; plain or compressed.

    A text file longer than a piece is as many documents as it has pieces, so that memory stays
    flat. A position is [bytes before it, uncompressed; lines before it].
    """

    path: Path
    reading: Reading = dataclasses.field(default_factory=Reading)
    # By which documents of it are held out: the same for a file that is named several times.
    number: int = 0

    def documents(self, position: list[int] | None = None) -> Iterator[tuple[Document, list[int]]]:
        offset, line = position or (0, 0)
        read = self._json_lines if is_json(self.path) else self._pieces
        return read(offset, line)

    def _lines(self, offset: int, line: int, limit: int) -> Iterator[tuple[bytes, int, int]]:
        """Lines of about `limit` bytes at most, each with the bytes and line ends up to its end."""
        try:
            with decompressed(self.path) as file:
                if not skip(file, offset):
                    raise UsageError(
                        f"{self.path} is shorter than when the position was saved: bring back the "
                        "file that it was."
                    )
                while data := file.readline(limit):
                    # Not within a character, of which the later bytes are 10xxxxxx.
                    for _ in range(3):
                        if not data.endswith(b"\n") and file.peek(1)[:1] in CONTINUATION:
                            data += file.read(1)
                    if offset == 0:
                        self._check_beginning(data)
                    offset += len(data)
                    line += data.endswith(b"\n")
                    yield data, offset, line
        except EOFError as error:
            raise UsageError(
                f"{self.path}: cannot be read after line {line}: it is truncated, or still being "
                "written."
            ) from error
        except Damaged as error:
            what = compression(self.path).removeprefix(".")
            raise UsageError(
                f"{self.path}: cannot be read after line {line}: it is damaged, or was not "
                f"compressed as {what} ({error})."
            ) from error
        except OSError as error:
            raise cannot_be_read(f"{self.path}, after line {line},", error) from error

    def _check_beginning(self, data: bytes) -> None:
        """Says what a file is that is not UTF-8 from its first byte on.

        Raises:
          UsageError: it is that.
        """
        for mark, encoding in OTHER_MARKS.items():
            if data.startswith(mark):
                raise UsageError(
                    f"{self.path}, line 1: it begins with the mark of {encoding}: expected UTF-8."
                )
        for magic, suffix in MAGIC.items():
            if data.startswith(magic):
                raise UsageError(
                    f"{self.path}, line 1: what it has is compressed, as {suffix} is, which its "
                    "name does not say: give it that suffix as well."
                )

    def _json_lines(self, offset: int, line: int) -> Iterator[tuple[Document, list[int]]]:
        for number, (data, end, ends) in enumerate(self._lines(offset, line, -1), line + 1):
            data = data.removeprefix(MARK)
            if not data.strip():
                continue
            document = self.reading.read_line(data, f"{self.path}, line {number}")
            if document is not None:
                yield document, [end, ends]

    def _pieces(self, offset: int, line: int) -> Iterator[tuple[str, list[int]]]:
        piece: list[str] = []
        size = 0
        for data, end, ends in self._lines(offset, line, PIECE):
            try:
                piece.append((data if offset else data.removeprefix(MARK)).decode())
                size += len(data)
            except UnicodeDecodeError as error:
                self.reading.leave_out(f"{self.path}, line {line + 1}", f"not UTF-8: {error}")
            offset, line = end, ends
            if size >= PIECE:
                yield "".join(piece), [offset, line]
                piece, size = [], 0
        if piece:
            yield "".join(piece), [offset, line]


def skip(file: Any, size: int) -> bool:
    """Reads past `size` bytes, if there are so many; seeks where that is faster."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        size -= file.seek(min(size, file.seek(0, io.SEEK_END)))
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        size -= len(data)
    return size == 0


def numbers(paths: Sequence[Path]) -> list[int]:
    """For each file the place of the first one that begins as it does.

    So a file has one number by all paths that lead to it, as have its copies, and those that were
    compressed; also where something was added to one of them, behind the first document of JSON
    lines, or behind the first piece of a text.
    """
    if len(paths) == 1:
        return [0]
    first: dict[bytes, int] = {}
    return [first.setdefault(beginning(path), place) for place, path in enumerate(paths)]


def beginning(path: Path) -> bytes:
    """A digest of the first document of a file, or of so much of it as tells it from others."""
    try:
        with decompressed(path) as file:
            data = file.read(PIECE).removeprefix(MARK)
    except (EOFError, Damaged, OSError):
        # Reading it says what is wrong.
        data = os.fsencode(os.path.realpath(path))
    if is_json(path):
        data = data.lstrip().split(b"\n", 1)[0].rstrip()
    return hashlib.sha256(data).digest()
