"""config.json of a Hugging Face directory and the shape of our model, both ways.

What a file leaves out is what `transformers` takes for it, family by family.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

from examples.flax_llama.architecture import Architecture, Kind
from examples.flax_llama.shapes import PRESETS, LlamaConfig
from examples.flax_llama.usage import UsageError, parse_json, read_object
from examples.hf.published import PUBLISHED
from examples.hf.rope import SLIDING, rope_of, rope_scaling
from examples.hf.values import check_only, flag, positive, whole

CONFIG = "config.json"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
COMMON = {
    **{"head_dim": None, "num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    **{"max_position_embeddings": 2048, "tie_word_embeddings": False, "attention_bias": False},
    **{"mlp_bias": False, "sliding_window": None, "hidden_act": "silu"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        **{"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
    },
    "qwen2": {
        **{"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
        **{"use_sliding_window": False, "max_window_layers": 28},
    },
    "qwen3": {
        **{"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
        **{"use_sliding_window": False, "max_window_layers": 28, "head_dim": 128},
    },
    "smollm3": {
        **{"num_key_value_heads": 4, "max_position_embeddings": 32_768, "rope_theta": 2e6},
        **{"use_sliding_window": False, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    },
    "gemma3_text": {
        **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
        **{"vocab_size": 262_208, "max_position_embeddings": 131_072, "rope_theta": 1e6},
        **{"rope_local_base_freq": 10_000.0, "sliding_window": 4096, "sliding_window_pattern": 6},
        **{"query_pre_attn_scalar": 256, "tie_word_embeddings": True},
        "hidden_act": "gelu_pytorch_tanh",
    },
}
# Of a family that none of its members does without.
ALWAYS: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": True, "output_bias": False},
    "qwen3": {"qk_norm": True},
    "gemma3_text": {
        **{"qk_norm": True, "norm_after": True, "norm_offset": True, "embed_scaled": True}
    },
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# What Hugging Face and `LlamaConfig` call the dimensions.
DIMENSIONS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS = ("hidden", "intermediate", "layers", "heads")
FULL = "full_attention"
# Null is a value of these; of all others it is as if they were not there.
MAY_BE_NULL = ("sliding_window", "num_key_value_heads")
# Of an original file: what is kept in what is exported, since nothing here depends on it.
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout")


def read_config(path: Path) -> dict[str, Any]:
    """The config.json at a path, or in the directory there.

    Raises:
      UsageError: there is none, or it is not JSON.
    """
    return read_object(path / CONFIG if path.is_dir() else path)


def is_model(directory: Path) -> bool:
    """Whether a directory is that of a model of Hugging Face, and not of a run."""
    try:
        settings = parse_json((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "train" not in settings and "model_type" in settings


def named_shape(name: str) -> LlamaConfig:
    """The model of a published name, or of a path as of `read_shape`.

    Raises:
      UsageError: there is none of that name, or none that this program has.
    """
    if name in PUBLISHED:
        return shape_of(PUBLISHED[name])
    if not os.path.exists(name):
        raise UsageError(
            f"preset={name!r}: expected one of {', '.join((*PRESETS, *PUBLISHED))}; or the "
            "directory of a model with its config.json."
        )
    return read_shape(Path(name))


def read_shape(path: Path) -> LlamaConfig:
    """The model of a config.json, or of the directory with one.

    Raises:
      UsageError: it is none that this program has; says what is not supported.
    """
    try:
        return shape_of(read_config(path))
    except UsageError as error:
        raise UsageError(
            f"{path}: {error}" if str(path) not in str(error) else str(error)
        ) from error


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the language model, which may be nested."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    tied = {k: config[k] for k in ("tie_word_embeddings",) if k in config}
    return tied | {k: config[k] for k in KEPT if k in config} | nested


def shape_of(config: dict[str, Any]) -> LlamaConfig:
    """Our shape for a configuration, with the context that it was trained with as `max_seq`.

    Raises:
      UsageError: it is none that this program has; says what is not supported.
    """
    config = text_config(config)
    family = config.get("model_type")
    if family not in list(CLASSES):
        raise UsageError(
            f"model_type={family!r} is not supported: expected one of {', '.join(CLASSES)}."
        )
    given = {k: v for k, v in config.items() if v is not None or k in MAY_BE_NULL}
    if "hidden_activation" in given:
        given["hidden_act"] = given["hidden_activation"]
    full: dict[str, Any] = COMMON | DEFAULTS[family] | given
    check_only(full)
    if full["hidden_act"] not in list(ACTIVATIONS):
        raise UsageError(
            f"hidden_act={full['hidden_act']!r} is not supported: expected one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    scalar = full.get("query_pre_attn_scalar")
    bias = flag(full, "attention_bias") and family != "mistral"
    own: dict[str, Any] = {"attention_bias": bias, "output_bias": bias}
    try:
        kinds, pattern = kinds_of(family, full)
        return LlamaConfig(
            *(whole(full, name) for name in DIMENSIONS),
            vocab_size=whole(full, "vocab_size"),
            max_seq=whole(full, "max_position_embeddings"),
            architecture=Architecture(
                family=family,
                kv_heads=full["num_key_value_heads"],
                head_size=full["head_dim"],
                tied=flag(full, "tie_word_embeddings"),
                mlp_bias=flag(full, "mlp_bias") and family in ("llama", "smollm3"),
                activation=ACTIVATIONS[full["hidden_act"]],
                norm_eps=positive("rms_norm_eps", full["rms_norm_eps"]),
                attention_scale=scalar and positive("query_pre_attn_scalar", scalar) ** -0.5,
                kinds=kinds,
                pattern=pattern,
                context=whole(full, "max_position_embeddings"),
                **own | ALWAYS.get(family, {}),
            ),
        )
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"a value of {CONFIG} is not what it should be: {error}.") from error


def kinds_of(family: str, full: dict[str, Any]) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
    """The kinds of layers, and the number of each layer's."""
    layers = whole(full, "num_hidden_layers")
    rotates = [True] * layers
    if family == "smollm3":
        every = whole(full, "no_rope_layer_interval")
        default = [(i + 1) % every != 0 for i in range(layers)]
        rotates = [bool(x) for x in full.get("no_rope_layers") or default]
    # Some families have a window only where it is said to be used.
    used = family != "llama" and (
        "use_sliding_window" not in full or flag(full, "use_sliding_window")
    )
    window = whole(full, "sliding_window") if used and full["sliding_window"] else None
    slides = [kind == SLIDING for kind in layer_types(family, full, rotates, window)]
    if len(slides) != layers or len(rotates) != layers:
        raise UsageError(
            f"layer_types or no_rope_layers: expected an entry for each of {layers} layers."
        )
    each = [
        Kind(
            rope_of(full, SLIDING if slide else FULL) if rotate else None,
            window if slide else None,
        )
        for slide, rotate in zip(slides, rotates, strict=True)
    ]
    kinds = tuple(dict.fromkeys(each))
    return kinds, tuple(map(kinds.index, each)) if len(kinds) > 1 else ()


def layer_types(
    family: str, full: dict[str, Any], rotates: list[bool], window: int | None
) -> list[str]:
    """Which layers attend to a window, and which to all before."""
    layers = whole(full, "num_hidden_layers")
    if (types := full.get("layer_types")) is not None:
        if not isinstance(types, list):
            raise UsageError(f"layer_types={types!r}: expected a list.")
        if unknown := [x for x in types if x not in (SLIDING, FULL)]:
            raise UsageError(
                f"layer_types: {', '.join(map(str, unknown))} is not supported, only {SLIDING} "
                f"and {FULL}."
            )
        return types
    if family == "gemma3_text":
        every = whole(full, "sliding_window_pattern")
        return [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
    if window is None:
        return [FULL] * layers
    if family == "smollm3":
        return [FULL if rotate else SLIDING for rotate in rotates]
    first = full.get("max_window_layers", 0)
    return [SLIDING if i >= first else FULL for i in range(layers)]


def config_of(shape: LlamaConfig, original: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a shape, in the form that old and new versions of `transformers` read.

    Args:
      shape: of the model.
      original: the file that it was imported with, whose numbers of special tokens are kept.

    Raises:
      UsageError: no class of `transformers` has such a model.
    """
    own = shape.architecture
    kinds = [own.kinds[i] for i in shape.pattern]
    config: dict[str, Any] = {k: v for k, v in text_config(original or {}).items() if k in KEPT}
    config |= {
        "architectures": [CLASSES[own.family]],
        "model_type": own.family,
        **{name: getattr(shape, field) for name, field in zip(DIMENSIONS, FIELDS, strict=True)},
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": own.context or shape.max_seq,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "rms_norm_eps": own.norm_eps,
        "tie_word_embeddings": own.tied,
        "torch_dtype": shape.param_dtype,
        "hidden_act": {v: k for k, v in ACTIVATIONS.items()}[own.activation],
    }
    if own.family in ("llama", "qwen3", "smollm3", "gemma3_text"):
        config["attention_bias"] = own.attention_bias
    if own.family in ("llama", "smollm3"):
        config["mlp_bias"] = own.mlp_bias
    windows = {kind.window for kind in kinds} - {None}
    config["sliding_window"] = windows.pop() if windows else None
    if own.family in ("qwen2", "qwen3", "smollm3"):
        config["use_sliding_window"] = config["sliding_window"] is not None
    if own.family in ("qwen2", "qwen3", "smollm3", "gemma3_text"):
        config["layer_types"] = [SLIDING if kind.window else FULL for kind in kinds]
    if own.family == "smollm3":
        config["no_rope_layers"] = [int(kind.rope is not None) for kind in kinds]
    full = next((kind.rope for kind in kinds if kind.rope and not kind.window), None)
    full = full or next(kind.rope for kind in kinds if kind.rope)
    config |= {"rope_theta": full.theta, "rope_scaling": rope_scaling(full)}
    if own.family == "gemma3_text":
        local = next((kind.rope for kind in kinds if kind.rope and kind.window), full)
        config |= {
            "hidden_activation": config.pop("hidden_act"),
            "rope_local_base_freq": local.theta,
            "query_pre_attn_scalar": scalar_of(shape),
        }
    if said_in_full(shape_of(config)) != said_in_full(shape):
        raise UsageError(f"No {CLASSES[own.family]} of transformers has this architecture: {own}.")
    return config


def said_in_full(shape: LlamaConfig) -> Architecture:
    """An architecture with nothing left to defaults, which is the same for the same models."""
    own = shape.architecture
    each = [own.kinds[i] for i in shape.pattern]
    kinds = tuple(dict.fromkeys(each))
    return dataclasses.replace(
        own,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        attention_scale=own.attention_scale or shape.head_size**-0.5,
        kinds=kinds,
        pattern=tuple(map(kinds.index, each)),
        context=own.context or shape.max_seq,
    )


def scalar_of(shape: LlamaConfig) -> int:
    """Of which the inverse root is the scale of attention; `transformers` takes whole numbers."""
    scale = shape.architecture.attention_scale
    return shape.head_size if scale is None else round(scale**-2)
