"""The optimizers that a training run can name."""

import dataclasses
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from examples.flax_llama.adapters import LORA, LOW_RANK, RELORA, of_trained
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.methods import ADAMW, ADAMW_8BIT, GALORE, IN_GALORE, own
from examples.flax_llama.model import Params, dimension_numbers, stacked_matrices
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.usage import one_of
from examples.flax_llama.values import RESIDUALS, TRANSPORTS
from galore_optax import CombinationError

Optimizer = Callable[[Config, optax.Schedule], optax.GradientTransformation]


def decays(params: Params) -> Params:
    """Tree of bool: all but the scales of norms and the biases."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def of_adamw(config: Config) -> dict[str, Any]:
    """The arguments of AdamW beside its learning rate, wherever its moments are held."""
    return {
        "b1": config.b1,
        "b2": 0.999 if config.b2 is None else config.b2,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "mask": decays,
    }


def adamw(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    optimizer = optax.adamw(schedule, **of_adamw(config))
    return galore_optax.low_bit(optimizer, 16, min_size=0) if config.moment_dtype else optimizer


def most_stacked(config: Config) -> int:
    """The most layers that the optimizer sees stacked: layer-wise it is tried with two of them."""
    return max(config.layers, 2)


def adafactor(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """As in GaLore's experiments: no parameter scale, and no first moment unless asked for."""
    return optax.chain(
        # Neither of a matrix' two factors may run over the layers that it is stacked with.
        optax.scale_by_factored_rms(min_dim_size_to_factor=most_stacked(config) + 1),
        clip_by_matrix_rms(1.0),
        optax.ema(config.momentum, debias=False) if config.momentum else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )


def clip_by_matrix_rms(threshold: float) -> optax.GradientTransformation:
    """`optax.clip_by_block_rms`, but of each layer's part of a stacked parameter by itself."""
    clip = optax.clip_by_block_rms(threshold)

    def each(update: jax.Array) -> Any:
        return clip.update(update, clip.init(update))[0]

    def of_layers(path: tuple[Any, ...], update: jax.Array) -> Any:
        return jax.vmap(each)(update) if path[0].key == "blocks" else each(update)

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(of_layers, updates))


def lion(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.lion(
        schedule,
        config.b1,
        0.99 if config.b2 is None else config.b2,
        weight_decay=config.weight_decay,
        mask=decays,
    )


def sgd(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """With decoupled weight decay, like the others."""
    return optax.chain(
        optax.trace(config.momentum) if config.momentum else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(schedule),
    )


def adamw_8bit(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return galore_optax.adamw_8bit(
        schedule,
        **of_adamw(config),
        tables=config.tables,
        min_size=smallest_in_codes(config),
        stacked=stacked_layers,
    )


def smallest_in_codes(config: Config) -> int:
    """The scale of a norm stays in float32, also where the model is so wide that it is large."""
    return max(4096, config.hidden + 1)


def stacked_layers(path: str, shape: tuple[int, ...]) -> int:
    """How many leading axes of a parameter are stacks of layers."""
    return 1 if path.startswith("blocks/") else 0


def galore_arguments(config: Config) -> dict[str, Any]:
    """The arguments of `galore_optax.galore` that the settings and the optimizer ask for."""
    names = (
        *("rank", "update_proj_gap", "scale", "projector", "projector_dtype", "refresh"),
        *("stagger", "transport", "residual"),
    )
    given = {name: getattr(config, name) for name in names}
    return own(config.optimizer) | {
        **{name: value for name, value in given.items() if value is not None},
        "accumulation_steps": micro_batches_at_rank(config),
        "diagnostics": True,
        "weight_dimension_numbers": dimension_numbers,
    }


def micro_batches_at_rank(config: Config) -> int:
    """How many micro-batches GaLore itself averages, at rank r, before it makes an update.

    Without `layerwise` the gradients are averaged before, and to clip their global norm they
    have to be. So they have where each update chooses a subspace, of the whole gradient, where
    something of the gradient is used that lies outside of the subspace, and where a part of the
    optimizer is outside of GaLore, which would take each micro-batch for an update. Layers that lie
    in the memory of the machine would be copied for each micro-batch.
    """
    before = (
        not config.layerwise
        or config.clip
        or config.offload
        or (config.update_proj_gap == 1 and config.refresh == "periodic")
        or (config.residual or own(config.optimizer).get("residual", "discard")) != "discard"
        or config.optimizer in ("flora", "galore_muon")
    )
    return 1 if before else config.accumulate


def size_of_updates(config: Config) -> float | None:
    """By how many learning rates an update moves an entry of the layers' matrices.

    None where nothing is known of that: of optimizers without Adam inside.
    """
    if config.optimizer in ("adamw", "adamw_8bit"):
        return config.matrix_lr_ratio
    if config.optimizer not in (*ADAMW, *ADAMW_8BIT):
        return None
    given = galore_arguments(config)
    names = [name for name in ("scale", "residual") if name in given]
    of_adamw = galore_optax.learning_rate_from_adamw(
        1.0, config.rank / config.hidden, **{name: given[name] for name in names}
    )
    return config.matrix_lr_ratio / of_adamw


def in_galore(inner: Optimizer) -> Optimizer:
    """The same optimizer, with the layers' matrices in the subspace of their gradients."""

    def make(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
        galore = galore_optax.galore(**galore_arguments(config))
        return galore_optax.chain(galore, inner(config, schedule))

    return make


def adamw_preset(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The library's preset of the optimizer's name, with AdamW inside."""
    held: dict[str, Any] = (
        {"min_size": smallest_in_codes(config), "stacked": stacked_layers}
        if config.optimizer in ADAMW_8BIT
        else {"moment_dtype": config.moment_dtype}
    )
    preset = IN_GALORE[config.optimizer](
        schedule, **of_adamw(config), **held, tables=config.tables, **galore_arguments(config)
    )
    # A chain of one, as in the checkpoints that there are, and as `in_galore` makes it.
    return optax.chain(preset)


def flora(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    return galore_optax.flora(
        schedule,
        config.b1,
        # As in `adafactor`, and what is clipped is each layer by itself, too.
        min_dim_size_to_factor=most_stacked(config) + 1,
        weight_decay=config.weight_decay,
        mask=decays,
        stacked=stacked_layers,
        **galore_arguments(config),
    )


def galore_muon(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    momentum: dict[str, Any] = {"beta": config.momentum} if config.momentum else {}
    return galore_optax.galore_muon(
        schedule,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decays,
        adam_b1=config.b1,
        adam_b2=0.999 if config.b2 is None else config.b2,
        **momentum,
        **galore_arguments(config),
    )


PLAIN: dict[str, Optimizer] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "sgd": sgd,
    "adamw_8bit": adamw_8bit,
}
# Of what is beside kernels, or in their place.
WITH_ADAPTER = {LORA: adamw, RELORA: adamw, LOW_RANK: adamw}
OPTIMIZERS = (
    PLAIN
    | WITH_ADAPTER
    | {
        **dict.fromkeys(IN_GALORE, adamw_preset),
        **{
            name: in_galore(PLAIN[name.removeprefix("galore_")])
            for name in ("galore_adafactor", "galore_lion", "galore_sgd")
        },
        **{"flora": flora, "galore_muon": galore_muon},
    }
)

# More than a run ever skips: `optax.apply_if_finite` applies what comes after that many.
ALWAYS_SKIP = 2**30


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of the whole model, for a resolved configuration.

    Raises:
      UsageError: there is no optimizer, schedule or projector of that name, or the optimizer cannot
        go with the projector, transport or residual.
    """
    one_of("optimizer", config.optimizer, OPTIMIZERS)
    schedule = learning_rate(config)
    try:
        check_together(config)
        optimizer = OPTIMIZERS[config.optimizer](config, schedule)
    except CombinationError as error:
        raise UsageError(refusal(config, error)) from error
    except ValueError as error:
        found = re.fullmatch(r"(\w+) must be (.*); got .*", str(error))
        if found and hasattr(config, found[1]):
            value = getattr(config, found[1])
            raise UsageError(f"{found[1]}={value!r}: expected {found[2]}.") from error
        raise UsageError(f"optimizer={config.optimizer!r}: {error}") from error
    # With `layerwise` there is no whole gradient; it clips by itself.
    clips = config.clip and not config.layerwise
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip) if clips else optax.identity(),
        optimizer,
        optax.masked(optax.scale(config.matrix_lr_ratio), stacked_matrices),
    )
    if config.on_nan == "skip":
        optimizer = optax.apply_if_finite(optimizer, ALWAYS_SKIP)
    return of_trained(optimizer, config.adapter)


def check_together(config: Config) -> None:
    """Raises a CombinationError where GaLore finds, at `init` only, that settings clash."""
    if config.transport is None and config.residual is None:
        return  # the optimizer's own are right
    kernel = jax.ShapeDtypeStruct((config.layers, config.hidden, config.intermediate), jnp.float32)
    with warnings.catch_warnings():
        # They are about parameters of which there is but one here.
        warnings.simplefilter("ignore")
        optimizer = OPTIMIZERS[config.optimizer](config, optax.constant_schedule(config.lr))
        jax.eval_shape(optimizer.init, {"blocks": {"kernel": kernel}})


def refusal(config: Config, error: CombinationError) -> str:
    """What to say of settings that the library refuses: the flags, and what would work."""

    def works(**settings: Any) -> bool:
        try:
            check_together(dataclasses.replace(config, **settings))
        except ValueError:
            return False
        return True

    flags, remedies = [f"--optimizer {config.optimizer}"], []
    if config.projector != own(config.optimizer).get("projector", GALORE["projector"]):
        flags.append(f"--projector {config.projector}")
    for name, choices in {"transport": TRANSPORTS, "residual": RESIDUALS}.items():
        if getattr(config, name) is not None:
            flags.append(f"--{name} {getattr(config, name)}")
            remedies += [f"--{name} {value}" for value in choices if works(**{name: value})]
    if not remedies:
        return f"optimizer={config.optimizer!r}: {error}"
    # The remedy of the library is for those who write Python; a class may stand for its name.
    reason = re.sub(
        r"\b(transport|residual)=\w+",
        lambda found: f"{found[1]}={getattr(config, found[1])!r}",
        error.reason,
    )
    return f"{' '.join(flags)}: {reason}. What would work is {', '.join(remedies)}."
