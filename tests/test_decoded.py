"""What comes after galore in a preset: with quantized parameters, of stacks, and with schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax


@pytest.mark.parametrize("name", ["apollo_adamw", "flora", "galore_muon"])
def test_decay_after_galore_is_of_what_the_codes_say(name):
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(16, 32)).astype(np.float32), "bias": np.ones(3, "f4")}
    gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype("f4"), params)
    quantized = galore_optax.quantize_params(params, rank=4)
    own = {"min_dim_size_to_factor": 3} if name == "flora" else {}
    tx = getattr(galore_optax, name)(0.1, weight_decay=0.5, rank=4, **own)
    dense = galore_optax.dequantize_params(quantized)
    (found, _), (expected, _) = (
        jax.jit(tx.update)(gradients, jax.jit(tx.init)(p), p) for p in (quantized, dense)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    shapes = jax.eval_shape(lambda: quantized)
    assert jax.tree.structure(tx.init(shapes)) == jax.tree.structure(tx.init(quantized))


@pytest.mark.filterwarnings("ignore:galore projects nothing")
def test_flora_clips_each_layer_of_a_stack_by_itself():
    rng = np.random.default_rng(1)
    # In factors, the second moment of the other one is far from that of each entry.
    layers = [rng.normal(size=(6, 9)).astype(np.float32), np.eye(6, 9, dtype=np.float32)]
    # Without random bases, and with a clipping that acts.
    given = {"rank": 3, "projector": "svd", "clipping_threshold": 0.1}
    given |= {"min_dim_size_to_factor": 3}

    def first_update(kernel, **settings):
        tx = galore_optax.flora(0.1, **given, **settings)
        params = {"layers": jnp.zeros_like(kernel)}
        return tx.update({"layers": kernel}, tx.init(params), params)[0]["layers"]

    stack, numbers = np.stack(layers), galore_optax.DimensionNumbers(-2, -1)
    for settings, of_stack in (
        # Matrices are told by their dimension numbers, and all else by `stacked`.
        ({"weight_dimension_numbers": numbers}, {}),
        ({"exclude": "layers"}, {"stacked": lambda path, shape: 1}),
    ):
        expected = np.stack([first_update(layer, **settings) for layer in layers])
        found = first_update(stack, **settings, **of_stack)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(first_update(stack, exclude="layers"), expected, rtol=0.01)


@pytest.mark.parametrize("first", [0.0, 1e-3])
def test_moments_that_are_reset_go_with_a_learning_rate_that_changes(first):
    params, schedule = {"kernel": jnp.ones((8, 16))}, optax.linear_schedule(first, 2e-3, 9)
    galore_optax.grass_adamw(schedule, rank=4).init(params)
    if first:  # at a rate of zero there is nothing to be seen
        with pytest.raises(ValueError, match="would not make the inner transformation begin anew"):
            galore_optax.galore(optax.adamw(schedule), rank=4, transport="reset")


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_the_second_moment_of_flora_is_in_float32(dtype):
    """Its epsilon of 1e-30 is zero in float16."""
    params = {"kernel": jnp.ones((8, 16), dtype)}
    tx = galore_optax.flora(0.1, rank=4, weight_decay=0.1)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim > 1} == {jnp.dtype(jnp.float32)}
    gradient = {"kernel": jnp.zeros((8, 16), dtype)}
    for _ in range(2):
        updates, state = tx.update(gradient, state, params)
    assert updates["kernel"].dtype == dtype
    np.testing.assert_allclose(updates["kernel"].astype(np.float32), -0.01, rtol=0.01)
