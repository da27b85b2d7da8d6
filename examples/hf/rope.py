"""Rotary embeddings in a config.json, both ways."""

import math
from typing import Any

from examples.flax_llama.architecture import Rope
from examples.flax_llama.usage import UsageError
from examples.hf.values import check_only, flag, positive, whole

SLIDING = "sliding_attention"


def rope_of(full: dict[str, Any], layer_type: str) -> Rope:
    """The rotary embedding of a kind of layers, in today's form of a file or in an older one."""
    scaling = full.get("rope_parameters") or full.get("rope_scaling") or {}
    local = full.get("rope_local_base_freq") if layer_type == SLIDING else None
    if isinstance(scaling, dict) and layer_type in scaling:
        scaling = scaling[layer_type]
    elif local is not None:
        scaling = {"rope_theta": local}
    if not isinstance(scaling, dict):
        raise UsageError(f"rope_scaling={scaling!r}: expected an object, or null.")
    check_only(scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = positive("rope_theta", scaling.get("rope_theta", full["rope_theta"]))
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise UsageError(
            f"rope_type={kind!r} is not supported: expected default, linear, dynamic, llama3 or "
            "yarn."
        )
    context = whole(full, "max_position_embeddings")
    original = context
    if scaling.get("original_max_position_embeddings") is not None:
        original = whole(scaling, "original_max_position_embeddings")

    def of(name: str, default: float | None = None) -> float:
        value = scaling.get(name)
        if value is None and default is None:
            raise UsageError(f"rope_scaling of type {kind!r} lacks {name}.")
        return positive(name, default if value is None else value)

    factor = of("factor", context / original if kind == "yarn" else None)
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "dynamic":
        return Rope(theta, kind, factor, context)
    if kind == "llama3":
        low, high = of("low_freq_factor"), of("high_freq_factor")
        if low >= high:
            raise UsageError(f"low_freq_factor={low:g}: expected less than {high:g}, the high one.")
        return Rope(theta, kind, factor, original, low, high)
    return Rope(
        *(theta, kind, factor, original),
        beta_fast=of("beta_fast", 32),
        beta_slow=of("beta_slow", 1),
        truncate=flag({"truncate": True} | scaling, "truncate"),
        attention_factor=yarn_attention(scaling, factor),
    )


def yarn_attention(scaling: dict[str, Any], factor: float) -> float:
    """What yarn multiplies cosines and sines with (arXiv:2309.00071, section 3.4)."""

    def temperature(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return positive("attention_factor", given)
    mscale, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and of_all):
        return temperature(1.0)
    return temperature(positive("mscale", mscale)) / temperature(positive("mscale_all_dim", of_all))


def rope_scaling(rope: Rope) -> dict[str, Any] | None:
    """The part of a configuration that says how a rotary embedding is stretched."""
    if rope.kind == "plain":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
        }
    if rope.kind == "yarn":
        scaling |= {
            **{"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow},
            **{"truncate": rope.truncate, "attention_factor": rope.attention_factor},
        }
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.context
    return scaling
