"""That what counts beside galore counts steps, where several gradients make one."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import galore

SHAPES = {"bias": (6,), "kernel": (4, 6)}
RANK, K = 2, 3
SUBSPACE = {"rank": RANK, "update_proj_gap": 5}
ACCUMULATING = SUBSPACE | {"accumulation_steps": K}
SCHEDULE = optax.exponential_decay(1.0, 1, 0.5)


def normal(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def assert_same(found, expected, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=0, atol=atol)


def is_rate(path, _):
    return any(getattr(key, "name", None) == "hyperparams" for key in path)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: galore_optax.chain(
            galore(optax.scale_by_adam(), **k),
            optax.trace(0.5),
            optax.scale_by_learning_rate(SCHEDULE),
        ),
        lambda k: galore_optax.chain(
            galore_optax.chain(optax.clip(0.5), galore(optax.identity(), **k)),
            optax.ema(0.9),
            optax.scale_by_schedule(SCHEDULE),
        ),
        lambda k: galore_optax.chain(
            optax.clip(0.5), galore(**k), optax.inject_hyperparams(optax.adamw)(SCHEDULE)
        ),
        lambda k: galore_optax.galore_adamw_8bit(SCHEDULE, inject_learning_rate=True, **k),
        lambda k: galore_optax.galore_lion(SCHEDULE, **k),
        lambda k: optax.masked(
            galore_optax.chain(galore(optax.sgd(1.0), **k), optax.scale_by_schedule(SCHEDULE)), True
        ),
    ],
    ids=["adam", "nested", "bare", "injected", "preset", "masked around"],
)
def test_what_follows_counts_steps_and_not_the_gradients_of_one(make):
    """A gradient given K times is a step that it makes alone."""
    alone, several = make(SUBSPACE), make(ACCUMULATING)
    params = normal(0)
    state, found = alone.init(params), several.init(params)
    update, micro = jax.jit(alone.update), jax.jit(several.update)
    structure = jax.tree.structure(found)
    for t in range(3):
        gradient = normal(t + 1)
        expected, state = update(gradient, state, params)
        for i in range(K):
            updates, found = micro(gradient, found, params)
            if i < K - 1:
                chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        assert_same(updates, expected, atol=1e-5)
        assert jax.tree.structure(found) == structure
    rates = [
        [float(x) for _, x in optax.tree.get_all_with_path(s, "learning_rate", filtering=is_rate)]
        for s in (found, state)
    ]
    assert rates[0] == rates[1]


def test_a_refresh_by_hand_is_no_step_for_what_follows():
    tx = galore_optax.chain(
        galore(optax.identity(), **ACCUMULATING), optax.scale_by_schedule(SCHEDULE)
    )
    params = normal(0)
    state = tx.init(params)
    refreshed = galore_optax.refresh(tx, params, state, params)
    assert refreshed[0].subspace.refreshes["kernel"] == 1
    chex.assert_trees_all_equal(refreshed[1], state[1])


def test_a_wrapper_that_hides_steps_from_what_counts_them_is_refused():
    hidden = optax.masked(galore(optax.identity(), **ACCUMULATING), True)
    with pytest.raises(ValueError, match=r"argument 1 of chain has a galore with accumulation_s"):
        galore_optax.chain(optax.clip(1.0), hidden, optax.scale_by_schedule(SCHEDULE)).init(
            normal(0)
        )
    # Without a state there is nothing to count.
    galore_optax.chain(hidden, optax.scale(0.1)).init(normal(0))
    # But it would decay with each gradient.
    with pytest.raises(ValueError, match="argument 0 of chain has a galore with accumulation_s"):
        galore_optax.chain(hidden, optax.scale(0.1), optax.add_decayed_weights(0.1)).init(normal(0))


@pytest.mark.parametrize("name", ["galore_adamw", "galore_lion", "galore_sgd", "galore_adafactor"])
def test_a_learning_rate_injected_around_an_accumulating_preset_warns(name):
    preset = getattr(galore_optax, name)
    parameters = inspect.signature(preset).parameters
    options = dict(ACCUMULATING)
    if name == "galore_adafactor":
        options["multiply_by_parameter_scale"] = False
    others = tuple(parameters.keys() - {"learning_rate"})
    made = optax.inject_hyperparams(preset, static_args=others)
    with pytest.warns(UserWarning, match=f"rate of {name} is an array.* counts gradients, 3 for"):
        made(SCHEDULE, **options).init(normal(0))
    preset(SCHEDULE, **options)  # as it is right, there is none, which would be an error here


@pytest.mark.parametrize("preset", [galore_optax.galore_adamw, galore_optax.fira_adamw])
def test_an_injected_learning_rate_is_that_of_the_argument_and_can_be_set(preset):
    plain, injected = (preset(0.1, inject_learning_rate=x, **SUBSPACE) for x in (False, True))
    half = preset(0.05, **SUBSPACE)
    params, gradient = normal(0), normal(1)
    state = injected.init(params)
    assert float(optax.tree.get(state, "learning_rate", filtering=is_rate)) == np.float32(0.1)
    assert_same(
        injected.update(gradient, state, params)[0],
        plain.update(gradient, plain.init(params), params)[0],
    )
    state = optax.tree.set(state, is_rate, learning_rate=0.05)
    assert_same(
        injected.update(gradient, state, params)[0],
        half.update(gradient, half.init(params), params)[0],
    )


@pytest.mark.parametrize("preset", [galore_optax.galore_adamw, galore_optax.fira_adamw])
@pytest.mark.parametrize("rate", [1e-3, 1, SCHEDULE], ids=["float", "int", "schedule"])
def test_an_injected_learning_rate_is_in_float32_and_stays_so(preset, rate):
    """In bfloat16, which the parameters are in, it would be another one."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), normal(0))
    tx = preset(rate, inject_learning_rate=True, **SUBSPACE)
    state = tx.init(params)
    _, new = tx.update(params, state, params)
    for found in (state, new):
        kept = optax.tree.get(found, "learning_rate", filtering=is_rate)
        assert kept.dtype == jnp.float32
        assert not kept.weak_type
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    expected = np.float32(rate(0) if callable(rate) else rate)
    assert optax.tree.get(state, "learning_rate", filtering=is_rate) == expected
