"""Compressed files, read to their ends: all members, streams and frames that follow each other."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

# Compressed bytes that are decompressed at a time.
CHUNK = 1 << 14
# The largest window that a frame of zstd may have, as of `zstd --long=31`; it is set aside only
# where a frame asks for it.
WINDOW = 1 << zstandard.WINDOWLOG_MAX


class Damaged(ValueError):
    """What a file has cannot be decompressed; the message says why."""


class Members(io.RawIOBase):
    """Decompresses all that was compressed into a file, part after part.

    Python's own readers of .xz and .bz2 end without a word at a part whose first bytes are damaged
    or that comes after padding, and that of zstandard takes half a frame for a whole.

    Args:
      path: of the file.
      new: makes what decompresses a part, with `decompress`, `eof` and `unused_data`.
      padded: whether zeros may follow a part.
    """

    def __init__(self, path: Path, new: Callable[[], Any], *, padded: bool):
        self._file = open(path, "rb")  # noqa: SIM115
        self._new, self._padded = new, padded
        self._part: Any = new()
        self._unused = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            compressed = self._unused or self._file.read(CHUNK)
            if self._part is None and self._padded:
                compressed = compressed.lstrip(b"\0") or self._after_zeros(compressed)
            if not compressed and self._part is not None:
                raise EOFError("the last part has no end")
            if not compressed:
                return 0
            self._decompress(compressed)
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _after_zeros(self, zeros: bytes) -> bytes:
        """The bytes after zeros up to the end of a chunk, of which there may be more."""
        while zeros and not (found := zeros.lstrip(b"\0")):
            zeros = self._file.read(CHUNK)
        return found if zeros else b""

    def _decompress(self, compressed: bytes) -> None:
        if self._part is None:
            self._part = self._new()
        try:
            self._output = memoryview(self._part.decompress(compressed))
        except MemoryError as error:
            raise Damaged("there is not enough memory for its window") from error
        # What bz2 raises is a bare OSError.
        except (lzma.LZMAError, zstandard.ZstdError, OSError) as error:
            raise Damaged(str(error)) from error
        self._unused = self._part.unused_data if self._part.eof else b""
        if self._part.eof:
            self._part = None

    def close(self) -> None:
        self._file.close()
        super().close()


def members(new: Callable[[], Any], *, padded: bool = False) -> Callable[[Path], Any]:
    return lambda path: io.BufferedReader(Members(path, new, padded=padded))


def zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()


ZSTD, BZ2 = members(zstd), members(bz2.BZ2Decompressor)
# Of zeros alone, what finds out the format would make an empty file of an older one.
XZ = members(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padded=True)
# By suffix, in small letters, what opens a file.
OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".xz": XZ,
    ".zst": ZSTD,
    ".bz2": BZ2,
    ".gzip": gzip.GzipFile,
    ".zstd": ZSTD,
}


def compression(path: Path) -> str:
    """The suffix that says how a file is compressed, in small letters; empty if it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in OPENERS else ""


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[Any]:
    """A file as binary, which is decompressed where its name says that it is compressed.

    Raises:
      EOFError: it is truncated.
      Damaged: it cannot be decompressed.
      OSError: it cannot be read.
    """
    opener = OPENERS.get(compression(path))
    try:
        with contextlib.closing(opener(path) if opener else open(path, "rb")) as file:
            yield file
    except (zlib.error, gzip.BadGzipFile) as error:
        raise Damaged(str(error)) from error
