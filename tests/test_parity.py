"""Whole trajectories: those of the PyTorch reference, and those of the algorithm in NumPy."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

TORCH = np.load(pathlib.Path(__file__).parent / "data" / "galore_adamw.npz")
TORCH_CASES = ("tall", "wide", "square")
TORCH_RATE, TORCH_B1, TORCH_B2 = 0.02, 0.9, 0.95

# (in, out), named after the (out, in) of the reference, like its trajectories.
SHAPES = {"tall": (10, 16), "wide": (16, 10), "square": (12, 12)}
SIDES = ("short", "long", "left", "right", "both")
STEPS, GAP, RANK = 250, 70, 4  # refreshes at 0, 70, 140, 210
RATE, B1, B2, EPS, DECAY, MOMENTUM, SCALE = 0.02, 0.9, 0.95, 1e-8, 0.1, 0.9, 0.25


def galore_trajectory(tx, weights, gradients):
    """Weights after each step, {name: (steps, m, n)}, of one jitted run over all leaves."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    def run(weights, gradients):
        return jax.lax.scan(step, (weights, tx.init(weights)), gradients)[1]

    return jax.tree.map(np.asarray, jax.jit(run)(weights, gradients))


@functools.cache
def torch_case_by_galore(decay, through_chain):
    ranks = {name: int(TORCH[f"{name}_meta"][0]) for name in TORCH_CASES}
    (gap,) = {int(TORCH[f"{name}_meta"][1]) for name in TORCH_CASES}
    subspace = {"rank": lambda path, shape: ranks[path], "update_proj_gap": gap, "scale": 0.25}
    adamw = {"b1": TORCH_B1, "b2": TORCH_B2, "eps": 1e-8, "weight_decay": decay}
    if through_chain:
        tx = galore_optax.chain(galore_optax.galore(**subspace), optax.adamw(TORCH_RATE, **adamw))
    else:
        tx = galore_optax.galore_adamw(TORCH_RATE, **adamw, **subspace)
    weights = {name: jnp.asarray(TORCH[f"{name}_W0"]) for name in TORCH_CASES}
    gradients = {name: jnp.asarray(TORCH[f"{name}_G"]) for name in TORCH_CASES}
    return galore_trajectory(tx, weights, gradients)


@pytest.mark.parametrize("through_chain", [False, True], ids=["galore_adamw", "chain"])
@pytest.mark.parametrize(("decay", "tolerance"), [(0.0, 2e-6), (0.1, 2e-4)])
@pytest.mark.parametrize("name", TORCH_CASES)
def test_every_step_of_the_torch_reference(name, decay, tolerance, through_chain):
    expected = TORCH[f"{name}_wd{decay}_traj"]
    found = torch_case_by_galore(decay, through_chain)[name]
    chex.assert_shape(found, expected.shape)
    assert len(expected) == 12
    errors = np.abs(found - expected).max(axis=(1, 2))
    assert np.all(errors <= tolerance), errors


def turning_gradients(shape, seed):
    """Gradients (STEPS, m, n) whose singular vectors turn slowly and whose values stay apart."""
    rng = np.random.default_rng(seed)
    m, n = shape
    k = min(m, n)

    def turning_basis(size):
        basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
        skew = rng.normal(size=(size, size))
        skew = 0.004 * (skew - skew.T)
        turn = np.linalg.solve(np.eye(size) + skew / 2, np.eye(size) - skew / 2)
        while True:
            yield basis[:, :k]
            basis = turn @ basis

    left, right = turning_basis(m), turning_basis(n)
    values = 0.7 ** np.arange(k)
    return np.stack(
        [
            (next(left) * values * rng.uniform(0.9, 1.1, size=k)) @ next(right).T
            for _ in range(STEPS)
        ]
    )


@functools.cache
def numpy_problem():
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = {name: turning_gradients(s, seed) for seed, (name, s) in enumerate(SHAPES.items())}
    return weights, gradients


def numpy_basis(vectors, old, sign_rule):
    """Singular vectors with the signs they are to have next to the basis they replace."""
    signs = np.ones(vectors.shape[1])
    for j, vector in enumerate(vectors.T):
        if old is None or sign_rule == "always first":
            sign_of = vector[np.argmax(np.abs(vector))]
        else:
            sign_of = vector @ old[:, j]
        if sign_of < 0 and sign_rule != "none":
            signs[j] = -1
    return vectors * signs


def numpy_sides(shape, side):
    """Whether the rows and the columns are projected."""
    m, n = shape
    if side == "both":
        return True, True
    rows = {"left": True, "right": False, "short": m <= n, "long": m > n}[side]
    return rows, not rows


def numpy_trajectory(name, side, sign_rule="galore"):
    """The algorithm in float64: AdamW in Optax's order, or for `both` SGD with momentum."""
    weights, gradients = numpy_problem()
    w = weights[name]
    rows, columns = numpy_sides(w.shape, side)
    p = q = None
    first = second = 0.0
    trajectory = []
    for step, g in enumerate(gradients[name]):
        if step % GAP == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            p = numpy_basis(u[:, :RANK], p, sign_rule) if rows else None
            q = numpy_basis(vt[:RANK].T, q, sign_rule) if columns else None
        r = g if p is None else p.T @ g
        r = r if q is None else r @ q
        if side == "both":
            first = r + MOMENTUM * first
            normalized, decay = first, 0.0
        else:
            first = B1 * first + (1 - B1) * r
            second = B2 * second + (1 - B2) * r**2
            normalized = first / (1 - B1 ** (step + 1))
            normalized = normalized / (np.sqrt(second / (1 - B2 ** (step + 1))) + EPS)
            decay = DECAY
        back = normalized if p is None else p @ normalized
        back = back if q is None else back @ q.T
        w = w - RATE * (SCALE * back + decay * w)
        trajectory.append(w)
    return np.stack(trajectory)


@functools.cache
def numpy_problem_by_galore(side):
    subspace = {"rank": RANK, "update_proj_gap": GAP, "scale": SCALE, "side": side}
    with jax.enable_x64(True):
        if side == "both":
            tx = galore_optax.galore_sgd(RATE, momentum=MOMENTUM, **subspace)
        else:
            tx = galore_optax.galore_adamw(RATE, B1, B2, EPS, weight_decay=DECAY, **subspace)
        weights, gradients = jax.tree.map(jnp.asarray, numpy_problem())
        return galore_trajectory(tx, weights, gradients)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_every_step_of_the_algorithm_in_numpy(side, name):
    found = numpy_problem_by_galore(side)[name]
    assert found.dtype == np.float64
    expected = numpy_trajectory(name, side)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sign_rule", ["none", "always first"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_gradients_show_the_sign_rule_of_later_refreshes(name, sign_rule):
    found = numpy_problem_by_galore("short")[name]
    error = np.abs(found - numpy_trajectory(name, "short", sign_rule)).max(axis=(1, 2))
    assert error[GAP:].max() > 1e-3
