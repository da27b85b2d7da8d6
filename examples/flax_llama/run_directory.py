"""The directory of a run: who may write to it, and the settings it was made with."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.flax_llama.config import Config, LlamaConfig, UsageError

SETTINGS = "config.json"
PARTIAL = "config.json.partial"
LOCK = "lock"
# What a run leaves that ends before it has written its settings.
EMPTY = {LOCK, PARTIAL}

# What a resumed run may change: none of it has a part in what is computed.
FREE = {
    *("eval_every", "save_every", "keep"),
    *("out", "resume", "new_subspace", "tensorboard", "wandb", "distributed", "quiet"),
}
SUBSPACE = {
    "rank",
    "projector",
    "projector_dtype",
    "moment_dtype",
    "transport",
    "residual",
    "refresh",
    "stagger",
    "update_proj_gap",
    "scale",
}


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


def check_contents(out: Path, *, resume: bool) -> None:
    """The part of `check_directory` that can be done while holding the lock."""
    if resume:
        if not (out / SETTINGS).is_file():
            raise UsageError(
                f"out={out} holds no run to resume: leave resume out to start one there."
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
    with open(out / LOCK, "r+" if (out / LOCK).exists() else "w+") as file:
        try:
            # Of the kernel, so that it goes with the process, however that ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"out={out} is in use by process {file.read().strip()}.") from None
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def write_settings(out: Path, config: Config, shape: LlamaConfig) -> None:
    """Writes the resolved configuration and the model's shape, whole or not at all."""
    settings = {"train": settings_of(config), "model": dataclasses.asdict(shape)}
    partial = out / PARTIAL
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    partial.replace(out / SETTINGS)


def settings_of(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it."""
    return dataclasses.asdict(config) | {"out": str(config.out)}


def config_of(settings: dict[str, Any]) -> Config:
    """Undoes `settings_of`.

    Raises:
      UsageError: another version of this program wrote them.
    """
    try:
        return Config(**settings | {"out": Path(settings["out"])})
    except (KeyError, TypeError) as error:
        raise UsageError(f"These are not the settings of this version: {error}") from error


def read_settings(out: Path) -> dict[str, Any]:
    """What `write_settings` wrote: the configuration in "train", the model's shape in "model".

    Raises:
      UsageError: there is nothing that can be read.
    """
    path = out / SETTINGS
    if not path.is_file():
        raise UsageError(f"{out} is not the directory of a run: it has no {SETTINGS}.")
    try:
        settings = json.loads(path.read_text())
        return {name: settings[name] for name in ("train", "model")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def check_same(stored: dict[str, Any], config: Config) -> None:
    """Refuses to go on with other settings than a checkpoint was made with.

    Raises:
      UsageError: some setting differs that the rest of the run depends on.
    """
    now = settings_of(config)
    changed = {name for name in now if name not in FREE and stored.get(name) != now[name]}
    refused = changed - SUBSPACE if config.new_subspace else changed
    if refused:
        differences = "; ".join(
            f"{name} was {stored.get(name)!r} and is {now[name]!r}"
            for name in now
            if name in refused
        )
        hint = " (new_subspace allows that)" if refused <= SUBSPACE else ""
        raise UsageError(
            f"out={config.out} is of another configuration: {differences}{hint}. Resume with the "
            "same settings, which need not be repeated, or name another directory."
        )
