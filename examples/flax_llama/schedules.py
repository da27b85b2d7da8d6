"""The learning-rate schedules that a training run can name."""

from typing import Any

import jax.numpy as jnp
import optax

from examples.flax_llama.adapters import RELORA
from examples.flax_llama.config import Config
from examples.flax_llama.usage import one_of


def cosine(config: Config, updates: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.lr, updates, alpha=config.final_lr)


def linear(config: Config, updates: int) -> optax.Schedule:
    return optax.linear_schedule(config.lr, config.final_lr * config.lr, updates)


def constant(config: Config, updates: int) -> optax.Schedule:
    return optax.constant_schedule(config.lr)


def wsd(config: Config, updates: int) -> optax.Schedule:
    decay = round(config.cooldown * config.steps)
    parts = [constant(config, updates - decay), linear(config, decay)]
    return optax.join_schedules(parts, [updates - decay])


# What follows the warm-up, over the number of updates that are left.
SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant, "wsd": wsd}


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up, then the schedule of that name.

    Raises:
      UsageError: there is none called `config.schedule`.
    """
    one_of("schedule", config.schedule, SCHEDULES)
    warmup = int(config.warmup * config.steps)
    rise = optax.linear_schedule(0.0, config.lr, max(warmup, 1))
    rest = SCHEDULES[config.schedule](config, config.steps - warmup)
    schedule = optax.join_schedules([rise, rest], [warmup])
    if config.optimizer == RELORA:
        schedule = rising_again(config, schedule)
    # Optax counts from 0; from 1, the first update is not void and the last one ends the schedule.
    return lambda count: schedule(count + 1)


def rising_again(config: Config, schedule: optax.Schedule) -> optax.Schedule:
    """ReLoRA's "jagged" schedule, of updates counted from 1: each time it begins again, so does it.

    From there it rises to what it would have been, in the same fraction of the updates until the
    next time as it rises in of all.
    """
    every = config.merge_every
    rise = max(1, int(config.warmup * every))

    def jagged(count: Any) -> Any:
        since = (count - 1) % every + 1
        part = jnp.where(count > every, jnp.minimum(1.0, since / rise), 1.0)
        return part * schedule(count)

    return jagged
