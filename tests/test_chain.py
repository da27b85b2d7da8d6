"""The user's line: what stands before and after ``galore(...)`` in a chain."""

import functools
import warnings

import chex
import jax
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import galore

SHAPES = {"bias": (6,), "kernel": (4, 6)}
RANK, GAP, STEPS = 2, 5, 12  # refreshes at 0, 5 and 10
SUBSPACE = {"rank": RANK, "update_proj_gap": GAP}
ADAFACTOR = {
    "min_dim_size_to_factor": 2,
    "multiply_by_parameter_scale": False,
    "weight_decay_rate": 0.02,
}
BARE = "galore_optax.chain"


def normal(seed, *batch):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((*batch, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


GRADIENTS = normal(1, STEPS)


def train(tx, gradients=GRADIENTS):
    """The parameters after each step, and the last state."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = normal(0)
    state, trajectory = tx.init(params), []
    for t in range(STEPS):
        params, state = step(params, state, {name: g[t] for name, g in gradients.items()})
        trajectory.append(params)
    return {name: np.stack([params[name] for params in trajectory]) for name in SHAPES}, state


def assert_same(trajectory, expected, atol=1e-6):
    chex.assert_trees_all_close(trajectory, expected, rtol=0, atol=atol)


# Of each optimizer the inner transformation, the preset, and the moments in its state.
OPTIMIZERS = {
    "adamw": (
        lambda: optax.adamw(0.1, weight_decay=0.2),
        lambda: galore_optax.galore_adamw(0.1, weight_decay=0.2, **SUBSPACE),
        {"mu": (2, 6), "nu": (2, 6)},
    ),
    "adafactor": (
        lambda: optax.adafactor(0.1, **ADAFACTOR),
        lambda: galore_optax.galore_adafactor(0.1, **ADAFACTOR, **SUBSPACE),
        {"v_row": (2,), "v_col": (6,)},
    ),
    "lion": (
        lambda: optax.lion(0.01, weight_decay=0.2),
        lambda: galore_optax.galore_lion(0.01, weight_decay=0.2, **SUBSPACE),
        {"mu": (2, 6)},
    ),
    "sgd": (
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: galore_optax.galore_sgd(0.1, momentum=0.9, **SUBSPACE),
        {"trace": (2, 6)},
    ),
}
LINES = {
    "chain": lambda inner, preset: galore_optax.chain(galore(**SUBSPACE), inner()),
    "argument": lambda inner, preset: galore(inner(), **SUBSPACE),
    "preset": lambda inner, preset: preset(),
}


@functools.cache
def trained(line, name):
    inner, preset, _ = OPTIMIZERS[name]
    return train(LINES[line](inner, preset))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("line", ["chain", "preset"])
def test_all_ways_to_write_the_line_train_alike(line, name):
    assert_same(trained(line, name)[0], trained("argument", name)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("line", LINES)
def test_moments_of_matrices_have_the_rank_of_the_subspace(line, name):
    state = trained(line, name)[1]
    for moment, shape in OPTIMIZERS[name][2].items():
        moment = optax.tree.get(state, moment)
        assert moment["kernel"].shape == shape


def adamw_by_hand(rate, decay, scale, b1=0.9, b2=0.999, eps=1e-8):
    """GaLore with AdamW in NumPy and float64, with the learning rate ``rate(step)``."""
    params = {name: x.astype(np.float64) for name, x in normal(0).items()}
    m, v, p = {"bias": 0.0, "kernel": 0.0}, {"bias": 0.0, "kernel": 0.0}, None
    trajectory = []
    for t in range(STEPS):
        gradient = {name: g[t].astype(np.float64) for name, g in GRADIENTS.items()}
        if t % GAP == 0:
            new = np.linalg.svd(gradient["kernel"])[0][:, :RANK]
            p = new if p is None else new * np.sign(np.sum(new * p, axis=0))
        gradient["kernel"] = p.T @ gradient["kernel"]
        for name, g in gradient.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            u = m[name] / (1 - b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
            u = scale * p @ u if name == "kernel" else u
            params[name] = params[name] - rate(t) * (u + decay * params[name])
        trajectory.append(dict(params))
    return {name: np.stack([params[name] for params in trajectory]) for name in SHAPES}


def test_decay_and_rate_after_galore_are_those_of_adamw():
    """Only what is inside is scaled, so decay and schedule give the same outside as inside."""
    schedule = optax.linear_schedule(0.1, 0.01, STEPS)
    outside = optax.chain(
        galore(optax.scale_by_adam(), **SUBSPACE),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule),
    )
    inside = galore(optax.adamw(schedule, weight_decay=0.1), **SUBSPACE)
    expected = adamw_by_hand(lambda t: 0.1 - 0.09 * t / STEPS, decay=0.1, scale=0.25)
    assert_same(train(outside)[0], expected, atol=1e-4)
    assert_same(train(inside)[0], expected, atol=1e-4)


def test_what_stands_before_galore_sees_the_full_gradient():
    line = galore_optax.chain(
        optax.clip_by_global_norm(1.0), galore(**SUBSPACE), optax.sgd(0.1, momentum=0.9)
    )
    norms = np.sqrt(
        np.sum(GRADIENTS["bias"] ** 2, axis=1) + np.sum(GRADIENTS["kernel"] ** 2, axis=(1, 2))
    )
    assert norms.min() > 1
    clipped = {
        "bias": GRADIENTS["bias"] / norms[:, None],
        "kernel": GRADIENTS["kernel"] / norms[:, None, None],
    }
    by_hand = train(galore(optax.sgd(0.1, momentum=0.9), **SUBSPACE), clipped)[0]
    assert_same(train(line)[0], by_hand)


ADAMW_MEMBERS = (
    optax.scale_by_adam(),
    optax.add_decayed_weights(0.2),
    optax.scale_by_learning_rate(0.1),
)


@pytest.mark.parametrize(
    "members",
    [ADAMW_MEMBERS, (optax.chain(*ADAMW_MEMBERS),)],
    ids=["members", "nested_chain"],
)
def test_all_that_stands_after_galore_runs_in_the_subspace(members):
    trajectory, state = train(galore_optax.chain(galore(**SUBSPACE), *members))
    assert optax.tree.get(state, "nu")["kernel"].shape == (2, 6)
    assert_same(trajectory, trained("argument", "adamw")[0])


def test_galore_with_an_inner_transformation_stays_one_member():
    """What follows it sees whole matrices, as after any other transformation."""
    tx = galore_optax.chain(galore(optax.scale_by_adam(), **SUBSPACE), optax.trace(0.9))
    state = tx.init(normal(0))
    assert optax.tree.get(state, "mu")["kernel"].shape == (2, 6)
    assert optax.tree.get(state, "trace")["kernel"].shape == (4, 6)


def test_chain_without_galore_is_that_of_optax():
    ours = galore_optax.chain(optax.clip(0.5), optax.adamw(0.1))
    assert_same(train(ours)[0], train(optax.chain(optax.clip(0.5), optax.adamw(0.1)))[0], atol=0)


def test_two_bare_galores_in_one_chain_are_refused():
    with pytest.raises(ValueError, match="arguments 1, 2"):
        galore_optax.chain(optax.clip(1.0), galore(rank=2), galore(rank=1), optax.adamw(0.1))


def test_extra_args_pass_through_the_chain():
    def update(updates, state, params=None, *, factor, **extra_args):
        return optax.tree.scale(factor, updates), state

    scaling = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = galore_optax.chain(scaling, galore(rank=RANK), scaling)
    params = normal(0)
    step = jax.jit(lambda factor: tx.update(params, tx.init(params), params, factor=factor)[0])
    chex.assert_trees_all_close(step(3.0), optax.tree.scale(9.0, step(1.0)), rtol=1e-5)


def optax_chain(rank=RANK, scale=0.25, learning_rate=0.1):
    """The line as written with Optax's own chain, which gives Adam whole matrices."""
    bare = galore(rank=rank, update_proj_gap=GAP, scale=scale)
    return optax.chain(bare, optax.adamw(learning_rate))


@pytest.mark.filterwarnings(f"ignore:.*{BARE}:UserWarning")
def test_optax_chain_trains_with_moments_of_full_size():
    target, tx = normal(2), optax_chain()

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    params = normal(0)
    state, losses = tx.init(params), []
    for _ in range(100):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < 0.1 * losses[0]
    assert optax.tree.get(state, "mu")["kernel"].shape == (4, 6)


@pytest.mark.filterwarnings(f"ignore:.*{BARE}:UserWarning")
def test_in_optax_chain_adam_cancels_the_scale():
    assert_same(train(optax_chain(scale=0.25))[0], train(optax_chain(scale=1.0))[0], atol=1e-5)


def caught_of(function):
    """What the function warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return caught


def test_optax_chain_warns_once_and_names_ours():
    tx, params = optax_chain(), normal(0)
    (warning,) = caught_of(lambda: tx.init(params))
    assert warning.category is UserWarning
    assert BARE in str(warning.message)
    assert not caught_of(lambda: tx.init(params))
    assert not caught_of(lambda: jax.eval_shape(tx.init, params))
    assert not caught_of(
        lambda: jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    )


@pytest.mark.parametrize("line", LINES)
def test_no_warning_where_galore_has_an_inner_transformation(line):
    inner, preset, _ = OPTIMIZERS["adamw"]
    tx, params = LINES[line](inner, preset), normal(0)
    assert not caught_of(lambda: tx.init(params))
    assert not caught_of(lambda: jax.eval_shape(tx.update, params, tx.init(params), params))


def test_bare_galore_at_the_end_of_a_chain_warns_too():
    tx = galore_optax.chain(optax.clip(1.0), galore(rank=RANK))
    with pytest.warns(UserWarning, match=BARE):
        tx.init(normal(0))
