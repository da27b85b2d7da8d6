"""Whole runs of a tiny model on a tiny text."""

import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_llama_runs import metrics, tiny, write_text

from examples.flax_llama import progress, sharding, step, train
from examples.flax_llama.config import LlamaConfig, UsageError
from examples.flax_llama.loading import load_run
from examples.flax_llama.loss import loss_sum
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import OPTIMIZERS
from examples.flax_llama.records import TAGS
from examples.flax_llama.units import size

README = pathlib.Path(train.__file__).with_name("README.md")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def run(text, tmp_path_factory, printed):
    """A run of 20 updates with GaLore."""
    out = tmp_path_factory.mktemp("runs") / "galore"
    with contextlib.redirect_stdout(printed):
        return out, train.train(tiny(text, eval_every=8, quiet=False, out=out))


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_twenty_updates_reduce_the_loss(run):
    _, result = run
    losses = [record["loss"] for record in result.train]
    assert losses[0] == pytest.approx(math.log(257), abs=0.05)
    assert np.mean(losses[-3:]) < losses[0] - 1
    assert result.valid[-1]["valid_loss"] < losses[0] - 1


def test_metrics_file_has_every_update_and_evaluation_once(run):
    out, result = run
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "valid_loss" in r] == [8, 16, 20]
    assert [r for r in records if "loss" in r] == result.train
    assert [r for r in records if "valid_loss" in r] == result.valid
    assert all(r["tokens"] == 8 * 20 for r in result.train)
    flops = result.model.config.flops_per_token
    for record in result.train:
        assert record["flops_per_second"] == pytest.approx(flops * record["tokens_per_second"])


def test_records_have_the_metrics_of_the_subspaces(run):
    _, result = run
    kernels = 7 * result.model.config.layers
    # Chosen on the updates 1, 9 and 17.
    refreshes = [record["refreshes"] for record in result.train]
    assert refreshes == [kernels] * 8 + [2 * kernels] * 8 + [3 * kernels] * 4
    for record in result.train:
        assert 0 < record["captured_energy_min"] <= record["captured_energy"] <= 1 + 1e-6
    energy = [record["captured_energy"] for record in result.train]
    assert energy[8] > energy[7]
    assert energy[16] > energy[15]


def test_the_memory_of_an_update_holds_parameters_gradients_and_state(run):
    _, result = run
    size = sum(p.nbytes for p in jax.tree.leaves(params_of(result.model)))
    batch = 4 * 8 * (20 + 1)
    assert 2 * size + batch < result.update_bytes < 100 * size


def test_settings_and_shape_are_written_resolved(run, text):
    out, result = run
    settings = json.loads((out / "config.json").read_text())
    assert settings["train"]["clip"] == 1.0
    assert settings["train"]["save_every"] == 8
    assert LlamaConfig.of(settings["model"]) == result.model.config
    assert settings["model"]["vocab_size"] == 257


def test_validation_is_the_mean_over_exactly_the_tokens_asked_for(run, text):
    _, result = run
    valid = train.open_dataset(tiny(text)).valid
    forward = nnx.jit(lambda model, tokens: model(tokens))
    losses = []
    for row, mask in zip(valid.rows, valid.mask, strict=True):
        log_p = jax.nn.log_softmax(forward(result.model, row[None, :-1])[0])
        losses.extend(-np.asarray(log_p)[np.arange(20), row[1:]][mask])
    assert len(losses) == 200
    assert result.valid[-1]["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.valid[-1]["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_as_many_updates_as_asked_at_the_learning_rates_logged(text, monkeypatch):
    def unit_steps(config, schedule):
        ones = optax.stateless(lambda updates, _: jax.tree.map(jnp.ones_like, updates))
        return optax.chain(ones, optax.scale_by_learning_rate(schedule))

    # Which that optimizer does not look at.
    monkeypatch.setattr(step, "make_gradients", lambda *_, **__: lambda params, _: (0.0, params))
    monkeypatch.setitem(OPTIMIZERS, "unit_steps", unit_steps)
    steps, warmup, peak, ratio = 10, 2, 0.01, 0.5
    settings = {"steps": steps, "warmup": 0.2, "lr": peak, "matrix_lr_ratio": ratio}
    result = train.train(tiny(text, optimizer="unit_steps", accumulate=2, **settings))
    fractions = [k / warmup for k in range(1, warmup + 1)] + [
        0.1 + 0.9 * (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2
        for k in range(warmup + 1, steps + 1)
    ]
    assert "captured_energy" not in result.train[0]  # without GaLore
    logged = [record["lr"] for record in result.train]
    np.testing.assert_allclose(logged, peak * np.array(fractions), rtol=1e-5)
    start = params_of(Llama(result.model.config, rngs=nnx.Rngs(0)))
    moved = jax.tree.map(lambda a, b: float((a - b).mean()), start, params_of(result.model))
    assert moved["norm"]["scale"] == pytest.approx(sum(logged), rel=1e-4)
    assert moved["head"]["kernel"] == pytest.approx(sum(logged), rel=1e-4)
    kernel = moved["blocks"]["mlp"]["down"]["kernel"]
    assert kernel == pytest.approx(ratio * sum(logged), rel=1e-4)


@functools.cache
def gradients_of_mean(shape):
    """The loss and its gradients, jitted, of float32 parameters, tokens and a mask."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def mean_loss(params, tokens, mask):
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(where=mask)

    return jax.jit(jax.value_and_grad(mean_loss))


@pytest.mark.parametrize(
    ("accumulate", "param_dtype"),
    [pytest.param(1, "float32", marks=pytest.mark.ci), (4, "float32"), (4, "bfloat16")],
)
def test_gradients_are_those_of_the_mean_over_all_targets(text, accumulate, param_dtype):
    config = tiny(text, packing=False, seq=100, param_dtype=param_dtype).resolve()
    batch = next(train.open_dataset(config).train)
    targets = batch["mask"].sum(axis=1)
    assert len(set(targets.tolist())) > 1, "rows of one length would not show a mean of means"
    shape = config.shape(257)
    model = Llama(shape, rngs=nnx.Rngs(0))
    params, mesh = params_of(model), sharding.make_mesh()
    gradients_of = jax.jit(step.make_gradients(nnx.graphdef(model), mesh))
    loss, gradients = gradients_of(params, step.put_batch(batch, accumulate, mesh))
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    exact_shape = dataclasses.replace(shape, param_dtype="float32")
    expected, expected_gradients = gradients_of_mean(exact_shape)(
        exact, batch["tokens"], batch["mask"]
    )
    tolerance = 2e-5 if param_dtype == "float32" else 2e-2
    assert float(loss) == pytest.approx(float(expected), rel=tolerance)
    for g, e, p in zip(*map(jax.tree.leaves, (gradients, expected_gradients, params)), strict=True):
        assert g.dtype == p.dtype
        e = np.asarray(e, np.float32)
        np.testing.assert_allclose(
            np.asarray(g, np.float32), e, atol=tolerance * np.abs(e).max(), rtol=tolerance
        )


def test_gradients_of_micro_batches_are_added_in_float32(text):
    config = tiny(text, param_dtype="bfloat16").resolve()
    model = Llama(config.shape(257), rngs=nnx.Rngs(0))
    params, mesh = params_of(model), sharding.make_mesh()
    gradients_of = jax.jit(step.make_gradients(nnx.graphdef(model), mesh))
    row = {name: rows[:1] for name, rows in next(train.open_dataset(config).train).items()}
    copies = {name: np.repeat(rows, 64, axis=0) for name, rows in row.items()}
    _, once = gradients_of(params, step.put_batch(row, 1, mesh))
    _, added = gradients_of(params, step.put_batch(copies, 64, mesh))
    # Each of the 64 has exactly 1/64 of the gradient, whose sum bfloat16 would round on the way.
    jax.tree.map(np.testing.assert_array_equal, added, once)


def poison(monkeypatch, config, *updates):
    """Makes the loss of these updates nan, which are told by the sum of their tokens."""
    batches = train.open_dataset(config).train
    totals = [int(next(batches)["tokens"].sum()) for _ in range(config.steps)]
    bad = [totals[k - 1] for k in updates]
    assert [k for k in range(1, config.steps + 1) if totals[k - 1] in bad] == list(updates)

    def poisoned(model, tokens, mask, segments=None):
        is_bad = jnp.isin(tokens.sum(), jnp.array(bad))
        return loss_sum(model, tokens, mask) * jnp.where(is_bad, jnp.nan, 1.0)

    monkeypatch.setattr(step, "loss_sum", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_in_no_checkpoint(
    text, tmp_path, monkeypatch
):
    config = tiny(text, optimizer="sgd", out=tmp_path / "out", save_every=1, eval_every=20)
    poison(monkeypatch, config, 4)
    with pytest.raises(FloatingPointError, match=r"loss is nan at update 4, .* smaller lr"):
        train.train(config)
    saved = sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved == [2, 3]
    model, _ = load_run(tmp_path / "out")
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(params_of(model)))
    last = metrics(tmp_path / "out")[-1]
    assert (last["step"], last["loss"]) == (4, None)


@pytest.mark.ci
def test_parameters_that_overflow_are_in_no_checkpoint(text, tmp_path):
    config = tiny(text, optimizer="sgd", lr=1e38, clip=0.0, out=tmp_path / "out", save_every=1)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at update \d,"):
        train.train(dataclasses.replace(config, warmup=0.0))
    for path in (tmp_path / "out" / "checkpoints").iterdir():
        model, _ = load_run(tmp_path / "out", int(path.name))
        assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(params_of(model)))


@pytest.mark.long("a run of its own, whose loss and optimizer no other test compiles")
def test_updates_that_are_not_finite_are_skipped_on_request_until_ten_in_a_row(
    text, tmp_path, monkeypatch
):
    config = tiny(text, optimizer="adamw", on_nan="skip", steps=25, eval_every=12, out=tmp_path)
    skipped, in_a_row = [4, 9, 10], list(range(14, 24))
    poison(monkeypatch, config, *skipped, *in_a_row)
    with pytest.raises(FloatingPointError, match=r"nan at update 23, the 10th in a row"):
        train.train(config)
    records = {record["step"]: record for record in metrics(tmp_path) if "loss" in record}
    assert [k for k, record in records.items() if record["update_norm"] == 0] == skipped + in_a_row
    assert records[23]["skipped"] == len(skipped + in_a_row)
    assert records[23].keys() - {"step"} <= TAGS.keys()
    for k in skipped:
        assert records[k]["loss"] is None
        # The schedule is one of updates that were made.
        assert records[k + 1]["lr"] == records[k]["lr"]
    (valid,) = [record for record in metrics(tmp_path) if "valid_loss" in record]
    assert math.isfinite(valid["valid_loss"])


@pytest.mark.parametrize("as_file", [False, True])
def test_an_out_that_is_not_an_empty_directory_is_refused_before_any_work(
    tmp_path, text, monkeypatch, as_file
):
    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr(train, "open_data", lambda **_: pytest.fail("work was done"))
    with pytest.raises(UsageError, match="not an empty directory: name another one or delete it"):
        train.train(tiny(text, out=tmp_path / "kept" if as_file else tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_usage_errors_of_the_command_line_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("old")
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: --out .* is not an empty directory"):
        train.main()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 16}, "rank=16: expected 1 to 15, less than the hidden size 16"),
        ({"optimizer": "adam"}, "optimizer='adam': expected one of adamw, adafactor"),
        ({"schedule": "step"}, "schedule='step': expected one of cosine"),
        ({"tokenizer": "words"}, "tokenizer='words'"),
        ({"vocab_size": 100}, "vocab_size=100 is smaller than the 257 tokens"),
        ({"batch": 100_000}, "batch=100000 of seq=20 is larger than the data"),
        ({"data": "missing.txt"}, "missing.txt"),
        ({"attention": "cudnn"}, "attention='cudnn' needs an NVIDIA GPU"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, text, settings, message):
    with pytest.raises(UsageError, match=message):
        train.train(tiny(**{"data": text, "out": tmp_path / "out"} | settings))
    assert not (tmp_path / "out").exists()


def test_a_batch_that_does_not_divide_among_devices_is_refused(text, monkeypatch):
    monkeypatch.setattr(step, "make_mesh", lambda _: sharding.planned_mesh("data=3"))
    config = tiny(text, batch=8, accumulate=2).resolve()
    with pytest.raises(UsageError, match=r"4 sequences each,.* 3 devices: choose a multiple of 6"):
        step.check_divides(config)
    step.check_divides(dataclasses.replace(config, batch=12))


def test_the_metrics_of_a_run_are_those_of_the_readme(run):
    _, result = run
    logged = result.train[0].keys() | result.valid[0].keys()
    table = re.findall(r"^\| `(\w+)` \| (\S+|\(the axis\)) \|", README.read_text(), re.MULTILINE)
    tags = {name: tag.strip("`") for name, tag in table if name in TAGS or name == "step"}
    assert len(table) == len(tags)
    # With --on-nan skip, and where the device's peak is known: other tests have their runs.
    assert tags.keys() == logged | {"skipped", "skipped_in_a_row", "mfu"}
    assert {name: tag for name, tag in tags.items() if name != "step"} == TAGS


def test_what_is_trained_is_told_before(run, printed):
    _, result = run
    output = printed.getvalue()
    shape = result.model.config
    count = sum(p.size for p in jax.tree.leaves(params_of(result.model)))
    assert f"LLaMA of {count:,} parameters" in output
    assert f"{progress.significant(shape.flops_per_token / 1e6)} MFLOP per token" in output
    assert "20 updates of 8 x 20 tokens, 3,200 in all" in output
    needed = size(result.update_bytes)
    assert re.search(rf"\nCompiled in 0:\d\d:\d\d; an update needs {needed} of memory\n", output)


def test_each_evaluation_is_told_and_the_first_update(run, printed):
    _, result = run
    lines = printed.getvalue().splitlines()
    for record in result.valid:
        told = f"update {record['step']}: {progress.scores(record)}"
        assert any(line.startswith(told) for line in lines)
    loss = result.train[0]["loss"]
    assert any(line.startswith(f"update 1/20  loss {loss:.3f}  lr ") for line in lines)
    # The end is told once.
    assert lines[-1].startswith("update 20: ")
    assert "nan" not in printed.getvalue()
