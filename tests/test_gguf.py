"""A LLaMA in GGUF: its logits, its tokenizer, and what cannot be taken from such a file."""

import dataclasses
import json

import decoders
import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGUFValueType, GGUFWriter
from safetensors.numpy import load_file

from examples.flax_llama.gguf_to_hf import gguf_to_hf
from examples.flax_llama.import_hf import import_hf
from examples.flax_llama.model import Llama
from examples.flax_llama.tokenizer import load_tokenizer
from examples.flax_llama.usage import UsageError
from examples.hf.configuration import read_shape
from examples.hf.names import match
from examples.hf.tensors import open_tensors
from examples.hf.weights import load

SOURCE = decoders.DATA / "llama"
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
} | {
    f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{own}.weight"
    for i in range(3)
    for theirs, own in {
        **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
        **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"},
        **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
        "post_attention_layernorm": "ffn_norm",
    }.items()
}


def neighbours(array, heads):
    """Rows of a head as llama.cpp has them, which rotates 2 i and 2 i + 1, not i and i + K/2."""
    of_heads = array.reshape(heads, -1, array.shape[1])
    half = of_heads.shape[1] // 2
    order = [i // 2 + half * (i % 2) for i in range(2 * half)]
    return of_heads[:, order].reshape(array.shape)


def write(path, *, architecture="llama", pre="smollm", leave_out=(), values=(), **changes):
    config = json.loads((SOURCE / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = ["<|end|>", *"0123456789abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġab"]
    assert len(tokens) == config["vocab_size"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(dict(values).get("merges", ["a b", "Ġ ab"]))
    for name, value in dict(values).items():
        if name != "merges":
            writer.add_key_value(f"llama.{name}", value, GGUFValueType.get_type(value))
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    for name, array in (load_file(SOURCE / "model.safetensors") | changes).items():
        own = NAMES.get(name, name)
        if own in leave_out:
            continue
        array = array if array.dtype == np.int8 else array.astype(np.float32)
        if "attn_q" in own:
            array = neighbours(array, config["num_attention_heads"])
        if "attn_k" in own:
            array = neighbours(array, config["num_key_value_heads"])
        writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    gguf_to_hf(write(directory / "model.gguf"), directory / "model")
    return directory


def test_logits_are_those_of_the_model_it_was_made_of(imported):
    shape = dataclasses.replace(read_shape(imported / "model"), max_seq=24)
    graphdef, like = nnx.split(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))), nnx.Param)
    tensors = open_tensors(imported / "model")
    params = load(tensors, match(shape, tensors).entries, nnx.to_pure_dict(like))
    golden = np.load(SOURCE / "golden.npz")
    logits = jax.jit(lambda p, tokens: nnx.merge(graphdef, p)(tokens))(params, golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_the_tokenizer_cuts_digits_and_words_and_knows_the_end(imported):
    tokenizer = load_tokenizer(imported / "model")
    names = ["<|end|>", *"0123456789abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġab"]
    ids = tokenizer.encode("ab 12 ab")
    assert [names[i] for i in ids] == ["ab", "Ġ", "1", "2", "Ġab"]
    assert tokenizer.decode(ids) == "ab 12 ab"
    said = json.loads((imported / "model" / "tokenizer_config.json").read_text())
    assert (said["eos_token"], said["chat_template"]) == ("<|end|>", "{{ messages }}")


def test_a_run_can_begin_with_it(imported):
    said = import_hf(imported / "model", imported / "run", quiet=True)
    assert said.startswith(f"LLaMA of {read_shape(SOURCE).num_params:,} parameters in float32")
    assert (imported / "run" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"architecture": "qwen2"}, "is a qwen2: expected a llama with a plain one"),
        ({"pre": "deepseek"}, "a tokenizer of model 'gpt2' and pre 'deepseek': expected 'gpt2'"),
        (
            {"leave_out": ["blk.1.ffn_up.weight"]},
            r"1 tensors are missing: blk\.1\.ffn_up\.weight",
        ),
        (
            {"blk.0.attn_v.bias": np.ones(12, np.float32)},
            r"1 tensors belong to nothing in a llama: blk\.0\.attn_v\.bias",
        ),
        (
            {"model.norm.weight": np.ones(3, np.float32)},
            r"output_norm\.weight has the shape \(3,\), where the rest .* \(24,\)",
        ),
        ({"model.norm.weight": np.ones(24, np.int8)}, r"output_norm\.weight is I8, which is not"),
        ({"values": {"rope.scaling.factor": 4.0}}, r"llama\.rope\.scaling\.factor is 4\.0, and"),
        ({"values": {"rope.scale_linear": 2.0}}, r"llama\.rope\.scale_linear is 2\.0, and only"),
        ({"values": {"attention.key_length": 8}}, r"attention\.key_length is 8, and only 6 is"),
        ({"values": {"merges": ["a Q"]}}, "has a tokenizer that does not work"),
    ],
    ids=[
        *("another architecture", "another tokenizer", "missing", "extra", "misshapen", "whole"),
        *("stretched", "stretched by its old name", "heads of another size", "merges"),
    ],
)
def test_what_cannot_be_taken(tmp_path, how, message):
    path = write(tmp_path / "model.gguf", **how)
    with pytest.raises(UsageError, match=message):
        gguf_to_hf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_file_that_is_cut_or_none(tmp_path):
    path = write(tmp_path / "model.gguf")
    for size in (3000, 100, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(UsageError, match=r"model\.gguf is cut, or no GGUF file"):
            gguf_to_hf(path, tmp_path / "model")
    with pytest.raises(UsageError, match="cannot be read"):
        gguf_to_hf(tmp_path / "none.gguf", tmp_path / "model")
