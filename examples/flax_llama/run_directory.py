"""The directory of a run: who may write to it, and the settings it was made with."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.flax_llama.changes import settings_of
from examples.flax_llama.config import Config
from examples.flax_llama.sealed import checked, sealed
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.usage import UsageError, read_object
from examples.flax_llama.writing import naming, write_whole
from examples.hf.configuration import is_model

SETTINGS = "config.json"
PARTIAL = "config.json.partial"
LOCK = "lock"
CHECKPOINTS = "checkpoints"
# In the settings, where weights are from that were not trained here.
IMPORTED = "imported"
# What a run leaves that ends before it has written its settings.
EMPTY = {LOCK, PARTIAL}


def check_directory(out: Path, *, resume: bool) -> None:
    """Refuses a directory that a run could not write to, before any work is done.

    Raises:
      UsageError: a run is to start in a directory that holds something, or to go on in one that
        holds no run; or another process is writing to it.
    """
    if (out / LOCK).is_file():
        with lock(out):
            pass
    check_contents(out, resume=resume)
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"out={out} cannot be made: {there} is no directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"out={out} cannot be written: no permission for {there}.")


def check_contents(out: Path, *, resume: bool) -> None:
    """The part of `check_directory` that can be done while holding the lock."""
    if resume:
        if (out / CHECKPOINTS).is_dir():
            _json(out)
        if not (out / SETTINGS).is_file():
            raise UsageError(
                f"out={out} holds no run to resume: leave out resume=True to start one there."
            )
        if imported_from(out):
            raise UsageError(
                f"out={out} is an imported model: name another directory, and begin with its "
                f"weights, init_from={out} weights_only=True."
            )
    elif out.exists() and not (out.is_dir() and {p.name for p in out.iterdir()} <= EMPTY):
        is_run = ", resume the run in it" if (out / SETTINGS).is_file() else ""
        raise UsageError(
            f"out={out} is not an empty directory: name another one{is_run} or delete it."
        )


@contextlib.contextmanager
def lock(out: Path) -> Iterator[None]:
    """Keeps other processes from writing to `out`, for as long as this one lives.

    Raises:
      UsageError: another process holds the lock.
    """
    path = out / LOCK
    # Without a buffer, so that nothing is left to be written when it is closed.
    with open(path, "r+b" if path.exists() else "w+b", buffering=0) as file:
        try:
            # Of the kernel, so that it goes with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().decode().strip()
            raise UsageError(f"out={out} is in use by process {holder}.") from None
        with naming(path):
            file.write(f"{os.getpid()}\n".encode())
            file.truncate()
        yield


def write_settings(
    out: Path, config: Config, shape: LlamaConfig, imported: str | None = None
) -> None:
    """Writes the resolved configuration and the model's shape, whole or not at all.

    Args:
      out: the directory.
      config: of the run, or with which one can begin with an imported model.
      shape: of the model.
      imported: where its weights are from, if it is no run that trains them.
    """
    settings = {"train": settings_of(config), "model": dataclasses.asdict(shape)}
    settings |= {IMPORTED: imported} if imported else {}
    write_whole(out / SETTINGS, json.dumps(sealed(settings), indent=2) + "\n")


def imported_from(out: Path) -> str | None:
    """Where the weights are from, if a directory is that of an imported model, and no run.

    Raises:
      UsageError: there is nothing that can be read.
    """
    return _json(out).get(IMPORTED)


def read_settings(out: Path) -> dict[str, Any]:
    """What `write_settings` wrote: the configuration in "train", the model's shape in "model".

    Raises:
      UsageError: there is nothing that can be read.
    """
    settings = _json(out)
    if not {"train", "model"} <= settings.keys():
        raise UsageError(f"{out / SETTINGS} is not what a run writes: it has no train and model.")
    return {name: settings[name] for name in ("train", "model")}


def _json(out: Path) -> dict[str, Any]:
    path = out / SETTINGS
    if not path.is_file():
        advice = f" {repair(out)}." if (out / CHECKPOINTS).is_dir() else ""
        raise UsageError(f"{out} is not the directory of a run: it has no {SETTINGS}.{advice}")
    if is_model(out):
        raise UsageError(
            f"{out} is a model of Hugging Face, not of a run: examples.flax_llama.import_hf makes "
            "a directory of it that can be taken for one."
        )
    try:
        found = read_object(path)
    except UsageError as error:
        raise UsageError(f"{error} {repair(out)}.") from error
    return checked(found, path, repair(out))


def repair(out: Path) -> str:
    """What to do where the settings of a run cannot be read."""
    return (
        "To take those of the last checkpoint, python -m examples.flax_llama.repair --out "
        f"{shlex.quote(str(out))}"
    )
