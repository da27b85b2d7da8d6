"""The settings of a command line, and those of the run that it goes on with or begins with."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.flax_llama.beginning import of_the_source
from examples.flax_llama.changes import config_of
from examples.flax_llama.config import Config
from examples.flax_llama.effects import check_effects
from examples.flax_llama.flags import command_line
from examples.flax_llama.run_directory import SETTINGS, read_settings


def from_command_line(
    args: Sequence[str] | None = None, *, description: str | None = None
) -> Config:
    """The settings given.

    Where a run is resumed, all others are its own; but what nobody gave is by default again, where
    that has become something else: another optimizer's own, or a tenth of other `steps`. Where one
    begins with another run, its model and optimizer are that one's.

    Args:
      args: the words of the command line; those of the program by default.
      description: what help begins with.

    Raises:
      UsageError: a setting that was given has no effect, or a run cannot be read.
    """
    config = command_line(Config, args, description=description)
    if config.resume and config.out is not None and (config.out / SETTINGS).is_file():
        return gone_on(config.out, args)
    default = Config()
    if config.init_from is not None:
        default = begun_with(config.init_from, weights_only=config.weights_only)
        config = command_line(Config, args, default=default)
    check_effects([config], default)
    return config


def gone_on(out: Path, args: Sequence[str] | None) -> Config:
    """The settings of a run, and those given in place of them."""
    stored = config_of(read_settings(out)["train"])
    own = dataclasses.replace(stored, out=out, resume=True, new_data=False)
    unset: dict[str, Any] = dict.fromkeys(own.by_default)
    nobody_gave = dataclasses.replace(own, **unset)
    config = command_line(Config, args, default=nobody_gave)
    check_effects([config], nobody_gave)
    before, after = nobody_gave.defaults(), config.defaults()
    still = [name for name in own.by_default if getattr(config, name) is None]
    same = {name: getattr(own, name) for name in still if before[name] == after[name]}
    return dataclasses.replace(config, **same, by_default=tuple(still))


def begun_with(source: Path, *, weights_only: bool) -> Config:
    """The settings that a run has of the one that it begins with."""
    stored = config_of(read_settings(source)["train"])
    names = of_the_source(weights_only=weights_only)
    same = {name: getattr(stored, name) for name in names}
    by_default = tuple(name for name in stored.by_default if name in names)
    return Config(**same, tokenizer=str(source), by_default=by_default)
