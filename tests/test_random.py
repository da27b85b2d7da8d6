"""Entries by a hash are as good as independent ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._random import fold_in, uniform


def entries(shape=(200, 300), seed=0, folds=0):
    key = fold_in(jax.random.key(seed), jnp.asarray(folds, jnp.int32))
    return np.asarray(jax.jit(uniform, static_argnums=(1, 2))(key, shape, jnp.float32), np.float64)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_entries_are_uniform_in_the_open_interval(seed):
    found = np.sort(entries(seed=seed).ravel())
    assert np.all(np.abs(found) < 1)
    assert np.all(found != 0)
    # Kolmogorov and Smirnov; by chance beyond this once in 10^5.
    expected = (np.arange(found.size) + 0.5) * 2 / found.size - 1
    assert np.abs(found - expected).max() / 2 < 2.5 / found.size**0.5


@pytest.mark.parametrize(
    "other",
    [
        lambda x: np.roll(x, 1, axis=0),
        lambda x: np.roll(x, 1, axis=1),
        lambda x: np.roll(x, 16, axis=1),
        lambda x: entries(folds=1),
        lambda x: entries(folds=2),
        lambda x: entries(seed=1),
    ],
    ids=["rows", "columns", "far_columns", "next_refresh", "one_more", "seeds"],
)
def test_entries_are_uncorrelated(other):
    x = entries()
    for power in (1, 2):
        both = [y**power - np.mean(y**power) for y in (x, other(x))]
        correlation = np.sum(both[0] * both[1]) / np.sum(both[0] ** 2)
        assert abs(correlation) < 5 / x.size**0.5


def test_matrix_has_the_singular_values_of_independent_entries():
    values = np.linalg.svd(entries((512, 256)), compute_uv=False)
    # Marchenko and Pastur, of variance 1/3.
    edges = (np.array([1, -1]) * 256**0.5 + 512**0.5) / 3**0.5
    np.testing.assert_allclose(values[[0, -1]], edges, rtol=0.05)


def test_entries_are_the_published_hash_of_place_and_key():
    def hashed(x):
        for shift, multiplier in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * multiplier % 2**32
        return x ^ x >> 16

    first, second = (int(word) for word in jax.random.key_data(jax.random.key(7)))
    expected = [
        [(hashed(hashed((3 * i + j) ^ first) ^ second) // 2**9 + 0.5) / 2**22 - 1 for j in range(3)]
        for i in range(2)
    ]
    np.testing.assert_array_equal(uniform(jax.random.key(7), (2, 3), jnp.float32), expected)


def test_traced_seed_chooses_the_same_bases():
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)}

    def update(seed):
        tx = galore_optax.galore(optax.identity(), rank=2, projector="gaussian", seed=seed)
        return tx.update(grads, tx.init(grads))[0]["kernel"]

    np.testing.assert_allclose(jax.jit(update)(3), jax.jit(lambda: update(3))(), rtol=1e-6)
    assert np.abs(update(3) - update(4)).max() > 0.1
