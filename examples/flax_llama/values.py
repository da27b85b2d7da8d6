"""What the values of settings may be, alone and together."""

import math
from typing import TYPE_CHECKING, Any

from examples.flax_llama.adapters import RELORA, TARGETS, WITH_LORA
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.reading import reading_of
from examples.flax_llama.shapes import ATTENTIONS, DTYPES
from examples.flax_llama.sharding import sizes_of
from examples.flax_llama.spaces import OFFLOAD
from examples.flax_llama.usage import UsageError, at_least_one, one_of

if TYPE_CHECKING:
    from examples.flax_llama.config import Config

ON_NAN = ("stop", "skip")
CLIP_BY = ("global", "layer")
REFRESHES = ("periodic", "lazy")
TRANSPORTS = ("keep", "reset", "project", "rotate")
RESIDUALS = ("discard", "norm_scaled", "scale_gradient", "sign", "error_feedback")
MOMENT_DTYPES = ("bfloat16",)
INPUTS_DTYPES = ("bfloat16", "int8", "float8_e4m3", "float8_e5m2")
INPUTS_MEMORIES = ("device", "pinned_host")
TABLES = ("adam", "factored")


def whole_rank(rank: Any, hidden: int) -> Any:
    """A rank, of which a fraction is one of the hidden size."""
    return max(1, round(rank * hidden)) if 0 < rank < 1 else rank


def check_choices(config: "Config") -> None:
    """Refuses what is none of a few names.

    Raises:
      UsageError: says which, and the names.
    """
    for name, choices in {
        "dtype": DTYPES,
        "param_dtype": DTYPES,
        "attention": ATTENTIONS,
        "on_nan": ON_NAN,
        "clip_by": CLIP_BY,
    }.items():
        one_of(name, getattr(config, name), choices)
    optional = {"refresh": REFRESHES, "transport": TRANSPORTS, "residual": RESIDUALS}
    for name, choices in optional.items():
        if getattr(config, name) is not None:
            one_of(name, getattr(config, name), choices)


def check_values(config: "Config") -> None:
    """Refuses values of a resolved configuration that cannot work.

    Raises:
      UsageError: says which, and what would be right.
    """
    if config.seq < 2:
        raise UsageError(
            f"seq={config.seq}: expected at least 2. Attention to one token has no choice, and "
            "its queries and keys would never be trained."
        )
    context = config.shape(config.vocab_size or 1).architecture.context
    if context is not None and config.seq > context:
        raise UsageError(
            f"seq={config.seq}: expected at most {context}, the positions that the model of "
            f"{config.preset} knows."
        )
    if not (isinstance(config.rank, int) and 1 <= config.rank < config.hidden):
        raise UsageError(
            f"rank={config.rank}: expected 1 to {config.hidden - 1}, less than the hidden size "
            f"{config.hidden}, or a fraction of it."
        )
    for name in (
        *("update_proj_gap", "steps", "batch", "accumulate"),
        *("eval_every", "save_every", "keep", "inputs_every"),
    ):
        at_least_one(name, getattr(config, name))
    check_processes(config)
    if config.eval_tokens is not None:
        at_least_one("eval_tokens", config.eval_tokens)
    if config.batch % config.accumulate:
        raise UsageError(
            f"batch={config.batch} does not divide into accumulate={config.accumulate} "
            "micro-batches: choose a multiple."
        )
    if config.clip_by != "global" and not config.clip:
        raise UsageError(
            f"clip_by={config.clip_by!r} clips nothing at clip=0: name the largest norm, or leave "
            "it out."
        )
    if config.layers % config.inputs_every:
        raise UsageError(
            f"inputs_every={config.inputs_every} does not divide the layers, {config.layers}."
        )
    one_of("inputs_memory", config.inputs_memory, INPUTS_MEMORIES)
    for word in config.offload:
        one_of("offload", word, OFFLOAD)
    if config.inputs_dtype is not None:
        one_of("inputs_dtype", config.inputs_dtype, INPUTS_DTYPES)
    for name in ("lr", "matrix_lr_ratio", "scale", "eps"):
        if not 0 < getattr(config, name) < math.inf:
            raise UsageError(f"{name}={getattr(config, name)}: expected a positive number.")
    for name in ("weight_decay", "clip"):
        if not 0 <= getattr(config, name) < math.inf:
            raise UsageError(f"{name}={getattr(config, name)}: expected 0 or more.")
    for name in ("warmup", "b1", "b2", "momentum"):
        if not 0 <= (getattr(config, name) or 0) < 1:
            raise UsageError(
                f"{name}={getattr(config, name)}: expected at least 0 and less than 1."
            )
    for name in ("cooldown", "final_lr"):
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(f"{name}={getattr(config, name)}: expected 0 to 1.")
    if config.int8_weights and config.optimizer not in (*IN_GALORE, *WITH_LORA):
        raise UsageError(
            "int8_weights=True needs an optimizer in GaLore, such as galore_adamw, lora or "
            f"relora; optimizer={config.optimizer!r} is none."
        )
    sizes_of(config.mesh)
    if config.optimizer in WITH_LORA:
        one_of("lora_targets", config.lora_targets, TARGETS)
        if not 0 < config.lora_alpha < math.inf:
            raise UsageError(f"lora_alpha={config.lora_alpha}: expected a positive number.")
        if config.optimizer == RELORA:
            at_least_one("merge_every", config.merge_every)
        if config.layerwise:
            raise UsageError(
                f"layerwise=True updates the layers' kernels, which optimizer={config.optimizer!r} "
                "leaves as they are: leave it out. Its gradients are small, and remat=True keeps "
                "activations so."
            )
    if config.moment_dtype is not None:
        one_of("moment_dtype", config.moment_dtype, MOMENT_DTYPES)
    one_of("tables", config.tables, TABLES)
    if config.layerwise and config.on_nan == "skip":
        raise UsageError(
            "on_nan='skip' looks at the whole gradient before an update, which layerwise=True "
            "never has: choose on_nan='stop'."
        )
    if config.schedule == "wsd" and config.warmup + config.cooldown > 1:
        raise UsageError(
            f"warmup={config.warmup} and cooldown={config.cooldown} are more than all updates."
        )
    if config.resume and config.out is None:
        raise UsageError("resume=True needs the directory of the run: out=DIRECTORY.")
    for name, value in vars(config).items():
        if value == "":
            raise UsageError(f"{name}='' is empty: expected a value, or leave it out.")
    reading_of(config)


def check_processes(config: "Config") -> None:
    """Refuses what cannot be said of several processes.

    Raises:
      UsageError: says which, and what would be right.
    """
    if config.processes is not None:
        at_least_one("processes", config.processes)
    if not 1 <= config.distributed_timeout < math.inf:
        raise UsageError(
            f"distributed_timeout={config.distributed_timeout}: expected at least 1 second."
        )
