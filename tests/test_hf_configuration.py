"""Windows and positions of layers by config.json, and values that are not what they should be."""

import copy

import decoders
import pytest

from examples.flax_llama.usage import UsageError
from examples.hf.configuration import config_of, shape_of

pytestmark = pytest.mark.plain

QWEN = {"model_type": "qwen2", **decoders.WITHOUT_HEAD_SIZE, "sliding_window": 5}
SMOLLM3 = {"model_type": "smollm3", **decoders.WITHOUT_HEAD_SIZE, "no_rope_layers": [1, 0, 1]}
SLIDES = {"use_sliding_window": True, "sliding_window": 7}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# What classes of transformers make of them: the window of each layer.
WINDOWS = {
    "qwen2, not used": (QWEN, [None, None, None]),
    "qwen2, not used by any type": (QWEN | MIXED, [None, None, None]),
    "qwen2, of the later layers": (QWEN | SLIDES | {"max_window_layers": 2}, [None, None, 7]),
    "qwen2, by type": (QWEN | SLIDES | MIXED, [7, None, 7]),
    "smollm3, of layers without positions": (SMOLLM3 | SLIDES, [None, 7, None]),
    "smollm3, by type": (SMOLLM3 | SLIDES | MIXED, [7, None, 7]),
    "smollm3, not used": (SMOLLM3 | {"sliding_window": 7}, [None, None, None]),
    "llama has none": (QWEN | SLIDES | {"model_type": "llama"}, [None, None, None]),
    "mistral": (QWEN | {"model_type": "mistral"}, [5, 5, 5]),
    "mistral without": (QWEN | {"model_type": "mistral", "sliding_window": None}, [None] * 3),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_those_of_transformers_and_come_back(case):
    config, windows = WINDOWS[case]
    shape = shape_of(config)
    own = shape.architecture
    assert [own.kinds[i].window for i in shape.pattern] == windows
    again = shape_of(config_of(shape))
    assert [again.architecture.kinds[i].window for i in again.pattern] == windows


def test_layers_without_positions_are_those_that_are_named():
    shape = shape_of(SMOLLM3)
    assert [shape.architecture.kinds[i].rope is None for i in shape.pattern] == [False, True, False]


def test_null_is_as_many_key_value_heads_as_heads():
    for family, absent in (("llama", 6), ("mistral", 8), ("qwen2", 32), ("smollm3", 4)):
        config = QWEN | {"model_type": family, "num_attention_heads": 32, "hidden_size": 64}
        config.pop("num_key_value_heads")
        heads = 32 if family == "llama" else absent
        assert shape_of(config).kv_heads == heads
        assert shape_of(config | {"num_key_value_heads": None}).kv_heads == 32


def rope(kind, **more):
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0} | more}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
WRONG = {
    "a text for an object": ({"rope_scaling": "linear"}, "rope_scaling='linear': expected an"),
    "a text for a number": (rope("linear", factor="4x"), "factor='4x': expected a positive number"),
    "zero": (rope("dynamic", factor=0), "factor=0: expected a positive number"),
    "infinity": (rope("linear", factor=float("inf")), "factor=inf: expected a positive number"),
    "missing": ({"rope_scaling": {"type": "linear"}}, "of type 'linear' lacks factor"),
    "a part rotates": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not supported",
    ),
    "an original context in words": (
        rope("yarn", original_max_position_embeddings="16"),
        "original_max_position_embeddings='16': expected a positive whole number",
    ),
    "frequencies that are the same": (
        rope("llama3", **LLAMA3 | {"high_freq_factor": 1.0}),
        "low_freq_factor=1: expected less than 1",
    ),
    "frequencies that lack": (rope("llama3"), "of type 'llama3' lacks low_freq_factor"),
    "yarn's factor": (rope("yarn", attention_factor="a"), "attention_factor='a'"),
    "a list as a type": ({"rope_scaling": {"type": ["yarn"]}}, r"rope_type=\['yarn'\] is not"),
    "a text for true": (
        {"tie_word_embeddings": "false"},
        "tie_word_embeddings='false': expected tr",
    ),
    "yarn's truncation": (rope("yarn", truncate="no"), "truncate='no': expected true or false"),
    "true for a number": ({"max_position_embeddings": True}, "max_position_embeddings=True"),
    "types that are lists": ({"layer_types": [["a"]] * 3}, r"layer_types: \['a'\]"),
    "types that are a text": ({"layer_types": "full_attention"}, "layer_types='full_attention'"),
    "too few types": ({"layer_types": ["full_attention"]}, "an entry for each of 3 layers"),
    "an activation that is a list": ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]"),
    "a window in words": ({"model_type": "mistral", "sliding_window": "5"}, "sliding_window='5'"),
    "heads in words": ({"num_key_value_heads": "two"}, "is not what it should be|key_value_heads"),
    "a family that is a list": ({"model_type": ["llama"]}, r"model_type=\['llama'\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_that_is_not_what_it_should_be_is_named(case):
    changes, message = WRONG[case]
    config = copy.deepcopy({"model_type": "llama", **decoders.WITHOUT_HEAD_SIZE} | changes)
    with pytest.raises(UsageError, match=message):
        shape_of(config)
