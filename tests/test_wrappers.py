"""Optax's wrappers around galore and inside it, and trees with odd leaves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import DimensionNumbers, galore

SHAPES = {"bias": (6,), "other": (5, 3), "kernel": (4, 6)}
SUBSPACE = {"rank": 2, "update_proj_gap": 3}
STEPS = 7


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def adam():
    return galore(optax.scale_by_adam(), **SUBSPACE)


def adamw():
    return galore(optax.adamw(0.1, weight_decay=0.2), **SUBSPACE)


def without(tree, *names):
    return {name: leaf for name, leaf in tree.items() if name not in names}


def run(tx, params, all_gradients):
    """The updates of each step, and the last state."""

    @jax.jit
    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return updates, state, optax.apply_updates(params, updates)

    state, all_updates = tx.init(params), []
    for gradients in all_gradients:
        updates, state, params = step(gradients, state, params)
        all_updates.append(updates)
    return all_updates, state


GRADIENTS = [normal(1 + step) for step in range(4)]


@functools.cache
def updates_without_other():
    """What galore makes of a tree in which the other matrix never was."""
    return run(adamw(), without(normal(0), "other"), [without(g, "other") for g in GRADIENTS])


def test_masked_around_leaves_masked_leaves_alone():
    tx = optax.masked(adamw(), {"bias": True, "other": False, "kernel": True})
    updates, state = run(tx, normal(0), GRADIENTS)
    for step, expected in enumerate(updates_without_other()[0]):
        chex.assert_trees_all_close(without(updates[step], "other"), expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal(updates[step]["other"], GRADIENTS[step]["other"])
    assert isinstance(state.inner_state.subspace.right["other"], optax.MaskedNode)
    assert isinstance(optax.tree.get(state, "mu")["other"], optax.MaskedNode)


def test_masked_inside_projects_masked_leaves_and_back():
    mask = {"bias": True, "other": False, "kernel": True}
    tx = galore(optax.masked(optax.adamw(0.1, weight_decay=0.2), mask), **SUBSPACE)
    updates, state = run(tx, normal(0), GRADIENTS[:1])
    chex.assert_trees_all_close(
        without(updates[0], "other"), updates_without_other()[0][0], rtol=1e-5
    )
    u, s, vt = np.linalg.svd(GRADIENTS[0]["other"], full_matrices=False)
    np.testing.assert_allclose(
        updates[0]["other"], 0.25 * (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-4, atol=1e-6
    )
    assert isinstance(optax.tree.get(state, "mu")["other"], optax.MaskedNode)


LABELS = {"bias": "galore", "other": "sgd", "kernel": "galore"}


def test_partition_around_gives_each_leaf_its_own_transformation():
    tx = optax.partition({"galore": adamw(), "sgd": optax.sgd(0.5)}, LABELS)
    updates, state = run(tx, normal(0), GRADIENTS)
    for step, expected in enumerate(updates_without_other()[0]):
        chex.assert_trees_all_close(without(updates[step], "other"), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(updates[step]["other"], -0.5 * GRADIENTS[step]["other"])
    assert optax.tree.get(state, "mu")["kernel"].shape == (2, 6)


def test_partition_inside_sees_each_leaf_at_its_rank():
    inner = optax.partition(
        {"galore": optax.adamw(0.1, weight_decay=0.2), "sgd": optax.sgd(0.5)},
        lambda params: {name: LABELS[name] for name in params},
    )
    updates, _ = run(galore(inner, **SUBSPACE), normal(0), GRADIENTS[:1])
    chex.assert_trees_all_close(
        without(updates[0], "other"), updates_without_other()[0][0], rtol=1e-5
    )
    u, s, vt = np.linalg.svd(GRADIENTS[0]["other"], full_matrices=False)
    np.testing.assert_allclose(
        updates[0]["other"], -0.5 * 0.25 * (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-4, atol=1e-6
    )


def test_two_galores_of_different_rank_in_one_partition():
    labels = {"bias": "two", "other": "one", "kernel": "two"}
    tx = optax.partition({"one": galore(optax.scale_by_adam(), rank=1), "two": adamw()}, labels)
    state = tx.init(normal(0)).inner_states
    assert state["one"].inner_state.subspace.right["other"].shape == (3, 1)
    assert state["two"].inner_state.subspace.left["kernel"].shape == (4, 2)


def test_multi_steps_around_counts_and_refreshes_by_whole_steps():
    tx = optax.MultiSteps(adamw(), every_k_schedule=2)
    params = without(normal(0), "other")
    micro = [without(g, "other") for g in GRADIENTS for _ in range(2)]
    updates, state = run(tx, params, micro)
    for step, expected in enumerate(updates_without_other()[0]):
        chex.assert_trees_all_equal(updates[2 * step], optax.tree.zeros_like(params))
        chex.assert_trees_all_close(updates[2 * step + 1], expected, rtol=1e-5, atol=1e-6)
    galore_state = state.inner_opt_state
    assert int(galore_state.step) == 4
    assert int(galore_state.subspace.refreshes["kernel"]) == 2  # at steps 0 and 3


def test_lookahead_around_moves_slow_parameters_towards_fast_ones():
    """Like galore alone for two steps, then half of the way back to where these started."""
    start = without(normal(0), "other")
    tx = optax.lookahead(adamw(), sync_period=2, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(start)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradients in GRADIENTS[:2]:
        updates, state = update(without(gradients, "other"), state, params)
        params = optax.apply_updates(params, updates)
    moved = optax.tree.add(*updates_without_other()[0][:2])
    expected = jax.tree.map(lambda w, u: w + 0.5 * u, start, moved)
    chex.assert_trees_all_close(params.fast, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(params.slow, expected, rtol=1e-5, atol=1e-6)


@functools.cache
def guarded():
    tx = optax.apply_if_finite(adamw(), max_consecutive_errors=5)
    return tx, jax.jit(tx.update)


def guarded_run(poisoned_at, value, leaf):
    """Updates and galore's states of a run in which one more step has a bad gradient."""
    tx, update = guarded()
    params = normal(0)
    state, all_updates, states = tx.init(params), [], []
    for step in range(STEPS):
        if step == poisoned_at:
            poisoned = jax.tree.map(np.copy, normal(99))
            poisoned[leaf].flat[0] = value
            nothing, state = update(poisoned, state, params)
            chex.assert_trees_all_equal(nothing, optax.tree.zeros_like(params))
        updates, state = update(normal(1 + step), state, params)
        params = optax.apply_updates(params, updates)
        all_updates.append(updates)
        states.append(state.inner_state)
    return all_updates, states


@functools.cache
def clean_run():
    return guarded_run(None, 0.0, "bias")


@pytest.mark.parametrize("leaf", ["bias", "kernel"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize(
    "poisoned_at", [0, 2, 3], ids=["first_refresh", "ordinary_step", "later_refresh"]
)
def test_apply_if_finite_around_recovers_as_if_nothing_had_been(poisoned_at, value, leaf):
    all_updates, states = guarded_run(poisoned_at, value, leaf)
    chex.assert_trees_all_equal(states, clean_run()[1])
    chex.assert_trees_all_equal(all_updates, clean_run()[0])


ZEROS = np.zeros(6, np.float32)
ODD_LEAVES = {
    "none": {"absent": None},
    "scalar": {"temperature": np.float32(2.0)},
    "python_float": {"temperature": 2.0},
    "empty_trees": {"dict": {}, "tuple": ((), [])},
    "no_elements": {"columns": ZEROS.reshape(6, 1)[:, :0], "rows": ZEROS[None, :0], "v": ZEROS[:0]},
    "no_layers": {"stacked": np.zeros((0, 4, 6), np.float32)},
    "one_element": {"row": ZEROS[None], "single": ZEROS[None, :1]},
}


@pytest.mark.parametrize("name", ODD_LEAVES)
def test_odd_leaves_beside_a_matrix_do_no_harm(name):
    params = {"kernel": normal(0)["kernel"], **ODD_LEAVES[name]}
    tx = galore(
        optax.trace(0.9), rank=2, scale=1.0, weight_dimension_numbers=DimensionNumbers(-2, -1)
    )
    (updates,), _ = run(tx, params, [params])
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, jax.tree.map(jnp.asarray, params))
    u, s, vt = np.linalg.svd(params["kernel"], full_matrices=False)
    best = {**params, "kernel": (u[:, :2] * s[:2]) @ vt[:2]}
    chex.assert_trees_all_close(updates, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("params", [{}, (), [{}, None]], ids=str)
def test_trees_without_leaves_stay_as_they_are(params):
    tx = adamw()
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates == params
    assert int(state.step) == 1


@pytest.mark.parametrize("params", [np.float32(2.0), np.ones(3, np.float32)], ids=["()", "(3,)"])
def test_trees_without_a_matrix_are_those_of_the_inner_transformation(params):
    with pytest.warns(UserWarning, match="galore projects nothing"):
        (updates,), _ = run(adamw(), params, [params])
    (expected,), _ = run(optax.adamw(0.1, weight_decay=0.2), params, [params])
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
