"""Refreshes that are staggered, lazy or by hand, and what the state says about them."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

NUMBERS = galore_optax.DimensionNumbers(-2, -1)


def gradients(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def counting_svd():
    executed = collections.Counter()

    def projector(matrix, rank):
        jax.debug.callback(functools.partial(executed.update, ["svd"]))
        return galore_optax.projectors.svd(matrix, rank)

    return projector, executed


def refreshes_by_step(tx, stream):
    """How often each matrix was refreshed on each step, (steps, matrices), and the last state."""
    update = jax.jit(tx.update)
    state, counts = None, []
    for grads in stream:
        state = tx.init(grads) if state is None else state
        _, state = update(grads, state, grads)
        jax.effects_barrier()
        leaves = jax.tree.leaves(state.subspace.refreshes)
        counts.append(np.concatenate([np.ravel(x) for x in leaves]))
    return np.diff(np.stack(counts), axis=0, prepend=0), state


SHAPES = {"a": (6, 9), "stack": (4, 5, 7), "z": (8, 6)}


@pytest.mark.parametrize("gap", [1, 2, 4, 7])
def test_staggered_refreshes_are_spread_evenly_and_each_comes_every_gap_steps(gap):
    projector, executed = counting_svd()
    tx = galore_optax.galore(
        optax.identity(),
        rank=2,
        update_proj_gap=gap,
        stagger=True,
        projector=projector,
        weight_dimension_numbers=NUMBERS,
    )
    steps = 3 * gap + 1
    by_step, _ = refreshes_by_step(tx, [gradients(i, SHAPES) for i in range(steps)])
    matrices = 6
    np.testing.assert_array_equal(by_step[0], 1)
    per_step = by_step[1:].sum(axis=1)
    assert per_step.max() == -(-matrices // gap)
    assert executed["svd"] == by_step.sum()
    for matrix in by_step[1:].T:
        done = np.flatnonzero(matrix)
        assert done[0] < gap
        np.testing.assert_array_equal(np.diff(done), gap)


def test_without_stagger_all_are_refreshed_on_the_same_steps():
    tx = galore_optax.galore(
        optax.identity(), rank=2, update_proj_gap=3, weight_dimension_numbers=NUMBERS
    )
    by_step, _ = refreshes_by_step(tx, [gradients(i, SHAPES) for i in range(7)])
    np.testing.assert_array_equal(by_step, np.tile([[1], [0], [0], [1], [0], [0], [1]], (1, 6)))


def test_staggered_matrix_that_was_late_goes_back_to_its_own_steps():
    tx = galore_optax.galore(
        optax.identity(),
        rank=2,
        update_proj_gap=4,
        stagger=True,
        weight_dimension_numbers=NUMBERS,
    )
    shapes = {"stack": (4, 5, 7)}
    stream = [gradients(i, shapes) for i in range(13)]
    expected, _ = refreshes_by_step(tx, stream)
    [own_step] = np.flatnonzero(expected[4:8, 2]) + 4
    stream[own_step] = {"stack": stream[own_step]["stack"].at[2].set(jnp.nan)}
    found, _ = refreshes_by_step(tx, stream)
    expected[own_step, 2], expected[own_step + 1, 2] = 0, 1
    np.testing.assert_array_equal(found, expected)


def still_stream(steps, shape=(8, 12)):
    """Gradients of other values in one and the same subspace."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 3)))[0] for size in shape)
    return [
        {"w": jnp.asarray(u @ rng.normal(size=(3, 3)) @ v.T, jnp.float32)} for _ in range(steps)
    ]


def moving_stream(steps, shape=(24, 32)):
    return [gradients(i, {"w": shape}) for i in range(steps)]


@pytest.mark.parametrize("gap", [1, 3])
def test_lazy_refresh_of_a_subspace_that_stands_still(gap):
    # Similarities are queued at T, ..., 5 T. The queue is full then, and from there on the gap
    # doubles at each refresh: to 2 T at 5 T, due next at the multiple 6 T; to 4 T there, due at
    # 8 T; to 8 T there, due at 16 T; and so on.
    projector, executed = counting_svd()
    tx = galore_optax.galore(
        optax.identity(), rank=3, update_proj_gap=gap, refresh="lazy", projector=projector
    )
    steps = 100 * gap
    grads = still_stream(7)
    stream = [grads[i % 7] for i in range(steps)]
    by_step, state = refreshes_by_step(tx, stream)
    expected = [gap * k for k in (0, 1, 2, 3, 4, 5, 6, 8, 16, 32, 64)]
    np.testing.assert_array_equal(np.flatnonzero(by_step), expected)
    assert executed["svd"] == state.subspace.refreshes["w"] == 11


def test_lazy_refresh_of_a_subspace_that_moves_is_periodic():
    projector, executed = counting_svd()
    tx = galore_optax.galore(
        optax.identity(), rank=3, update_proj_gap=3, refresh="lazy", projector=projector
    )
    by_step, state = refreshes_by_step(tx, moving_stream(30))
    np.testing.assert_array_equal(np.flatnonzero(by_step), np.arange(0, 30, 3))
    assert executed["svd"] == 10
    # By the definition, from the bases themselves: those of the last two refreshes.
    bases = [np.linalg.svd(np.asarray(g["w"], np.float64))[0][:, :3] for g in moving_stream(30)]
    overlap = np.sum((bases[27].T @ bases[24]) ** 2) / 3
    similarity = (overlap - 3 / 24) / (1 - 3 / 24)
    np.testing.assert_allclose(state.subspace.similarities["w"][-1], similarity, atol=1e-5)


def test_each_layer_of_a_stack_is_lazy_on_its_own():
    tx = galore_optax.galore(
        optax.identity(),
        rank=3,
        update_proj_gap=1,
        refresh=galore_optax.Lazy(threshold=0.5, queue=2),
        weight_dimension_numbers=NUMBERS,
    )
    still, moving = still_stream(16, (24, 32)), moving_stream(16)
    stream = [{"w": jnp.stack([a["w"], b["w"]])} for a, b in zip(still, moving, strict=True)]
    by_step, _ = refreshes_by_step(tx, stream)
    # Queued at 1 and 2, where the gap becomes 2, then 4 at 4, 8 at 8.
    np.testing.assert_array_equal(np.flatnonzero(by_step[:, 0]), [0, 1, 2, 4, 8])
    np.testing.assert_array_equal(by_step[:, 1], 1)


def test_lazy_and_staggered_refreshes_compose():
    tx = galore_optax.galore(
        optax.identity(),
        rank=3,
        update_proj_gap=4,
        refresh=galore_optax.Lazy(queue=1),
        stagger=True,
        weight_dimension_numbers=NUMBERS,
    )
    still = still_stream(5)
    stream = [{"w": jnp.stack([still[i % 5]["w"]] * 4)} for i in range(40)]
    by_step, _ = refreshes_by_step(tx, stream)
    for matrix, phase in enumerate((0, 1, 2, 3)):
        # The first refresh of its own steps finds the subspace where it was: 8 steps, then 16, ...
        first = phase or 4
        due = [0, first]
        for gap in (8, 16, 32):
            due.append(min(s for s in range(phase, 99, gap) if s > due[-1]))
        np.testing.assert_array_equal(
            np.flatnonzero(by_step[:, matrix]), [s for s in due if s < 40]
        )
    assert by_step[1:].sum(axis=1).max() == 1


def test_update_without_refresh_has_no_factorization_at_all():
    tx = galore_optax.chain(
        optax.clip_by_global_norm(1.0), galore_optax.galore(rank=2), optax.adamw(0.1)
    )
    grads = gradients(0, {"w": (6, 9)})
    state = tx.init(grads)

    def text(refresh):
        update = functools.partial(tx.update, refresh=refresh)
        return jax.jit(update).lower(grads, state, grads).as_text()

    assert "gesdd" in text(None)
    assert "gesdd" in text(True)
    assert "custom_call" not in text(False)
    assert "stablehlo.case" not in text(False)


@pytest.mark.parametrize("projector", ["svd", "power_iteration", "gaussian"])
def test_refreshes_by_hand_give_the_trajectory_of_due_ones(projector):
    tx = galore_optax.galore_adamw(0.1, rank=2, update_proj_gap=3, projector=projector)
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    stream = [gradients(i, {"w": (6, 9)}) for i in range(7)]
    params = {"w": jnp.zeros((6, 9))}
    update = jax.jit(tx.update)
    without = jax.jit(functools.partial(tx.update, refresh=False))
    refresh = jax.jit(functools.partial(galore_optax.refresh, tx))
    state = by_hand = tx.init(params)
    for step, grads in enumerate(stream):
        expected, state = update(grads, state, params)
        if step % 3 == 0:
            by_hand = refresh(grads, by_hand, params)
        found, by_hand = without(grads, by_hand, params)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(by_hand[1].subspace.refreshes, state[1].subspace.refreshes)


def test_refresh_changes_the_subspace_alone():
    tx = galore_optax.galore_adamw(0.1, rank=2)
    params = gradients(0, {"w": (6, 9), "b": (9,)})
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    after = galore_optax.refresh(tx, gradients(1, {"w": (6, 9), "b": (9,)}), state, params)
    chex.assert_trees_all_equal((after.step, after.inner), (state.step, state.inner))
    assert after.subspace.refreshes["w"] == 2
    assert np.abs(after.subspace.left["w"] - state.subspace.left["w"]).max() > 0.1


def test_refresh_by_hand_under_vmap_over_seeds():
    tx = galore_optax.galore_sgd(1.0, rank=2, scale=1.0)
    grads = jax.vmap(lambda key: {"w": jax.random.normal(key, (6, 9))})(
        jax.random.split(jax.random.key(0), 3)
    )
    state = jax.vmap(tx.init)(grads)
    state = jax.vmap(functools.partial(galore_optax.refresh, tx))(grads, state)
    step = jax.vmap(functools.partial(tx.update, refresh=False))
    assert "custom_call" not in jax.jit(step).lower(grads, state, grads).as_text()
    updates, _ = step(grads, state, grads)
    for update, grad in zip(updates["w"], np.asarray(grads["w"], np.float64), strict=True):
        u = np.linalg.svd(grad)[0][:, :2]
        np.testing.assert_allclose(update, -u @ (u.T @ grad), atol=1e-5)


def test_metrics_are_those_of_the_bases():
    tx = galore_optax.chain(
        galore_optax.galore(
            rank=2, update_proj_gap=2, diagnostics=True, weight_dimension_numbers=NUMBERS
        ),
        optax.adam(0.1),
    )
    shapes = {"stack": (2, 5, 7), "w": (9, 6)}
    stream = [gradients(i, shapes) for i in range(4)]
    state = tx.init(stream[0])
    update = jax.jit(tx.update)
    for grads in stream:
        _, state = update(grads, state, grads)
    layers = [
        [np.asarray(g["stack"][0]), np.asarray(g["stack"][1]), np.asarray(g["w"]).T] for g in stream
    ]
    first, second = ([np.linalg.svd(g)[0][:, :2] for g in layers[step]] for step in (0, 2))
    energies = [
        np.sum((p.T @ g) ** 2) / np.sum(g**2) for p, g in zip(second, layers[3], strict=True)
    ]
    overlaps = [np.sum((p.T @ q) ** 2) / 2 for p, q in zip(first, second, strict=True)]
    found = galore_optax.metrics(state)
    assert found["refreshes"] == 6
    np.testing.assert_allclose(found["captured_energy"], np.mean(energies), rtol=1e-4)
    np.testing.assert_allclose(found["captured_energy_min"], min(energies), rtol=1e-4)
    np.testing.assert_allclose(found["overlap"], np.mean(overlaps), rtol=1e-4)


def test_metrics_without_diagnostics_or_galore():
    params = gradients(0, {"w": (6, 9)})
    state = optax.chain(galore_optax.galore_adamw(0.1, rank=2)).init(params)
    assert galore_optax.metrics(state) == {"refreshes": 0}
    assert galore_optax.metrics(optax.adamw(0.1).init(params)) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_entry_of_a_large_gradient_is_seen(value):
    projector, executed = counting_svd()
    tx = galore_optax.galore(optax.identity(), rank=2, projector=projector)
    grads = {"w": jnp.ones((150, 200)).at[70, 3].set(value)}
    _, state = jax.jit(tx.update)(grads, tx.init(grads))
    jax.effects_barrier()
    assert executed["svd"] == state.subspace.refreshes["w"] == 0
