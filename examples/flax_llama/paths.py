"""The files that a setting names: paths, globs and directories, with commas between.

What is there under the very name that was given is meant by it, whatever brackets, stars and commas
are in that name.
"""

import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from examples.flax_llama.compressed import OPENERS, compression
from examples.flax_llama.usage import UsageError, cannot_be_read, say_once

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
NAMES = (
    f"{', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}, alone or followed by one of {', '.join(OPENERS)}"
)
# Files of a directory that are about the data, by how their names begin.
NO_DATA = (".", "readme", "license")
TRAINED_ON = "Note: all of data is valid_data too, which is validated on what was trained on"
# No name in a directory is longer.
LONGEST = 255


def content_suffix(path: Path) -> str:
    """The suffix of a name without that of a compression, in small letters."""
    return (Path(path.stem) if compression(path) else path).suffix.lower()


def is_text(path: Path) -> bool:
    return content_suffix(path) in TEXT_SUFFIXES


def is_json(path: Path) -> bool:
    return content_suffix(path) in JSON_SUFFIXES


def is_document(path: Path) -> bool:
    """Whether a name is one of text or of JSON lines."""
    return is_text(path) or is_json(path)


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
    paths = listed(data, name) if isinstance(data, str) else list(data)
    for path in paths:
        check(path, name)
    return paths


def listed(data: str, name: str) -> list[Path]:
    """The files of a list with commas between, some of which may be within names."""
    parts, found = data.split(","), []
    while parts:
        count, paths = first_of(parts, name)
        found += paths
        parts = parts[count:]
    return found


def first_of(parts: list[str], name: str) -> tuple[int, list[Path]]:
    """How many parts of a list are the first name in it, and the files of that name."""
    joined = within_a_path(parts)
    for count in range(len(joined), 0, -1):
        whole, before = joined[count - 1], len(",".join(parts[: count - 1]))
        if os.path.lexists(whole):
            return count, files_of([whole], name)
        if count > 1 and len(directory_of(whole)) > before:
            return count, files_of(matching(whole, name) or refused(whole, name), name)
    if not parts[0]:
        # Which would be the directory that we are in.
        raise UsageError(f"{name}='' is empty, or has nothing before or after a comma.")
    for count, pattern in enumerate(joined, 1):
        if matches := matching(pattern, name):
            return count, files_of(matches, name)
    return 1, [Path(each) for each in refused(parts[0], name, divided=len(parts) > 1)]


def refused(pattern: str, name: str, *, divided: bool = False) -> list[str]:
    """Refuses what names no file."""
    said = " Commas are between names." if divided else ""
    if glob.has_magic(pattern):
        raise UsageError(f"{name}={pattern!r} matches no file.{said}")
    raise UsageError(f"{name}={pattern} does not exist.{said}")


def directory_of(pattern: str) -> str:
    """The longest beginning of a name that is a directory as it is written, with its slash."""
    place = len(pattern)
    while (place := pattern.rfind("/", 0, place)) >= 0:
        if os.path.isdir(found := pattern[: place + 1]):
            return found
    return ""


def within_a_path(parts: list[str]) -> list[str]:
    """The first part, and with those after it as long as they can be one name together.

    They cannot where what is before the last slash is no directory: it is no beginning of another
    name then either, so that of a long list of files each is looked at once.
    """
    joined = [parts[0]]
    for part in parts[1:]:
        whole = f"{joined[-1]},{part}"
        directory, _, last = whole.rpartition("/")
        if len(last) > LONGEST or (directory and not is_directory(directory)):
            break
        joined.append(whole)
    return joined


def is_directory(pattern: str) -> bool:
    """Whether there is a directory of a name, or one that a glob matches."""
    if os.path.isdir(pattern):
        return True
    return glob.has_magic(pattern) and any(map(os.path.isdir, glob.iglob(pattern, recursive=True)))


def matching(pattern: str, name: str) -> list[str]:
    """What a glob matches, in alphabetical order.

    Directories that are there as they are written come first; brackets are tried as what they are
    in a glob, and then as what they are in a name.
    """
    if not glob.has_magic(pattern):
        return []
    root = directory_of(pattern)
    rest = pattern[len(root) :]
    if os.path.isdir(root or ".") and not os.access(root or ".", os.R_OK | os.X_OK):
        raise UsageError(
            f"{name}={pattern!r} cannot be read: no permission for {Path(root or '.')}."
        )
    for each in (rest, rest.replace("[", "[[]")):
        if found := glob.glob(glob.escape(root) + each, recursive=True):
            return sorted(found)
    return []


def files_of(names: Sequence[str], name: str) -> list[Path]:
    """Files, and those of directories, each once."""
    found = []
    for path in map(Path, names):
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
        f"{NAMES}; nor is it a directory that the tokenize command made."
    )


def check(path: Path, name: str) -> None:
    """Refuses what is no file of documents that can be read.

    Raises:
      UsageError: says what it is.
    """
    what = f"{name}={path}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{what} is no file but a pipe or a device: expected files.")
        with open(path, "rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{what} does not exist.") from None
    except OSError as error:
        raise cannot_be_read(what, error) from error
    if not is_document(path):
        raise UsageError(f"{what}: expected a name that ends in one of {NAMES}.")
    if status.st_size == 0:
        raise UsageError(f"{what} is empty.")


def apart(paths: Sequence[Path], valid: Sequence[Path]) -> list[Path]:
    """The files that are trained on: those that are not validated on, whatever they are called.

    Where that is none, since both settings name the same files, it is all of them, as who tries
    whether a model can learn a text by heart wants it. Either is told.
    """
    ids = {identity(path) for path in valid}
    both = [str(path) for path in paths if identity(path) in ids]
    if len(both) == len(paths):
        say_once(TRAINED_ON)
        return list(paths)
    if both:
        more = f" and {len(both) - 5} more" if len(both) > 5 else ""
        say_once(f"Left out of data, since valid_data has it: {', '.join(both[:5])}{more}")
    return [path for path in paths if identity(path) not in ids]


def identity(path: Path) -> tuple[int, int]:
    """What two paths have in common that lead to one file."""
    status = path.stat()
    return status.st_dev, status.st_ino
