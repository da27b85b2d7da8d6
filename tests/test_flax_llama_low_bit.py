"""Runs whose weights and state are in few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_llama_runs import tiny, write_text

import galore_optax
from examples.flax_llama import sharding, step
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.loading import load_run
from examples.flax_llama.model import Llama, is_quantized
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.step import initial_params
from examples.flax_llama.train import any_batch, from_command_line, train

WIDE = {"hidden": 64, "intermediate": 176, "rank": 16}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("q_galore") / "run"
    settings = {"optimizer": "q_galore_adamw", "steps": 20, "accumulate": 2, "eval_every": 20}
    return train(tiny(text, out=out, **settings)), out


def test_q_galore_is_lazy_with_int8_weights_at_its_own_rate_unless_told_otherwise():
    config = Config(preset="60m", optimizer="q_galore_adamw").resolve()
    assert (config.lr, config.refresh, config.int8_weights) == (0.015, "lazy", True)
    told = {"lr": 0.02, "refresh": "periodic", "int8_weights": False}
    config = Config(preset="60m", optimizer="q_galore_adamw", **told).resolve()
    assert (config.lr, config.refresh, config.int8_weights) == (0.02, "periodic", False)
    config = Config(preset="60m").resolve()
    assert (config.lr, config.refresh, config.int8_weights) == (0.01, "periodic", False)


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw", "fira_adamw"])
def test_moments_in_bfloat16_take_two_bytes(optimizer):
    def moments(**settings):
        config = Config(preset="9m", optimizer=optimizer, **settings).resolve()
        params = jax.eval_shape(lambda: initial_params(config, config.shape(300)))
        state = jax.eval_shape(make_optimizer(config).init, params)
        found = [*jax.tree.leaves(optax.tree.get(state, "mu"))]
        return found + jax.tree.leaves(optax.tree.get(state, "nu"))

    half, whole = moments(moment_dtype="bfloat16"), moments()
    assert {x.dtype for x in half} == {jnp.dtype("bfloat16")}
    assert [x.shape for x in half] == [x.shape for x in whole]
    assert {x.dtype for x in whole} == {jnp.dtype("float32")}


@pytest.mark.parametrize("optimizer", ["sgd", "galore_adamw_8bit", "flora"])
def test_moments_in_bfloat16_are_those_of_adamw(optimizer):
    message = (
        rf"with optimizer='{optimizer}', only with adamw, lora, relora, low_rank, galore_adamw, "
    )
    with pytest.raises(UsageError, match=rf"moment_dtype='bfloat16' has no effect {message}"):
        from_command_line(["--optimizer", optimizer, "--moment-dtype", "bfloat16"])
    with pytest.raises(UsageError, match="moment_dtype='float16': expected one of bfloat16"):
        Config(moment_dtype="float16").resolve()


def test_weights_moments_and_projectors_are_in_few_bits():
    config = Config(preset="9m", optimizer="q_galore_adamw").resolve()
    shape = config.shape(2048)
    params = jax.eval_shape(lambda: initial_params(config, shape))
    kernels = jax.tree.leaves(params["blocks"]["mlp"], is_leaf=is_quantized)
    assert [kernel.scheme for kernel in kernels] == ["int8"] * 3
    assert not is_quantized(params["embed"]["embedding"])
    report = galore_optax.memory_report(make_optimizer(config), params)
    matrices = 4 * (4 * 128**2 + 3 * 128 * 352)
    dense = 2 * 2048 * 128 + 9 * 128
    assert report.parameters == pytest.approx(1.0195 * matrices + 4 * dense, rel=1e-3)
    projectors = 4 * 7 * 128 * 32
    assert report.projectors == pytest.approx(0.5195 * projectors, rel=1e-3)
    moments = 2 * 4 * (4 * 128 + 3 * 352) * 32
    assert report.moments == pytest.approx(
        1.0156 * (moments + 2 * 2 * 2048 * 128) + 2 * 4 * 9 * 128, rel=1e-3
    )


def test_a_q_galore_run_learns_and_its_model_is_that_of_its_checkpoint(run):
    result, out = run
    losses = [record["loss"] for record in result.train]
    assert np.mean(losses[-5:]) < losses[0] - 1
    assert result.valid[-1]["valid_loss"] < losses[0] - 1
    model, _ = load_run(out)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(result.model))
    # At most 255 values in a block of 256.
    block = np.asarray(model.blocks.mlp.up.kernel[...][0]).ravel()[:256]
    assert len(np.unique(block)) < 256


def test_forward_dequantizes_the_weights_where_it_uses_them():
    config = tiny("austen", optimizer="q_galore_adamw").resolve()
    shape = config.shape(50)
    params = initial_params(config, shape)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    tokens = jnp.arange(40).reshape(2, 20)

    def logits(params):
        return nnx.merge(graphdef, params)(tokens)

    def with_gradients(value_and_grad):
        return jax.jit(lambda p: (logits(p), value_and_grad(lambda p: logits(p).std())(p)[1]))

    found, gradients = with_gradients(galore_optax.value_and_grad)(params)
    dense = galore_optax.dequantize_params(params)
    expected, expected_gradients = with_gradients(jax.value_and_grad)(dense)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        gradients,
        expected_gradients,
    )


def test_bfloat16_parameters_rounded_at_random_move_by_updates_too_small_for_the_nearest(
    monkeypatch,
):
    def all_ones(params, _):
        return 0.0, jax.tree.map(jnp.ones_like, params)

    monkeypatch.setattr(step, "make_gradients", lambda *_, **__: all_ones)
    # Two of them, clipped, are updates of some 1e-6.
    settings = {"optimizer": "sgd", "lr": 1e-2, "clip": 1e-2, "param_dtype": "bfloat16"}
    mesh = sharding.make_mesh()

    def moved(stochastic_rounding):
        config = tiny("austen", **settings, stochastic_rounding=stochastic_rounding).resolve()
        optimizer = make_optimizer(config)
        params = initial_params(config, config.shape(257))
        start = np.array(params["head"]["kernel"])
        state = step.State(params, jax.jit(optimizer.init)(params))
        update = step.make_update(config, None, optimizer, mesh)
        for _ in range(2):
            batch = step.put_batch(any_batch(config), 1, mesh)
            state, _ = update(jax.device_put(state, sharding.replicated(mesh)), batch)
        # Entries whose neighbours in bfloat16 are 1e-4 away, far beyond all updates together.
        end = np.array(state.params["head"]["kernel"])
        return np.sum((end != start) & (np.abs(start.astype(np.float32)) > 0.016))

    assert moved(True) > 0
    assert moved(False) == 0


@pytest.mark.ci
@pytest.mark.long("two runs, of a model whose moments are large enough for codes")
def test_adamw_with_8_bit_state_ends_within_1_percent_of_float32_state():
    settings = {"steps": 60, "lr": 0.01, "eval_tokens": 4000} | WIDE
    losses = {
        name: train(tiny("austen", optimizer=name, **settings)).valid[-1]["valid_loss"]
        for name in ("adamw", "adamw_8bit")
    }
    assert losses["adamw"] < 0.7 * np.log(256)
    assert losses["adamw_8bit"] != losses["adamw"]
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.01)


def test_adamw_with_8_bit_state_takes_a_quarter_of_float32_state():
    config = tiny("austen", optimizer="adamw_8bit", **WIDE).resolve()
    params = jax.eval_shape(lambda: initial_params(config, config.shape(256)))
    report = galore_optax.memory_report(make_optimizer(config), params)
    assert report.moments < 2 * 1.04 * report.parameters / 4  # of float32
