"""Bases of one matrix, their signs, and the products with them."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._matrix import Selection
from galore_optax._subspace import Subspace, project, project_back

SHAPES = [(9, 14), (14, 9), (11, 11)]
RANKS = [1, 5]
SIDES = ["short", "long", "left", "right", "both"]


def matrix_of(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_update(tx, gradient, state=None):
    """The update of a single matrix and the state after it."""
    params = {"kernel": jnp.zeros_like(gradient)}
    state = tx.init(params) if state is None else state
    updates, state = jax.jit(tx.update)({"kernel": gradient}, state, params)
    return updates["kernel"], state


def subspace_of(shape, side, rank):
    """Random orthonormal bases for a stack of matrices."""
    *batch, m, n = shape
    numbers = galore_optax.DimensionNumbers(-2, -1)
    (view,) = Selection(rank, side, None, numbers).views(np.zeros(shape, np.float32))
    rng = np.random.default_rng(0)

    def basis(size, present):
        columns = np.linalg.qr(rng.normal(size=(*batch, size, rank)))[0]
        return jnp.asarray(columns, jnp.float32) if present else optax.MaskedNode()

    return Subspace(basis(m, view.left), basis(n, view.right))


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_has_the_shapes_and_dtype_of_two_bases(shape, rank):
    left, right = galore_optax.svd(jnp.asarray(matrix_of(shape)), rank)
    chex.assert_shape(left, (shape[0], rank))
    chex.assert_shape(right, (shape[1], rank))
    chex.assert_type([left, right], jnp.float32)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_is_orthonormal(shape, rank):
    for basis in map(np.asarray, galore_optax.svd(jnp.asarray(matrix_of(shape)), rank)):
        np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-5)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_svd_leaves_the_smallest_possible_residual(shape, rank):
    # Eckart and Young: no rank-r approximation leaves less than the trailing singular values.
    g = matrix_of(shape).astype(np.float64)
    left, right = (np.asarray(x, np.float64) for x in galore_optax.svd(jnp.asarray(g), rank))
    smallest = np.sum(np.linalg.svd(g, compute_uv=False)[rank:] ** 2)
    for approximation in (left @ (left.T @ g), (g @ right) @ right.T):
        np.testing.assert_allclose(np.sum((g - approximation) ** 2), smallest, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_orders_directions_by_singular_value(shape):
    g = matrix_of(shape)
    left, right = map(np.asarray, galore_optax.svd(jnp.asarray(g), 4))
    values = np.linalg.svd(g.astype(np.float64), compute_uv=False)[:4]
    np.testing.assert_allclose(np.abs(np.diag(left.T @ g @ right)), values, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_first_refresh_makes_the_largest_entry_positive(side):
    gradient = jnp.asarray(matrix_of((9, 14)))
    _, state = one_update(galore_optax.galore(optax.identity(), rank=8, side=side), gradient)
    bases = jax.tree.leaves((state.subspace.left, state.subspace.right))
    assert len(bases) == (2 if side == "both" else 1)
    for basis in bases:
        peaks = np.take_along_axis(basis, np.abs(basis).argmax(axis=0, keepdims=True), axis=0)
        assert np.all(peaks > 0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_later_refreshes_keep_the_direction_of_each_vector(side):
    tx = galore_optax.galore(optax.identity(), rank=6, side=side, update_proj_gap=1)
    gradient = matrix_of((8, 12))
    _, state = one_update(tx, jnp.asarray(gradient))
    for seed in range(1, 6):
        old = jax.tree.leaves((state.subspace.left, state.subspace.right))
        gradient = gradient + 0.5 * matrix_of((8, 12), seed)
        _, state = one_update(tx, jnp.asarray(gradient), state)
        new = jax.tree.leaves((state.subspace.left, state.subspace.right))
        for p_new, p_old in zip(new, old, strict=True):
            assert np.all(np.diag(p_new.T @ p_old) >= 0)
            assert np.abs(p_new - p_old).max() > 1e-3


def test_signs_chosen_by_the_projector_do_not_matter():
    def contrary_svd(matrix, rank):
        left, right = galore_optax.svd(matrix, rank)
        signs = jnp.where(jnp.arange(rank) % 2 == 0, -1.0, 1.0)
        return left * signs, right * signs

    gradients = [jnp.asarray(matrix_of((8, 12), seed)) for seed in range(3)]
    bases = []
    for projector in (galore_optax.svd, contrary_svd):
        tx = galore_optax.galore(
            optax.identity(), rank=5, side="both", update_proj_gap=1, projector=projector
        )
        state = None
        bases.append([])
        for gradient in gradients:
            _, state = one_update(tx, gradient, state)
            bases[-1].append(state.subspace[:2])
    chex.assert_trees_all_close(bases[0], bases[1], atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14), (2, 3, 14, 9)])
def test_project_and_project_back_are_adjoint(shape, side):
    subspace = subspace_of(shape, side, rank=4)
    g = matrix_of(shape, seed=1)
    low_rank = np.asarray(project(jnp.asarray(g), subspace))
    u = matrix_of(low_rank.shape, seed=2)
    back = np.asarray(project_back(jnp.asarray(u), subspace, jnp.float32))
    chex.assert_shape(back, shape)
    axes = (-2, -1)  # an inner product for each matrix of a stack, none may leak into another
    np.testing.assert_allclose(
        np.sum(low_rank * u, axis=axes), np.sum(g * back, axis=axes), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(9, 14), (3, 14, 9)])
def test_projection_is_the_product_with_the_bases(shape, side):
    subspace = subspace_of(shape, side, rank=4)
    g = matrix_of(shape)
    expected = g.astype(np.float64)
    if not isinstance(subspace.left, optax.MaskedNode):
        expected = np.swapaxes(subspace.left, -1, -2) @ expected
    if not isinstance(subspace.right, optax.MaskedNode):
        expected = expected @ np.asarray(subspace.right)
    np.testing.assert_allclose(project(jnp.asarray(g), subspace), expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bfloat16_products_accumulate_in_float32(side):
    shape = (512, 600)
    subspace = subspace_of(shape, side, rank=16)
    g = jnp.asarray(matrix_of(shape), jnp.bfloat16)
    basis = subspace.left if side == "left" else subspace.right
    p = basis.astype(jnp.bfloat16)

    def product(a, b):
        return a.T @ b if side == "left" else b @ a

    # The operands are rounded to bfloat16 in any case; the reference starts from these.
    exact = product(np.asarray(p, np.float64), np.asarray(g, np.float64))
    accumulated_in_bfloat16 = np.asarray(product(p, g), np.float64)
    found = project(g, subspace)
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found, np.float64) - exact).max()
    assert error < 1e-4
    assert error < 0.01 * np.abs(accumulated_in_bfloat16 - exact).max()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_take_operands_in_the_dtype_of_the_gradient(dtype, side):
    subspace = subspace_of((9, 14), side, rank=4)
    g = jnp.zeros((9, 14), dtype)

    def there_and_back(g, subspace):
        return project_back(project(g, subspace), subspace, g.dtype)

    module = jax.jit(there_and_back).lower(g, subspace).as_text()
    products = re.findall(r"stablehlo\.dot_general .*: \((.*), (.*)\) -> (.*)", module)
    assert len(products) == (4 if side == "both" else 2)
    operand = {jnp.bfloat16: "bf16", jnp.float32: "f32"}[dtype]
    for product in products:
        assert [re.search(r"(\w+)>", x)[1].split("x")[-1] for x in product] == [
            operand,
            operand,
            "f32",
        ]


def test_custom_projector_is_given_the_matrix_and_the_rank():
    given = []

    def projector(matrix, rank):
        given.append((matrix.shape, matrix.dtype, rank))
        return galore_optax.svd(matrix, rank)

    tx = galore_optax.galore(optax.identity(), rank=3, projector=projector)
    one_update(tx, jnp.asarray(matrix_of((8, 12)), jnp.bfloat16))
    assert set(given) == {((8, 12), jnp.dtype(jnp.float32), 3)}


def test_custom_projector_chooses_the_basis():
    def orthonormalized_columns(matrix, rank):
        return jnp.linalg.qr(matrix[:, :rank])[0], jnp.linalg.qr(matrix[:rank].T)[0]

    g = matrix_of((8, 12))
    tx = galore_optax.galore(optax.identity(), rank=3, scale=1.0, projector=orthonormalized_columns)
    update, _ = one_update(tx, jnp.asarray(g))
    q = np.linalg.qr(g[:, :3].astype(np.float64))[0]
    np.testing.assert_allclose(update, q @ (q.T @ g), atol=1e-5)


def test_svd_by_name_is_the_public_function():
    gradient = jnp.asarray(matrix_of((8, 12)))
    by_name, by_function = (
        one_update(galore_optax.galore(optax.identity(), rank=3, projector=p), gradient)
        for p in ("svd", galore_optax.svd)
    )
    chex.assert_trees_all_equal(by_name, by_function)
