"""Weights in integer codes: selection, gradients, and updates smaller than a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import (
    DimensionNumbers,
    QuantizedArray,
    apply_updates,
    dequantize_params,
    galore_adamw,
    quantize,
    quantize_params,
    value_and_grad,
)


def normal(*shape, seed=0, scale=1.0):
    values = scale * np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values.astype(np.float32))


def is_quantized(x):
    return isinstance(x, QuantizedArray)


def params_of_a_model():
    return {
        "embed": normal(50, 64),
        "layers": {"kernel": normal(3, 64, 96, scale=0.1), "bias": np.zeros((3, 96), np.float32)},
        "out": normal(96, 64, scale=0.1, seed=1),
        "small": normal(64, 4),
    }


SELECTION = {"rank": 8, "weight_dimension_numbers": DimensionNumbers(-2, -1)}


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 1.04), ("int4", 0.54)])
def test_the_leaves_that_galore_projects_are_quantized(scheme, bound):
    params = params_of_a_model()
    quantized = quantize_params(params, scheme=scheme, **SELECTION)
    state = jax.eval_shape(galore_adamw(0.1, **SELECTION).init, params)
    projected = jax.tree.map(
        lambda left, right: (
            not (isinstance(left, optax.MaskedNode) and isinstance(right, optax.MaskedNode))
        ),
        state.subspace.left,
        state.subspace.right,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert jax.tree.map(is_quantized, quantized, is_leaf=is_quantized) == projected
    assert sum(map(is_quantized, jax.tree.leaves(quantized, is_leaf=is_quantized))) == 2
    kernel = quantized["layers"]["kernel"]
    assert kernel.nbytes / kernel.size <= bound
    assert kernel.codes.shape[0] == 3
    back = dequantize_params(quantized)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, params)
    step = float(jnp.max(kernel.scales))
    np.testing.assert_allclose(
        back["layers"]["kernel"], params["layers"]["kernel"], rtol=0, atol=0.51 * step
    )
    shapes = dequantize_params(jax.eval_shape(lambda: quantized))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params)


def test_rounding_at_random_differs_by_key_and_leaf():
    params = {"a": normal(64, 64), "b": normal(64, 64)}
    one, other = (quantize_params(params, rank=8, key=jax.random.key(i)) for i in (0, 1))
    assert not np.array_equal(one["a"].codes, other["a"].codes)
    assert not np.array_equal(one["a"].codes, one["b"].codes)
    same = {name: one["a"] for name in one}
    half = optax.tree.full_like(params, 0.5 * float(one["a"].scales.ravel()[0]))
    moved, again = (apply_updates(same, half, jax.random.key(i)) for i in (0, 1))
    assert not np.array_equal(moved["a"].codes, again["a"].codes)
    assert not np.array_equal(moved["a"].codes, moved["b"].codes)


def loss(params, x, checkpoint=True):
    def body(x, layer):
        layer = dequantize_params(layer)
        return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

    body = jax.checkpoint(body) if checkpoint else body
    x, _ = jax.lax.scan(body, x, params["layers"])
    return jnp.sum((x @ params["out"]) ** 2)


def square_model(size, layers):
    return {
        "layers": {
            "kernel": normal(layers, size, size, scale=0.05),
            "bias": jnp.zeros((layers, size)),
        },
        "out": normal(size, 64, scale=0.1, seed=1),
    }


def test_gradients_are_those_of_the_dequantized_weights():
    quantized = quantize_params(square_model(96, 3), **SELECTION)
    x = normal(5, 96, seed=2)
    value, gradients = jax.jit(value_and_grad(loss))(quantized, x)
    dense = dequantize_params(quantized)
    expected_value, expected = jax.jit(jax.value_and_grad(loss))(dense, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients, dense)


def test_gradients_are_finite_differences_of_the_weight():
    quantized = quantize(normal(16, 32))

    def function(params):
        return jnp.sum(jnp.sin(params["w"].dequantize()))

    _, gradients = value_and_grad(function)({"w": quantized})
    dense, step = np.asarray(quantized.dequantize(), np.float64), 1e-4
    difference = (np.sin(dense + step) - np.sin(dense - step)) / (2 * step)
    np.testing.assert_allclose(gradients["w"], difference, rtol=1e-4, atol=1e-6)


def test_auxiliary_data_and_further_arguments_pass_through():
    quantized = {"w": quantize(normal(8, 32))}

    def function(params, x, *, factor):
        y = factor * x @ params["w"]
        return jnp.sum(y), (params["w"].shape, y)

    x = normal(3, 8)
    shapes = []

    @jax.jit
    def differentiate(quantized, x):
        (value, (shape, y)), gradients = value_and_grad(function, has_aux=True)(
            quantized, x, factor=2
        )
        shapes.append(shape)
        return value, y, gradients

    value, y, gradients = differentiate(quantized, x)
    np.testing.assert_allclose(value, np.sum(y), rtol=1e-5)
    assert shapes == [(8, 32)]
    np.testing.assert_allclose(gradients["w"], 2 * np.sum(x, 0)[:, None] * np.ones(32), rtol=1e-5)


def test_one_layer_at_a_time_is_dequantized():
    """A second copy of the stacked weights would take 8 layers; the workspace is less than 3."""
    size, layers = 256, 8
    quantized = quantize_params(square_model(size, layers), **SELECTION)
    x = normal(4, size)
    compiled = jax.jit(value_and_grad(loss)).lower(quantized, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * size * size
    dense = jax.jit(value_and_grad(lambda p, x: loss(dequantize_params(p), x)))
    dense = dense.lower(quantized, x).compile()
    assert dense.memory_analysis().temp_size_in_bytes > layers * 4 * size * size


STEPS = 1000


@functools.partial(jax.jit, static_argnames=("scheme", "rounding"))
def drift(weights, fraction, scheme, rounding):
    """By how many steps of the first scale weights move in 1000 updates of a part of it."""
    start = quantize(weights, scheme)
    updates = jnp.full(weights.shape, fraction * start.scales[0])

    def step(quantized, i):
        key = jax.random.fold_in(jax.random.key(3), i) if rounding == "stochastic" else None
        return apply_updates(quantized, updates, key), None

    end, _ = jax.lax.scan(step, start, jnp.arange(STEPS))
    return (end.dequantize() - start.dequantize()) / start.scales[0]


GROUPS = {
    "mixed": np.linspace(-1, 1, 256),
    "positive": np.linspace(1, 2, 256),
    "negative": np.linspace(-2, -1, 256),
    "constant": np.full(256, 0.5),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("group", GROUPS)
def test_updates_of_a_fiftieth_of_a_step_add_up(group, sign):
    weights = jnp.asarray(GROUPS[group], jnp.float32)
    moved = drift(weights, sign / 50, "int8", "stochastic")
    np.testing.assert_allclose(jnp.mean(moved), sign * STEPS / 50, atol=1.5)
    nearest = drift(weights, sign / 50, "int8", "nearest")
    np.testing.assert_allclose(jnp.mean(nearest), 0, atol=0.05)  # a new scale moves all a little


def test_the_extremes_of_a_group_move_too():
    """Over 128 groups, the least and the greatest weight of each on their own."""
    weights = normal(128, 256)
    start = quantize(weights, batch_axes=1)
    updates = jnp.broadcast_to(start.scales / 50, weights.shape)

    @jax.jit
    def run(quantized):
        def step(quantized, i):
            return apply_updates(quantized, updates, jax.random.fold_in(jax.random.key(0), i)), None

        return jax.lax.scan(step, quantized, jnp.arange(200))[0]

    moved = np.asarray((run(start).dequantize() - start.dequantize()) / start.scales)
    for extreme in (np.argmin(weights, 1), np.argmax(weights, 1)):
        of_each = moved[np.arange(128), extreme]
        assert abs(of_each.mean() - 4) <= 4 * of_each.std() / np.sqrt(128)
        assert of_each.std() < 5


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_what_is_not_updated_does_not_move(scheme):
    params = {"w": quantize(normal(64, 256), scheme)}
    updates = {"w": np.zeros((64, 256), np.float32)}
    updates["w"][0, :5] = 1e-3
    new = apply_updates(params, updates, jax.random.key(0))
    codes, old = np.asarray(new["w"].codes), np.asarray(params["w"].codes)
    np.testing.assert_array_equal(codes[1:], old[1:])
    np.testing.assert_array_equal(new["w"].scales, params["w"].scales)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("factor", [0.0, 0.1, 5.0], ids=["to_zero", "shrinks", "grows"])
def test_large_updates_choose_a_new_scale(scheme, factor):
    old, wanted = normal(4, 256), np.float32(factor) * np.asarray(normal(4, 256, seed=1))
    new, step = replaced(old, wanted, jax.random.key(0), scheme)
    assert np.all(np.abs(np.asarray(new) - wanted) <= 1.001 * np.asarray(step) + 1e-6)


@functools.partial(jax.jit, static_argnames="scheme")
def replaced(old, wanted, key, scheme):
    """Weights after the update that would make them the wanted ones, and the step of these."""
    params = quantize(old, scheme)
    new = apply_updates(params, wanted - params.dequantize(), key)
    return new.dequantize(), quantize(wanted, scheme).scales


def test_bfloat16_leaves_do_not_lose_small_updates_on_request():
    params = {"w": np.ones(4096, jnp.bfloat16), "norm": np.ones(3, np.float32)}
    updates = {"w": np.full(4096, 2.0**-12, np.float32), "norm": np.full(3, 0.5, np.float32)}
    params, updates = jax.tree.map(jnp.asarray, (params, updates))
    nearest = apply_updates(params, updates, jax.random.key(0))
    chex.assert_trees_all_equal(nearest, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal(nearest["w"], params["w"])
    apply = jax.jit(functools.partial(apply_updates, round_bfloat16=True))
    rounded = apply(params, updates, jax.random.key(0))
    assert rounded["w"].dtype == jnp.bfloat16
    moved = np.asarray(rounded["w"], np.float64) - 1
    assert abs(moved.mean() - 2.0**-12) <= 4 * moved.std() / np.sqrt(4096)
    assert rounded["norm"].dtype == jnp.float32
    np.testing.assert_array_equal(rounded["norm"], 1.5)


def test_none_leaves_parameters_as_they_are():
    params = {"a": quantize(normal(2, 64)), "b": jnp.ones(2), "c": None}
    new = apply_updates(params, {"a": None, "b": None, "c": None}, jax.random.key(0))
    chex.assert_trees_all_equal(new, params)


@pytest.mark.parametrize(
    "make", [galore_optax.adamw_8bit, lambda lr: galore_optax.low_bit(optax.sgd(3000 * lr, 0.9))]
)
def test_quantized_weights_are_trained(make):
    """With a step that is small beside the weights' own, in a jitted step that donates them."""
    target = normal(64, 128, seed=5, scale=0.1)
    params = {"w": quantize(jnp.zeros((64, 128)) + normal(64, 128, scale=0.1)), "b": jnp.zeros(128)}
    tx, x = make(3e-3), normal(256, 64, seed=6)

    def function(params):
        return jnp.mean((x @ params["w"] + params["b"] - x @ target) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, key):
        value, gradients = value_and_grad(function)(params)
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates, key), state, value

    state, losses = jax.jit(tx.init)(params), []
    for i in range(100):
        params, state, value = step(params, state, jax.random.key(i))
        losses.append(float(value))
    assert losses[-1] < 0.2 * losses[0]
    assert step._cache_size() == 1


QUANTIZED = {"dense": {"w": quantize(np.ones((4, 64), np.float32))}}


@pytest.mark.parametrize(
    ("params", "updates", "message"),
    [
        (
            QUANTIZED,
            {"dense": {"w": np.ones((64, 4), np.float32)}},
            r"dense/w.*\(4, 64\).*\(64, 4\)",
        ),
        (QUANTIZED, QUANTIZED, r"dense/w .*got QuantizedArray.*value_and_grad"),
        (QUANTIZED, {"dense": {}}, "updates must have the structure of params"),
        (
            {"dense": {"w": quantize(np.ones((4, 64), np.float32), "signed")}},
            {"dense": {"w": np.ones((4, 64), np.float32)}},
            "dense/w is in signed codes.*'int8' or 'int4'",
        ),
    ],
)
def test_updates_that_do_not_fit_name_the_leaf(params, updates, message):
    with pytest.raises(ValueError, match=message):
        apply_updates(params, updates, jax.random.key(0))


def test_other_arguments_that_cannot_be_right():
    with pytest.raises(ValueError, match="round_bfloat16=True needs a key"):
        apply_updates({}, {}, None, round_bfloat16=True)
    with pytest.raises(ValueError, match="scheme must be one of int8, int4; got 'signed'"):
        quantize_params({"w": np.ones((64, 64), np.float32)}, rank=8, scheme="signed")
    with pytest.raises(ValueError, match=r"'w' of shape \(64, 64, 3\) has a batch axis last"):
        quantize_params(
            {"w": np.ones((64, 64, 3), np.float32)},
            rank=8,
            weight_dimension_numbers=DimensionNumbers(0, 1),
        )


@pytest.mark.parametrize(
    "make",
    [
        optax.adamw,
        optax.lion,
        lambda lr: optax.sgd(lr, momentum=0.9),
        lambda lr: optax.chain(galore_adamw(lr, rank=2), optax.add_decayed_weights(lr)),
    ],
    ids=["adamw", "lion", "momentum", "decay_after_galore"],
)
def test_an_optimizer_that_cannot_update_quantized_leaves_says_which_can(make):
    tx, grads = make(0.1), dequantize_params(QUANTIZED)
    state = jax.eval_shape(tx.init, QUANTIZED)
    message = r"times a QuantizedArray of shape \(4, 64\).*galore, low_bit and the presets"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(tx.update, grads, state, QUANTIZED)


def apply_multi_steps(params, updates):
    tx = optax.MultiSteps(galore_adamw(0.1, rank=2), 2)
    tx.update(updates, tx.init(params), params)


@pytest.mark.parametrize("apply", [optax.apply_updates, apply_multi_steps])
@pytest.mark.since(jax="0.10")
def test_functions_of_optax_that_match_trees_name_the_leaf(apply):
    with pytest.raises(ValueError, match=r"\['dense'\]\['w'\](.|\n)*QuantizedArray"):
        apply(QUANTIZED, dequantize_params(QUANTIZED))


def test_jax_grad_refuses_quantized_leaves():
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        jax.grad(lambda params: jnp.sum(params["dense"]["w"].dequantize()))(QUANTIZED)


@pytest.mark.parametrize("tx", [galore_adamw(0.1, rank=2), galore_optax.adamw_8bit(0.1)])
def test_gradients_in_codes_are_refused_with_the_leaf(tx):
    message = r"gradient of 'dense/w' must .* \(4, 64\); got a QuantizedArray.*value_and_grad"
    state = jax.jit(tx.init)(QUANTIZED)
    with pytest.raises(TypeError, match=message):
        tx.update(QUANTIZED, state, QUANTIZED)
    gradients = jax.grad(lambda params: jnp.sum(params["dense"]["w"].dequantize()), allow_int=True)(
        QUANTIZED
    )
    with pytest.raises(TypeError, match=message):
        tx.update(gradients, state, QUANTIZED)


@pytest.mark.parametrize("factor", [jnp.float32(2), 2 * jnp.ones((4, 64))])
def test_arrays_of_jax_multiply_quantized_ones(factor):
    quantized = quantize(normal(4, 64))
    for product in (factor * quantized, quantized * factor):
        np.testing.assert_allclose(product, 2 * np.asarray(quantized.dequantize()))


def test_shapes_are_quantized_like_arrays():
    params = {"kernel": jnp.ones((256, 512)), "bias": jnp.zeros(512)}
    shapes = jax.eval_shape(lambda: params)
    found = galore_optax.quantize_params(shapes, rank=8)
    expected = jax.eval_shape(lambda: galore_optax.quantize_params(params, rank=8))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [x.shape for x in jax.tree.leaves(found)] == [x.shape for x in jax.tree.leaves(expected)]


def test_a_tree_without_matrices_is_worth_a_warning():
    with pytest.warns(UserWarning, match=r"quantizes nothing.*blocks \(3, 32, 64\).*numbers"):
        galore_optax.quantize_params({"blocks": jnp.ones((3, 32, 64))}, rank=8)
