"""Several gradients that make one step, averaged at rank r."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

SHAPES = {"w": (12, 20), "stack": (2, 16, 10), "b": (20,)}
NUMBERS = {"w": galore_optax.DimensionNumbers(), "stack": galore_optax.DimensionNumbers(1, 2)}
NUMBERS["b"] = None
K = 3


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def mean(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def make(inner, k, **arguments):
    return galore_optax.galore(
        inner, rank=4, accumulation_steps=k, weight_dimension_numbers=NUMBERS, **arguments
    )


IDENTITY = make(optax.identity(), K, update_proj_gap=2)
UPDATE = jax.jit(IDENTITY.update)


def by_leaf(**transformations):
    return optax.partition(transformations, lambda params: {name: name for name in params})


@pytest.mark.parametrize(
    ("inner", "projector"),
    [
        (optax.adamw(0.1, weight_decay=0.1), "svd"),
        (
            by_leaf(
                w=optax.sgd(0.1, momentum=0.9),
                stack=optax.lion(0.01),
                b=optax.adamw(0.1, weight_decay=0.1),
            ),
            "gaussian",
        ),
    ],
    ids=["adamw", "by leaf"],
)
def test_steps_between_refreshes_are_those_of_the_mean_gradient(inner, projector):
    accumulating = make(inner, K, projector=projector, update_proj_gap=100)
    plain = make(inner, 1, projector=projector, update_proj_gap=100)
    params = found = expected = tree(0)
    micro_state, state = accumulating.init(params), plain.init(params)
    micro_update, update = jax.jit(accumulating.update), jax.jit(plain.update)
    for step in range(4):
        # The same subspaces for both, of the first gradient; then no refresh is due.
        grads = [tree(10 * step + (i + 2 if step else 1)) for i in range(K)]
        for i, g in enumerate(grads):
            updates, micro_state = micro_update(g, micro_state, found)
            if i < K - 1:
                chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, updates))
            found = jax.tree.map(np.add, found, updates)
        updates, state = update(mean(grads), state, expected)
        expected = jax.tree.map(np.add, expected, updates)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
        chex.assert_trees_all_close(micro_state.inner, state.inner, rtol=1e-4, atol=1e-5)
        assert micro_state.step == state.step == step + 1


def test_a_due_refresh_takes_the_first_gradient_of_its_step():
    params = tree(0)
    state = IDENTITY.init(params)
    counts = []
    for i in range(4 * K):
        _, state = UPDATE(tree(i), state, params)
        counts.append(int(state.subspace.refreshes["w"]))
        if i == 2 * K:
            u = np.linalg.svd(np.asarray(tree(i)["w"], np.float64))[0][:, :4]
            p = np.asarray(state.subspace.left["w"])
            np.testing.assert_allclose(p @ p.T, u @ u.T, atol=1e-4)
    assert counts == [1] * (2 * K) + [2] * (2 * K)


def test_a_refresh_by_hand_in_the_middle_of_a_step_waits_for_the_next():
    params, refresh = tree(0), jax.jit(functools.partial(galore_optax.refresh, IDENTITY))
    _, middle = UPDATE(tree(1), IDENTITY.init(params), params)
    chex.assert_trees_all_equal(refresh(tree(2), middle, params), middle)
    for i in range(K - 1):
        _, middle = UPDATE(tree(i), middle, params)
    assert refresh(tree(2), middle, params).subspace.refreshes["w"] == 2


def test_accumulator_has_rank_r_and_the_state_is_stable():
    tx = make(optax.scale_by_adam(), K)
    params = tree(0)
    state = tx.init(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        state.accumulator.mean,
        {"w": jnp.zeros((4, 20)), "stack": jnp.zeros((2, 16, 4)), "b": jnp.zeros(20)},
    )
    _, after = jax.jit(tx.update)(tree(1), state, params)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    report = galore_optax.memory_report(tx, params)
    assert report.moments == 3 * 4 * (4 * 20 + 2 * 16 * 4 + 20)


def test_the_inner_transformation_runs_once_per_step():
    runs = []

    def count(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return updates, state

    tx = make(optax.GradientTransformation(lambda _: optax.EmptyState(), count), K)
    params = tree(0)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(2 * K):
        _, state = update(tree(i), state)
    jax.effects_barrier()
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError)]
)
def test_bad_accumulation_steps(value, error):
    with pytest.raises(error, match=f"accumulation_steps must be .*got {value!r}"):
        galore_optax.galore(optax.identity(), accumulation_steps=value)


@pytest.mark.parametrize(("made_with", "used_with"), [(1, 2), (2, 1)])
def test_state_of_another_accumulation(made_with, used_with):
    made, used = (make(optax.identity(), steps) for steps in (made_with, used_with))
    state = jax.eval_shape(made.init, tree(0))
    with pytest.raises(ValueError, match="another configuration: it was made with accumulation"):
        jax.eval_shape(used.update, tree(0), state)


@pytest.mark.parametrize(
    ("made_with", "done", "used_with"), [(3, 2, 4), (4, 3, 2), (4, 1, 2), (3, 2, 3)]
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_step_begun_with_another_number_has_the_mean_of_what_it_was_given(
    made_with, done, used_with, version
):
    """Against galore without accumulation, whose gradient is the mean by NumPy."""
    if version == 1 and made_with != used_with:
        pytest.skip("a state of version 1 does not say the number")
    before, after, plain = (
        make(optax.sgd(1.0), k, projector="rows") for k in (made_with, used_with, 1)
    )
    params, grads = tree(0), [tree(i + 1) for i in range(2 * used_with + done)]
    state = before.init(params)
    for g in grads[:done]:
        _, state = before.update(g, state, params)
    state = galore_optax.migrate(galore_optax.as_version(state, version))
    update, begun, found = jax.jit(after.update), 0, []
    for i in range(done, len(grads)):
        updates, state = update(grads[i], state, params)
        if any(np.any(u) for u in jax.tree.leaves(updates)):
            found.append((updates, grads[begun : i + 1]))
            begun = i + 1
    first = max(used_with, done + 1)
    assert [len(given) for _, given in found[:2]] == [first, used_with]
    plain_state = plain.init(params)._replace(
        subspace=state.subspace, step=jnp.asarray(1, jnp.int32)
    )
    for updates, given in found:
        expected, _ = plain.update(mean(given), plain_state, params)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)
