"""Runs that update each layer inside the backward pass, against ordinary ones."""

import functools
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import assert_same_end, finish, metrics, start, tiny, write_text

from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.train import train

# Refreshes at updates 1, 6 and 11.
STEPS, GAP = 12, 5
TRAIN = """
import sys
from pathlib import Path, PosixPath
from examples.flax_llama.config import Config
from examples.flax_llama.train import train
train(eval(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def text(directory):
    return write_text(directory)


def short(text, **settings):
    # An epsilon beyond round-off: at 1e-8 Adam makes a whole step of what is no gradient at all.
    common = {"steps": STEPS, "update_proj_gap": GAP, "eval_every": 60, "eps": 1e-5}
    return tiny(text, **common | {"clip": 0.0, "weight_decay": 0.1} | settings)


def run(text, **settings):
    return train(short(text, **settings))


IN_TWO = {"optimizer": "galore_adamw", "accumulate": 2}
# A document per row: the two micro-batches have different numbers of targets.
CLIPPED = IN_TWO | {"clip": 1.0, "packing": False}
Q_GALORE = {"optimizer": "q_galore_adamw", "steps": 40, "hidden": 64, "intermediate": 176}
Q_GALORE |= {"rank": 16, "lr": 0.005, "batch": 16, "eval_tokens": 1400}
CAPTURED = {f"captured_energy{suffix}" for suffix in ("", "_min")}
SAVED = {"clipped": (CLIPPED, 7), "in two": (IN_TWO, 7), "Q-GaLore": (Q_GALORE, 26)}


@pytest.fixture(scope="module")
def saved(directory, text):
    """Makes a layer-wise run with checkpoints, once for all tests of that name."""

    @functools.cache
    def make(name):
        settings, step = SAVED[name]
        return run(text, layerwise=True, out=directory / name, save_every=step, keep=9, **settings)

    return make


def assert_close(found, expected, tolerance):
    """Each parameter, relative to its norm."""

    def check(path, a, b):
        error = np.linalg.norm(np.ravel(a - b)) / np.linalg.norm(np.ravel(b))
        assert error < tolerance, (jax.tree_util.keystr(path), error)

    pure = (nnx.to_pure_dict(nnx.state(result.model)) for result in (found, expected))
    jax.tree.map_with_path(check, *pure)


def assert_same_records(found, expected, but=frozenset()):
    but = {"seconds", "tokens_per_second", "flops_per_second", "mfu"} | but
    for a, b in zip(found.train + found.valid, expected.train + expected.valid, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - but:
            assert a[key] == pytest.approx(b[key], rel=1e-3), key


def test_a_clipped_layerwise_run_is_the_ordinary_one(text, saved):
    """To what the order of sums in float32 makes of 12 updates, of which Adam sees quotients."""
    found, expected = saved("clipped"), run(text, **CLIPPED)
    assert_close(found, expected, 1e-4)
    assert_same_records(found, expected)
    norms = [record["grad_norm"] for record in expected.train]
    assert min(norms) < CLIPPED["clip"] < max(norms)


@pytest.mark.ci
def test_micro_batches_at_rank_r_are_the_ordinary_ones(text, saved):
    found, expected = saved("in two"), run(text, **IN_TWO)
    assert_close(found, expected, 1e-4)
    # What is measured on a gradient is of single micro-batches, but for updates with a refresh.
    assert_same_records(found, expected, but={"grad_norm", *CAPTURED})
    for i, (a, b) in enumerate(zip(found.train, expected.train, strict=True)):
        if i % GAP == 0:
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        else:
            assert a["grad_norm"] > b["grad_norm"]


@pytest.mark.ci
@pytest.mark.parametrize(
    "name",
    # One of which a part is outside of GaLore and clips; one that rotates its moments each time;
    # one that would take two layers, with which it is tried, for a side of a matrix.
    ["flora", "ldadamw", "adafactor"],
)
def test_other_methods_are_the_ordinary_ones(text, name):
    settings = {"optimizer": name, "steps": 4, "lr": 0.01}
    settings |= {"update_proj_gap": None if name == "ldadamw" else 2}
    settings |= {"layers": 1} if name == "adafactor" else {}
    found, expected = run(text, layerwise=True, **settings), run(text, **settings)
    assert_close(found, expected, 1e-4)
    assert_same_records(found, expected)
    losses = [record["loss"] for record in found.train]
    assert losses[-1] < losses[0]


@pytest.mark.ci
def test_q_galore_learns_as_in_the_ordinary_run(text, saved):
    # Weights are rounded by other random numbers, which no tolerance for round-off covers.
    found, expected = saved("Q-GaLore"), run(text, **Q_GALORE)
    losses = [result.valid[-1]["valid_loss"] for result in (found, expected)]
    assert losses[0] != losses[1]
    assert losses[0] < expected.train[0]["loss"] - 1
    assert losses[0] == pytest.approx(losses[1], rel=0.005)


@pytest.mark.parametrize(
    "name",
    ["clipped", *(pytest.param(name, marks=pytest.mark.ci) for name in ("in two", "Q-GaLore"))],
)
def test_a_layerwise_run_resumes_bit_for_bit(directory, text, saved, name):
    (settings, step), whole = SAVED[name], saved(name)
    last = len(whole.train)
    copy = shutil.copytree(directory / name, directory / f"{name}, resumed")
    for later in {path.name for path in (copy / "checkpoints").iterdir()} - {str(step)}:
        shutil.rmtree(copy / "checkpoints" / later)
    run(text, layerwise=True, out=copy, save_every=step, keep=9, resume=True, **settings)
    assert [r["step"] for r in metrics(copy) if "loss" in r] == list(range(1, last + 1))
    assert_same_end(directory / name, copy, last)


@pytest.mark.ci
def test_two_devices_share_the_batch(directory, text, saved):
    saved("clipped")
    out = directory / "two devices"
    finish(start("-c", TRAIN, short(text, layerwise=True, out=out, **CLIPPED), devices=2))
    for a, b in zip(metrics(directory / "clipped"), metrics(out), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_clipping_by_layer_bounds_the_update_of_each(text):
    clip, lr = 1e-3, 0.01
    settings = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "lr": lr, "steps": 3}
    settings |= {"clip": clip, "clip_by": "layer", "weight_decay": 0.0}
    records = run(text, layerwise=True, **settings).train
    # Two layers, the embedding, and the head with the last norm, each as long as it may be.
    assert [r["update_norm"] for r in records] == pytest.approx([lr * clip * 4**0.5] * 3, rel=1e-4)
    assert min(r["grad_norm"] for r in records) > 100 * clip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layerwise": True, "on_nan": "skip"}, "on_nan='skip' looks at the whole gradient"),
        ({"clip_by": "leaf"}, "clip_by='leaf': expected one of global, layer"),
        ({"clip_by": "layer", "clip": 0.0}, "clip_by='layer' clips nothing at clip=0"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(UsageError, match=message):
        Config(**settings).resolve()
