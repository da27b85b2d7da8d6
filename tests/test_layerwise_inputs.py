"""What is kept of the inputs of layers: the numbers stay, or are those at the rounded inputs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from tests import layerwise_model as model


def trained(params, steps=2, micro_batches=1, **arguments):
    """Parameters and losses of some steps of momentum."""
    tx = optax.sgd(0.1, momentum=0.9)
    training = model.layerwise(tx, micro_batches=micro_batches, **arguments)
    tokens = model.batches(steps, micro_batches)
    params, _, metrics = model.train(training.step, params, training.init(params), tokens)
    return params, metrics


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs_every": 2},
        {"inputs_every": 3, "micro_batches": 2, "clip_norm": 0.1},
        pytest.param(
            {"inputs_memory": "pinned_host", "inputs_every": 6}, marks=pytest.mark.since(jax="0.8")
        ),
    ],
    ids=["of every second", "of micro-batches", "in the host's memory"],
)
def test_where_and_of_which_layers_inputs_are_kept_changes_no_number(arguments):
    kept = {name: value for name, value in arguments.items() if name.startswith("inputs")}
    more = {name: value for name, value in arguments.items() if name not in kept}
    with jax.enable_x64(True):
        params = model.init(layers=6)
        found, metrics = trained(params, **kept, **more)
        expected, of_all = trained(params, **more)
        assert metrics == [pytest.approx(step, rel=1e-9) for step in of_all]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)


@pytest.mark.since(jax="0.8")
def test_inputs_in_the_hosts_memory_are_put_there_and_taken_from_there():
    training = model.layerwise(optax.sgd(0.1), inputs_memory="pinned_host", inputs_dtype="int8")
    params, (tokens,) = model.init(jnp.float32), model.batches(1)
    arguments = params, jax.eval_shape(training.init, params), tokens, None
    # What is compiled for a CPU has one memory only.
    lowered = jax.jit(training.step).trace(*arguments).lower(lowering_platforms=("cuda",))
    places = set(re.findall(r'_xla_buffer_placement = "(\w+)"', lowered.as_text()))
    assert places == {"pinned_host", "device"}


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float8_e4m3"])
def test_gradients_are_those_at_the_rounded_inputs(dtype):
    params, (tokens,) = model.init(jnp.float32, layers=2), model.batches(1)
    rest = {name: x for name, x in params.items() if name != "blocks"}
    layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(2)]

    def rounded(x):
        if dtype == "bfloat16":
            return x.astype(dtype).astype(x.dtype)
        return galore_optax.quantize(x, dtype, batch_axes=2).dequantize()

    first, of_embed = jax.vjp(lambda rest: model.embed(rest, tokens), rest)
    second = model.block(layers[0], first)
    last = model.block(layers[1], second)
    _, of_head = jax.vjp(lambda rest, x: model.head_loss(rest, x, tokens), rest, last)
    by_head, dx = of_head(jnp.ones(()))
    by_layer = [None, None]
    for i, x in ((1, second), (0, first)):
        by_layer[i], dx = jax.vjp(model.block, layers[i], rounded(x))[1](dx)
    (by_embed,) = of_embed(dx)
    gradients = jax.tree.map(jnp.add, by_head, by_embed)
    gradients["blocks"] = jax.tree.map(lambda *g: jnp.stack(g), *by_layer)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    training = model.layerwise(optax.sgd(0.1), inputs_dtype=dtype)
    found, *_ = jax.jit(training.step)(params, training.init(params), tokens, None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, expected
    )
    exact, _ = trained(params, steps=1)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), exact, found)))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("arguments", "part"),
    # Of a group all inputs are there at once.
    [({"inputs_dtype": "int8"}, 0.27), ({"inputs_every": 4}, 0.25 + 0.25)],
    ids=["in 8 bits", "of every fourth"],
)
def test_the_inputs_take_as_much_less_memory_as_they_should(arguments, part):
    layers, d, tokens = 16, 512, jnp.zeros((4, 128), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jnp.float32, layers=layers, d=d, f=8))

    def temporaries(**arguments):
        training = model.layerwise(optax.sgd(0.1), **arguments)
        step = jax.jit(training.step, donate_argnums=(0, 1))
        state = jax.eval_shape(training.init, params)
        plan = step.lower(params, state, tokens, None).compile().memory_analysis()
        return plan.temp_size_in_bytes

    whole = layers * tokens.size * d * 4
    working = temporaries() - whole
    assert temporaries(**arguments) - working < (part + 0.1) * whole


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs_every": 0}, ValueError, "inputs_every must be at least 1; got 0"),
        ({"inputs_every": 2.0}, TypeError, "inputs_every must be a positive int; got 2.0"),
        ({"inputs_every": 2}, ValueError, "must divide the number of layers, 3; got 2"),
        (
            {"inputs_memory": "disk"},
            ValueError,
            "must be one of 'device', 'pinned_host'; got 'disk'",
        ),
        ({"inputs_dtype": "unsigned"}, ValueError, "inputs_dtype must be one of .*got 'unsigned'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_computed(arguments, error, message):
    with pytest.raises(error, match=message):
        model.layerwise(optax.sgd(0.1), **arguments).init(model.init(jnp.float32))
