"""Whole runs of a tiny model on a small piece of the text."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.flax_llama import data, sample, train
from examples.flax_llama.config import PRESETS, Config, LlamaConfig, UsageError
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import OPTIMIZERS

TINY = LlamaConfig(hidden=16, intermediate=40, layers=2, heads=2)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A preset and a text small enough for runs of seconds."""
    texts, valid = data.read_split()
    split = [novel[:4000] for novel in texts], [novel[:301] for novel in valid]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setattr(data, "read_split", lambda: split)
        data.load_corpus.cache_clear()
        yield
    data.load_corpus.cache_clear()


def config(**settings):
    small = {"preset": "tiny", "tokenizer": "bytes", "batch": 4, "seq": 20, "quiet": True}
    return Config(**small | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "galore"
    settings = config(lr=0.03, rank=4, update_proj_gap=8, steps=20, eval_every=8, out=out)
    return out, train.train(settings)


def test_twenty_updates_reduce_the_loss(run):
    _, result = run
    losses = [record["loss"] for record in result.train]
    assert losses[0] == pytest.approx(math.log(256), abs=0.05)
    assert np.mean(losses[-3:]) < losses[0] - 1
    assert result.valid[-1]["valid_loss"] < losses[0] - 1


def test_metrics_file_has_every_update_and_evaluation_once(run):
    out, result = run
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "valid_loss" in r] == [8, 16, 20]
    assert [r for r in records if "loss" in r] == result.train
    assert [r for r in records if "valid_loss" in r] == result.valid
    assert all(r["tokens_per_second"] > 0 for r in result.train)
    settings = json.loads((out / "config.json").read_text())
    assert settings["train"]["rank"] == 4
    assert settings["model"]["vocab_size"] == 256


def test_valid_loss_is_the_mean_over_exactly_the_held_out_tokens(run):
    _, result = run
    valid = data.load_corpus("bytes").valid
    losses = []
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for start in range(0, len(valid) - 1, 20):
        window = valid[start : start + 21]
        log_p = jax.nn.log_softmax(forward(result.model, window[None, :-1])[0])
        losses.extend(-np.asarray(log_p)[np.arange(len(window) - 1), window[1:]])
    assert len(losses) == 6 * 301
    assert result.valid[-1]["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.valid[-1]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_as_many_updates_as_asked_at_the_learning_rates_logged(monkeypatch):
    def unit_steps(config, schedule):
        ones = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
        return optax.chain(ones, optax.scale_by_learning_rate(schedule))

    monkeypatch.setitem(OPTIMIZERS, "unit_steps", unit_steps)
    steps, warmup, peak, ratio = 10, 2, 0.01, 0.5
    result = train.train(
        config(optimizer="unit_steps", steps=steps, warmup=0.2, lr=peak, matrix_lr_ratio=ratio)
    )
    fractions = [k / warmup for k in range(1, warmup + 1)] + [
        0.1 + 0.9 * (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2
        for k in range(warmup + 1, steps + 1)
    ]
    logged = [record["lr"] for record in result.train]
    np.testing.assert_allclose(logged, peak * np.array(fractions), rtol=1e-5)
    start = Llama(result.model.config, rngs=nnx.Rngs(0))
    start, end = (nnx.to_pure_dict(nnx.state(model)) for model in (start, result.model))
    moved = jax.tree.map(lambda a, b: float((a - b).mean()), start, end)
    assert moved["norm"]["scale"] == pytest.approx(sum(logged), rel=1e-4)
    assert moved["head"]["kernel"] == pytest.approx(sum(logged), rel=1e-4)
    kernel = moved["blocks"]["mlp"]["down"]["kernel"]
    assert kernel == pytest.approx(ratio * sum(logged), rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at update [23],.* smaller lr"):
        train.train(config(optimizer="adamw", lr=1e30, warmup=0, steps=10, out=out))
    assert not (out / "checkpoint").exists()


@pytest.mark.parametrize("as_file", [False, True])
def test_an_out_that_is_not_an_empty_directory_is_refused_before_any_work(
    tmp_path, monkeypatch, as_file
):
    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr(data, "load_corpus", lambda _: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="not an empty directory: name another one or delete it"):
        train.train(config(out=tmp_path / "kept" if as_file else tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_usage_errors_of_the_command_line_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: out=.* is not an empty directory"):
        train.main()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "8m"}, "preset='8m': expected one of 9m, 20m"),
        ({"dtype": "float16"}, "dtype='float16': expected one of float32, bfloat16"),
        ({"rank": 16}, "rank=16: expected 1 to 15, less than the hidden size 16"),
        ({"rank": 0}, "rank=0: expected 1 to 15"),
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"eval_every": 0}, "eval_every=0: expected at least 1"),
        ({"lr": -1.0}, "lr=-1.0: expected a positive number"),
        ({"clip": math.nan}, "clip=nan: expected a positive number"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: expected 0 or more"),
        ({"warmup": 1.0}, "warmup=1.0: expected a fraction"),
        ({"optimizer": "adam"}, "optimizer='adam': expected one of adamw, galore_adamw"),
        ({"tokenizer": "words"}, 'tokenizer=\'words\': expected "bytes" or "bpe:SIZE"'),
        ({"batch": 10_000}, "batch=10000 of seq=20 is larger than the data"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        train.train(config(**settings, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_checkpoint_restores_the_trained_model(run):
    out, result = run
    model, tokenizer = sample.load(out)
    assert model.config == result.model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(result.model))
    assert tokenizer.to_str() == data.load_corpus("bytes").tokenizer.to_str()


def test_greedy_sampling_follows_the_likeliest_token_past_the_window(run):
    out, _ = run
    model, tokenizer = sample.load(out)
    prompt = "Emma Woodhouse, han"
    assert len(prompt) < model.config.max_seq < len(prompt) + 6
    text = sample.generate(model, tokenizer, prompt, tokens=6, temperature=0)
    ids = tokenizer.encode(prompt).ids
    forward = nnx.jit(lambda model, tokens: model(tokens))
    for _ in range(6):
        context = np.array(ids[-model.config.max_seq :])
        ids.append(int(forward(model, context[None])[0, -1].argmax()))
    assert text == tokenizer.decode(ids)


def test_sampling_depends_on_the_seed_alone(run):
    out, _ = run
    one, same, other = (sample.sample(out, "Emma", 30, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert one.startswith("Emma")


def test_sampling_errors_say_what_would_be_right(run, tmp_path):
    out, _ = run
    with pytest.raises(UsageError, match="expected the --out directory of a finished run"):
        sample.sample(tmp_path)
    with pytest.raises(UsageError, match="prompt is empty"):
        sample.sample(out, prompt="")
    with pytest.raises(UsageError, match="must not be negative"):
        sample.sample(out, temperature=-1)
