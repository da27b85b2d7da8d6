"""Documents in text files and in files of JSON lines, plain or compressed."""

import contextlib
import dataclasses
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from examples.flax_llama.config import UsageError

# A text file is cut into documents of this many bytes, each up to the next end of a line.
PIECE = 1 << 14


class ZstdFile(io.RawIOBase):
    """Decompresses all frames of a file; zstandard's own reader takes half a frame for a whole."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._unused = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            compressed = self._unused or self._file.read(1 << 16)
            if not compressed and self._in_frame:
                raise EOFError("the last frame has no end")
            if not compressed:
                return 0
            if not self._in_frame:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = memoryview(self._frame.decompress(compressed))
            self._in_frame = not self._frame.eof
            self._unused = self._frame.unused_data
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


# Of compressed files, each to be called as `open(path, "rb")`.
OPENERS = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda path, _: io.BufferedReader(ZstdFile(path)),
}
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
CONTINUATION = {bytes([byte]) for byte in range(0x80, 0xC0)}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def content_suffix(path: Path) -> str:
    """The suffix of a name without that of a compression."""
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def expand(data: str) -> list[Path]:
    """The files of a comma-separated list of paths and globs, in alphabetical order for each."""
    paths = []
    for part in data.split(","):
        matches = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
        if not matches:
            raise UsageError(f"data={part!r} matches no file.")
        paths += map(Path, matches)
    for path in paths:
        if path.is_dir():
            raise UsageError(
                f"data={path} is a directory, and not one that the tokenize command made: name "
                f"files, as in '{path}/*.jsonl.gz'."
            )
        if not path.exists():
            raise UsageError(f"data={path} does not exist.")
        if content_suffix(path) not in TEXT_SUFFIXES + JSON_SUFFIXES:
            raise UsageError(
                f"data={path}: expected a name that ends in one of "
                f"{', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}, alone or followed by one of "
                f"{', '.join(OPENERS)}."
            )
        if path.stat().st_size == 0:
            raise UsageError(f"data={path} is empty.")
    return paths


@dataclasses.dataclass(frozen=True)
class File:
    """A text file, or one of JSON lines with a `text` each; plain or compressed.

    A text file longer than a piece is as many documents as it has pieces, so that memory stays
    flat. A position is [bytes before it, uncompressed; lines before it].
    """

    path: Path

    def documents(self, position: list[int] | None = None) -> Iterator[tuple[str, list[int]]]:
        offset, line = position or (0, 0)
        is_json = content_suffix(self.path) in JSON_SUFFIXES
        return self._json_lines(offset, line) if is_json else self._pieces(offset, line)

    def _lines(self, offset: int, line: int, limit: int) -> Iterator[tuple[bytes, int, int]]:
        """Lines of about `limit` bytes at most, each with the bytes and line ends up to its end."""
        try:
            with contextlib.closing(OPENERS.get(self.path.suffix, open)(self.path, "rb")) as file:
                skip(file, offset)
                while data := file.readline(limit):
                    # Not within a character, of which the later bytes are 10xxxxxx.
                    while not data.endswith(b"\n") and file.peek(1)[:1] in CONTINUATION:
                        data += file.read(1)
                    offset += len(data)
                    line += data.endswith(b"\n")
                    yield data, offset, line
        except UNREADABLE as error:
            raise UsageError(
                f"{self.path}: cannot be read after line {line}, is it truncated? {error}"
            ) from error

    def _json_lines(self, offset: int, line: int) -> Iterator[tuple[str, list[int]]]:
        for number, (data, end, ends) in enumerate(self._lines(offset, line, -1), line + 1):
            if data.isspace():
                continue
            where = f"{self.path}, line {number}"
            try:
                example = json.loads(data)
            except UnicodeDecodeError as error:
                raise UsageError(f"{where}: not UTF-8: {error}") from error
            except ValueError as error:
                raise UsageError(f"{where}: not JSON: {error}") from error
            if not isinstance(example, dict) or not isinstance(example.get("text"), str):
                raise UsageError(
                    f"{where}: expected an object with a string 'text', got {data[:60]!r}."
                )
            if not is_unicode(example["text"]):
                raise UsageError(f"{where}: half a surrogate pair, which is no character.")
            yield example["text"], [end, ends]

    def _pieces(self, offset: int, line: int) -> Iterator[tuple[str, list[int]]]:
        piece: list[str] = []
        size = 0
        for data, end, ends in self._lines(offset, line, PIECE):
            try:
                piece.append(data.decode())
            except UnicodeDecodeError as error:
                raise UsageError(f"{self.path}, line {line + 1}: not UTF-8: {error}") from error
            size += len(data)
            offset, line = end, ends
            if size >= PIECE:
                yield "".join(piece), [offset, line]
                piece, size = [], 0
        if piece:
            yield "".join(piece), [offset, line]


def is_unicode(text: str) -> bool:
    """Whether there are UTF-8 bytes for a text, which JSON escapes do not promise."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def skip(file: Any, size: int) -> None:
    """Reads past `size` bytes; seeks where that is faster."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        size -= file.seek(min(size, file.seek(0, io.SEEK_END)))
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        size -= len(data)
    if size > 0:
        raise EOFError("it is shorter than when the position was saved")
