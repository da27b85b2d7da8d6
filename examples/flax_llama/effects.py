"""Which settings have an effect only together with others: one table.

A flag that does nothing is an error. What comes from a preset or from a former run, whose optimizer
may have been another one, may do nothing.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

from examples.flax_llama.adapters import RELORA, WITH_LORA
from examples.flax_llama.config import DISTRIBUTED, Config
from examples.flax_llama.documents import BUILT_IN, is_tokenized
from examples.flax_llama.methods import ADAMW, ADAMW_8BIT, IN_GALORE
from examples.flax_llama.optimizers import OPTIMIZERS, WITH_ADAPTER
from examples.flax_llama.usage import UsageError


@dataclasses.dataclass(frozen=True)
class Need:
    """What some settings need to have an effect."""

    names: tuple[str, ...]
    met: Callable[[Any], bool]
    # The setting that decides it.
    decides: str
    # With which of its values they have one, in words.
    what: str


def for_optimizers(names: tuple[str, ...], optimizers: Collection[str], what: str) -> Need:
    """Settings that some optimizers have; an unheard-of optimizer is refused elsewhere."""
    without = OPTIMIZERS.keys() - set(optimizers)
    return Need(names, lambda config: config.optimizer not in without, "optimizer", what)


def for_formats(names: tuple[str, ...], *formats: str) -> Need:
    """Settings for data of some formats, and for such whose format is to be recognised."""
    what = " or ".join(f"data_format={name!r}" for name in (*formats, "auto"))
    return Need(names, lambda config: config.data_format in (*formats, "auto"), "data_format", what)


def reads_text(config: Config) -> bool:
    data = [config.data, config.valid_data]
    return any(d and d != BUILT_IN and not is_tokenized(d) for d in data)


WITH_ADAM = {name for name in OPTIMIZERS if "adamw" in name} | WITH_ADAPTER.keys()
LION = {"lion", "galore_lion"}
OF_GALORE = "optimizers in GaLore, such as galore_adamw"
NEEDS = (
    for_optimizers(("rank",), (*IN_GALORE, *WITH_ADAPTER), OF_GALORE),
    for_optimizers(
        (
            *("update_proj_gap", "scale", "projector", "projector_dtype"),
            *("transport", "residual", "refresh", "stagger"),
        ),
        IN_GALORE,
        OF_GALORE,
    ),
    for_optimizers(("lora_alpha", "lora_targets", "lora_only"), WITH_LORA, "lora or relora"),
    for_optimizers(("merge_every",), (RELORA,), "relora"),
    for_optimizers(
        ("matrix_lr_ratio",),
        OPTIMIZERS.keys() - set(WITH_LORA),
        "those that train the layers' matrices",
    ),
    for_optimizers(
        ("moment_dtype",),
        ("adamw", *WITH_ADAPTER, *ADAMW),
        f"adamw, {', '.join((*WITH_ADAPTER, *ADAMW))}",
    ),
    for_optimizers(
        ("tables",),
        ("adamw_8bit", *ADAMW, *ADAMW_8BIT),
        "adamw_8bit and those in GaLore with adamw in the name",
    ),
    for_optimizers(
        ("b1",),
        WITH_ADAM | LION | {"flora", "galore_muon"},
        "those with adamw or lion in the name, lora, relora, low_rank, flora and galore_muon",
    ),
    for_optimizers(
        ("b2",),
        WITH_ADAM | LION | {"galore_muon"},
        "those with adamw or lion in the name, lora, relora, low_rank, and galore_muon",
    ),
    for_optimizers(
        ("eps",),
        WITH_ADAM | {"galore_muon"},
        "those with adamw in the name, lora, relora, low_rank, and galore_muon",
    ),
    for_optimizers(
        ("momentum",),
        {"sgd", "galore_sgd", "adafactor", "galore_adafactor", "galore_muon"},
        "those with sgd or adafactor in the name, and galore_muon",
    ),
    Need(("cooldown",), lambda config: config.schedule == "wsd", "schedule", "schedule='wsd'"),
    Need(
        ("final_lr",),
        lambda config: config.schedule != "constant",
        "schedule",
        "all other schedules",
    ),
    Need(
        ("clip_by", "inputs_dtype", "inputs_every", "inputs_memory", "offload"),
        lambda config: config.layerwise,
        "layerwise",
        "layerwise=True",
    ),
    Need(
        ("stochastic_rounding",),
        lambda config: config.param_dtype == "bfloat16",
        "param_dtype",
        "param_dtype='bfloat16'",
    ),
    Need(
        ("text_field", "on_bad_line", "data_format", "eos_token"),
        reads_text,
        "data",
        "text in files and of the hub",
    ),
    for_formats(("text_field", "attend_across"), "text"),
    Need(("attend_across",), lambda config: config.packing, "packing", "packing=True"),
    for_formats(("prompt_field", "response_field"), "prompt"),
    for_formats(("messages_field",), "chat"),
    for_formats(("loss_on", "on_long"), "prompt", "chat"),
    Need(
        ("max_bad_lines",),
        lambda config: config.on_bad_line == "skip",
        "on_bad_line",
        "on_bad_line='skip'",
    ),
    Need(("keep", "save_every", "wandb"), lambda config: config.out is not None, "out", "out=RUN"),
    Need(
        DISTRIBUTED[1:],
        lambda config: config.distributed,
        "distributed",
        "distributed=True",
    ),
    Need(("new_data",), lambda config: config.resume, "resume", "resume=True"),
    Need(
        ("init_step", "weights_only"),
        lambda config: config.init_from is not None,
        "init_from",
        "init_from=RUN",
    ),
)


def has_effect(config: Config, name: str) -> bool:
    """Whether anything depends on a setting, where the others are as they are."""
    return all(need.met(config) for need in NEEDS if name in need.names)


def check_effects(
    configs: Sequence[Config], default: Config, needs: Sequence[Need] = NEEDS
) -> None:
    """Refuses settings that were given and have no effect.

    Args:
      configs: as they were given, one or several that were given together; what has an effect in
        any of them is right.
      default: what they are where nothing is given.
      needs: what settings need to have one.

    Raises:
      UsageError: names the settings, and what they are for.
    """
    unmet = [need for need in needs if not any(map(need.met, configs))]
    for need in unmet:
        alike = [other.names for other in unmet if other.what == need.what]
        names = [n for n in itertools.chain(*alike) if n not in configs[0].by_default]
        given = [n for n in names if getattr(configs[0], n) != getattr(default, n)]
        if given:
            settings = " and ".join(f"{name}={getattr(configs[0], name)!r}" for name in given)
            values = dict.fromkeys(getattr(config, need.decides) for config in configs)
            those = ", ".join(f"{need.decides}={value!r}" for value in values)
            absent = values.keys() <= {None, False}
            where = f"without {need.what}" if absent else f"with {those}, only with {need.what}"
            verb = "has" if len(given) == 1 else "have"
            raise UsageError(f"{settings} {verb} no effect {where}. Leave it out.")
