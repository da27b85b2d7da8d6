"""Perplexity and its standard error against loops, formulas and the bootstrap."""

import dataclasses
import inspect
import json
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import finish, start, tiny, write_text

from examples.flax_llama import evaluate, train
from examples.flax_llama.config import UsageError
from examples.flax_llama.loading import load_run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    config = tiny(text, optimizer="sgd", steps=4, out=tmp_path_factory.mktemp("runs") / "run")
    return config, train.train(config)


def losses_of(out, valid):
    """Loss of each token that counts, by row, as the model's own logits give it."""
    model, _ = load_run(out)
    forward = nnx.jit(lambda model, tokens: model(tokens))
    rows = []
    for row, mask in zip(valid.rows, valid.mask, strict=True):
        log_p = np.asarray(jax.nn.log_softmax(forward(model, row[None, :-1])[0]))
        rows.append(-log_p[np.arange(len(mask)), row[1:]][mask])
    return rows


@pytest.mark.parametrize(("tokens", "batch"), [(1, 16), (19, 3), (20, 16), (173, 7)])
def test_loss_is_the_mean_over_exactly_so_many_tokens(run, tokens, batch):
    config, _ = run
    scores = evaluate.evaluate(config.out, tokens=tokens, batch=batch)
    valid = train.open_dataset(dataclasses.replace(config, eval_tokens=tokens)).valid
    losses = np.concatenate(losses_of(config.out, valid))
    assert scores["tokens"] == len(losses) == tokens
    assert scores["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    bits = losses.mean() / math.log(2) / valid.bytes_per_token
    assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_evaluation_repeats_what_training_found(run):
    config, result = run
    scores = evaluate.evaluate(config.out, tokens=config.eval_tokens)
    last = result.valid[-1]
    assert scores["loss"] == pytest.approx(last["valid_loss"], rel=1e-6)
    assert scores["loss_standard_error"] == pytest.approx(last["standard_error"], rel=1e-4)
    assert scores["perplexity_standard_error"] == pytest.approx(
        scores["perplexity"] * scores["loss_standard_error"]
    )


def test_other_text_is_evaluated_whole(run, tmp_path):
    config, _ = run
    (tmp_path / "other.txt").write_text("abcd efgh " * 37)
    scores = evaluate.evaluate(config.out, data=str(tmp_path / "other.txt"))
    # Its bytes and the end of the document, with an end of a document as the first context.
    assert scores["tokens"] == 371


def test_other_text_may_have_another_field_and_lines_without_one(run, tmp_path, capsys):
    config, _ = run
    texts = ["abcd efgh " * 3, "hgfe"]
    lines = [json.dumps({"body": text}) for text in texts]
    (tmp_path / "other.jsonl").write_text("\n".join([lines[0], "{]", lines[1]]))
    scores = evaluate.evaluate(
        config.out, data=str(tmp_path / "other.jsonl"), text_field="body", on_bad_line="skip"
    )
    # Their bytes, and an end for each.
    assert scores["tokens"] == sum(len(text) + 1 for text in texts)
    assert "Left out 1 line that is no text." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("--data {path}", {"--text-field", "--on-bad-line"}),
        ("--data {path} --on-bad-line skip", {"--text-field", "--data"}),
        ("--tokens 1000000000", {"--data"}),
        ("--data missing.txt", {"--data"}),
    ],
)
def test_what_an_error_tells_to_type_there_is(run, tmp_path, monkeypatch, given, flags):
    (tmp_path / "other.jsonl").write_text('{"body": "abcd"}\n')
    words = given.format(path=tmp_path / "other.jsonl").split()
    monkeypatch.setattr("sys.argv", ["evaluate", "--run", str(run[0].out), *words])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    line = stopped.value.code
    assert flags <= set(re.findall(r"--[a-z-]+", line))
    own = set(inspect.signature(evaluate.evaluate).parameters)
    # The other one is for a training run, and says so.
    told = {f.removeprefix("--").replace("-", "_") for f in re.findall(r"--[a-z-]+", line)}
    assert told - own <= {"valid_data"}
    assert not re.search(r"\b\w+=\w", line)


def test_standard_error_is_that_of_equal_rows_in_the_textbook_case():
    sums = np.random.default_rng(0).normal(80.0, 9.0, size=50)
    result = evaluate.summarize(sums, np.full(50, 20))
    assert result.loss == pytest.approx(sums.mean() / 20)
    assert result.standard_error == pytest.approx(np.std(sums / 20, ddof=1) / math.sqrt(50))
    assert result.tokens == 1000


def test_standard_error_is_that_of_resampled_rows_of_unequal_lengths():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, size=200)
    sums = counts * (3 + 0.5 * rng.standard_normal(200)) + 0.02 * counts**2
    result = evaluate.summarize(sums, counts)
    picks = rng.integers(200, size=(4000, 200))
    bootstrap = (sums[picks].sum(axis=1) / counts[picks].sum(axis=1)).std()
    assert result.standard_error == pytest.approx(bootstrap, rel=0.05)


def test_rows_without_targets_count_for_nothing():
    sums, counts = np.array([3.0, 8.0, 0.0, 5.0]), np.array([1, 4, 0, 2])
    assert evaluate.summarize(sums, counts) == evaluate.summarize(
        sums[counts > 0], counts[counts > 0]
    )
    assert math.isnan(evaluate.summarize(sums[:1], counts[:1]).standard_error)


@pytest.mark.ci
@pytest.mark.long("another process, on 8 devices")
def test_many_devices_find_what_one_does(run, tmp_path):
    config, _ = run
    command = ("-m", "examples.flax_llama.evaluate", "--run", config.out, "--tokens", 173)
    output = finish(start(*command, "--batch", 2, devices=8))
    scores = evaluate.evaluate(config.out, tokens=173)
    found = dict(re.findall(r"^(\w+) +([\d.]+)", output, re.MULTILINE))
    (error,) = re.findall(r"^loss .* \+- ([\d.]+)$", output, re.MULTILINE)
    # Written with four decimals.
    assert float(found["loss"]) == pytest.approx(scores["loss"], abs=1e-4)
    assert float(error) == pytest.approx(scores["loss_standard_error"], abs=1e-4)
    assert float(found["perplexity"]) == pytest.approx(scores["perplexity"], rel=1e-5)
    assert found["tokens"] == "173"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens=0: expected at least 1"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"step": "7"}, "step=7: there is no such checkpoint"),
        ({"step": "worst"}, "step=worst: there is no such checkpoint"),
        ({"text_field": "body"}, "text_field='body' has no effect without data=PATH"),
        ({"max_bad_lines": 3}, "max_bad_lines=3 has no effect without on_bad_line='skip'"),
        ({"tokens": 10**9}, "There are only"),
        ({"data": "missing.txt"}, "missing.txt"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(run, settings, message):
    config, _ = run
    with pytest.raises(UsageError, match=message):
        evaluate.evaluate(config.out, **settings)
