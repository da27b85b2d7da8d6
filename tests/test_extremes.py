"""Numbers at the ends of what their types hold: nothing is lost, nothing overflows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import _orthonormalize
from galore_optax._directions import cosines

M, N, RANK = 16, 24, 5


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("projector", ["svd", "rows"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_small_updates_of_float16_gradients_are_those_of_float32(projector, side):
    gradient = normal(M, N, dtype=np.float16)
    params = {"kernel": jnp.zeros((M, N))}
    tx = galore_optax.galore(optax.sgd(1e-7), rank=RANK, side=side, projector=projector)
    found, wanted = (
        tx.update({"kernel": jnp.asarray(g)}, tx.init(params), params)[0]["kernel"]
        for g in (gradient, gradient.astype(np.float32))
    )
    assert np.abs(wanted).max() > 1e-8
    np.testing.assert_allclose(found, wanted, atol=1e-2 * np.abs(wanted).max())


def test_low_bit_keeps_small_updates_of_float16_gradients():
    params = jnp.zeros(600)
    tx = galore_optax.low_bit(optax.adamw(1e-9), min_size=0)
    gradient = jnp.asarray(normal(600, dtype=np.float16))
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates, -1e-9 * np.sign(np.float32(gradient)), rtol=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1.0, 1e25, 1e35])
def test_captured_energy_is_that_of_a_gradient_of_any_size(size):
    gradient = normal(M, N)
    tx = galore_optax.galore(optax.sgd(1.0), rank=RANK, diagnostics=True)
    state = tx.init({"kernel": jnp.zeros((M, N))})
    _, state = tx.update({"kernel": jnp.asarray(size * gradient, jnp.float32)}, state)
    values = np.linalg.svd(gradient.astype(np.float64), compute_uv=False) ** 2
    wanted = values[:RANK].sum() / values.sum()
    np.testing.assert_allclose(galore_optax.metrics(state)["captured_energy"], wanted, rtol=1e-5)


@pytest.mark.parametrize(("away", "part"), [(150, -1e-5), (200, 5e-6), (240, 1e-5)])
def test_updates_far_below_a_step_move_as_many_codes_as_they_should(away, part):
    """Of codes far from zero too, where the float32 sum with the update would be another one."""
    count = 2**23
    # Blocks from 0 to 1 with all other numbers on the same code.
    blocks = np.full((count // 256, 256), away / 254, np.float32)
    blocks[:, 0], blocks[:, 1] = 0, 1
    params = galore_optax.quantize(jnp.asarray(blocks))
    scale = float(params.scales.ravel()[0])
    updates = jnp.full(blocks.shape, part * scale)
    moved = galore_optax.apply_updates(params, updates, jax.random.key(1))
    apart = np.asarray(moved.codes).astype(int) - np.asarray(params.codes)
    assert set(np.unique(apart)) <= {0, int(np.sign(part))}
    expected = count * abs(part)
    assert abs(np.abs(apart).sum() - expected) < 4.5 * expected**0.5


@pytest.mark.parametrize("size", [1000, 2**15 + 1, 2**20])
def test_cosines_of_many_rows_are_those_of_float64(size):
    numbers = np.array([0, 1, 2, size // 3, size - 2, size - 1])
    found = np.asarray(cosines(jnp.asarray(numbers, jnp.int32), size, jnp.float32))
    rows = np.unique(np.concatenate([np.arange(50), size - 1 - np.arange(50), [size // 2]]))
    # The angle, in whole periods first, in Python's integers.
    places = np.array([[(2 * int(i) + 1) * int(k) % (4 * size) for k in numbers] for i in rows])
    wanted = np.cos(np.pi * places / (2 * size)) * np.sqrt(2 / size)
    wanted[:, 0] = 1 / np.sqrt(size)
    np.testing.assert_allclose(found[rows], wanted, atol=2e-6 / np.sqrt(size))


def test_cosines_of_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="fewer than 134,217,728 rows; got 134,217,728"):
        jax.eval_shape(lambda k: cosines(k, 2**27, jnp.float32), jnp.zeros(1, jnp.int32))


def test_the_overlap_that_lazy_refresh_decides_by_has_the_highest_precision():
    params = {"kernel": jnp.zeros((M, N))}
    tx = galore_optax.galore(optax.sgd(1.0), rank=RANK, refresh="lazy")
    state = jax.eval_shape(tx.init, params)
    text = jax.jit(lambda g, s: galore_optax.refresh(tx, g, s)).lower(params, state).as_text()
    products = re.findall(r"stablehlo.dot_general.*-> tensor<5x5xf32>", text)
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_moments_that_are_too_small_for_codes_are_wide_and_keep_their_type():
    params = {"large": jnp.ones(8192, jnp.float16), "small": jnp.ones(8, jnp.float16)}
    tx = galore_optax.low_bit(optax.scale_by_adam())
    state = jax.eval_shape(tx.init, params)
    _, later = jax.eval_shape(tx.update, params, state, params)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, later)]
    assert types[0] == types[1]
    assert state.inner.mu["small"].dtype == state.inner.nu["small"].dtype == jnp.float32


def test_columns_become_orthonormal_where_products_are_less_exact_than_expected(monkeypatch):
    """As if a device's Gram matrices were so far off that the first shift is too small for them."""
    m, r = 60, 4
    exact = _orthonormalize._product
    off = 400 * r * np.finfo(np.float32).eps * np.eye(r, dtype=np.float32)

    def product(a, b):
        return exact(a, b) - (off if a.shape == (r, m) else 0)

    monkeypatch.setattr(_orthonormalize, "_product", product)
    basis = np.asarray(_orthonormalize.orthonormalize(jnp.ones((m, r))))
    np.testing.assert_allclose(basis.T @ basis, np.eye(r), atol=1e-3)
