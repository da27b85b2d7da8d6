"""The settings that a command line asks for, with those that the run has that it goes on with."""

import dataclasses
from collections.abc import Callable

from examples.flax_llama.beginning import of_the_source
from examples.flax_llama.changes import RULES, Kind, config_of
from examples.flax_llama.command import as_flags
from examples.flax_llama.config import Config
from examples.flax_llama.run_directory import SETTINGS, read_settings


def settings_given(parse: Callable[[Config], Config]) -> Config:
    """The settings that a command line gives, whose defaults depend on what it gives.

    Args:
      parse: reads the command line with these settings where it says nothing.
    """
    base = Config()
    config = parse(base)
    while (found := base_of(config)) != base:
        base, config = found, parse(found)
    return config


def base_of(config: Config) -> Config:
    """The settings that a command line for a configuration need not repeat.

    Where a run is resumed, they are its own; but what its optimizer had by default is another
    optimizer's own. Where one begins with another run, its model and optimizer are that one's.
    """
    if config.resume and config.out is not None and (config.out / SETTINGS).is_file():
        stored = config_of(read_settings(config.out)["train"])
        own = dataclasses.replace(stored, out=config.out, resume=True, new_data=False)
        return own if config.optimizer == stored.optimizer else own.without_defaults()
    if config.init_from is not None:
        source = config_of(read_settings(config.init_from)["train"])
        names = of_the_source(weights_only=config.weights_only)
        same = {name: getattr(source, name) for name in names}
        return Config(**same, tokenizer=str(config.init_from))
    return Config()


def fixed_settings(config: Config) -> frozenset[str]:
    """The settings that cannot be others, since a run goes on, or begins with another one."""
    if config.resume:
        return frozenset(name for name, rule in RULES.items() if rule.kind is Kind.NEVER)
    if config.init_from is not None:
        return frozenset(of_the_source(weights_only=config.weights_only))
    return frozenset()


def flags(config: Config, base: Config) -> list[str]:
    """The words of a command line that make a configuration of the settings it need not repeat.

    What is None in the configuration alone is said only where it is not what the base has.
    """
    now, was = config.resolve(), base.resolve()
    chosen = {
        name: default if getattr(now, name) == getattr(was, name) else getattr(now, name)
        for name, default in vars(base).items()
        if default is not None and getattr(config, name) is None
    }
    return as_flags(dataclasses.replace(config, **chosen), base)
