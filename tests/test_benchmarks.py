"""The benchmarks run, and compute what they say."""

import dataclasses
import json
import statistics
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from benchmarks import (
    compile_time,
    fewest_loss,
    gradients,
    layerwise_step,
    low_bit_training,
    projectors,
    refresh_quality,
    runs,
    shapes,
    step_time,
    trace_time,
    train_step,
)
from examples.flax_llama import data, demo
from examples.flax_llama.config import PRESETS, LlamaConfig
from examples.flax_llama.report import Run

TINY = LlamaConfig(hidden=16, intermediate=24, layers=1, heads=1, vocab_size=32)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setitem(shapes.PRESETS, "tiny", TINY)
    monkeypatch.setitem(shapes.RANKS, "tiny", 4)


@pytest.fixture(scope="module", autouse=True)
def short_corpus():
    """Of the built-in text the first part of each novel, which takes no time to tokenize."""
    split = [[text[:3000] for text in part] for part in data.read_split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_split", lambda: split)
        data.load_corpus.cache_clear()
        yield
    data.load_corpus.cache_clear()


@pytest.fixture
def short_demo():
    """The demo's settings, but for a tiny model, its text, and the length of its batches."""
    shape = {name: getattr(TINY, name) for name in ("hidden", "intermediate", "layers", "heads")}
    small = {"rank": 4, "tokenizer": "bytes", "batch": 2, "seq": 16, "eval_tokens": 200}
    return dataclasses.replace(demo.GALORE, **shape, **small)


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    cache = jax.config.jax_compilation_cache_dir
    module.main()
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.ci
def test_step_time_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    path = tmp_path / "times.json"
    peers = ["same sides", "rows", step_time.STAGGERED[1]]
    run_main(
        monkeypatch, step_time, "--model", "tiny", "--steps", 60, "--peers", *peers, "--out", path
    )
    result = json.loads(path.read_text())
    assert list(result["optimizers"]) == [*step_time.BASELINES, *peers]
    printed = capsys.readouterr().out
    for name, row in result["optimizers"].items():
        (line,) = (x for x in printed.splitlines() if x.startswith(f"{name}   "))
        assert f"{row['ratio_to_contrib']:.3f}" in line.split()
    assert result["optimizers"][step_time.CONTRIB]["ratio_to_contrib"] == 1
    # 7 matrices over 200 steps: places 0 to 2 on steps 0, 28 and 57.
    assert sum(result["optimizers"][step_time.STAGGERED[1]]["refreshed"]) == 2
    # Adam's moments, of two (16, 24) matrices and alike, and the numbers of 4 rows each.
    moments = sum(2 * 4 * count * n for (_, n), count in shapes.matrices("tiny").items())
    full = 2 * (2 * 32 * 16 + 3 * 16)
    bases = 7 * 4
    counters = 7 * 2 + 3  # refreshes and due; the steps of galore and of Adam, and the version
    expected = 4 * (moments + full + bases + counters)
    assert result["optimizers"]["rows"]["state_bytes"] == expected


def rows_of(name, contrib_refresh, my_refresh):
    return {
        step_time.CONTRIB: {"refresh_ms": contrib_refresh},
        step_time.ADAMW: {"refresh_ms": None},
        name: {"refresh_ms": my_refresh},
    }


def test_mean_step_is_that_of_a_period_with_one_refresh():
    rows = rows_of("svd", 2000.0, 1000.0)
    times = {step_time.ADAMW: [5.0] * 4, step_time.CONTRIB: [10.0] * 4, "svd": [8, 9, 10, 11]}
    step_time.summarize(rows, "svd", times, [0] * 4, 56)
    mine = statistics.mean([1000] + 199 * [9.5])
    contrib = statistics.mean([2000] + 199 * [10])
    assert rows["svd"]["mean_ms"] == pytest.approx(mine)
    assert rows["svd"]["mean_ratio_to_contrib"] == pytest.approx(mine / contrib)
    assert rows["svd"]["mean_ratio_to_adamw"] == pytest.approx(mine / 5)
    assert rows["svd"]["ratio_to_contrib"] == pytest.approx(0.95)
    assert rows["svd"]["spike"] == pytest.approx(1000 / 9.5)


def test_mean_staggered_step_is_that_of_a_period_in_which_each_matrix_is_refreshed_once():
    rows = rows_of("staggered", 2000.0, 300.0)
    times = {step_time.CONTRIB: [10.0] * 5, "staggered": [8.0, 8.0, 11.0, 8.0, 13.0]}
    step_time.summarize(rows, "staggered", times, [0, 0, 1, 0, 1], 50)
    row = rows["staggered"]
    assert row["ordinary_ms"] == 8
    assert row["mean_ms"] == pytest.approx(statistics.mean(25 * [11] + 25 * [13] + 150 * [8]))
    assert row["spike"] == pytest.approx(13 / 8)
    assert "mean_ratio_to_adamw" not in row


def test_refresh_times_are_of_steps_that_refresh_all_matrices():
    params = {"a": jnp.ones((6, 9)), "b": jnp.ones((8, 6))}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    run = runs.OptaxRun(galore_optax.galore(optax.sgd(0.1), rank=2), params, grads)
    params, times = runs.refresh_times(run, params, grads, most=2)
    assert len(times) == 3
    assert run.refreshes() == 6
    runs.take_turns({"galore": run}, params, grads, steps=3)
    assert run.refreshes() == 6


@pytest.mark.live("torch")
def test_torch_peer_takes_the_steps_of_galore_adamw():
    from benchmarks import torch_galore

    rng = np.random.default_rng(0)
    tree = {"tall": (9, 5), "wide": (5, 8), "square": (6, 6), "norm": (5,)}
    start, *stream = (
        {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in tree.items()}
        for _ in range(8)
    )
    # Its bases are those of SVD without a rule for signs, so that only the first one is compared.
    settings = torch_galore.Settings(rank=2, learning_rate=0.1, update_proj_gap=100)
    projected = {name: len(shape) == 2 for name, shape in tree.items()}
    peer = torch_galore.TorchRun(start, projected, settings)
    adamw = optax.adamw(0.1, weight_decay=0.1)
    tx = galore_optax.galore(adamw, rank=2, update_proj_gap=100)
    params, state = start, tx.init(start)
    for grads in stream:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        peer.step(start, grads)
    for mine, theirs in zip(jax.tree.leaves(params), peer.parameters, strict=True):
        np.testing.assert_allclose(mine, theirs.weight.numpy(), rtol=1e-4, atol=1e-5)


def test_synthetic_matrix_has_the_spectrum():
    matrix, values = gradients.synthetic(12, 20, np.array([1.0, 0.1, 0.01]))
    np.testing.assert_allclose(values[[0, -1]], [1.0, 0.01])
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), values, rtol=1e-4)


@pytest.mark.ci
def test_projectors_are_measured_against_the_best_that_a_basis_can_capture():
    rows = projectors.on_shape(16, 24, 4, np.array([1.0, 0.1]), repeats=2, svd_seconds=1)
    assert list(rows) == list(projectors.NAMES)
    assert rows["svd"]["energy"] == pytest.approx(1, abs=1e-4)
    assert rows["eigh"]["energy"] == pytest.approx(1, abs=1e-4)
    for row in rows.values():
        assert 0 < row["energy"] < 1 + 1e-4
        assert row["ms"] > 0
    result = projectors.whole_model("tiny", dict.fromkeys(shapes.matrices("tiny"), rows))
    assert result["svd"]["speedup"] == pytest.approx(1)
    assert result["svd"]["seconds"] == pytest.approx(7 * rows["svd"]["ms"] / 1e3)


@pytest.mark.ci
def test_projectors_on_gradients_of_a_trained_model(monkeypatch, tmp_path, short_demo):
    monkeypatch.setattr(gradients, "GALORE", short_demo)
    before, now = gradients.of_trained_model("9m", steps=1, batches=2, rows=2, seq=16)
    assert {path: stack.shape for path, stack in now.items()} == {
        **{f"attention/{name}/kernel": (1, 16, 16) for name in "kqvo"},
        **{f"mlp/{name}/kernel": (1, 16, 24) for name in ("gate", "up", "down")},
    }
    assert np.any(before["mlp/up/kernel"] != now["mlp/up/kernel"])
    few = [{path: stack for path, stack in g.items() if "/o/" in path} for g in (before, now)]
    rows = projectors.on_real_gradients(*few)
    assert rows["eigh"]["energy_min"] == pytest.approx(1, abs=1e-3)
    assert 0.9 < rows["power_iteration, first"]["energy_min"] <= 1 + 1e-4
    spectrum = gradients.mean_spectrum(now)
    assert spectrum[0] == 1
    synthetic = {"refresh": {name: {"seconds": 1.0} for name in projectors.NAMES}}
    result = {"real": {"9m": {"projectors": rows}}, "synthetic": {"tiny": synthetic}}
    projectors.plot(result | {"machine": {"device": "any"}}, tmp_path / "projectors.png")
    assert (tmp_path / "projectors.png").stat().st_size > 0


@pytest.mark.ci
def test_projectors_writes_a_refresh_of_the_model_and_a_picture(monkeypatch, tmp_path):
    stack = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32)
    few = [{"q": stack}, {"q": stack + 0.1}]
    monkeypatch.setattr(gradients, "of_trained_model", lambda *_, **__: few)
    arguments = ("--train", "9m", "--models", "tiny", "--repeats", 1, "--svd-seconds", 1)
    run_main(monkeypatch, projectors, *arguments, "--out", tmp_path / "projectors")
    result = json.loads((tmp_path / "projectors.json").read_text())
    refresh = result["synthetic"]["tiny"]["refresh"]
    assert list(refresh) == list(projectors.NAMES)
    by_shape = result["synthetic"]["tiny"]["shapes"]
    in_turn = sum(
        count * by_shape[f"{m}x{n}"]["rows"]["ms"]
        for (m, n), count in shapes.matrices("tiny").items()
    )
    assert refresh["rows"]["seconds"] == pytest.approx(in_turn / 1e3)
    assert (tmp_path / "projectors.png").stat().st_size > 0


def test_low_bit_training_compares_each_at_the_best_of_its_rates(monkeypatch, tmp_path, capsys):
    def compare(shared, optimizers, sweep, seeds):
        assert sweep == tuple(f"{name}=0.1,0.2" for name in low_bit_training.OPTIMIZERS)
        assert (shared.steps, seeds, shared.out) == (7, 2, tmp_path)
        losses = dict(zip(optimizers, (4.0, 4.04, 4.2), strict=True))
        runs = {name: [types.SimpleNamespace(loss=loss)] for name, loss in losses.items()}
        return types.SimpleNamespace(best=runs)

    monkeypatch.setattr(low_bit_training, "compare", compare)
    arguments = ("--rates", "0.1,0.2", "--seeds", 2, "--steps", 7, "--out", tmp_path)
    run_main(monkeypatch, low_bit_training, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["+0.00%", "+1.00%", "+5.00%"]


def test_the_fewest_bytes_are_compared_by_seed_each_at_its_best_rate(monkeypatch, tmp_path, capsys):
    def compare(shared, optimizers, sweep, seeds):
        (optimizer,) = optimizers
        assert sweep == (f"{optimizer}=0.1,0.2,0.4",)
        assert (shared.layerwise, shared.steps, seeds) == (True, 7, 2)
        factor = 1 + 0.01 * (shared.tables == "factored") + 0.02 * (shared.inputs_dtype == "int8")

        def run(lr, seed):
            loss = factor * (4 + abs(lr - 0.2) + seed)
            scores = {"valid_loss": loss, "projector_bytes": 1, "moment_bytes": 2}
            return Run(shared.out.name, optimizer, seed, {"lr": lr}, scores, None)

        best = [run(0.2, seed) for seed in range(2)]
        return types.SimpleNamespace(best={optimizer: best}, runs=[run(0.1, 0), *best, run(0.4, 0)])

    monkeypatch.setattr(fewest_loss, "compare", compare)
    arguments = ("--runs", tmp_path / "runs", "--out", tmp_path / "loss.json")
    words = ("--rates", "0.1,0.2,0.4", "--seeds", 2, "--steps", 7)
    run_main(monkeypatch, fewest_loss, *arguments, *words)
    lines = capsys.readouterr().out.splitlines()
    found = [line.split(" of the plain loss; ")[0].split() for line in lines]
    assert [words[-3:] for words in found] == [
        [ratio, "±", "0.0000"] for ratio in ("1.0000", "1.0100", "1.0200", "1.0300")
    ]
    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert rows["both"]["settings"] == {"tables": "factored", "inputs_dtype": "int8"}
    assert rows["plain"]["losses"] == {"0": 4.0, "1": 5.0}
    assert rows["plain"]["rates"] == {"0.1": 4.1, "0.2": 4.0, "0.4": 4.2}
    assert all(row["state_bytes"] == 3 and row["lr"] == 0.2 for row in rows.values())


@pytest.mark.ci
def test_train_step_adds_the_refreshes_to_the_ordinary_steps(monkeypatch):
    monkeypatch.setattr(train_step, "PIPELINE_SECONDS", 0.05)
    settings = {"hidden": 16, "intermediate": 24, "layers": 1, "heads": 1, "rank": 4}
    settings |= {"tokenizer": "bytes", "batch": 2, "seq": 16, "projector": "rows"}
    settings |= {"optimizer": "galore_adamw"}
    row = train_step.measure(settings, steps=6)
    refreshing = row["refreshing_step_ms"]
    assert len(refreshing) == 4  # of steps 0, 2, 4 and 6
    extra = (statistics.median(refreshing[1:]) - row["step_ms"]) / 200
    assert row["refresh_ms_per_step"] == pytest.approx(extra)
    assert row["ratio_with_refresh"] == pytest.approx(row["ratio"] + extra / row["gradient_ms"])


@pytest.mark.ci
def test_layerwise_step_counts_the_operations_of_xla(monkeypatch, tmp_path, capsys):
    # Of one layer, so that what is timed is compiled already to have its operations counted.
    shape = dataclasses.replace(PRESETS["9m"], layers=1)
    monkeypatch.setitem(PRESETS, "9m", shape)
    path = tmp_path / "layerwise.json"
    sizes = ("--vocab-size", 300, "--batch", 4, "--seq", 64, "--steps", 2, "--optimizers", "sgd")
    run_main(monkeypatch, layerwise_step, *sizes, "--out", path)
    row = json.loads(path.read_text())["optimizers"]["sgd"]
    assert f"{row['ratio']:.3f}" in capsys.readouterr().out.splitlines()[1].split()
    assert min(row["ms"].values()) > 0
    shape = dataclasses.replace(shape, vocab_size=1, max_seq=64)
    counted = layerwise_step.operations(shape)
    # The layer-wise head has so few entries in one chunk, whose four products XLA counts.
    counted["layer-wise"] += 4 * 2 * shape.hidden * 300
    # XLA adds what is done entry by entry, and a chunk of the ordinary head.
    for way, flops in row["xla_flops_of_one_layer"].items():
        assert flops / (4 * 64) == pytest.approx(counted[way], rel=0.1)
    # It merges some of what is computed twice.
    assert 0.99 < row["xla_flops_ratio"] < 0.01 + counted["layer-wise"] / counted["ordinary"]
    whole = layerwise_step.operations(dataclasses.replace(shape, vocab_size=300))
    assert row["operations_ratio"] == whole["layer-wise"] / whole["ordinary"]


def fake_train(calls):
    """Losses that are least at a learning rate of 0.16 and worse without a subspace."""

    def train(config):
        calls.append(config)
        loss = 4 + abs(np.log2(config.lr / 0.16)) + 0.01 * config.seed
        loss += 0.1 * (config.update_proj_gap == config.steps)
        return types.SimpleNamespace(valid=[{"valid_loss": loss}])

    return train


def test_refresh_quality_sweeps_compares_and_goes_on(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(refresh_quality, "train", fake_train(calls))
    arguments = ("--steps", 7, "--out", tmp_path / "quality", "--only", "svd, first step only")
    run_main(monkeypatch, refresh_quality, *arguments)
    summary = json.loads((tmp_path / "quality.json").read_text())["summary"]
    assert {name: row["setting"]["lr"] for name, row in summary.items()} == dict.fromkeys(
        [refresh_quality.ADAMW, refresh_quality.SVD, "svd, first step only"], pytest.approx(0.16)
    )
    losses = np.array([4.1, 4.11, 4.12])
    row = summary["svd, first step only"]
    np.testing.assert_allclose(row["losses"], losses)
    np.testing.assert_allclose(row["loss"], 4.11)
    np.testing.assert_allclose(row["loss_error"], losses.std(ddof=1) / 3**0.5)
    np.testing.assert_allclose(row["percent_over_svd"], np.mean(10 / (losses - 0.1)))
    assert (tmp_path / "quality.png").stat().st_size > 0
    assert "left" in capsys.readouterr().out
    done = len(calls)
    run_main(monkeypatch, refresh_quality, *arguments)
    assert len(calls) == done


@pytest.mark.ci
def test_refresh_quality_trains_the_demo(monkeypatch, short_demo):
    monkeypatch.setattr(refresh_quality.demo, "GALORE", short_demo)
    setting = {**refresh_quality.SWEPT[refresh_quality.ADAMW], "lr": 0.01}
    assert 5 < refresh_quality.Record(None, steps=1).loss(setting, seed=0) < 6


@pytest.mark.ci
def test_compile_time_of_stacked_and_unstacked_layers(monkeypatch, tmp_path):
    monkeypatch.setitem(shapes.PRESETS, "tiny", dataclasses.replace(TINY, layers=2))
    path = tmp_path / "compile.json"
    run_main(
        monkeypatch,
        compile_time,
        *("--projectors", "rows", "--model", "tiny", "--layers", 2, "--unstacked", "tiny"),
        *("--out", path),
    )
    rows = json.loads(path.read_text())["rows"]
    assert [row["model"] for row in rows] == ["tiny, 2 stacked layers", "tiny unstacked"]
    assert rows[1]["hlo_characters"] > rows[0]["hlo_characters"] > 0


def test_tracing_is_measured_beside_optax(monkeypatch, tmp_path, capsys):
    path = tmp_path / "trace.json"
    run_main(monkeypatch, trace_time, "--leaves", 6, "--runs", 1, "--out", path)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["galore", "optax.contrib.galore", "optax.adamw"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:]] == list(rows)
    assert all(row["seconds"] > 0 for row in rows.values())


def test_a_further_leaf_of_a_known_shape_adds_few_lines():
    """To the StableHLO of an update; without a function for all leaves of a shape it was 136."""
    tx = trace_time.MAKERS["galore"]()
    few, many = (trace_time.trace(tx, leaves)[1] for leaves in (4, 8))
    assert (many - few) / 4 <= 60
