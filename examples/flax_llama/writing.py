"""Files that are written whole or not at all, and errors that name the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from examples.flax_llama.usage import UsageError, reason


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the operating system name the file, which one of writing does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def make_directory(out: Path) -> None:
    """Makes a directory to write to, where it is not there yet.

    Raises:
      UsageError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"out={out} cannot be made: {reason(error)}.") from error


def write_whole(path: Path, contents: str | bytes) -> None:
    """Writes a file such that nobody ever sees a part of it, and an error leaves the old one.

    Raises:
      OSError: it cannot be written; names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
            partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
