"""Reads the files of tasks: GLUE's own, and lines of a label and a text."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.flax_glue import packaged
from examples.flax_glue.tasks import TASKS, Task
from examples.flax_llama.usage import UsageError, cannot_be_read, one_of

# One text, or two.
Texts = tuple[str, ...]
# Where a line is, its texts, and its label as it is written.
Row = tuple[str, Texts, str]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts and labels: int32, or float32 where they are numbers."""

    texts: Sequence[Texts]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, limit: int | None) -> "Examples":
        return Examples(self.texts[:limit], self.labels[:limit])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The data of a task.

    Attributes:
      train: to train on.
      dev: to choose by; where there are several, the first one. By what precedes their scores.
      test: to report on, if there is a test with labels.
      labels: what the numbers of classes stand for; empty where a label is a number.
      files: that were read.
      notes: what there is to say of them, a line each.
    """

    train: Examples
    dev: dict[str, Examples]
    test: Examples | None
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """How many numbers a model has to give for a text."""
        return max(len(self.labels), 1)


def open_task(name: str, data: Path, test: Path | None, limit: int | None = None) -> Dataset:
    """The data of a task.

    Args:
      name: of the task.
      data: a directory with train and dev, as .tsv in GLUE's format or as .txt with a label and a
        text on each line; of what packages have, the one file.
      test: a file to report on; by default test.txt of the directory, if there is one, or test.tsv,
        if that has labels.
      limit: of each file the first examples alone.

    Raises:
      UsageError: there is no such task or file, or something in it is wrong.
    """
    one_of("task", name, TASKS)
    task = TASKS[name]
    if name in packaged.READERS:
        return of_package(name, task, data, test, limit)
    if not data.is_dir():
        raise UsageError(f"data={data} is no directory: expected one with train and dev.")
    notes: list[str] = []
    train_file = find(data, "train", task)
    rows = {train_file: list(read_rows(train_file, task, notes))}
    labels = task.labels or (() if task.is_regression else in_order(rows[train_file]))
    if len(labels) == 1:
        raise UsageError(f"{train_file}: each label is {labels[0][:40]!r}; expected two or more.")
    dev_files = {prefix: find(data, file, task) for prefix, file in task.dev}
    for file in dev_files.values():
        rows[file] = list(read_rows(file, task, notes))
    test_file = test or (default_test(data, task, notes) if len(task.dev) == 1 else None)
    if test_file is not None:
        if test_file.is_file() and test_file.samefile(train_file):
            notes.append(f"test={test_file} is what is trained on")
        rows[test_file] = list(read_rows(test_file, task, notes))
    found = {file: to_examples(rows[file], labels, task, file).first(limit) for file in rows}
    return Dataset(
        found[train_file],
        {prefix: found[file] for prefix, file in dev_files.items()},
        None if test_file is None else found[test_file],
        labels,
        tuple(rows),
        tuple(notes),
    )


def of_package(name: str, task: Task, data: Path, test: Path | None, limit: int | None) -> Dataset:
    """The data of a task that a package has in one file, divided into three."""
    if test is not None:
        raise UsageError(f"test={test} has no effect with task={name!r}: a part of it is the test.")
    if not data.is_file():
        raise UsageError(f"data={data} is no file: expected {packaged.FILES[name]}.")
    rows = packaged.divided(name, data)
    train, dev, of_test = (
        to_examples(rows[part], task.labels, task, data).first(limit)
        for part in ("train", "dev", "test")
    )
    return Dataset(train, {"": dev}, of_test, task.labels, (data,))


def find(data: Path, name: str, task: Task) -> Path:
    """The file of that name, as GLUE has it or as text.

    Raises:
      UsageError: there is none, or there are both.
    """
    suffixes = [".tsv"] if task.texts else []
    suffixes += [".txt"] if len(task.texts) <= 1 and not task.is_regression else []
    paths = [data / f"{name}{suffix}" for suffix in suffixes]
    there = [path for path in paths if path.is_file()]
    if len(there) != 1:
        names = (" and " if there else " or ").join(path.name for path in paths)
        raise UsageError(f"data={data} has {'both' if there else 'no'} {names}: expected one.")
    return there[0]


def default_test(data: Path, task: Task, notes: list[str]) -> Path | None:
    """The test of a directory, if it has labels; says so if it has none."""
    if not any((data / f"test{suffix}").is_file() for suffix in (".tsv", ".txt")):
        return None
    path = find(data, "test", task)
    if path.suffix.lower() == ".tsv" and not has_labels(path, task):
        notes.append(f"{path} has no labels: nothing is reported of it")
        return None
    return path


def has_labels(path: Path, task: Task) -> bool:
    """Whether a file of GLUE has labels, which its tests have not."""
    _, columns = next(lines(path))
    if isinstance(task.label, int):
        return columns[:2] != ["index", "sentence"]
    return task.label in columns


def lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a file of GLUE, by number, and their columns; quotes stand for themselves.

    Raises:
      UsageError: the file cannot be read, has none, or is not UTF-8.
    """
    number = 0
    try:
        # As bytes, since no other character ends a line, and to know which one is no text.
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # Some begin with a mark of their byte order.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, text.rstrip("\r\n").split("\t")
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}, line {number}: not UTF-8.") from error
    if not number:
        raise UsageError(f"{path} is empty.")


def read_rows(path: Path, task: Task, notes: list[str]) -> Iterator[Row]:
    """The rows of a file.

    Raises:
      UsageError: it has no labels, or a line is not as it should be.
    """
    if not task.texts or (path.suffix.lower() == ".txt" and len(task.texts) == 1):
        yield from labelled_lines(path)
        return
    found = lines(path)
    if isinstance(task.label, int):
        if not has_labels(path, task):
            raise UsageError(f"{path} has no labels: tests of GLUE cannot be trained or scored on.")
        where: list[Any] = [*task.texts, task.label]
    else:
        _, header = next(found)
        where = columns_of(path, header, task)
    short = 0
    for number, columns in found:
        if len(columns) <= max(where):
            short += 1
            if not task.skips_short_rows:
                raise UsageError(
                    f"{path}, line {number}: {len(columns)} columns, expected {max(where) + 1} or "
                    "more, with tabs between."
                )
            continue
        *texts, label = (columns[i] for i in where)
        yield f"{path}, line {number}", tuple(texts), label
    if short:
        lack = "1 line that lacks" if short == 1 else f"{short} lines that lack"
        notes.append(f"{path}: left out {lack} columns")


def columns_of(path: Path, header: list[str], task: Task) -> list[int]:
    """The numbers of a task's columns of text and of its label, by a header."""
    if any(name not in header for name in task.texts):
        raise UsageError(
            f"{path}: expected columns {', '.join(map(str, [*task.texts, task.label]))}; its first "
            f"line is {' '.join(header)[:80]!r}."
        )
    if task.label not in header:
        raise UsageError(
            f"{path} has no labels, no column {task.label!r}: tests of GLUE cannot be trained or "
            "scored on."
        )
    return [header.index(str(name)) for name in (*task.texts, task.label)]


def labelled_lines(path: Path) -> Iterator[Row]:
    """The rows of a file with a label on each line, a tab or a space behind it, and a text."""
    for number, columns in lines(path):
        line = "\t".join(columns).strip()
        if line:
            label, *text = line.split(maxsplit=1)
            if not text:
                raise UsageError(
                    f"{path}, line {number}: {line[:60]!r}; expected a label, a tab or a space, "
                    "and a text."
                )
            yield f"{path}, line {number}", tuple(text), label


def in_order(rows: Sequence[Row]) -> tuple[str, ...]:
    """The labels that there are, numbers by their size."""
    labels = {label for _, _, label in rows}
    numeric = all(label.isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if numeric else str))


def to_examples(rows: Sequence[Row], labels: Sequence[str], task: Task, path: Path) -> Examples:
    """Rows with labels in numbers.

    Raises:
      UsageError: there is none, or a label is out of range.
    """
    if not rows:
        raise UsageError(f"{path} has no examples.")
    if task.span is None:
        number = {label: i for i, label in enumerate(labels)}
        for where, _, label in rows:
            if label not in number:
                known = ", ".join(list(labels)[:10])
                raise UsageError(f"{where}: label {label[:40]!r}; expected one of {known}.")
        values = np.array([number[label] for _, _, label in rows], np.int32)
    else:
        values = np.array([to_number(where, label, task.span) for where, _, label in rows])
        values = values.astype(np.float32)
    return Examples([texts for _, texts, _ in rows], values)


def to_number(where: str, label: str, span: tuple[float, float]) -> float:
    """A label that is a number."""
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not span[0] <= value <= span[1]:
        raise UsageError(
            f"{where}: label {label[:40]!r}; expected a number from {span[0]:g} to {span[1]:g}."
        )
    return value
