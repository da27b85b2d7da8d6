"""Small decoders of every architecture that is imported, as `transformers` has them.

    python tests/decoders.py [NAME ...]

writes those that the tests read, or some of them, with torch and transformers: weights that
bfloat16 holds exactly, some tokens, and the logits of them in float32.
"""

import sys
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "decoders"
WITHOUT_HEAD_SIZE = {
    **{"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "vocab_size": 40},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
BASE = WITHOUT_HEAD_SIZE | {"head_dim": 6, "num_attention_heads": 4}


def rope(kind, factor=4.0, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": factor} | more}


def gemma(**more):
    return (
        BASE
        | {"sliding_window": 6, "query_pre_attn_scalar": 10, "num_hidden_layers": 4}
        | {"layer_types": 2 * ["sliding_attention"] + ["full_attention", "sliding_attention"]}
        | {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            }
        }
        | more
    )


SHORT, LONG = ({"original_max_position_embeddings": tokens} for tokens in (16, 64))
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Of each: the name of its class and of its configuration in transformers, and the latter's values.
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", BASE),
    "llama_biases": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        | {"rms_norm_eps": 1e-2}
        | rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SHORT),
    ),
    # Of its three frequencies one is stretched, one in part, and one not at all.
    "llama_llama3": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE
        | rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **LONG)
        | {"attention_bias": True, "num_hidden_layers": 1},
    ),
    "llama_linear": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE | {"num_key_value_heads": 4} | rope("linear"),
    ),
    "llama_dynamic": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE | {"max_position_embeddings": 16} | rope("dynamic"),
    ),
    "llama_yarn": ("LlamaForCausalLM", "LlamaConfig", BASE | rope("yarn", **SHORT)),
    "llama_yarn_as_given": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE | rope("yarn", beta_fast=8.0, beta_slow=0.5, mscale=1.2, mscale_all_dim=0.7, **SHORT),
    ),
    # The factor is none of its contexts' quotient.
    "llama_yarn_untruncated": (
        *("LlamaForCausalLM", "LlamaConfig"),
        BASE | rope("yarn", factor=3.0, attention_factor=1.3, truncate=False, **SHORT),
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", BASE | {"sliding_window": None}),
    "mistral_window": ("MistralForCausalLM", "MistralConfig", BASE | {"sliding_window": 7}),
    "qwen2": (
        *("Qwen2ForCausalLM", "Qwen2Config"),
        WITHOUT_HEAD_SIZE | {"tie_word_embeddings": True},
    ),
    "qwen2_window": (
        *("Qwen2ForCausalLM", "Qwen2Config"),
        WITHOUT_HEAD_SIZE
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", BASE | {"attention_bias": True}),
    "smollm3": (
        *("SmolLM3ForCausalLM", "SmolLM3Config"),
        WITHOUT_HEAD_SIZE | TOKENS | {"no_rope_layer_interval": 2},
    ),
    "smollm3_window": (
        *("SmolLM3ForCausalLM", "SmolLM3Config"),
        WITHOUT_HEAD_SIZE
        | TOKENS
        | {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", gemma()),
    "gemma3_unstretched": (
        *("Gemma3ForCausalLM", "Gemma3TextConfig"),
        gemma(
            attention_bias=True,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        ),
    ),
    "gemma3_nested": (
        *("Gemma3ForConditionalGeneration", "Gemma3Config"),
        {
            "text_config": gemma(),
            "vision_config": {
                **{"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1},
                **{"num_attention_heads": 1, "image_size": 4, "patch_size": 2},
            },
            "mm_tokens_per_image": 1,
        },
    ),
}

IN_FLOAT32 = ("smollm3_window", "gemma3_unstretched")


def build(name, seed):
    """A model with random weights that bfloat16 holds exactly, tokens, and their logits."""
    import torch
    import transformers

    model_class, config_class, values = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**values)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            new = 0.35 * torch.randn(parameter.shape)
            scales = "norm" in path and "gemma" not in name
            parameter.copy_((new + scales).bfloat16().float())
        model.tie_weights()
        vocab_size = values.get("text_config", values)["vocab_size"]
        tokens = torch.randint(3, vocab_size, (2, 24))
        logits = model(tokens).logits.float().numpy()
    return model, tokens.numpy(), logits


def torch_dtype(name):
    """In what a model is stored."""
    import torch

    return torch.float32 if name in IN_FLOAT32 else torch.bfloat16


def logits_and_save(directory, tokens, saved):
    """Those of transformers, of a model that we have written, which it saves as well."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(saved)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        model, tokens, logits = build(case, seed=0)
        model.to(torch_dtype(case)).save_pretrained(DATA / case)
        (DATA / case / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(DATA / case / "golden.npz", tokens=tokens, logits=logits)
