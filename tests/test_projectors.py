"""Bases of one matrix, their signs, and the products with them."""

import dataclasses
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._basis import Dense
from galore_optax._core import Bases, down, matrix_of, project_back
from galore_optax._numbered import Rows
from galore_optax._orthonormalize import orthonormalize
from galore_optax._select import Selection
from galore_optax.projectors import PROJECTORS, resolve

SHAPES = [(9, 14), (14, 9), (11, 11)]
OPTIONS = {"momentum_iteration": {"b1": 0.9}}
NUMBERED = ("rows", "random_rows", "dct")  # these return numbers of directions
SIDES = ["short", "long", "left", "right", "both"]


def random_matrix(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_update(tx, gradient, state=None):
    """The update of a single matrix and the state after it."""
    params = {"kernel": jnp.zeros_like(gradient)}
    state = tx.init(params) if state is None else state
    updates, state = jax.jit(tx.update)({"kernel": gradient}, state, params)
    return updates["kernel"], state


def view_of(shape, side, rank):
    numbers = galore_optax.DimensionNumbers(-2, -1)
    (view,) = Selection(rank, side, None, numbers).views(np.zeros(shape, np.float32))
    return view


def over_a_stack(function, shape):
    for _ in shape[:-2]:
        function = jax.vmap(function)
    return function


def project(g, bases, side, rank):
    """R of each matrix of a stack."""
    matrix = matrix_of(view_of(g.shape, side, rank))
    return over_a_stack(functools.partial(down, matrix=matrix), g.shape)(g, bases)


def and_back(u, bases, shape, side, rank, dtype):
    """The way back of each matrix of a stack of that shape."""
    matrix = matrix_of(view_of(shape, side, rank))
    return over_a_stack(functools.partial(project_back, matrix=matrix, dtype=dtype), shape)(
        u, bases
    )


def bases_of(shape, side, rank, kind="dense"):
    """Random orthonormal bases for a stack of matrices: dense ones, or unit vectors."""
    *batch, m, n = shape
    view = view_of(shape, side, rank)
    rng = np.random.default_rng(0)

    def basis(size, present):
        if not present:
            return None
        if kind == "unit vectors":
            rows = rng.permuted(np.broadcast_to(np.arange(size), (*batch, size)), axis=-1)
            return Rows(rows[..., :rank].astype(np.int32))
        columns = np.linalg.qr(rng.normal(size=(*batch, size, rank)))[0]
        return Dense(columns.astype(np.float32))

    return Bases(basis(m, view.left), basis(n, view.right))


@functools.cache
def jitted(name, rank, options):
    projector = resolve(name, dict(options))
    return jax.jit(lambda g, key, old, first: projector(g, rank, key=key, old=old, first=first))


def chosen_by(name, g, rank, *, seed=0, old=None, **options):
    """What a projector chooses: a basis, or the numbers of directions."""
    selects = name in NUMBERED
    start = np.arange(rank, dtype=np.int32) if selects else np.eye(g.shape[0], rank)
    old, first = (start, True) if old is None else (old, False)
    choose = jitted(name, rank, tuple(options.items()))
    old = old if selects else np.asarray(old, np.float32)
    chosen = choose(np.asarray(g, np.float32), jax.random.key(seed), old, np.asarray(first))
    chex.assert_shape(chosen, (rank,) if selects else (g.shape[0], rank))
    chex.assert_type(chosen, jnp.int32 if selects else jnp.float32)
    return chosen


def basis_of(name, g, rank, **arguments):
    """The basis that a projector chooses, as float64."""
    return as_a_basis(name, chosen_by(name, g, rank, **arguments), len(g))


def as_a_basis(name, chosen, size):
    chosen = np.asarray(chosen)
    if name in NUMBERED:
        return (cosines(size) if name == "dct" else np.eye(size))[:, chosen]
    return chosen.astype(np.float64)


def energy(basis, g):
    return np.sum((basis.T @ g) ** 2) / np.sum(np.asarray(g, np.float64) ** 2)


def best_energy(g, rank):
    values = np.linalg.svd(g.astype(np.float64), compute_uv=False) ** 2
    return values[:rank].sum() / values.sum()


def decaying(shape, power=1.0, seed=0):
    """A matrix whose singular values fall like those of gradients do."""
    rng = np.random.default_rng(seed)
    short = min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(size, short)))[0] for size in shape)
    return (u * np.arange(1, short + 1.0) ** -power) @ v.T


@functools.cache
def bases_of_all_shapes(name):
    """Of rank 5, of one compiled program, as float64."""
    projector = resolve(name, OPTIONS.get(name, {}))

    @jax.jit
    def choose(matrices, key):
        def of_one(g):
            return projector(
                g,
                5,
                key=key,
                old=jnp.arange(5) if name in NUMBERED else jnp.eye(g.shape[0], 5),
                first=jnp.asarray(True),
                moments={"first": [jnp.zeros((5, g.shape[1]))]},
                step=jnp.asarray(0),
            )

        return [of_one(g) for g in matrices]

    chosen = choose([random_matrix(shape) for shape in SHAPES], jax.random.key(0))
    return {shape: as_a_basis(name, x, shape[0]) for shape, x in zip(SHAPES, chosen, strict=True)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in PROJECTORS if PROJECTORS[name].orthonormal])
def test_bases_are_orthonormal(name, shape):
    basis = bases_of_all_shapes(name)[shape]
    chex.assert_shape(basis, (shape[0], 5))
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)


@pytest.mark.parametrize("name", ["randomized_svd", "power_iteration", "eigh", "rows"])
def test_bases_of_difficult_matrices_are_orthonormal(name):
    plain = random_matrix((12, 20))
    tx = galore_optax.galore(optax.identity(), rank=6, projector=name)
    update = jax.jit(tx.update)
    for g in (
        plain[:, :3] @ random_matrix((3, 20), seed=1),
        plain * (np.arange(12) != 4)[:, None],
        plain * np.float32(1e-30),
        plain * np.float32(1e30),
    ):
        params = {"kernel": jnp.asarray(g)}
        _, state = update(params, tx.init(params), params)
        basis = np.asarray(state.subspace.left["kernel"], np.float64)
        basis = np.eye(12)[:, basis.astype(int)] if name == "rows" else basis
        assert state.subspace.refreshes["kernel"] == 1
        np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-5)
        least = 0.8 if name != "rows" else 0.4
        g = g / np.abs(g).max()
        np.testing.assert_array_less(least * best_energy(g, 6), energy(basis, g))


@pytest.mark.parametrize(
    ("shape", "rank"), [*((shape, 5) for shape in SHAPES), ((14, 9), 1), ((8, 1030), 5)]
)
@pytest.mark.parametrize("name", ["svd", "eigh"])
def test_exact_projectors_leave_the_smallest_possible_residual(name, shape, rank):
    # Eckart and Young: no rank-r approximation leaves less than the trailing singular values.
    g = random_matrix(shape).astype(np.float64)
    shared = shape in SHAPES and rank == 5
    basis = bases_of_all_shapes(name)[shape] if shared else basis_of(name, g, rank)
    smallest = np.sum(np.linalg.svd(g, compute_uv=False)[rank:] ** 2)
    np.testing.assert_allclose(np.sum((g - basis @ (basis.T @ g)) ** 2), smallest, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["svd", "eigh"])
def test_exact_projectors_order_directions_by_singular_value(name, shape):
    g = random_matrix(shape)
    basis = bases_of_all_shapes(name)[shape]
    values = np.linalg.svd(g.astype(np.float64), compute_uv=False)[:5]
    np.testing.assert_allclose(np.linalg.norm(basis.T @ g, axis=1), values, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "platform", "routine"),
    [
        ((40, 50), "cpu", "gesdd"),
        ((40, 2000), "cpu", "gesdd"),
        ((1024, 1024), "cuda", "gesvd"),
        ((1025, 40), "cuda", "gesvd"),
        ((40, 1025), "cuda", "gesvd"),
    ],
)
@pytest.mark.since(jax="0.7")
def test_svd_is_by_the_routine_that_is_right_on_the_platform(shape, platform, routine):
    traced = jax.jit(resolve("svd", {}), static_argnums=1).trace(np.zeros(shape, np.float32), 8)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"custom_call @\w*?(ges\w+)_ffi", text) == [routine]


@pytest.mark.parametrize(
    ("shape", "rounds", "close"), [((60, 90), (0, 1, 3), 1e-4), ((90, 60), (0, 1), 1e-3)]
)
def test_power_rounds_bring_the_randomized_svd_to_the_best_energy(shape, rounds, close):
    g = decaying(shape)
    losses = [
        best_energy(g, 8) - energy(basis_of("randomized_svd", g, 8, power_iterations=q), g)
        for q in rounds
    ]
    for before, after in itertools.pairwise(losses):
        assert before > 2 * after
    assert abs(losses[-1]) < close


def test_oversampling_improves_the_randomized_svd():
    g = decaying((60, 90), power=0.5)

    def mean_energy(**oversampling):
        options = {"power_iterations": 0, **oversampling}
        return np.mean(
            [energy(basis_of("randomized_svd", g, 8, seed=s, **options), g) for s in range(5)]
        )

    most = mean_energy(oversampling=40)
    assert mean_energy(oversampling=0) < mean_energy() < most < best_energy(g, 8) + 1e-6


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_power_iteration_from_the_old_basis_tracks_a_turning_subspace(shape):
    g = decaying(shape)
    basis = basis_of("power_iteration", g, 10)
    for step in range(4):
        g = g + 0.02 * decaying(shape, seed=step + 1)
        cold = basis_of("power_iteration", g, 10, seed=step)
        basis = basis_of("power_iteration", g, 10, old=basis)
    assert energy(basis, g) > 0.995 * best_energy(g, 10)
    assert energy(basis, g) > energy(cold, g)


def test_power_iteration_is_a_product_with_the_gram_matrix_of_the_old_basis():
    g, old = random_matrix((9, 14)), np.linalg.qr(random_matrix((9, 4), seed=1))[0]
    for iterations in (1, 3):
        basis = basis_of("power_iteration", g, 4, old=old, iterations=iterations)
        exact = np.linalg.qr(
            np.linalg.matrix_power((g @ g.T).astype(np.float64), iterations) @ old
        )[0]
        np.testing.assert_allclose(basis @ basis.T, exact @ exact.T, atol=1e-4)


def drawn(name, count):
    """Bases (count, 6, 4) of as many keys."""
    g = np.zeros((6, 9), np.float32)
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: resolve(name, {})(g, 4, key=key)))(keys))


def test_gaussian_is_the_identity_on_average():
    bases = drawn("gaussian", 2000)
    mean = np.mean([p @ p.T for p in bases], axis=0)
    np.testing.assert_allclose(mean, np.eye(6), atol=4 * (2 / 4 / 2000) ** 0.5)


def test_orthonormal_is_unbiased():
    bases = drawn("orthonormal", 500)
    mean = np.mean([p @ p.T for p in bases], axis=0)
    np.testing.assert_allclose(mean, 4 / 6 * np.eye(6), atol=0.1)


def test_rows_are_those_of_largest_norm():
    g = random_matrix((9, 14)) * np.array([1, 5, 1, 4, 1, 1, 9, 1, 1])[:, None]
    basis = basis_of("rows", g, 3)
    assert set(basis.argmax(axis=0)) == {1, 3, 6}
    np.testing.assert_array_equal(np.sort(basis, axis=0)[-2:], [[0, 0, 0], [1, 1, 1]])


def cosines(size):
    k, i = np.meshgrid(np.arange(size), np.arange(size))
    matrix = np.cos(np.pi * k * (2 * i + 1) / (2 * size)) * (2 / size) ** 0.5
    matrix[:, 0] /= 2**0.5
    return matrix


def test_dct_takes_the_cosines_that_capture_most():
    g = random_matrix((50, 14))
    basis = basis_of("dct", g, 7)
    best = np.argsort(-np.linalg.norm(cosines(50).T @ g, axis=1))[:7]
    chosen = np.abs(cosines(50).T @ basis)
    assert set(chosen.argmax(axis=0)) == set(best)
    np.testing.assert_allclose(chosen.max(axis=0), 1, atol=1e-5)


def test_cosines_of_more_rows_than_an_int32_can_square():
    matrix = jax.ShapeDtypeStruct((100_000, 1), jnp.float32)
    draw = jax.jit(lambda key: resolve("orthonormal", {})(matrix, 8, key=key))
    basis = np.asarray(draw(jax.random.key(0)), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(8), atol=1e-4)


@pytest.mark.parametrize("name", ["rows", "dct"])
def test_what_stays_selected_keeps_its_column(name):
    g = random_matrix((30, 14))
    for seed in range(1, 5):
        old = np.asarray(chosen_by(name, g, 8))
        g = g + random_matrix((30, 14), seed)
        new = np.asarray(chosen_by(name, g, 8, old=old))
        among_all = np.asarray(chosen_by(name, g, 8))
        stays = np.isin(old, new)
        assert set(new) == set(among_all)
        np.testing.assert_array_equal(new[stays], old[stays])
        assert 0 < stays.sum() < 8


ORTHONORMALIZE = jax.jit(orthonormalize)


@pytest.mark.parametrize("shape", [(40, 20), (300, 40), (20, 20)])
@pytest.mark.parametrize("condition", [1e0, 1e3, 1e7])
def test_orthonormalize_spans_the_same_columns_at_any_condition(condition, shape):
    rng = np.random.default_rng(0)
    m, r = shape
    u, v = np.linalg.qr(rng.normal(size=(m, r)))[0], np.linalg.qr(rng.normal(size=(r, r)))[0]
    matrix = (u * np.geomspace(1, 1 / condition, r)) @ v.T
    basis = np.asarray(ORTHONORMALIZE(matrix.astype(np.float32)), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(r), atol=1e-5)
    np.testing.assert_allclose(basis @ (basis.T @ matrix), matrix, atol=1e-5)


NARROW = {
    "one direction short": np.eye(20) - 1 / 20,
    "one direction short, tall": np.pad(np.eye(20) - 1 / 20, ((0, 20), (0, 0))),
    "nearly square": np.random.default_rng(3).normal(size=(300, 297)),
    "rank 3": np.random.default_rng(4).normal(size=(40, 3)) @ np.ones((3, 20)),
    "ones": np.ones((20, 6)),
    "zeros": np.zeros((20, 6)),
    "some zero columns": np.eye(40, 20) * (np.arange(20) % 3 > 0),
    "Hilbert": 1 / (np.arange(40)[:, None] + np.arange(20) + 1.0),
}


@pytest.mark.parametrize("name", NARROW)
def test_orthonormalize_makes_orthonormal_columns_of_anything(name):
    matrix = NARROW[name]
    basis = np.asarray(ORTHONORMALIZE(matrix.astype(np.float32)), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(matrix.shape[1]), atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "orthonormal"])
def test_regenerated_bases_take_no_memory_and_are_the_same_until_the_next_refresh(name):
    def tx(seed):
        numbers = galore_optax.DimensionNumbers(-2, -1)
        return galore_optax.galore(
            optax.identity(),
            rank=3,
            update_proj_gap=2,
            projector=name,
            seed=seed,
            scale=1.0,
            weight_dimension_numbers=numbers,
        )

    g = {"kernel": random_matrix((2, 8, 12))}
    update_of_any_seed = jax.jit(lambda seed, g, state: tx(seed).update(g, state))

    def run(update, seed, steps):
        state, updates = tx(seed).init(g), []
        for _ in range(steps):
            out, state = update(g, state)
            updates.append(np.asarray(out["kernel"]))
        return updates, state

    updates, state = run(jax.jit(tx(0).update), 0, 4)
    assert jax.tree.leaves((state.subspace.left, state.subspace.right)) == []
    np.testing.assert_array_equal(updates[0], updates[1])
    np.testing.assert_array_equal(updates[2], updates[3])
    assert np.abs(updates[1] - updates[2]).max() > 0.1
    [again], [other] = (
        run(functools.partial(update_of_any_seed, seed), seed, 1)[0] for seed in (0, 1)
    )
    np.testing.assert_array_equal(updates[0], again)
    assert np.abs(updates[0] - other).max() > 0.1
    # A projection P P^T of its own for each layer: U = P P^T G, of rank 3.
    projections = [
        u @ np.linalg.pinv(layer)
        for u, layer in zip(updates[0], np.asarray(g["kernel"]), strict=True)
    ]
    assert np.linalg.norm(projections[0] - projections[1]) > 0.1
    for projection in projections:
        assert np.linalg.matrix_rank(projection, tol=1e-3) == 3


def rows_as_a_basis(matrix, rank, old, first):
    numbers = PROJECTORS["rows"](matrix, rank, old=jnp.argmax(old, axis=0), first=first)
    return jax.nn.one_hot(numbers, matrix.shape[0], axis=0, dtype=matrix.dtype)


def dct_as_a_basis(matrix, rank, old, first):
    directions = jnp.asarray(cosines(matrix.shape[0]), matrix.dtype)
    before = jnp.argmax(jnp.abs(directions.T @ old), axis=0)
    return directions[:, PROJECTORS["dct"](matrix, rank, old=before, first=first)]


@pytest.mark.parametrize(
    # The sign of a cosine that arrives would matter to a moment.
    ("name", "dense", "inner", "side"),
    [
        # A side alone is part of both.
        pytest.param("rows", rows_as_a_basis, optax.adamw(0.1), "short", marks=pytest.mark.ci),
        ("rows", rows_as_a_basis, optax.adamw(0.1), "both"),
        pytest.param("dct", dct_as_a_basis, optax.sgd(0.1), "long", marks=pytest.mark.ci),
        ("dct", dct_as_a_basis, optax.sgd(0.1), "both"),
    ],
    ids=["rows-short", "rows-both", "dct-long", "dct-both"],
)
def test_numbers_in_the_state_do_what_the_basis_does(name, dense, inner, side):
    shapes = {"wide": (9, 14), "tall": (14, 9), "stacked": (2, 9, 14)}
    params = {kind: random_matrix(shape) for kind, shape in shapes.items()}
    updates, states = [], []
    for projector, dtype in ((name, "int4"), (dense, None)):
        tx = galore_optax.galore(
            inner,
            rank=4,
            update_proj_gap=2,
            projector=projector,
            projector_dtype=dtype,
            side=side,
            weight_dimension_numbers=galore_optax.DimensionNumbers(-2, -1),
            diagnostics=True,
        )
        state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
        updates.append([])
        for seed in range(5):
            gradients = {kind: random_matrix(shape, seed) for kind, shape in shapes.items()}
            out, state = update(gradients, state, params)
            updates[-1].append(out)
        states.append(state)
    chex.assert_trees_all_close(*updates, atol=1e-5)
    chex.assert_trees_all_close(*(galore_optax.metrics(x) for x in states), atol=1e-5)
    for kind, shape in shapes.items():
        bases = states[0].subspace.left[kind], states[0].subspace.right[kind]
        numbers = jax.tree.leaves(bases)
        for x in numbers:
            chex.assert_shape(x, (*shape[:-2], 4))
            chex.assert_type(x, jnp.int32)
        assert len(numbers) == (2 if side == "both" else 1)


@pytest.mark.parametrize("side", ["short", "long", "both"])
@pytest.mark.since(jax="0.7")
def test_rows_multiply_nothing(side):
    tx = galore_optax.galore(optax.adamw(0.1), rank=4, projector="rows", side=side)
    params = {"w": random_matrix((9, 14)), "x": random_matrix((14, 9))}
    for refresh in (None, False):

        def update(g, state, refresh=refresh):
            return tx.update(g, state, params, refresh=refresh)

        program = jax.jit(update).lower(params, tx.init(params)).as_text()
        assert "dot_general" not in program
    # Into R and back, for each projected side; what is found by number is not multiplied.
    assert program.count('"stablehlo.gather"') == (8 if side == "both" else 4)


def test_a_function_around_rows_is_told_that_it_needs_a_basis():
    around = functools.partial(galore_optax.projectors.rows)
    tx = galore_optax.galore(optax.identity(), rank=3, projector=around)
    params = {"w": jnp.ones((8, 12))}
    with pytest.raises(
        TypeError, match=r"rows returns numbers .* as old, \(r,\) int32; got float32"
    ):
        tx.update(params, tx.init(params), params)


def test_a_projector_need_not_be_hashable():
    @dataclasses.dataclass
    class Leading:
        columns: int

        def __call__(self, matrix, rank):
            return galore_optax.projectors.svd(matrix[:, : self.columns], rank)

    g = jnp.asarray(random_matrix((8, 12)))
    _, state = one_update(galore_optax.galore(optax.identity(), rank=3, projector=Leading(12)), g)
    _, exact = one_update(galore_optax.galore(optax.identity(), rank=3), g)
    chex.assert_trees_all_close(state, exact)


@pytest.mark.parametrize(
    # On both sides it has each of them; those of each kind are enough for one side alone.
    ("side", "name"),
    [
        *(("both", name) for name in PROJECTORS if name != "momentum_iteration"),
        *(("short", "svd"), ("long", "gaussian"), ("short", "momentum_iteration")),
    ],
)
def test_every_projector_trains_on_every_side(side, name):
    target = decaying((12, 20)).astype(np.float32)
    tx = galore_optax.galore(
        optax.sgd(1.0, momentum=0.0),
        rank=6,
        scale=1.0 if PROJECTORS[name].orthonormal else 0.05,
        update_proj_gap=2,
        projector=name,
        projector_options=OPTIONS.get(name),
        side=side,
    )

    def loss(p):
        return 0.5 * ((p["w"] - target) ** 2).sum()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"w": np.zeros((12, 20), np.float32)}
    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), None, 100)[0][0])
    assert loss(jax.tree.map(np.asarray, run(params))) < 0.1 * loss(params)


@functools.cache
def bases_of_refreshes(side, projector=galore_optax.projectors.svd):
    """What is chosen at six steps, of a gradient that moves."""
    tx = galore_optax.galore(
        optax.identity(), rank=6, side=side, update_proj_gap=1, projector=projector
    )
    gradient, state, chosen = random_matrix((8, 12)), None, []
    for seed in range(1, 7):
        _, state = one_update(tx, gradient, state)
        bases = jax.tree.leaves((state.subspace.left, state.subspace.right))
        chosen.append([np.asarray(basis) for basis in bases])
        gradient = gradient + 0.5 * random_matrix((8, 12), seed)
    return chosen


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_first_refresh_makes_the_largest_entry_positive(side):
    bases, *_ = bases_of_refreshes(side)
    assert len(bases) == (2 if side == "both" else 1)
    for basis in bases:
        peaks = np.take_along_axis(basis, np.abs(basis).argmax(axis=0, keepdims=True), axis=0)
        assert np.all(peaks > 0)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_later_refreshes_keep_the_direction_of_each_vector(side):
    for old, new in itertools.pairwise(bases_of_refreshes(side)):
        for p_new, p_old in zip(new, old, strict=True):
            assert np.all(np.diag(p_new.T @ p_old) >= 0)
            assert np.abs(p_new - p_old).max() > 1e-3


def test_signs_chosen_by_the_projector_do_not_matter():
    def contrary_svd(matrix, rank):
        signs = jnp.where(jnp.arange(rank) % 2 == 0, -1.0, 1.0)
        return galore_optax.projectors.svd(matrix, rank) * signs

    chex.assert_trees_all_close(
        bases_of_refreshes("both"), bases_of_refreshes("both", contrary_svd), atol=1e-6
    )


@functools.cache
def projected_and_back():
    """Of every shape, kind of basis and side, by one program: the low-rank matrix and u, back."""
    bases = {
        (shape, kind, side): bases_of(shape, side, 4, kind)
        for shape in [(9, 14), (14, 9), (3, 9, 14), (2, 3, 14, 9)]
        for kind in ("dense", "unit vectors")
        for side in SIDES
    }
    u = {
        (shape, kind, side): random_matrix(
            (
                *shape[:-2],
                shape[-2] if basis.left is None else 4,
                shape[-1] if basis.right is None else 4,
            ),
            seed=2,
        )
        for (shape, kind, side), basis in bases.items()
    }

    @jax.jit
    def there_and_back(bases, u):
        return [
            (
                project(jnp.asarray(random_matrix(shape, seed=1)), bases[i], side, 4),
                and_back(u[i], bases[i], shape, side, 4, jnp.float32),
            )
            for i, (shape, _, side) in enumerate(cases)
        ]

    cases = list(bases)
    found = there_and_back([bases[case] for case in cases], [u[case] for case in cases])
    return {
        case: (bases[case], u[case], *map(np.asarray, both))
        for case, both in zip(cases, found, strict=True)
    }


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["dense", "unit vectors"])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14), (2, 3, 14, 9)])
def test_project_and_project_back_are_adjoint(shape, kind, side):
    _, u, low_rank, back = projected_and_back()[shape, kind, side]
    g = random_matrix(shape, seed=1)
    chex.assert_shape(low_rank, u.shape)
    chex.assert_shape(back, shape)
    axes = (-2, -1)  # an inner product for each matrix of a stack, none may leak into another
    np.testing.assert_allclose(
        np.sum(low_rank * u, axis=axes), np.sum(g * back, axis=axes), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["dense", "unit vectors"])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14), (2, 3, 14, 9)])
def test_projection_is_the_product_with_the_bases(shape, kind, side):
    bases, _, low_rank, _ = projected_and_back()[shape, kind, side]

    def array(basis, size):
        if kind == "dense":
            return np.asarray(basis.matrix)
        return np.swapaxes(np.eye(size)[np.asarray(basis.numbers)], -1, -2)

    expected = random_matrix(shape, seed=1).astype(np.float64)
    if bases.left is not None:
        expected = np.swapaxes(array(bases.left, shape[-2]), -1, -2) @ expected
    if bases.right is not None:
        expected = expected @ array(bases.right, shape[-1])
    np.testing.assert_allclose(low_rank, expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_bfloat16_products_accumulate_in_float32(side):
    shape = (512, 600)
    bases = bases_of(shape, side, rank=16)
    g = jnp.asarray(random_matrix(shape), jnp.bfloat16)
    basis = bases.left if side == "left" else bases.right
    p = basis.matrix.astype(jnp.bfloat16)

    def product(a, b):
        return a.T @ b if side == "left" else b @ a

    # The operands are rounded to bfloat16 in any case; the reference starts from these.
    exact = product(np.asarray(p, np.float64), np.asarray(g, np.float64))
    accumulated_in_bfloat16 = np.asarray(product(p, g), np.float64)
    found = project(g, bases, side, 16)
    assert found.dtype == jnp.float32
    error = np.abs(np.asarray(found, np.float64) - exact).max()
    assert error < 1e-4
    assert error < 0.01 * np.abs(accumulated_in_bfloat16 - exact).max()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_take_operands_in_the_dtype_of_the_gradient(dtype, side):
    bases = bases_of((9, 14), side, rank=4)
    g = np.zeros((9, 14), dtype)

    def there_and_back(g, bases):
        return and_back(project(g, bases, side, 4), bases, g.shape, side, 4, g.dtype)

    module = jax.jit(there_and_back).lower(g, bases).as_text()
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
        return galore_optax.projectors.svd(matrix, rank)

    tx = galore_optax.galore(optax.identity(), rank=3, projector=projector)
    one_update(tx, jnp.asarray(random_matrix((8, 12)), jnp.bfloat16))
    assert set(given) == {((8, 12), jnp.dtype(jnp.float32), 3)}


def test_custom_projector_chooses_the_basis():
    def orthonormalized_columns(matrix, rank):
        return jnp.linalg.qr(matrix[:, :rank])[0]

    g = random_matrix((8, 12))
    tx = galore_optax.galore(optax.identity(), rank=3, scale=1.0, projector=orthonormalized_columns)
    update, _ = one_update(tx, jnp.asarray(g))
    q = np.linalg.qr(g[:, :3].astype(np.float64))[0]
    np.testing.assert_allclose(update, q @ (q.T @ g), atol=1e-5)


def test_svd_by_name_is_the_public_function():
    gradient = jnp.asarray(random_matrix((8, 12)))
    by_name, by_function = (
        one_update(galore_optax.galore(optax.identity(), rank=3, projector=p), gradient)
        for p in ("svd", galore_optax.projectors.svd)
    )
    chex.assert_trees_all_equal(by_name, by_function)


def test_random_rows_are_different_ones_and_all_as_likely():
    keys = jax.random.split(jax.random.key(0), 2000)
    like = jnp.zeros((6, 3))
    drawn = np.asarray(jax.vmap(lambda key: resolve("random_rows", {})(like, 2, key=key))(keys))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = np.bincount(drawn.ravel(), minlength=6) / 2000
    # The standard error of a frequency of 1/3 among 2000 draws is 0.0105.
    np.testing.assert_allclose(counts, np.full(6, 1 / 3), atol=4 * 0.0105)


def test_sampled_rows_are_right_on_average():
    """The mean of P P^T G over many draws is G, within four standard errors of each entry."""
    count = 4000
    gradient = np.random.default_rng(0).normal(size=(6, 3)) * np.arange(1.0, 7.0)[:, None]
    params = {"stack": jnp.broadcast_to(jnp.asarray(gradient, jnp.float32), (count, 6, 3))}
    tx = galore_optax.galore(
        optax.identity(),
        rank=2,
        projector="sampled_rows",
        side="left",
        scale=1.0,
        weight_dimension_numbers=galore_optax.DimensionNumbers(1, 2),
    )
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    back = np.asarray(updates["stack"], np.float64)
    error = back.std(axis=0, ddof=1) / count**0.5
    np.testing.assert_array_less(np.abs(back.mean(axis=0) - gradient), 4 * error)
    # Each is P P^T G of its own rows and weights.
    numbers, weights = (np.asarray(x) for x in jax.tree.leaves(state.subspace.left["stack"]))
    norms = np.linalg.norm(gradient, axis=1)
    probabilities = norms / norms.sum()
    np.testing.assert_allclose(weights, (2 * probabilities[numbers]) ** -0.5, rtol=1e-5)
    for i in range(20):
        p = np.zeros((6, 2))
        p[numbers[i], [0, 1]] = weights[i]
        np.testing.assert_allclose(back[i], p @ p.T @ gradient, rtol=1e-4, atol=1e-5)
    # Rows are drawn as often as their norms say.
    found = np.bincount(numbers.ravel(), minlength=6) / numbers.size
    error = np.sqrt(probabilities * (1 - probabilities) / numbers.size)
    np.testing.assert_array_less(np.abs(found - probabilities), 4 * error)


@pytest.mark.parametrize("shape", SHAPES)
def test_momentum_iteration_turns_the_basis_to_the_mean_of_momentum_and_gradient(shape):
    rank, b1, rho, step = 3, 0.8, 0.7, 4
    g = random_matrix(shape).astype(np.float64)
    old = np.linalg.qr(random_matrix((shape[0], rank), seed=1).astype(np.float64))[0]
    m = random_matrix((rank, shape[1]), seed=2).astype(np.float64)
    found = resolve("momentum_iteration", {"b1": b1, "rho": rho})(
        jnp.asarray(g, jnp.float32),
        rank,
        old=jnp.asarray(old, jnp.float32),
        first=jnp.asarray(False),
        moments={"first": [jnp.asarray(m, jnp.float32)]},
        step=jnp.asarray(step),
    )
    mean = rho * old @ m / (1 - b1**step) + (1 - rho) * g
    q = np.linalg.qr(mean @ (mean.T @ old))[0]
    np.testing.assert_allclose(found @ found.T, q @ q.T, atol=1e-4)
