"""What is in the directory of a fine-tuning run, beside metrics and checkpoints: its settings."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.flax_glue.config import Config
from examples.flax_glue.shapes import CONFIG, EncoderConfig
from examples.flax_glue.tokens import FILE
from examples.flax_llama.fingerprint import marks_of
from examples.flax_llama.records import METRICS, missing, read_records
from examples.flax_llama.run_directory import SETTINGS
from examples.flax_llama.sealed import checked, sealed
from examples.flax_llama.usage import UsageError, read_object
from examples.flax_llama.writing import write_whole
from examples.hf.tensors import open_tensors

# Settings that are not of a run but of a process.
OF_PROCESS = ("out", "resume", "quiet")
# What is in them counts, not where they are.
PATHS = ("model", "data", "test")


def settings_of(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it, but for what is of a process."""
    settings = dataclasses.asdict(config)
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in settings.items()
        if name not in OF_PROCESS
    }


def digests(config: Config, files: Sequence[Path]) -> list[list[Any]]:
    """What the files of the model and of the data are known by, wherever they are."""
    of_model = {tensor.file for tensor in open_tensors(config.model).values()}
    of_model |= {config.model / CONFIG, config.model / FILE}
    return [list(mark.known_by) for paths in (sorted(of_model), files) for mark in marks_of(paths)]


def write_settings(
    out: Path, config: Config, encoder: EncoderConfig, files: list[list[Any]]
) -> None:
    """Writes the resolved configuration, the model's, and digests, whole or not at all."""
    settings = {"finetune": settings_of(config), "model": dataclasses.asdict(encoder)}
    whole = sealed(settings | {"files": files})
    write_whole(out / SETTINGS, json.dumps(whole, indent=2) + "\n")


def read_settings(out: Path) -> dict[str, Any]:
    """What `write_settings` wrote.

    Raises:
      UsageError: there is nothing of it, or it is damaged.
    """
    path = out / SETTINGS
    if not path.is_file():
        raise UsageError(f"out={out} holds no run to resume: leave out resume=True to start one.")
    settings = checked(read_object(path), path, "Begin anew in another directory")
    if not all(name in settings for name in ("finetune", "model", "files")):
        raise UsageError(f"{path} is not what a fine-tuning run writes.")
    return settings


def config_of(settings: dict[str, Any]) -> Config:
    """Undoes `settings_of`, with None for what nobody gave.

    Raises:
      UsageError: another version of this program wrote them.
    """
    changed: dict[str, Any] = {n: Path(settings[n]) for n in PATHS if settings.get(n)}
    changed |= dict.fromkeys(settings.get("by_default", ())) | {"by_default": ()}
    try:
        return Config(**settings | changed)
    except TypeError as error:
        raise UsageError(f"These are not the settings of this version: {error}") from error


def check_settings(stored: dict[str, Any], config: Config, *, resolved: bool = False) -> None:
    """Refuses to go on with a run with other settings, where any are given.

    Files may be at another place.

    Args:
      stored: what `read_settings` found.
      config: the settings now.
      resolved: whether what is None is so, and not left out.

    Raises:
      UsageError: names the first that differs.
    """
    was, now = stored["finetune"], settings_of(config)
    for name in now:
        if name in (*PATHS, "by_default") or (now[name] is None and not resolved):
            continue
        if was.get(name) != now[name]:
            raise UsageError(
                f"out={config.out} is of another configuration: {name}={now[name]!r}, which was "
                f"{was.get(name)!r}. Leave out what is not to change, or name another directory."
            )


def check_files(stored: dict[str, Any], out: Path, files: list[list[Any]]) -> None:
    """Refuses to go on with a run whose model or data is not what it was.

    Raises:
      UsageError: names the first file that differs.
    """
    began = stored["files"]
    if changed := [file[0] for file in files if file not in began]:
        raise UsageError(f"out={out}: {changed[0]} is not what the run began with.")
    if gone := [file[0] for file in began if file not in files]:
        raise UsageError(f"out={out}: {gone[0]}, which the run began with, is not there any more.")


def check_metrics(out: Path, start: int, updates: int) -> None:
    """Refuses to go on with a run that has lost records, by which dev chooses the epoch.

    Args:
      out: the directory of the run.
      start: how many updates are done.
      updates: of an epoch.

    Raises:
      UsageError: some of these updates, or an evaluation after them, has no record.
    """
    path = out / METRICS
    records = read_records(path) if path.exists() else []
    evaluated = {record["step"] for record in records if "valid_loss" in record}
    if missing(path, start) or not evaluated >= set(range(updates, start + 1, updates)):
        raise UsageError(
            f"{path} has not all records of the {start:,} updates that the run has made: it was "
            "cut or deleted. Put it back, or begin anew in another directory."
        )
