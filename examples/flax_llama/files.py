"""Documents in text files and in files of JSON lines, plain or compressed."""

import contextlib
import dataclasses
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from examples.flax_llama.reading import Document, Reading
from examples.flax_llama.usage import UsageError, cannot_be_read

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
# What comes of a file that ends too early, or whose bytes are others than were compressed.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile)
# Files of a directory that are about the data, by how their names begin.
NO_DATA = (".", "readme", "license")


def content_suffix(path: Path) -> str:
    """The suffix of a name without that of a compression."""
    return Path(path.stem).suffix if path.suffix in OPENERS else path.suffix


def expand(data: str | Sequence[Path], name: str = "data") -> list[Path]:
    """The files of a comma-separated list of paths, globs and directories.

    Those of one glob or directory are in alphabetical order. Of a directory they are all that are
    in it and below it and whose names have a suffix of documents, but for hidden ones and those
    that begin with README or LICENSE.

    Args:
      data: what to expand, or the files themselves.
      name: of the setting that names them, for errors.

    Raises:
      UsageError: there is nothing, or it cannot be read, or it is no file of documents.
    """
    if not isinstance(data, str):
        paths = list(data)
    else:
        paths = [path for part in data.split(",") for path in matching(part, name)]
    for path in paths:
        try:
            with open(path, "rb"):
                size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{name}={path} does not exist.") from None
        except OSError as error:
            raise cannot_be_read(f"{name}={path}", error) from error
        if not is_document(path):
            raise UsageError(
                f"{name}={path}: expected a name that ends in one of "
                f"{', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}, alone or followed by one of "
                f"{', '.join(OPENERS)}."
            )
        if size == 0:
            raise UsageError(f"{name}={path} is empty.")
    return paths


def matching(part: str, name: str) -> list[Path]:
    """The files of a path, a glob or a directory, each once."""
    if not part:
        # Which would be the directory that we are in.
        raise UsageError(f"{name}='' is empty, or has nothing before or after a comma.")
    matches = [part]
    if glob.has_magic(part):
        root = Path(part[: part.index(next(c for c in part if c in "*?["))] + "x").parent
        if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
            raise UsageError(f"{name}={part!r} cannot be read: no permission for {root}.")
        matches = sorted(glob.glob(part, recursive=True))
        if not matches:
            raise UsageError(f"{name}={part!r} matches no file.")
    found = []
    for path in map(Path, matches):
        found += in_directory(path, name) if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def in_directory(directory: Path, name: str) -> list[Path]:
    """All files of documents in a directory and below it, in alphabetical order."""

    def refuse(error: OSError) -> None:
        raise cannot_be_read(f"{name}={error.filename}", error) from error

    found = []
    for path, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, name) for name in names if not name.lower().startswith(NO_DATA)]
    if found := sorted(filter(is_document, found)):
        return found
    raise UsageError(
        f"{name}={directory}: there is no file in it or below it whose name ends in one of "
        f"{', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}, alone or followed by one of "
        f"{', '.join(OPENERS)}; nor is it a directory that the tokenize command made."
    )


def is_document(path: Path) -> bool:
    """Whether a name is one of text or of JSON lines."""
    return content_suffix(path) in TEXT_SUFFIXES + JSON_SUFFIXES


@dataclasses.dataclass(frozen=True)
class File:
    """A text file, or one of JSON lines with a document each; plain or compressed.

    A text file longer than a piece is as many documents as it has pieces, so that memory stays
    flat. A position is [bytes before it, uncompressed; lines before it].
    """

    path: Path
    reading: Reading = dataclasses.field(default_factory=Reading)

    def documents(self, position: list[int] | None = None) -> Iterator[tuple[Document, list[int]]]:
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
        except DAMAGED as error:
            raise UsageError(
                f"{self.path}: cannot be read after line {line}, is it truncated? {error}"
            ) from error
        except OSError as error:
            raise cannot_be_read(f"{self.path}, after line {line},", error) from error

    def _json_lines(self, offset: int, line: int) -> Iterator[tuple[Document, list[int]]]:
        for number, (data, end, ends) in enumerate(self._lines(offset, line, -1), line + 1):
            if data.isspace():
                continue
            document = self.reading.read_line(data, f"{self.path}, line {number}")
            if document is not None:
                yield document, [end, ends]

    def _pieces(self, offset: int, line: int) -> Iterator[tuple[str, list[int]]]:
        piece: list[str] = []
        size = 0
        for data, end, ends in self._lines(offset, line, PIECE):
            try:
                piece.append(data.decode())
                size += len(data)
            except UnicodeDecodeError as error:
                self.reading.leave_out(f"{self.path}, line {line + 1}", f"not UTF-8: {error}")
            offset, line = end, ends
            if size >= PIECE:
                yield "".join(piece), [offset, line]
                piece, size = [], 0
        if piece:
            yield "".join(piece), [offset, line]


def skip(file: Any, size: int) -> None:
    """Reads past `size` bytes; seeks where that is faster."""
    if isinstance(file, io.BufferedReader) and file.seekable():
        size -= file.seek(min(size, file.seek(0, io.SEEK_END)))
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        size -= len(data)
    if size > 0:
        raise EOFError("it is shorter than when the position was saved")
