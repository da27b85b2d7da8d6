"""What tells whether data is still what it was: names, sizes and digests of samples of its files.

`data.json` in the directory of a run has them. A file that was replaced or that grew has another
digest; the same files at another place have not. Of the Hugging Face hub there is only the name.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.flax_llama.config import Config
from examples.flax_llama.documents import BUILT_IN, META, TEXT, is_of_files, is_tokenized
from examples.flax_llama.files import numbers
from examples.flax_llama.paths import apart, expand
from examples.flax_llama.sealed import checked, sealed
from examples.flax_llama.tokens import ENDS, TOKENS
from examples.flax_llama.usage import UsageError, cannot_be_read
from examples.flax_llama.writing import write_whole

DATA = "data.json"
# Of a large file so many pieces are read, from its start to its end, each of so many bytes.
PIECES, PIECE = 16, 4096
MOVE_AWAY = (
    "Move it away to go on: checkpoints have the digest of the data too, and it is written again"
)
# So many changed files are named.
NAMED = 5


@dataclasses.dataclass(frozen=True)
class FileMark:
    """What a file is known by."""

    # Relative to the directory that all files of the data have in common.
    name: str
    # Where it was; no part of what it is known by.
    path: str
    size: int
    # Of samples, in hexadecimal.
    digest: str

    @property
    def known_by(self) -> tuple[str, int, str]:
        return self.name, self.size, self.digest


@dataclasses.dataclass(frozen=True)
class Marks:
    """The files of some data, in the order in which they are read."""

    files: tuple[FileMark, ...]
    text_field: str = "text"
    # Whether documents of these files are kept for validation.
    held_out: bool = False
    # Names of the fields of conversations, where they were given.
    fields: str = ""
    # Which of them begin alike, so that the same documents of them are kept for validation.
    alike: str = ""

    @property
    def digest(self) -> str:
        """Of all that decides which documents there are, and in which order."""
        parts = [[file.known_by for file in self.files], self.text_field, self.held_out]
        parts += [self.fields] if self.fields or self.alike else []
        parts += [self.alike] if self.alike else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a run reads."""

    train: Marks
    # Where it is other data.
    valid: Marks | None

    @property
    def of_validation(self) -> Marks:
        """The marks of the data that it validates on."""
        return self.valid or self.train

    @property
    def digests(self) -> dict[str, str]:
        """Those of what it trains and validates on."""
        return {"train": self.train.digest, "valid": self.of_validation.digest}


def fingerprint_of(config: Config) -> Fingerprint:
    """The fingerprint of the data of a configuration, as it is now.

    Raises:
      UsageError: some of it cannot be read.
    """
    held_out = config.valid_data is None and not config.data.startswith("hf:")
    names = ("prompt_field", "response_field", "messages_field")
    given = [f"{name}={value}" for name in names if (value := getattr(config, name))]
    read = {"text_field": config.text_field, "fields": ", ".join(given)}
    held_out = held_out and config.data != BUILT_IN
    of_train = marks(config.data, valid_data=config.valid_data)
    of_files = held_out and is_of_files(config.data)
    same = alike([Path(mark.path) for mark in of_train]) if of_files else ""
    train = Marks(of_train, held_out=held_out, alike=same, **read)
    if config.valid_data is None:
        return Fingerprint(train, None)
    return Fingerprint(train, Marks(marks(config.valid_data, "valid_data"), **read))


def alike(paths: Sequence[Path]) -> str:
    """Which files begin as an earlier one does, as "2=0,3=1" by their places; empty if none."""
    return ",".join(f"{place}={n}" for place, n in enumerate(numbers(paths)) if n != place)


def marks(data: str, name: str = "data", valid_data: str | None = None) -> tuple[FileMark, ...]:
    """The marks of all files that data is read from, but for those of `valid_data`."""
    if data.startswith("hf:"):
        return (FileMark(data, data, 0, ""),)
    if data == BUILT_IN:
        paths = [TEXT]
    elif is_tokenized(data):
        paths = [Path(data, name) for name in (META, TOKENS, ENDS)]
    else:
        paths = expand(data, name)
        if valid_data is not None and is_of_files(valid_data):
            paths = apart(paths, expand(valid_data, "valid_data"))
    return marks_of(paths, name)


def marks_of(paths: Sequence[Path], name: str = "data") -> tuple[FileMark, ...]:
    """The marks of some files.

    Raises:
      UsageError: one of them cannot be read.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]  # as named, not where a link leads
    common = os.path.commonpath([path.parent for path in absolute])
    try:
        return tuple(
            FileMark(str(path.relative_to(common)), str(path), path.stat().st_size, sample(path))
            for path in absolute
        )
    except OSError as error:
        raise cannot_be_read(f"{name}={error.filename}", error) from error


def sample(path: Path, size: int | None = None) -> str:
    """A digest of pieces of a file, or of its first bytes; of all of them where they are few."""
    digest, size = hashlib.sha256(), path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        if size <= PIECES * PIECE:
            digest.update(file.read(size))
        else:
            for piece in range(PIECES):
                file.seek((size - PIECE) * piece // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:32]


def differences(was: Marks, now: Marks) -> str:
    """What is not as it was, for a person; empty if nothing is."""
    if was.digest == now.digest:
        return ""
    before = {file.name: file for file in was.files}
    after = {file.name: file for file in now.files}
    changed = [
        f"{name} {difference(file, after.get(name))}"
        for name, file in before.items()
        if name not in after or after[name].known_by != file.known_by
    ]
    new = [f"{name} is new" for name in after if name not in before]
    parts = []
    if changed or new:
        count, named = len(changed) + len(new), ", ".join([*changed, *new][:NAMED])
        more = f" and {count - NAMED} more" if count > NAMED else ""
        files = "1 file" if len(was.files) == 1 else f"{len(was.files)} files"
        parts.append(f"{named}{more} (of {files})")
        if new and before.keys() - after.keys():
            parts.append("files that have moved are known again by their names")
    elif list(before) != list(after) or len(before) != len(was.files):
        parts.append("the files come in another order")
    if was.text_field != now.text_field:
        parts.append(f"text_field was {was.text_field!r} and is {now.text_field!r}")
    if was.fields != now.fields:
        parts.append(f"the fields given were {was.fields or 'none'} and are {now.fields or 'none'}")
    if was.alike != now.alike:
        parts.append(
            "it has files that begin alike, of which an earlier version trained on documents that "
            "it validated on: others are held out now"
            if not was.alike
            else "other files begin alike"
        )
    if was.held_out != now.held_out:
        taken = "no longer" if was.held_out else "now"
        parts.append(f"documents to validate on are {taken} taken out of it")
    return "; ".join(parts)


def difference(was: FileMark, now: FileMark | None) -> str:
    """What became of a file that is not what it was."""
    if now is None:
        # Deleted, not named any more, or left out since valid_data has it.
        return "is no longer among them"
    grown = now.size - was.size
    if grown > 0 and sample(Path(now.path), was.size) == was.digest:
        return f"has {grown:,} bytes more at its end"
    return "has changed"


def write_fingerprint(out: Path, fingerprint: Fingerprint) -> None:
    """Writes it into the directory of a run, whole or not at all."""
    contents = sealed(dataclasses.asdict(fingerprint))
    write_whole(out / DATA, json.dumps(contents, indent=1) + "\n")


def read_fingerprint(out: Path) -> Fingerprint | None:
    """What `write_fingerprint` wrote; None where an earlier version of this program did not.

    Raises:
      UsageError: it cannot be read.
    """
    path = out / DATA
    if not path.is_file():
        return None

    def marks_from(stored: dict[str, Any]) -> Marks:
        return Marks(**stored | {"files": tuple(FileMark(**file) for file in stored["files"])})

    try:
        stored = checked(json.loads(path.read_text()), path, MOVE_AWAY)
        valid = stored["valid"] and marks_from(stored["valid"])
        return Fingerprint(marks_from(stored["train"]), valid)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. {MOVE_AWAY}.") from error
