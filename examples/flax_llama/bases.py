"""The settings that a command line asks for, with those of the run that it goes on with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from examples.flax_llama.beginning import of_the_source
from examples.flax_llama.changes import config_of
from examples.flax_llama.config import Config
from examples.flax_llama.effects import check_effects
from examples.flax_llama.run_directory import SETTINGS, read_settings


def settings_given(parse: Callable[[Config], Config]) -> Config:
    """The settings that a command line gives, whose defaults depend on what it gives.

    Args:
      parse: reads the command line with these settings where it says nothing.

    Raises:
      UsageError: a setting that was given has no effect, or a run cannot be read.
    """
    base = Config()
    config = parse(base)
    if config.resume and config.out is not None and (config.out / SETTINGS).is_file():
        return going_on(config.out, parse)
    if config.init_from is not None:
        base = begun_with(config.init_from, weights_only=config.weights_only)
        config = parse(base)
    check_effects([config], base)
    return config


def going_on(out: Path, parse: Callable[[Config], Config]) -> Config:
    """The settings of a run, and those given in place of them.

    What nobody gave is by default again, where that has become something else: another optimizer's
    own, or a tenth of other `steps`.
    """
    stored = config_of(read_settings(out)["train"])
    own = dataclasses.replace(stored, out=out, resume=True, new_data=False)
    base = own.without_defaults()
    config = parse(base)
    check_effects([config], base)
    before, after = base.defaults(), config.defaults()
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
