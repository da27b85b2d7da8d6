"""Encoders of Hugging Face: what they compute in PyTorch, and checkpoints that are wrong."""

import dataclasses
import functools
import importlib.util
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_glue_runs import DATA, ENCODERS
from safetensors.numpy import load_file, save_file

from examples.flax_glue.config import Config
from examples.flax_glue.model import Text
from examples.flax_glue.optimizers import make_optimizer
from examples.flax_glue.shapes import read_encoder
from examples.flax_glue.step import Update, graph_of
from examples.flax_glue.weights import initial_params, load_weights
from examples.flax_llama.step import State
from examples.flax_llama.usage import UsageError

OUTPUTS = {"bert": 3, "bert_base": 2, "roberta": 1, "roberta_masked": 2}


def load(directory, **settings):
    """The model in a directory, and the line about it."""
    settings = {"outputs": OUTPUTS.get(directory.name, 3)} | settings
    config = read_encoder(directory, **settings)
    loaded = load_weights(directory, config, seed=0)
    return nnx.merge(graph_of(config), loaded.params), loaded.note


def read_expected(directory):
    arrays = np.load(directory / "expected.npz")
    mask = arrays["mask"].astype(bool)
    return Text(arrays["tokens"].astype(np.int32), arrays["types"].astype(np.int32), mask), arrays


def assert_agrees(directory):
    model, _ = load(directory)
    text, expected = read_expected(directory)
    hidden, logits = jax.jit(lambda text: (model.hidden(text), model(text)))(text)
    assert np.abs(expected["hidden"]).max() > 1
    np.testing.assert_allclose(
        hidden[text.mask_BxS], expected["hidden"][text.mask_BxS], atol=1e-4, rtol=0
    )
    if "logits" in expected:
        assert np.ptp(expected["logits"]) > 0.01
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", OUTPUTS)
def test_states_and_logits_are_those_of_pytorch(name):
    assert_agrees(ENCODERS / name)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_losses_of_updates_are_those_of_pytorch(name):
    """All of it at once: gradients of every parameter, AdamW, and the falling learning rate."""
    text, expected = read_expected(ENCODERS / name)
    settings = {"optimizer": "adamw", "lr": 0.01, "dropout": 0.0}
    config = Config(model=ENCODERS / name, data=ENCODERS, **settings).resolve()
    encoder = config.encoder(OUTPUTS[name])
    steps = len(expected["losses"])
    optimizer = make_optimizer(config, encoder, steps)
    params = load_weights(ENCODERS / name, encoder, seed=0).params
    state = State(params, optimizer.init(params))
    update = Update(config, encoder, optimizer, steps)
    labels = expected["labels"].astype(np.float32 if OUTPUTS[name] == 1 else np.int32)
    weights = np.ones(len(labels), np.float32)
    batch = dict(zip(("tokens", "types", "mask"), text, strict=True))
    losses = []
    for _ in range(steps):
        state, metrics = update(state, {}, batch | {"labels": labels, "weights": weights})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(losses, expected["losses"], rtol=2e-4)


@pytest.mark.live("torch", "transformers")
@pytest.mark.long("transformers is imported")
def test_the_files_are_what_pytorch_writes_and_computes_now(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_encoders", DATA / "make_encoders.py")
    make_encoders = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_encoders)
    monkeypatch.setattr(make_encoders, "OUT", tmp_path)
    make_encoders.main()
    for name in OUTPUTS:
        assert_agrees(tmp_path / name)
        stored = load_file(ENCODERS / name / "model.safetensors")
        for tensor, array in load_file(tmp_path / name / "model.safetensors").items():
            np.testing.assert_array_equal(array, stored[tensor], err_msg=tensor)


def test_what_is_behind_a_text_changes_nothing():
    model, _ = load(ENCODERS / "bert")
    text, _ = read_expected(ENCODERS / "bert")
    forward = jax.jit(model)
    other = text._replace(tokens_BxS=np.where(text.mask_BxS, text.tokens_BxS, 7))
    np.testing.assert_allclose(forward(text), forward(other), atol=1e-6)
    changed = text._replace(tokens_BxS=np.where(text.mask_BxS, text.tokens_BxS + 1, 0))
    assert np.abs(forward(text) - forward(changed)).max() > 1e-2


def test_the_mean_is_of_the_tokens_of_a_text():
    model, note = load(ENCODERS / "bert", pooling="mean")
    text, expected = read_expected(ENCODERS / "bert")
    assert note.endswith("skipped classifier, pooler; newly drawn head")
    means = np.stack([h[m].mean(0) for h, m in zip(expected["hidden"], text.mask_BxS, strict=True)])
    head = model.head.out
    np.testing.assert_allclose(
        jax.jit(model)(text), means @ head.kernel[...] + head.bias[...], atol=1e-5
    )


def test_bfloat16_is_float32_to_its_precision():
    text, expected = read_expected(ENCODERS / "roberta")
    model, _ = load(ENCODERS / "roberta", dtype="bfloat16", param_dtype="bfloat16")
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    found = jax.jit(model)(text)
    assert found.dtype == jnp.float32
    difference = np.abs(found - expected["logits"]).max()
    assert 0 < difference < 0.1


DROPOUTS = ("hidden_dropout", "attention_dropout", "classifier_dropout")


@pytest.mark.parametrize("part", DROPOUTS)
def test_each_dropout_depends_on_the_key(part):
    text, _ = read_expected(ENCODERS / "bert")
    model, _ = load(ENCODERS / "bert", **dict.fromkeys(DROPOUTS, 0) | {part: 0.5})
    keys = jax.random.split(jax.random.key(0), 2)
    forward = jax.jit(model)
    one, other, again = (np.asarray(forward(text, keys[i])) for i in (0, 1, 0))
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(one, again)


def test_at_rate_0_nothing_is_dropped():
    text, expected = read_expected(ENCODERS / "bert")
    model, _ = load(ENCODERS / "bert", **dict.fromkeys(DROPOUTS, 0))
    found = jax.jit(model)(text, jax.random.key(0))
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4)


def copy(tmp_path, name, change=None, **settings):
    """A copy of a model, with other tensors and other settings."""
    directory = shutil.copytree(ENCODERS / name, tmp_path / "copy")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) if change else tensors, path)
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def renamed(pattern, to):
    return lambda tensors: {re.sub(pattern, to, name): x for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("pattern", "to"),
    [(r"^bert\.", ""), (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"Norm\.bias", "Norm.beta")],
)
def test_names_without_a_prefix_and_of_old_checkpoints(tmp_path, pattern, to):
    directory = copy(tmp_path, "bert", renamed(pattern, to))
    assert any(to in name for name in load_file(directory / "model.safetensors"))
    model, note = load(directory)
    text, expected = read_expected(ENCODERS / "bert")
    np.testing.assert_allclose(jax.jit(model)(text), expected["logits"], atol=1e-4)
    assert note.endswith("57 tensors taken")


def test_a_head_for_another_number_of_classes_is_newly_drawn():
    model, note = load(ENCODERS / "bert", outputs=2)
    assert note.endswith("55 tensors taken; skipped classifier; newly drawn head")
    assert model.head.out.kernel.shape == (16, 2)
    assert 0.01 < np.std(model.head.out.kernel[...]) < 0.03
    np.testing.assert_array_equal(model.head.out.bias[...], 0)


def test_what_is_drawn_depends_on_the_seed_alone():
    config = read_encoder(ENCODERS / "roberta_masked")
    heads, whole_of = {}, jax.jit(initial_params, static_argnums=(0, 1))
    for seed in (0, 1):
        params = load_weights(ENCODERS / "roberta_masked", config, seed).params
        whole = whole_of(config, seed)
        heads[seed] = params["head"]["dense"]["kernel"]
        np.testing.assert_allclose(heads[seed], whole["head"]["dense"]["kernel"], rtol=1e-5)
    assert np.abs(heads[0] - heads[1]).max() > 1e-3


def without(name):
    return lambda tensors: {k: x for k, x in tensors.items() if k != name}


def in_turn(*changes):
    return lambda tensors: functools.reduce(lambda x, change: change(x), changes, tensors)


def with_tensor(name, array):
    return lambda tensors: tensors | {name: array}


LAYER_1 = "bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(LAYER_1), "the checkpoint lacks encoder.layer.1.output.dense.weight."),
        (
            renamed("layer.2.", "layer.3."),
            "the checkpoint lacks encoder.layer.2.attention.output.LayerNorm.bias, .* and 13 more.",
        ),
        (
            with_tensor("bert.encoder.layer.3.output.dense.bias", np.zeros(16, np.float32)),
            "has tensors that this model has not: bert.encoder.layer.3.output.dense.bias.",
        ),
        (
            with_tensor(LAYER_1, np.zeros((24, 16), np.float32)),
            rf"{LAYER_1} is float32\[24, 16\]; expected .* of shape \[16, 24\].",
        ),
        (with_tensor(LAYER_1, np.zeros((16, 24), np.int8)), rf"{LAYER_1} is I8\[16, 24\]"),
        (
            with_tensor("pooler.dense.bias", np.zeros(16, np.float32)),
            "pooler.dense.bias are the same tensor",
        ),
    ],
    ids=["missing", "layer", "extra", "shape", "dtype", "twice"],
)
def test_tensors_that_are_wrong_are_named(tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        load(copy(tmp_path, "bert", change))


BERT, ROBERTA = "bert.pooler.dense.weight", "classifier.out_proj"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            *("bert", with_tensor(BERT, np.zeros((16, 8), np.float32))),
            rf"{BERT} is float32\[16, 8\]; expected .* of shape \[16, 16\]",
        ),
        ("bert", without("bert.pooler.dense.bias"), r"lacks pooler\.dense\.bias"),
        ("bert", without("classifier.bias"), r"lacks classifier\.bias"),
        (
            *("bert", with_tensor("classifier.weight", np.zeros((2, 16), np.float32))),
            r"classifier\.weight is float32\[2, 16\]",
        ),
        ("roberta", without("classifier.dense.bias"), r"lacks classifier\.dense\.bias"),
        (
            "roberta",
            in_turn(
                without("classifier.dense.bias"),
                with_tensor(f"{ROBERTA}.weight", np.zeros((5, 16), np.float32)),
                with_tensor(f"{ROBERTA}.bias", np.zeros(5, np.float32)),
            ),
            r"lacks classifier\.dense\.bias",
        ),
    ],
    ids=["pooler's shape", "pooler", "head", "head's shape", "layer", "layer, other classes"],
)
def test_a_part_that_is_not_whole_is_not_drawn_in_silence(tmp_path, name, change, said):
    with pytest.raises(UsageError, match=said):
        load(copy(tmp_path, name, change))


def test_a_file_that_is_cut_is_named(tmp_path):
    path = copy(tmp_path, "bert") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"model.safetensors is cut or damaged"):
        load(path.parent)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'; expected 'gelu'."),
        ({"position_embedding_type": "relative_key"}, "expected 'absolute'."),
        ({"is_decoder": True}, "is_decoder is True; expected False."),
        ({"architectures": ["GPT2Model"]}, "its architecture is GPT2Model; expected BERT or"),
        ({"model_type": "electra", "architectures": None}, "its architecture is electra"),
        ({"model_type": ["bert"], "architectures": None}, r"its architecture is \['bert'\]"),
        ({"architectures": 5}, "architectures=5: expected a list of names."),
        ({"num_hidden_layers": None}, "num_hidden_layers=None: expected a positive whole number."),
        ({"vocab_size": 50.0}, "vocab_size=50.0: expected a positive whole number."),
        ({"type_vocab_size": 0}, "type_vocab_size=0: expected a positive whole number."),
        ({"num_attention_heads": 3}, "num_attention_heads=3: expected .* hidden_size=16 divides"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob=1.0: expected at least 0 and less"),
        ({"attention_probs_dropout_prob": "x"}, "attention_probs_dropout_prob='x': expected at"),
        ({"classifier_dropout": True}, "classifier_dropout=True: expected at least 0"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps='x': expected a positive number."),
        ({"layer_norm_eps": -1}, "layer_norm_eps=-1: expected a positive number."),
        ({"initializer_range": "a"}, "initializer_range='a': expected a positive number."),
        ({"pad_token_id": 50}, "pad_token_id=50: expected a whole number from 0 to 49."),
        ({"pad_token_id": "0"}, "pad_token_id='0': expected a whole number"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_the_model_does_not_compute_is_refused(tmp_path, settings, said):
    directory = copy(tmp_path, "bert", **settings)
    with pytest.raises(UsageError, match=f"config.json: .*{said}"):
        read_encoder(directory)


def test_positions_of_roberta_begin_behind_its_padding(tmp_path):
    directory = copy(tmp_path, "roberta", pad_token_id=19)
    with pytest.raises(UsageError, match="max_position_embeddings=20: expected more than 20, "):
        read_encoder(directory)


@pytest.mark.parametrize(("name", "pad"), [("bert", 0), ("roberta", 1)])
def test_null_is_what_transformers_has_by_default(tmp_path, name, pad):
    names = ("pad_token_id", "layer_norm_eps", "initializer_range", "hidden_dropout_prob")
    others = ("type_vocab_size", "attention_probs_dropout_prob", "classifier_dropout")
    found = read_encoder(copy(tmp_path, name, **dict.fromkeys((*names, *others))))
    expected = {"pad_id": pad, "norm_eps": 1e-12, "init_std": 0.02, "token_types": 2}
    expected |= dict.fromkeys(DROPOUTS, 0.1)
    assert found == dataclasses.replace(read_encoder(ENCODERS / name), **expected)


def test_an_adapter_adds_its_product_times_alpha_over_its_rank():
    text, _ = read_expected(ENCODERS / "roberta")
    settings = {"lora_rank": 2, "lora_alpha": 6.0, "lora_targets": "all"}
    model, note = load(ENCODERS / "roberta", **settings)
    assert note.endswith("newly drawn adapters")
    plain, _ = load(ENCODERS / "roberta")
    forward = nnx.jit(lambda model, text: model(text))
    before = forward(plain, text)
    # The second matrix is zeros at first.
    np.testing.assert_allclose(forward(model, text), before, atol=1e-6)
    modules = (("attention", "q"), ("attention", "o"), ("mlp", "up"), ("mlp", "down"))
    for seed, names in enumerate(modules):
        ours, theirs = model.blocks, plain.blocks
        for name in names:
            ours, theirs = getattr(ours, name), getattr(theirs, name)
        a = np.asarray(ours.lora.lora_a[...])
        # Uniformly within 1 / sqrt(d_in), each layer its own.
        assert np.abs(a).max() <= a.shape[1] ** -0.5 < 1.3 * np.abs(a).max()
        assert np.abs(a[0] - a[1]).max() > 1e-2
        b = np.random.default_rng(seed).normal(0, 0.3, ours.lora.lora_b.shape).astype(np.float32)
        ours.lora.lora_b[...] = jnp.asarray(b)
        theirs.kernel[...] = theirs.kernel[...] + 3.0 * np.einsum("lir,lro->lio", a, b)
    found = forward(model, text)
    np.testing.assert_allclose(found, forward(plain, text), atol=2e-5)
    assert np.abs(found - before).max() > 1e-2
