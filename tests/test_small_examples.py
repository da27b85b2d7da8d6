"""The small models: what is projected of them, and that a sweep is alike for both optimizers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import galore_optax
from examples.small import digits, experts, sweep

pytestmark = pytest.mark.ci


@pytest.fixture(params=[digits, experts], ids=["digits", "experts"])
def task(request):
    pytest.importorskip("sklearn")
    return request.param.task()


def test_what_is_projected(task):
    params = task.init(0)
    make, _ = task.optimizers["GaLore"]
    report = galore_optax.memory_report(make(0.01), params)
    moments = 0
    for path, x in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = np.prod(x.shape)
        if x.ndim == 4 and x.shape[:3] != (3, 3, 1):
            size = digits.RANK * max(np.prod(x.shape[:3]), x.shape[3])
        elif x.ndim == 3:
            size = len(x) * experts.RANK * max(x.shape[1:])
        elif name == "inside/kernel":
            size = experts.RANK * max(x.shape)
        moments += 2 * 4 * size
    assert report.moments == moments
    whole = galore_optax.memory_report(task.optimizers["AdamW"][0](0.01), params)
    assert report.state < 0.6 * whole.state


def test_the_weights_of_a_kernel_are_those_of_its_matrix():
    """The rows of the matrix are what an output sums up: a convolution is a product with it."""
    network = digits.Network(digits.nnx.Rngs(0))
    kernel = np.asarray(network.second.kernel[...])
    image = np.random.default_rng(0).standard_normal((1, 3, 3, 32)).astype(np.float32)
    middle = network.second(image)[0, -1, -1] - network.second.bias[...]
    # Strides of two from an image of three: the last window has its corner in the middle.
    window = np.zeros((3, 3, 32), np.float32)
    window[:2, :2] = image[0, 1:, 1:]
    rows = kernel.reshape(-1, kernel.shape[3])
    np.testing.assert_allclose(window.reshape(-1) @ rows, middle, atol=1e-5)


def test_a_sweep_takes_each_rate_once_and_the_best_with_other_seeds(tmp_path, monkeypatch):
    """Rates are tried with the first seed; what is best there is the same for both optimizers."""
    trained = []

    def train(task, make, rate, seed):
        trained.append((make, rate, seed))
        return {"valid_loss": abs(rate - 2) + 0.1 * seed, "state_bytes": 7}

    monkeypatch.setattr(sweep, "train", train)
    monkeypatch.setattr("sys.argv", ["sweep", "--out", str(tmp_path / "x.json")])
    nothing = dict.fromkeys(("init", "loss", "batches", "scores"))
    task = sweep.Task("x", optimizers={"a": ("A", (1, 2, 3)), "b": ("B", (1, 2))}, **nothing)
    sweep.main(task)
    assert trained == [
        *(("A", rate, 0) for rate in (1, 2, 3)),
        *(("A", 2, seed) for seed in (1, 2)),
        *(("B", rate, 0) for rate in (1, 2)),
        *(("B", 2, seed) for seed in (1, 2)),
    ]
    best = json.loads((tmp_path / "x.json").read_text())["best"]
    assert best["a"] == best["b"]
    assert best["a"]["valid_loss"]["mean"] == pytest.approx(0.1)
    assert best["a"]["valid_loss"]["error"] == pytest.approx(0.1 / 3**0.5)
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.long("two trainings")
def test_training_lowers_the_loss(task):
    few = jax.tree.map(lambda x: x[:12], task.batches(0))
    short = dataclasses.replace(task, batches=lambda seed: few)
    for make, rates in task.optimizers.values():
        before = task.scores(task.init(0))["valid_loss"]
        assert sweep.train(short, make, rates[1], 0)["valid_loss"] < 0.98 * before
