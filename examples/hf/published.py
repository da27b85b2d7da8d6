"""Published models by name, as their config.json on the Hugging Face hub says them.

Left out is what `transformers` takes anyway. The counts of parameters that tests compare with are
those of the models' cards.
"""

from typing import Any


def llama3(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    factor = more.pop("factor", 32.0)
    return {
        "model_type": "llama",
        **{"hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8},
        **{"vocab_size": 128_256, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
        **{"rope_theta": 500_000.0, "tie_word_embeddings": True},
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
        },
        **more,
    }


def qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        **{"hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8},
        **{"head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960},
        **{"rope_theta": 1_000_000.0, "tie_word_embeddings": tied},
    }


def gemma3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "gemma3_text",
        **{"hidden_size": hidden, "intermediate_size": intermediate},
        **{"num_hidden_layers": layers, "num_attention_heads": heads},
        **{"num_key_value_heads": kv_heads, "head_dim": 256, "query_pre_attn_scalar": 256},
        **{"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
        **{"sliding_window_pattern": 6, "vocab_size": 262_144, "sliding_window": 512},
        **{"max_position_embeddings": 32_768, **more},
    }


# Of the larger Gemmas, which also see: the part that reads and writes.
SEEING = {
    **{"vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window": 1024},
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"vocab_size": 49_152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        **{"rope_theta": 100_000.0, "tie_word_embeddings": True},
    },
    "smollm3-3b": {
        **{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11_008},
        **{"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4},
        **{"vocab_size": 128_256, "max_position_embeddings": 65_536, "rope_theta": 5_000_000.0},
        **{"no_rope_layer_interval": 4, "tie_word_embeddings": True},
    },
    "llama-3.2-1b": llama3(2048, 8192, 16, 32, head_dim=64),
    "llama-3.2-3b": llama3(3072, 8192, 28, 24, head_dim=128),
    "llama-3.1-8b": llama3(4096, 14_336, 32, 32, factor=8.0, tie_word_embeddings=False),
    "mistral-7b-v0.1": {
        **{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"vocab_size": 32_000, "max_position_embeddings": 32_768, "sliding_window": 4096},
        "rms_norm_eps": 1e-5,
    },
    "qwen2.5-0.5b": {
        **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864},
        **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
        **{"vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1_000_000.0},
        **{"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32_768},
    },
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, tied=True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, tied=True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, tied=True),
    "qwen3-8b": qwen3(4096, 12_288, 36, 32, tied=False),
    "qwen3-14b": qwen3(5120, 17_408, 40, 40, tied=False),
    "gemma-3-270m": gemma3(640, 2048, 18, 4, 1),
    "gemma-3-1b": gemma3(1152, 6912, 26, 4, 1),
    "gemma-3-4b": gemma3(2560, 10_240, 34, 8, 4, **SEEING),
    "gemma-3-12b": gemma3(3840, 15_360, 48, 16, 8, **SEEING),
}
