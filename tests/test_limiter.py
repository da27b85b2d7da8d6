"""The limiter of the growth of norms, alone, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_family import SMALL, Limiter

from galore_optax import limit_norm_growth

STEPS = 40


def updates_of(shape, seed=0, sigma=1.0):
    """Updates whose norms jump up and down."""
    rng = np.random.default_rng(seed)
    return np.exp(sigma * rng.normal(size=(STEPS, *[1] * len(shape)))) * rng.normal(
        size=(STEPS, *shape)
    )


def limited(tx, updates):
    """The updates of all steps that a transformation lets through, and its states."""
    update, state, found = jax.jit(tx.update), tx.init(jax.tree.map(lambda x: x[0], updates)), []
    for step in range(len(jax.tree.leaves(updates)[0])):
        through, state = update(jax.tree.map(lambda x, i=step: x[i], updates), state)
        found.append((through, state.norms))
    return jax.tree.map(lambda *x: np.stack(x), *found)


@pytest.mark.parametrize("gamma", [1.0, 1.01, 1.5])
@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (2, 3, 4)])
def test_every_step_is_that_of_numpy(shape, gamma):
    updates = updates_of(shape)
    with jax.enable_x64(True):
        found, norms = limited(limit_norm_growth(gamma), jnp.asarray(updates))
    expected = map(Limiter(gamma), updates)
    np.testing.assert_allclose(found, np.stack([*expected]), rtol=1e-12)
    np.testing.assert_allclose(norms, np.linalg.norm(found.reshape(STEPS, -1), axis=1), rtol=1e-12)
    assert np.all(norms[1:] <= gamma * (norms[:-1] + SMALL) * (1 + 1e-12))


def test_each_matrix_of_a_stack_has_a_memory_of_its_own():
    shapes = {"layers": (3, 4, 5), "grid": (2, 2, 4, 5), "alone": (4, 5)}
    updates = {name: updates_of(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    updates["layers"] *= np.exp(np.random.default_rng(9).normal(size=(STEPS, 3, 1, 1)))
    asked = []

    def stacked(path, shape):
        asked.append((path, shape))
        return len(shape) - 2

    with jax.enable_x64(True):
        found, norms = limited(
            limit_norm_growth(1.01, stacked=stacked), jax.tree.map(jnp.asarray, updates)
        )
    assert set(asked) == set(shapes.items())
    for name, shape in shapes.items():
        flat = updates[name].reshape(STEPS, -1, 4, 5)
        expected = [np.stack([*map(Limiter(1.01), flat[:, k])]) for k in range(flat.shape[1])]
        expected = np.stack(expected, axis=1).reshape(STEPS, *shape)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)
        assert norms[name].shape == (STEPS, *shape[:-2])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_what_is_zero_or_not_finite_is_let_through_and_not_remembered(value):
    updates = np.ones((5, 3, 4), np.float32)
    updates[0] = updates[2] = value
    updates[3:] = 10
    found, norms = limited(limit_norm_growth(1.5), jnp.asarray(updates))
    np.testing.assert_array_equal(found[[0, 2]], updates[[0, 2]])
    one = np.linalg.norm(updates[1])
    np.testing.assert_allclose(norms, [0, one, one, 1.5 * one, 1.5**2 * one], rtol=1e-6)
    np.testing.assert_allclose(found[1:, 0, 0], [1, value, 1.5, 1.5**2], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30, 3e38])
def test_squares_of_large_and_small_entries_do_not_count(size):
    updates = size * np.array([0.1, 0.2, 1.0], np.float32)[:, None] * np.ones(4, np.float32)
    found, norms = limited(limit_norm_growth(1.25), jnp.asarray(updates))
    assert np.all(np.isfinite(found))
    if size < 1e38:
        np.testing.assert_allclose(norms[0], 0.2 * size, rtol=1e-6)
    if 1e-8 < size < 1e38:
        np.testing.assert_allclose(found[:, 0], size * np.array([0.1, 0.125, 0.15625]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_dtype_and_norms_are_in_float32(dtype):
    updates = jnp.asarray(updates_of((4, 6)), dtype)
    found, norms = limited(limit_norm_growth(), updates)
    assert found.dtype == dtype
    assert norms.dtype == np.float32
    expected = np.stack([*map(Limiter(1.01), np.asarray(updates, np.float64))])
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float64(found), expected, rtol=tolerance, atol=1e-6)


def test_long_growth_of_bfloat16_is_not_held_up_by_rounding():
    """In whose eight bits a norm that grows by a hundredth would stay what it is."""
    updates = jnp.full((500, 4), 100.0, jnp.bfloat16).at[0].set(1)
    found, _ = limited(limit_norm_growth(), updates)
    assert np.all(found[-1] == 100)
    assert np.sum(np.float32(found[:, 0]) < 100) == np.ceil(np.log(100) / np.log(1.01))


@pytest.mark.parametrize(
    ("gamma", "error", "says"),
    [
        (0.99, ValueError, r"gamma must be a finite number of at least 1; got 0\.99"),
        (np.inf, ValueError, "gamma must be a finite number of at least 1; got inf"),
        (np.nan, ValueError, "gamma must be a finite number of at least 1; got nan"),
        ("1.01", TypeError, "gamma must be a number of at least 1; got '1.01'"),
        (True, TypeError, "gamma must be a number of at least 1; got True"),
        (None, TypeError, "gamma must be a number of at least 1; got None"),
    ],
)
def test_gamma(gamma, error, says):
    with pytest.raises(error, match=says):
        limit_norm_growth(gamma)
