"""ReLoRA: what begins again, when, and what is trained in between."""

import dataclasses
import itertools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_llama_runs import tiny, write_text
from test_flax_llama_adapters import logits, with_adapter

import galore_optax
from examples.flax_llama.adapters import TARGETS, Adapter, lora_of, merged, trained_of, without_lora
from examples.flax_llama.config import UsageError
from examples.flax_llama.loading import load_params
from examples.flax_llama.memory import estimate
from examples.flax_llama.model import dimension_numbers
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.relora import forgotten, merged_and_redrawn
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.step import initial_params
from examples.flax_llama.train import train

ADAPTER = Adapter("lora", 3, alpha=6.0, targets="all", only=False)
KEY = jax.random.key(7)


def test_what_begins_again_computes_the_same():
    graphdef, params, _ = with_adapter(ADAPTER)
    found = jax.jit(lambda p: merged_and_redrawn(p, ADAPTER, KEY))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)
    np.testing.assert_allclose(logits(graphdef, found), logits(graphdef, params), atol=2e-5)
    whole = merged(params, ADAPTER)
    chex.assert_trees_all_close(without_lora(found), whole, atol=1e-6)
    drawn = {}
    for path, x in jax.tree.leaves_with_path(lora_of(found)):
        if path[-1].key == "lora_b":
            assert not np.any(x)
        else:
            drawn |= {(path[2].key, layer): np.asarray(x[layer]) for layer in range(len(x))}
    assert len(drawn) == 2 * len(TARGETS["all"])
    for (name, _), a in drawn.items():
        bound = (40 if name == "down" else 16) ** -0.5
        assert 0.8 * bound < np.abs(a).max() <= bound
    # Each is drawn by itself.
    assert len({a[0, 0] for a in drawn.values()}) == len(drawn)


def test_kernels_in_codes_are_rounded_at_random():
    """Each entry lands on one of the two codes about the sum, and the mean of many is the sum."""
    adapter = Adapter("lora", 3, alpha=0.06, targets="qv")
    _, params, _ = with_adapter(adapter)
    coded = galore_optax.quantize_params(params, rank=4, weight_dimension_numbers=dimension_numbers)
    right = merged(coded, adapter)["blocks"]["attention"]["q"]["kernel"]

    @jax.jit
    def once(key):
        again = merged_and_redrawn(coded, adapter, key)["blocks"]["attention"]["q"]["kernel"]
        return again.dequantize()

    many = jnp.stack([once(jax.random.key(i)) for i in range(64)])
    step = float(jnp.abs(right).max()) / 100
    assert jnp.abs(many - right).max() < 2 * step
    assert jnp.abs((many - right).mean()) < step / 100
    assert len({float(x) for x in many[:, 0, 0, 0]}) > 1


def test_of_the_moments_the_largest_hundredth_stays():
    params = {
        "blocks": {
            "q": {"lora": {"lora_a": jnp.ones((2, 40, 30)), "lora_b": jnp.ones((2, 30, 50))}}
        },
        "embed": jnp.ones((6, 4)),
    }
    rng = np.random.default_rng(0)
    state = optax.adam(0.1).init(params)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype) if x.ndim else x, state
    )
    found = forgotten(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state)
    for old, new in zip(state[0][1:], found[0][1:], strict=True):
        np.testing.assert_array_equal(new["embed"], old["embed"])
        for name in ("lora_a", "lora_b"):
            before, after = (x["blocks"]["q"]["lora"][name] for x in (old, new))
            for layer, kept in zip(np.asarray(before), np.asarray(after), strict=True):
                largest = np.argsort(np.abs(layer), axis=None)[-layer.size // 100 :]
                expected = np.zeros(layer.size)
                expected[largest] = layer.flat[largest]
                np.testing.assert_array_equal(kept.ravel(), expected)


def test_the_learning_rate_rises_again_after_each_time():
    settings = {"lr": 0.5, "warmup": 0.2, "steps": 40, "schedule": "constant"}
    config = tiny("x", optimizer="relora", merge_every=10, **settings).resolve()
    found = [float(learning_rate(config)(count)) for count in range(40)]
    rise, peak = [0.0625 * n for n in range(1, 9)], [0.5]
    # Eight updates of forty; then two of ten, each time.
    expected = rise + 2 * peak + 3 * ([0.25] + 9 * peak)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ReLoRA that begins again after 5 updates, and LoRA that does not, each of 9."""
    directory = tmp_path_factory.mktemp("relora")
    text = write_text(directory)
    common = {"rank": 3, "lora_targets": "all", "lora_alpha": 6.0, "lora_only": False}
    common |= {"steps": 9, "eval_every": 5, "save_every": 5, "warmup": 0.0, "clip": 1.0}
    common |= {"schedule": "constant", "keep": 5}
    configs = {
        name: tiny(text, optimizer=name, out=directory / name, **common | own)
        for name, own in {"relora": {"merge_every": 5}, "lora": {}}.items()
    }
    trained = {name: (train(config), directory) for name, config in configs.items()}
    return trained | {"config": configs["relora"]}


def params_of(directory, step):
    return load_params(directory, step, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def test_it_is_lora_until_it_begins_again(runs):
    (again, directory), (lora, _) = runs["relora"], runs["lora"]
    losses, same = ([row["loss"] for row in run.train] for run in (again, lora))
    np.testing.assert_allclose(losses[:5], same[:5], rtol=1e-6)
    assert losses[6] != pytest.approx(same[6], rel=1e-6)
    # The model is the same after that.
    assert again.valid[0]["valid_loss"] == pytest.approx(lora.valid[0]["valid_loss"], rel=1e-6)
    whole = merged(params_of(directory / "lora", 5), lora.model.config.adapter)
    now = params_of(directory / "relora", 5)
    chex.assert_trees_all_close(without_lora(now), whole, atol=1e-6)


def test_all_is_trained_but_the_kernels_beside_which_it_is(runs):
    _, directory = runs["lora"]
    first, last = params_of(directory / "lora", 5), params_of(directory / "lora", 9)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(first), jax.tree.leaves(last), strict=True
    ):
        frozen = path[0].key == "blocks" and path[-1].key == "kernel"
        assert np.array_equal(before, after) == frozen, jax.tree_util.keystr(path)


@pytest.mark.long("two more runs")
def test_it_resumes_bit_for_bit_across_a_beginning(runs, tmp_path):
    """From update 9 to 12, which begins again after 10, beside a run that was not interrupted."""
    _, directory = runs["relora"]
    shutil.copytree(directory / "relora", tmp_path / "resumed")
    more = {"steps": 12, "eval_every": 12, "save_every": 12}
    train(dataclasses.replace(runs["config"], out=tmp_path / "resumed", resume=True, **more))
    train(dataclasses.replace(runs["config"], out=tmp_path / "whole", **more))
    found, right = (params_of(tmp_path / name, 12) for name in ("resumed", "whole"))
    chex.assert_trees_all_equal(found, right)
    old = params_of(directory / "relora", 9)
    old, new = (x["blocks"]["attention"]["q"]["kernel"] for x in (old, found))
    assert not np.array_equal(old, new)


@pytest.mark.parametrize(("only", "targets"), list(itertools.product([True, False], ["qv", "all"])))
def test_the_planner_knows_what_is_trained(only, targets):
    config = tiny("x", optimizer="lora", rank=3, lora_targets=targets, lora_only=only).resolve()
    shape = config.shape(300)
    params = jax.eval_shape(lambda: initial_params(config, shape))
    trained = sum(x.size for x in jax.tree.leaves(trained_of(params, config.adapter)))
    assert shape.trained_params == trained
    report = galore_optax.memory_report(make_optimizer(config), params)
    assert report.moments == 2 * 4 * trained
    assert estimate(config, 300).moments == report.moments + report.counters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_every": 0}, "merge_every=0: expected at least 1"),
        ({"layerwise": True}, "which optimizer='relora' leaves as they are"),
    ],
)
def test_settings_that_cannot_work_with_relora(settings, message):
    with pytest.raises(UsageError, match=message):
        tiny("x", optimizer="relora", **settings).resolve()


def test_by_default_it_begins_again_four_times():
    config = tiny("x", optimizer="relora", steps=100, rank=None).resolve()
    assert (config.merge_every, config.lora_targets, config.lora_only) == (20, "all", False)
    assert config.rank == 4  # a quarter of the hidden size, as of GaLore
