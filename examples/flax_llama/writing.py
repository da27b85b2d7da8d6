"""Files that are written whole or not at all, and errors that name the file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the operating system name the file, which one of writing does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file such that nobody ever sees a part of it, and an error leaves the old one.

    Raises:
      OSError: it cannot be written; names the file.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with naming(path):
            partial.write_text(text)
            partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
