"""The optimizers that a fine-tuning run can name, and what each of them trains."""

import re
from typing import Any

import jax
import optax

import galore_optax
from examples.flax_glue.config import IN_GALORE, LORA, Config
from examples.flax_glue.names import Path
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_llama.methods import ADAMW_8BIT, own
from examples.flax_llama.model import Params, dimension_numbers
from examples.flax_llama.optimizers import stacked_layers
from examples.flax_llama.usage import UsageError


def learning_rate(config: Config, updates: int) -> optax.Schedule:
    """Linear warm-up, then linear decay to 0 after so many updates."""
    warmup = int(config.warmup * updates)
    # Neither the first update nor the last one is void.
    rise = optax.linear_schedule(config.lr / (warmup + 1), config.lr, max(warmup, 1))
    fall = optax.linear_schedule(config.lr, 0.0, updates - warmup)
    return optax.join_schedules([rise, fall], [warmup])


def decayed(params: Params) -> Params:
    """Tree of bool: all but norms and biases."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def make_optimizer(
    config: Config, encoder: EncoderConfig, updates: int
) -> optax.GradientTransformation:
    """The optimizer of what is trained, for a resolved configuration.

    Projected are the kernels of the layers; embeddings, head, norms and biases are not.

    Raises:
      UsageError: GaLore refuses a setting.
    """
    schedule = learning_rate(config, updates)
    adamw: dict[str, Any] = {
        **{name: getattr(config, name) for name in ("b1", "b2", "eps", "weight_decay")},
        "mask": decayed,
    }
    if config.optimizer == "adamw_8bit" or config.optimizer in ADAMW_8BIT:
        # Norms and biases stay in float32, also those of a model that is so wide.
        smallest = max(4096, encoder.intermediate + 1)
        adamw |= {"min_size": smallest, "stacked": stacked_layers}
    of_galore = galore_arguments(config, encoder) if config.optimizer in IN_GALORE else {}
    try:
        if config.optimizer in ("adamw", LORA):
            optimizer = optax.adamw(schedule, **adamw)
        elif config.optimizer not in IN_GALORE:
            optimizer = galore_optax.adamw_8bit(schedule, **adamw)
        else:
            preset = getattr(galore_optax, config.optimizer)
            optimizer = preset(schedule, **adamw, **of_galore)
    except ValueError as error:
        if found := re.fullmatch(r"(\w+) must be (.*); got .*", str(error)):
            value = getattr(config, found[1], None)
            raise UsageError(f"{found[1]}={value!r}: expected {found[2]}.") from error
        raise UsageError(f"optimizer={config.optimizer!r}: {error}") from error
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(), optimizer
    )


def galore_arguments(config: Config, encoder: EncoderConfig) -> dict[str, Any]:
    """The arguments of `galore_optax.galore` that the settings and the optimizer ask for."""
    return own(config.optimizer) | {
        "rank": config.rank_for(encoder.hidden),
        "scale": config.scale,
        "update_proj_gap": config.update_proj_gap,
        "projector": config.projector,
        "seed": config.seed,
        "weight_dimension_numbers": dimension_numbers,
    }


def trained(config: Config, paths: frozenset[Path], drawn: frozenset[Path]) -> frozenset[Path]:
    """The paths of the parameters that are trained.

    With LoRA these are the adapters, the head, and what else the checkpoint has not.
    """
    if config.optimizer != LORA:
        return paths
    return frozenset(path for path in paths if path in drawn or path[0] == "head")


def in_8_bits(config: Config, encoder: EncoderConfig, params: Params) -> Params:
    """Parameters as the optimizer keeps them: the kernels of the layers in 8 bits with Q-GaLore."""
    if config.optimizer != "q_galore_adamw":
        return params
    return galore_optax.quantize_params(
        params,
        rank=config.rank_for(encoder.hidden),
        weight_dimension_numbers=dimension_numbers(params),
    )
