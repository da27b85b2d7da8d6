"""The optimizers that a training run can name."""

from collections.abc import Callable

import jax
import optax

import galore_optax
from examples.flax_llama.config import PRESETS, Config, UsageError
from examples.flax_llama.model import Params, dimension_numbers, stacked_matrices


def learning_rate(config: Config) -> optax.Schedule:
    """Linear warm-up, then a cosine down to 10 %."""
    warmup_steps = int(config.warmup * config.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.lr, warmup_steps, config.steps, end_value=config.lr / 10
    )
    # Optax counts from 0; from 1, the first update is not void and the last one has the 10 %.
    return lambda count: schedule(count + 1)


def not_norm(params: Params) -> Params:
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def adamw(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=not_norm),
    )


def galore_adamw(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return galore_optax.chain(
        optax.clip_by_global_norm(config.clip),
        galore_optax.galore(
            rank=config.rank or PRESETS[config.preset].hidden // 4,
            update_proj_gap=config.update_proj_gap,
            scale=config.scale,
            weight_dimension_numbers=dimension_numbers,
        ),
        optax.adamw(schedule, weight_decay=config.weight_decay, mask=not_norm),
    )


OPTIMIZERS: dict[str, Callable[[Config, optax.Schedule], optax.GradientTransformation]] = {
    "adamw": adamw,
    "galore_adamw": galore_adamw,
}


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of the whole model.

    Raises:
      UsageError: there is none called `config.optimizer`.
    """
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(
            f"optimizer={config.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}."
        )
    return optax.chain(
        OPTIMIZERS[config.optimizer](config, learning_rate(config)),
        optax.masked(optax.scale(config.matrix_lr_ratio), stacked_matrices),
    )
