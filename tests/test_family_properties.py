"""What must hold of transports and residuals whatever the formulae say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_runs import galore, run
from reference_family import Rule

import galore_optax
from galore_optax import Project, Rotate
from galore_optax._refresh import Clock
from galore_optax._subspace import ABSENT
from galore_optax._transport import Turn

M, N, RANK = 12, 16, 4
B1, B2 = 0.9, 0.99


def orthonormal(rng, *shape):
    return np.linalg.qr(rng.normal(size=shape))[0]


def moved(transport, m, v, c, t, axis=0):
    """The moments after a transport, in float64, by which t steps were done before."""
    bases = [jnp.asarray(c) if side == axis else None for side in (0, 1)]
    clock = Clock(*(jnp.asarray(x, jnp.int32) for x in (t, 1, 0)))
    held = {"first": [jnp.asarray(m)], "second": [jnp.asarray(v)]}
    handed = {role: held[role] for role in transport.moves}
    new, _ = transport.move(handed, ABSENT, Turn(*bases, clock, jnp.asarray(False)))
    [m], [v] = (np.asarray(x) for x in (held | new).values())
    return m, v


def moments_of(rng, t, shape):
    """Adam's moments of t gradients, not divided by anything."""
    m = v = np.zeros(shape)
    for gradient in rng.normal(size=(t, *shape)):
        m = B1 * m + (1 - B1) * gradient
        v = B2 * v + (1 - B2) * gradient**2
    return m, v


@pytest.mark.parametrize("t", [1, 2, 30])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_subspace_that_stands_still_changes_no_moment(axis, t):
    """But a second one that is less than the squared mean, which no variance allows.

    Such there are, since the two means are over different times.
    """
    shape = (RANK, N) if axis == 0 else (N, RANK)
    m, v = moments_of(np.random.default_rng(t), t, shape)
    squared_mean = (1 - B2**t) * (m / (1 - B1**t)) ** 2
    below = v < squared_mean * (1 + 1e-9)
    assert np.mean(below) == 1 if t == 1 else np.mean(below) < 0.1
    with jax.enable_x64(True):
        for transport in (Project(), Rotate(B1, B2)):
            m_new, v_new = moved(transport, m, v, np.eye(RANK), t, axis)
            np.testing.assert_allclose(m_new, m, rtol=1e-12)
            np.testing.assert_allclose(v_new[~below], v[~below], rtol=1e-12)
            wanted = v[below] if transport == Project() else squared_mean[below]
            np.testing.assert_allclose(v_new[below], wanted, rtol=1e-8)


@pytest.mark.parametrize("axis", [0, 1])
def test_vectors_that_change_places_and_signs_take_their_moments_with_them(axis):
    rng = np.random.default_rng(0)
    m, v = moments_of(rng, 30, (RANK, N))
    c = np.eye(RANK)[[2, 0, 3, 1]] * np.array([1, -1, -1, 1])[:, None]
    turn = np.transpose if axis else np.asarray
    with jax.enable_x64(True):
        m_new, v_new = moved(Rotate(B1, B2), turn(m), turn(v), c, 30, axis)
    np.testing.assert_allclose(turn(m_new), c @ m, rtol=1e-12)
    clipped = np.maximum(v, (1 - B2**30) * (m / (1 - B1**30)) ** 2)
    np.testing.assert_allclose(turn(v_new), c**2 @ clipped, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("t", [1, 7, 10**6])
@pytest.mark.parametrize("seed", range(5))
def test_second_moments_are_never_negative_after_a_turn(seed, t, dtype):
    """Whatever the moments: also those of no gradients at all, with means larger than squares."""
    rng = np.random.default_rng(seed)
    old, new = orthonormal(rng, 2, M, RANK)
    m = rng.normal(size=(RANK, N)) * np.exp(5 * rng.normal(size=(RANK, N)))
    v = np.exp(5 * rng.normal(size=(RANK, N))) * (rng.uniform(size=(RANK, N)) < 0.8)
    with jax.enable_x64(dtype == np.float64):
        for c in (new.T @ old, np.eye(RANK), np.zeros((RANK, RANK)), rng.normal(size=(4, 4))):
            m_new, v_new = moved(Rotate(B1, B2), *(x.astype(dtype) for x in (m, v, c)), t)
            assert np.all(v_new >= 0)
            assert np.all(np.isfinite(m_new))
            assert np.all(np.isfinite(v_new))
            # Nor is there less than the mean itself takes, so that Adam's steps stay bounded. Where
            # large entries cancel, float32 loses some of it.
            floor = (1 - B2**t) * (m_new.astype(np.float64) / (1 - B1**t)) ** 2
            assert np.all(v_new >= floor * (1 - (1e-9 if dtype == np.float64 else 1e-3)))


def growth(transport, rank, size=64, gap=60, steps=240):
    """By how much the largest entry of the update grows at refreshes, of noise, at each of them.

    The five steps from a refresh on, over the twenty before it.
    """
    gradients = {"w": np.random.default_rng(0).normal(size=(steps, size, 96)).astype(np.float32)}
    rule = Rule(transport, scale=1.0, rank=rank, gap=gap, b2=0.999)
    largest = np.abs(run(galore(rule), gradients)[0]["w"]).max(axis=(1, 2))
    refreshes = range(gap, steps, gap)
    return [largest[k : k + 5].max() / largest[k - 20 : k].max() for k in refreshes]


@pytest.mark.parametrize("part", [2, 4])
def test_rotation_at_most_doubles_the_largest_entry_of_an_update(part):
    """Down to a quarter of the rank, for gradients that are noise, the worst there are for it.

    Measured, the largest of four refreshes, for m = 64 and b2 = 0.999: 1.3 at r = m/2, 1.4 at m/4,
    1.9 at m/8, and 2.2 at m/16 (b2 = 0.99: 2.0). There C C^T holds a sixteenth of the old variance,
    and the second moment waits for new gradients. With subspaces drawn at random, which do not
    favour the gradient of the moment, it is 1.1, 1.3, 1.7 and 2.0.
    """
    assert max(growth("rotate", 64 // part)) <= 2


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(M, N), (N, M), (M, M), (2, M, N)])
def test_momentum_in_a_subspace_that_holds_all_gradients_is_momentum_in_full(shape, nesterov):
    """However the basis turns in it: exact singular vectors here, all of a gradient's but one."""
    rng = np.random.default_rng(0)
    tall = shape[-2] > shape[-1]
    span = orthonormal(rng, *shape[:-2], M, M - 1)
    there = rng.normal(size=(30, *shape[:-2], M - 1, max(shape[-2:])))
    gradients = span @ there
    gradients = {"w": np.swapaxes(gradients, -1, -2) if tall else gradients}
    momentum = optax.trace(B1, nesterov)
    rule = Rule("project", scale=1.0, rank=M - 1, gap=7)
    with jax.enable_x64(True):
        found, kept, expected = (
            run(tx, gradients)[0]["w"]
            for tx in (
                galore(rule, inner=momentum),
                galore(Rule(scale=1.0, rank=M - 1, gap=7), inner=momentum),
                momentum,
            )
        )
    np.testing.assert_allclose(found, expected, atol=1e-11)
    np.testing.assert_allclose(kept[:7], expected[:7], atol=1e-11)
    assert np.abs(kept - expected).max() > 0.1  # without transport the difference is large


@functools.cache
def staggered_resets(gap=6, steps=27):
    """Updates, bases and numbers of refreshes of all steps, of matrices that reset in turn."""
    rng = np.random.default_rng(0)
    shapes = {"a": (M, N), "b": (N, M), "c": (M, M), "d": (2, M, N)}
    gradients = {name: rng.normal(size=(steps, *shape)) for name, shape in shapes.items()}
    with jax.enable_x64(True):
        inner = optax.scale_by_adam(B1, B2, eps=1e-30)
        tx = galore(Rule("reset", gap=gap, rank=RANK, b2=B2), inner=inner, stagger=True)

        def step(state, gradient):
            updates, state = tx.update(gradient, state)
            s = state.subspace
            bases = {k: s.right[k] if k == "b" else s.left[k] for k in shapes}
            return state, (updates, bases, s.refreshes)

        params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        found = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(gradients)
        return jax.tree.map(np.asarray, (gradients, *found))


@pytest.mark.parametrize("name", "abcd")
def test_a_matrix_steps_as_a_fresh_adam_would_after_its_reset(name):
    """Although others go on meanwhile, and the inner transformation counts for all of them."""
    gradients, updates, bases, refreshes = (tree[name] for tree in staggered_resets())
    if name == "b":
        gradients, updates = (np.swapaxes(x, 1, 2) for x in (gradients, updates))
    gradients, updates, bases, refreshes = (
        x.reshape(len(x), -1, *x.shape[y:])
        for x, y in zip((gradients, updates, bases, refreshes), (-2, -2, -2, 2), strict=True)
    )
    for layer in range(refreshes.shape[1]):
        begins = np.flatnonzero(np.diff(refreshes[:, layer], prepend=0))
        assert len(begins) >= 5
        for begin, end in zip(begins, [*begins[1:], len(updates)], strict=True):
            p = bases[begin, layer]
            np.testing.assert_array_equal(bases[end - 1, layer], p)
            low_rank = p.T @ gradients[begin:end, layer]
            with jax.enable_x64(True):
                fresh, _ = run(optax.adam(-1.0, B1, B2, eps=1e-30), low_rank)
            expected = 0.25 * p @ fresh
            np.testing.assert_allclose(updates[begin:end, layer], expected, atol=1e-11)


def test_matrices_are_reset_on_different_steps():
    refreshes = staggered_resets()[3]
    begins = {
        tuple(np.flatnonzero(np.diff(x)))
        for tree in refreshes.values()
        for x in tree.reshape(len(tree), -1).T
    }
    assert len(begins) == 5


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_norms_are_estimated_from_a_random_sketch_as_well_as_its_rank_allows(rank):
    """Of many columns in many subspaces: off by sqrt(1/2r), and their squares by sqrt(2/r)."""
    m, columns, draws = 96, 500, 20
    rng = np.random.default_rng(0)
    like = jax.ShapeDtypeStruct((m, columns), jnp.float32)
    square = []
    for seed in range(draws):
        p = galore_optax.projectors.gaussian(like, rank, key=jax.random.key(seed))
        g = rng.normal(size=(m, columns))
        sketch = np.float64(p).T @ g
        square.append(np.sum(sketch**2, axis=0) / np.sum(g**2, axis=0))
    square = np.concatenate(square)
    assert abs(square.mean() - 1) < 0.03
    np.testing.assert_allclose(square.std(), np.sqrt(2 / rank), rtol=0.1)
    np.testing.assert_allclose(np.sqrt(square).std(), np.sqrt(1 / (2 * rank)), rtol=0.1)


@pytest.mark.parametrize("rank", [4, 32])
def test_columns_scaled_from_a_sketch_are_near_those_scaled_from_all_of_it(rank):
    """One step of APOLLO beside Adam's: s |G| is known, since Adam's first step has entries of 1.

    So |psi| = sqrt(r) there, and s |g| = sqrt(r) |g| / |P^T g|, which is off by sqrt(1/2r) too.
    That is the norm of a column's update, which for Adam is sqrt(m): the ratio sqrt(r/m) is left to
    the learning rate.
    """
    m, n = 48, 4000
    gradient = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1, m, n)), jnp.float32)}
    rule = Rule(residual="scale_gradient", scale=1.0, rank=rank)
    updates, _ = run(galore(rule, "gaussian"), gradient)
    norms = np.linalg.norm(updates["w"][0].astype(np.float64), axis=0) / np.sqrt(rank)
    directions = updates["w"][0] / np.asarray(gradient["w"][0])
    np.testing.assert_allclose(directions / directions[0], 1, rtol=1e-5)
    # The deviation of 1/x, which a few columns with small sketches add to at rank 4.
    inverse = 1 / np.sqrt(np.random.default_rng(1).chisquare(rank, 10**6) / rank)
    np.testing.assert_allclose(norms.std(), inverse.std(), rtol=0.15)
    np.testing.assert_allclose(np.median(norms), np.median(inverse), rtol=0.05)
