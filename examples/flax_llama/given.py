"""The settings that a command line asks for, with those that the run has that it goes on with."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from examples.flax_llama.beginning import of_the_source
from examples.flax_llama.changes import RULES, Kind, config_of
from examples.flax_llama.command import as_flags
from examples.flax_llama.config import DISTRIBUTED, Config
from examples.flax_llama.effects import check_effects
from examples.flax_llama.pretrained import settings_of_source
from examples.flax_llama.run_directory import SETTINGS, read_settings

C = TypeVar("C", bound=Config)


def as_they_are(base: Config) -> Any:
    return base


def settings_given(
    parse: Callable[[C], C], with_defaults: Callable[[Config], C] = as_they_are
) -> C:
    """The settings that a command line gives, whose defaults depend on what it gives.

    Args:
      parse: reads the command line with these settings where it says nothing.
      with_defaults: makes them of those that a command line of training need not repeat.

    Raises:
      UsageError: a setting that was given has no effect, or a run cannot be read.
    """
    base = with_defaults(Config())
    config = parse(base)
    while (found := with_defaults(base_of(config))) != base:
        base, config = found, parse(found)
    check_effects([config], base)
    return config if (out := resumed(config)) is None else as_it_was(config, settings_of(out))


# What is no setting of a run but of each process that goes on with it.
OF_PROCESS = ("new_data", *DISTRIBUTED)


def base_of(config: Config) -> Config:
    """The settings that a command line for a configuration need not repeat.

    Where a run is resumed, they are its own, with None for what nobody gave. Where one begins with
    another run, its model and optimizer are that one's.
    """
    if (out := resumed(config)) is not None:
        return settings_of(out).unset()
    if config.init_from is not None:
        source = settings_of_source(config.init_from)
        names = of_the_source(weights_only=config.weights_only)
        same = {name: getattr(source, name) for name in names}
        by_default = tuple(name for name in source.by_default if name in names)
        return Config(**same, tokenizer=str(config.init_from), by_default=by_default)
    return Config()


def resumed(config: Config) -> Path | None:
    """The directory of the run that goes on, if one does."""
    out = config.out
    return out if config.resume and out is not None and (out / SETTINGS).is_file() else None


def settings_of(out: Path) -> Config:
    """The settings of the run that goes on."""
    stored = config_of(read_settings(out)["train"])
    own = {name: getattr(Config, name) for name in OF_PROCESS}
    return dataclasses.replace(stored, **own, out=out, resume=True)


def as_it_was(config: C, own: Config) -> C:
    """With what a run has where nobody gave anything, unless that has become something else.

    That is another optimizer's own, or a tenth of other `steps`.
    """
    before, after = own.unset().defaults(), config.defaults()
    still = [name for name in own.by_default if getattr(config, name) is None]
    same = {name: getattr(own, name) for name in still if before[name] == after[name]}
    return dataclasses.replace(config, **same, by_default=tuple(still))


def fixed_settings(config: Config) -> frozenset[str]:
    """The settings that cannot be others, since a run goes on, or begins with another one."""
    if config.resume:
        return frozenset(name for name, rule in RULES.items() if rule.kind is Kind.NEVER)
    if config.init_from is not None:
        return frozenset(of_the_source(weights_only=config.weights_only))
    return frozenset()


def as_words(config: Config, base: Config) -> list[str]:
    """The words of a command line that make a configuration of the settings it need not repeat.

    What is None in the configuration alone is said only where it is not what the base has.
    """
    now, was = config.resolve(), base.resolve()
    chosen = {
        name: default if getattr(now, name) == getattr(was, name) else getattr(now, name)
        for name, default in vars(base).items()
        if default is not None and getattr(config, name) is None
    }
    # What nobody gave is nothing to say.
    chosen["by_default"] = base.by_default
    return as_flags(dataclasses.replace(config, **chosen), base)
