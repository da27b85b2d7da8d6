"""Sampling against whole forward passes and NumPy."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.flax_llama import sample
from examples.flax_llama.config import LlamaConfig, UsageError
from examples.flax_llama.generate import (
    decode,
    draw,
    generate,
    generate_ids,
    keep_top_k,
    keep_top_p,
    padded_length,
    pieces,
    prefill,
)
from examples.flax_llama.model import Llama
from examples.flax_llama.tokenizer import train_tokenizer

CONFIG = LlamaConfig(hidden=16, intermediate=40, layers=3, heads=2, vocab_size=257, max_seq=16)
TEXT = "Emma Woodhouse, handsome, clever, and rich"


@functools.cache
def model():
    """Random, with embeddings small beside the rest: the context counts, not the last token."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes
    )
    params["embed"]["embedding"] = params["embed"]["embedding"] / 10
    return nnx.merge(graphdef, params)


@functools.cache
def tokenizer():
    return train_tokenizer([], "bytes", eos=True)


@nnx.jit
def forward(model, tokens_BxS):
    return model(tokens_BxS)


def test_logits_out_of_the_cache_equal_those_of_the_whole_sequence():
    tokens = np.random.default_rng(1).integers(CONFIG.vocab_size, size=CONFIG.max_seq)
    expected = forward(model(), tokens[None])[0]
    graphdef, state = nnx.split(model())
    prompt = np.append(tokens[:5], [7, 7, 7]).astype(np.int32)  # three of padding
    logits, cache = prefill(graphdef, state, prompt, 5)
    np.testing.assert_allclose(logits, expected[4], rtol=0, atol=1e-5)
    for position in range(5, CONFIG.max_seq):
        logits, cache = decode(graphdef, state, jnp.int32(tokens[position]), cache)
        np.testing.assert_allclose(logits, expected[position], rtol=0, atol=1e-5)
    assert cache.length.tolist() == [CONFIG.max_seq] * CONFIG.layers


def likeliest_tokens(prompt, count):
    """Greedy, each token by a forward pass over the whole context, shifted as documented."""
    window, ids = CONFIG.max_seq, list(prompt)
    context = ids[-window:]
    for _ in range(count):
        if len(context) > window:
            context = context[-window // 2 :]
        padded = np.array(context + [0] * (window - len(context)))
        token = int(forward(model(), padded[None])[0, len(context) - 1].argmax())
        ids, context = [*ids, token], [*context, token]
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 42])
def test_temperature_0_takes_the_likeliest_token_within_and_past_the_context(length):
    prompt = tokenizer().encode(TEXT)[:length]
    assert len(prompt) == length
    stream = generate_ids(model(), prompt, temperature=0.0, top_p=0.5, seed=0)
    ids = [next(stream) for _ in range(40)]
    assert ids == likeliest_tokens(prompt.tolist(), 40)
    assert len(set(ids)) > 3


def nucleus(logits, top_p):
    """The set, a token at a time in float64."""
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    kept, total = set(), 0.0
    for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
        if total < top_p or top_p == 1:
            kept.add(token)
            total += p[token]
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_top_p_keeps_the_smallest_set_whose_probability_reaches_it(top_p, spread):
    # A prime number of tokens, so that no sum of equal probabilities is close to top_p.
    logits = spread * np.random.default_rng(0).standard_normal(997).astype(np.float32)
    cut = np.asarray(keep_top_p(jnp.asarray(logits), top_p))
    kept = np.flatnonzero(np.isfinite(cut))
    assert set(kept.tolist()) == nucleus(logits, top_p)
    np.testing.assert_array_equal(cut[kept], logits[kept])


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 6), (0.5, 1.0, 3), (2.0, 0.7, 6), (1.0, 0.6, 3)]
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, top_k):
    logits = np.array([2.0, -1.0, 0.0, 1.0, 1.5, -3.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = jax.vmap(lambda key: draw(jnp.asarray(logits), temperature, top_p, key, top_k))(keys)
    # First the likeliest, then what is kept of their share of the probability.
    cut = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    p = np.exp(cut / temperature)
    p[[token not in nucleus(cut / temperature, top_p) for token in range(6)]] = 0
    p /= p.sum()
    frequencies = np.bincount(tokens, minlength=6) / len(keys)
    assert not frequencies[p == 0].any()
    np.testing.assert_array_less(
        np.abs(frequencies - p), 4 * np.sqrt(p * (1 - p) / len(keys)) + 1e-9
    )


def test_text_depends_on_the_seed_alone():
    one, same, other = (
        generate(model(), tokenizer(), TEXT, tokens=30, seed=seed) for seed in (0, 0, 1)
    )
    assert one == same != other
    assert one.startswith(TEXT)


def test_every_token_is_drawn_anew():
    uniform = nnx.clone(model())
    uniform.head.kernel[...] = jnp.zeros_like(uniform.head.kernel[...])
    stream = generate_ids(uniform, np.array([1]), temperature=1.0, top_p=1.0, seed=0)
    assert len({next(stream) for _ in range(30)}) > 20


def test_text_ends_before_the_token_that_ends_a_document(monkeypatch):
    prompt = tokenizer().encode(TEXT)
    ids = likeliest_tokens(prompt.tolist(), 12)
    end = ids[6]
    assert end not in ids[:6]
    settings = {"tokens": 12, "temperature": 0}
    monkeypatch.setattr(tokenizer(), "eos_id", None)
    assert generate(model(), tokenizer(), TEXT, **settings) == tokenizer().decode([*prompt, *ids])
    monkeypatch.setattr(tokenizer(), "eos_id", end)
    expected = tokenizer().decode([*prompt, *ids[:6]])
    assert generate(model(), tokenizer(), TEXT, **settings) == expected


def test_no_tokens_are_the_prompt():
    assert generate(model(), tokenizer(), TEXT, tokens=0) == TEXT


def test_one_compilation_per_padded_length_and_one_for_decoding(caplog):
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for length in (3, 4, 5, 8, 12, 42):
            generate(model(), tokenizer(), TEXT[:length], tokens=20, seed=length)
    compiled = [record.args[0] for record in caplog.records if "Compiling" in record.msg]
    assert compiled.count("jit(decode)") == 1
    # 4, 8 and 16 tokens; a context that starts anew has 8.
    assert compiled.count("jit(prefill)") == 3


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 1), (2, 2), (3, 4), (9, 16), (17, 24), (24, 24)]
)
def test_prompts_are_padded_to_powers_of_two_within_the_context(length, padded):
    assert padded_length(length, 24) == padded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": -1}, "tokens=-1: expected 0 or more"),
        ({"temperature": -0.1}, "temperature=-0.1: expected 0 or a positive number"),
        ({"temperature": math.nan}, "temperature=nan: expected 0 or a positive number"),
        ({"temperature": math.inf}, "temperature=inf: expected 0 or a positive number"),
        ({"top_p": 0.0}, "top_p=0.0: expected more than 0"),
        ({"top_p": 1.1}, "top_p=1.1: expected more than 0"),
        ({"top_k": 0}, "top_k=0: expected at least 1"),
        ({"top_p": math.nan}, "top_p=nan: expected more than 0"),
        ({"prompt": ""}, "prompt='' is empty: give at least one character"),
    ],
)
def test_errors_say_what_would_be_right(settings, message):
    prompt = settings.pop("prompt", TEXT)
    with pytest.raises(UsageError, match=message):
        generate(model(), tokenizer(), prompt, **settings)


def test_the_command_prints_the_text_of_a_checkpoint(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        sample, "load_run", lambda *args: asked.append(args) or (model(), tokenizer())
    )
    for step in ("best", "40"):
        command = f"sample --run runs/a --prompt Emma --step {step} --tokens 9 --seed 3 --top-k 4"
        monkeypatch.setattr("sys.argv", command.split())
        sample.main()
        expected = generate(model(), tokenizer(), "Emma", tokens=9, seed=3, top_k=4)
        assert capsys.readouterr().out == expected + "\n"
    assert [(str(run), step) for run, step in asked] == [("runs/a", "best"), ("runs/a", 40)]


def test_the_command_prints_each_piece_as_soon_as_it_is_made(monkeypatch, capsys):
    def stream(*_, **__):
        for piece in ("Emma", " Wood", "house"):
            yield piece
            assert capsys.readouterr().out == piece

    monkeypatch.setattr(sample, "load_run", lambda *_: (model(), tokenizer()))
    monkeypatch.setattr(sample, "stream", stream)
    monkeypatch.setattr("sys.argv", ["sample", "--run", "runs/a"])
    sample.main()
    assert capsys.readouterr().out == "\n"


def test_pieces_are_made_one_by_one_of_whole_characters():
    """Of bytes at random, which are hardly ever characters, and of text that has long ones."""
    text = "Jane Austen \N{EM DASH} \N{PILE OF POO} na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"
    (start,) = tokenizer().encode("A").tolist()
    for ids in (np.random.default_rng(0).integers(256, size=300), tokenizer().encode(text)):
        taken = []
        stream = pieces(tokenizer(), [start], (taken.append(each) or each for each in ids))
        assert next(stream) == "A"
        assert taken == []
        found = list(stream)
        assert taken == ids.tolist()
        assert "A" + "".join(found) == tokenizer().decode([start, *ids])
    assert found == [*text, ""]


def test_an_error_of_the_command_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["sample", "--run", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: "):
        sample.main()


def test_of_the_likeliest_tokens_only_and_of_equal_ones_the_first():
    stream = generate_ids(model(), np.array([1]), temperature=9.0, top_p=1.0, seed=0, top_k=1)
    assert [next(stream) for _ in range(9)] == likeliest_tokens([1], 9)
    equal = np.asarray(keep_top_k(jnp.array([0.0, 1.0, 1.0, 1.0]), 2))
    assert np.flatnonzero(np.isfinite(equal)).tolist() == [1, 2]
    assert generate(model(), tokenizer(), TEXT, tokens=9, top_k=10**9) == generate(
        model(), tokenizer(), TEXT, tokens=9
    )
