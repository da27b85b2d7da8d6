"""What a run may change when it goes on: one table, of all settings."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

from examples.flax_llama.architecture import Architecture
from examples.flax_llama.config import DISTRIBUTED, Config
from examples.flax_llama.effects import has_effect
from examples.flax_llama.shapes import DIMENSIONS
from examples.flax_llama.usage import UsageError


class Kind(enum.Enum):
    """What a change of a setting comes to."""

    # It is not of the run but of a process: no change at all.
    PROCESS = enum.auto()
    # Nothing that is computed depends on it.
    FREE = enum.auto()
    # It holds from the next update on. The optimizer's state stays, where it has the same arrays.
    NOW = enum.auto()
    # It holds from the next update on, with which the optimizer's moments and subspaces begin anew.
    ANEW = enum.auto()
    # It names data: what counts is what is in the files.
    DATA = enum.auto()
    # The run would be another one.
    NEVER = enum.auto()


@dataclasses.dataclass(frozen=True)
class Rule:
    """The kind of a setting, and what there is to say about a change."""

    kind: Kind
    note: str = ""


def rules(kind: Kind, *names: str, note: str = "") -> dict[str, Rule]:
    return dict.fromkeys(names, Rule(kind, note))


# What fixes the shapes of the weights.
MODEL = ("preset", *DIMENSIONS, "vocab_size", "architecture")
OTHER_SHAPES = "the weights would have other shapes"
ROUND_OFF = "with another {name}, what is computed is the same to round-off, not bit for bit"
WEIGHTS = "init_from=RUN with weights_only=True starts a new run from the weights of this one"

RULES: dict[str, Rule] = {
    **rules(Kind.PROCESS, "out", "resume", "new_data", "quiet", "by_default", *DISTRIBUTED),
    **rules(Kind.FREE, "eval_every", "save_every", "keep", "tensorboard", "wandb"),
    **rules(Kind.FREE, "on_bad_line", "max_bad_lines"),
    **rules(Kind.NOW, "steps", "lr", "schedule", "warmup", "cooldown", "final_lr"),
    **rules(Kind.NOW, "matrix_lr_ratio", "weight_decay", "b1", "b2", "eps", "momentum"),
    **rules(Kind.NOW, "clip", "clip_by", "on_nan", "batch"),
    **rules(Kind.NOW, "scale", "update_proj_gap", "stochastic_rounding", "dtype"),
    **rules(Kind.NOW, "accumulate", "layerwise", "remat", "attention", "mesh", note=ROUND_OFF),
    **rules(Kind.NOW, "inputs_dtype", "inputs_every"),
    **rules(Kind.NOW, "inputs_memory", "offload", note=ROUND_OFF),
    **rules(Kind.NOW, "eval_tokens"),
    **rules(Kind.ANEW, "optimizer", "rank", "projector", "projector_dtype", "moment_dtype"),
    **rules(Kind.ANEW, "transport", "residual", "refresh", "stagger", "tables"),
    **rules(Kind.NOW, "merge_every"),
    **rules(Kind.ANEW, "lora_alpha", "lora_targets", "lora_only"),
    **rules(Kind.DATA, "data", "valid_data", "text_field", "tokenizer"),
    **rules(Kind.DATA, "prompt_field", "response_field", "messages_field"),
    **rules(
        Kind.NEVER,
        *MODEL,
        note=OTHER_SHAPES,
    ),
    **rules(
        Kind.NEVER,
        *("param_dtype", "int8_weights"),
        note=f"the weights are kept in another form; {WEIGHTS}",
    ),
    **rules(
        Kind.NEVER,
        *("seq", "packing", "data_format", "on_long"),
        note=f"the position in the data is one in rows of these; {WEIGHTS}",
    ),
    **rules(
        Kind.NEVER,
        "eos_token",
        note=f"documents before and after would end in other tokens; {WEIGHTS}",
    ),
    **rules(
        Kind.NEVER,
        *("loss_on", "attend_across"),
        note=f"losses before and after would be of other tokens; {WEIGHTS}",
    ),
    **rules(
        Kind.NEVER,
        "seed",
        note=f"the order of the data, and so the position in it, depends on it; {WEIGHTS}",
    ),
    **rules(
        Kind.NEVER,
        *("init_from", "init_step", "weights_only"),
        note="a run begins only once",
    ),
}

# What a checkpoint has beside its settings: digests of the data to train and to validate on.
DIGESTS = "digests"
# Settings that earlier versions of this program had.
RETIRED = {"new_subspace"}


def settings_of(config: Config) -> dict[str, Any]:
    """The configuration as JSON has it."""
    settings = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}


def config_of(settings: dict[str, Any]) -> Config:
    """Undoes `settings_of`, also where an earlier version had fewer settings, or a retired one.

    Raises:
      UsageError: another version of this program wrote them.
    """
    known: dict[str, Any] = {k: v for k, v in settings.items() if k not in RETIRED | {DIGESTS}}
    known |= {name: Path(known[name]) for name in ("out", "init_from") if known.get(name)}
    by_default = known.pop("by_default", None)
    known["offload"] = tuple(known.get("offload", ()))
    if known.get("architecture"):
        known["architecture"] = Architecture.of(known["architecture"])
    try:
        config = Config(**known)
    except TypeError as error:
        raise UsageError(f"These are not the settings of this version: {error}") from error
    if by_default is None:
        # An earlier version did not say: what is as it would be by default.
        by_default = [k for k, v in config.defaults().items() if getattr(config, k) == v]
    return dataclasses.replace(config, by_default=tuple(by_default))


def changes(was: Config, now: Config) -> dict[str, list[Any]]:
    """What differs between two resolved configurations, as [was, is], but for a process' own.

    What has no effect any more has not changed by itself: what it depended on has.
    """
    before, after = settings_of(was), settings_of(now)
    return {
        name: [before[name] if has_effect(was, name) else None, after[name]]
        for name, rule in RULES.items()
        if rule.kind is not Kind.PROCESS and before[name] != after[name] and has_effect(now, name)
    }


def check_same(stored: dict[str, Any], config: Config) -> None:
    """Refuses a run of other settings, but for those that nothing computed depends on.

    Raises:
      UsageError: some setting differs.
    """
    differ = changes(config_of(stored), config)
    refuse(config, {name: "" for name in differ if RULES[name].kind is not Kind.FREE}, differ)


def check_allowed(was: Config, now: Config, done: int) -> dict[str, list[Any]]:
    """The changes with which a run goes on after some updates.

    Data is taken as it is named here; whether it is the same is for `fingerprint` to say.

    Raises:
      UsageError: a change does not make sense; says why.
    """
    differ = changes(was, now)
    reasons = {name: RULES[name].note for name in differ if RULES[name].kind is Kind.NEVER}
    if "steps" in differ and now.steps < done:
        reasons["steps"] = f"{done} updates are done: {done} ends the run there, and more go on"
    if was.adapter != now.adapter:
        shapes = ("optimizer", "rank", "lora_alpha", "lora_targets")
        reasons |= {name: OTHER_SHAPES for name in shapes if name in differ}
    refuse(now, reasons, differ)
    return differ


def refuse(config: Config, reasons: dict[str, str], differ: dict[str, list[Any]]) -> None:
    """Raises UsageError for the settings that there are reasons against."""
    if reasons:
        raise UsageError(
            f"out={config.out} is of another configuration: {in_words(reasons, differ)}. Leave out "
            "what is not to change, or name another directory."
        )


def in_words(reasons: dict[str, str], differ: dict[str, list[Any]]) -> str:
    """Some changes, each with the reason why it is mentioned, if there is one."""
    return "; ".join(
        f"{name}={differ[name][1]!r}, which was {differ[name][0]!r}"
        + (f" ({reason})" if reason else "")
        for name, reason in reasons.items()
    )
