"""Every optimizer against Optax, and the schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from examples.flax_llama import optimizers, schedules
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.model import dimension_numbers
from examples.flax_llama.optimizer_state import schedule_count, skipped_updates, start_anew
from examples.flax_llama.values import RESIDUALS, TRANSPORTS
from galore_optax import _residuals, _transports

STEPS, LR = 10, 0.02


def config(**settings):
    shape = {"hidden": 16, "intermediate": 40, "layers": 2, "heads": 2, "rank": 4, "clip": 0.0}
    return Config(**shape | {"steps": STEPS, "lr": LR, "update_proj_gap": 2} | settings).resolve()


@pytest.fixture(scope="module")
def params():
    """Paths and stacking of a model's parameters, few of them so that compilation is quick."""
    rng = np.random.default_rng(100)

    def leaf(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "embed": {"embedding": leaf(30, 8)},
        "blocks": {
            "mlp": {"down": {"kernel": leaf(2, 12, 8)}, "up": {"kernel": leaf(2, 8, 12)}},
            "mlp_norm": {"scale": leaf(2, 8)},
        },
        "head": {"kernel": leaf(8, 30)},
    }


def gradients_at(params, step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(p.dtype), params)


def trajectory(tx, params, steps=3):
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(gradients_at(params, step), state, params)
        params = jax.tree.map(lambda p, u: p + np.asarray(u), params, updates)
    return params


def constant(**settings):
    return config(schedule="constant", warmup=0.0, **settings)


def mask(params):
    names = {"scale"}
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in names, params)


PLAIN = {
    "adamw": optax.adamw(LR, 0.8, 0.95, 1e-6, weight_decay=0.1, mask=mask),
    "adamw_8bit": galore_optax.adamw_8bit(LR, 0.8, 0.95, 1e-6, weight_decay=0.1, mask=mask),
    "lion": optax.lion(LR, 0.8, 0.95, weight_decay=0.1, mask=mask),
    "sgd": optax.chain(
        optax.trace(0.7), optax.add_decayed_weights(0.1, mask), optax.scale_by_learning_rate(LR)
    ),
    # Optax does not multiply Adafactor's decay by the learning rate.
    "adafactor": optax.adafactor(
        LR,
        min_dim_size_to_factor=3,
        multiply_by_parameter_scale=False,
        weight_decay_rate=0.1 * LR,
        weight_decay_mask=mask,
    ),
}
SETTINGS = {"weight_decay": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-6}


def of_each_layer(tx):
    """A transformation that sees each layer of a stack as a parameter of its own."""

    def unstacked(params):
        rest = {name: x for name, x in params.items() if name != "blocks"}
        layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(2)]
        return rest | {f"blocks{i}": layer for i, layer in enumerate(layers)}

    def update(updates, state, params):
        updates, state = tx.update(unstacked(updates), state, unstacked(params))
        layers = [updates.pop(f"blocks{i}") for i in range(2)]
        return updates | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}, state

    return optax.GradientTransformation(lambda params: tx.init(unstacked(params)), update)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("in_galore", [False, True])
def test_an_optimizer_is_that_of_optax(params, name, in_galore):
    settings = SETTINGS | ({"momentum": 0.7} if name == "sgd" else {})
    expected = PLAIN[name]
    if in_galore:
        numbers = None if name == "adafactor" else dimension_numbers
        expected = galore_optax.galore(
            expected, rank=4, update_proj_gap=2, weight_dimension_numbers=numbers
        )
    if name == "adafactor":  # whose clipping is of each layer by itself
        expected = of_each_layer(expected)
    chosen = f"galore_{name}" if in_galore else name
    tx = optimizers.make_optimizer(constant(optimizer=chosen, **settings))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        trajectory(tx, params),
        trajectory(expected, params),
    )


def test_flora_is_that_of_the_library_for_each_layer_by_itself(params):
    # Not random bases, which the numbers of the layers have a part in.
    given = {"rank": 4, "update_proj_gap": 2, "projector": "svd"}
    expected = of_each_layer(galore_optax.flora(LR, 0.8, 3, weight_decay=0.1, mask=mask, **given))
    settings = {"b1": 0.8, "weight_decay": 0.1, "projector": "svd"}
    tx = optimizers.make_optimizer(constant(optimizer="flora", **settings))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        trajectory(tx, params),
        trajectory(expected, params),
    )


@pytest.mark.parametrize(
    "name",
    # Those in 8 bits are made in the same way.
    [pytest.param(x, marks=[pytest.mark.ci] * x.endswith("8bit")) for x in IN_GALORE],
)
def test_an_optimizer_in_galore_makes_a_loss_fall(params, name):
    """The distance from parameters of zero, at the optimizer's own settings but the rate."""
    shape = {"hidden": 8, "intermediate": 12, "layers": 2, "heads": 2, "steps": STEPS, "clip": 0.0}
    tx = optimizers.make_optimizer(Config(**shape, optimizer=name, lr=LR).resolve())

    def step(carry, _):
        params, state = carry
        loss, gradients = jax.value_and_grad(lambda p: optax.tree.norm(p, squared=True))(params)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    _, losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=4))(params)
    assert np.all(np.diff(losses) < 0)


@pytest.mark.parametrize(
    # Of the others it is in the tests above, with the same mask, or made in the same way.
    "name",
    ["adamw", "q_galore_adamw", "fira_adamw", "grass_adamw", "galore_muon"],
)
def test_decay_moves_everything_but_the_norms(params, name):
    plain, decayed = (
        trajectory(
            optimizers.make_optimizer(constant(optimizer=name, weight_decay=decay)), params, 1
        )
        for decay in (0.0, 0.5)
    )
    expected = jax.tree.map(lambda p, m: -LR * 0.5 * p if m else 0 * p, params, mask(params))
    jax.tree.map(
        lambda a, b, e: np.testing.assert_allclose(a - b, e, atol=1e-6), decayed, plain, expected
    )


def test_galore_projects_the_stacked_kernels_alone(params):
    tx = optimizers.make_optimizer(config(optimizer="galore_adamw"))
    state = jax.eval_shape(tx.init, params)
    subspace = optax.tree.get(state, "subspace")
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path((subspace.left, subspace.right))
    }
    assert paths == {
        "0/blocks/mlp/up/kernel": (2, 8, 4),
        "1/blocks/mlp/down/kernel": (2, 8, 4),
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"projector": "power_iteration", "stagger": True, "update_proj_gap": 3},
        {"refresh": "lazy", "projector_dtype": "bfloat16"},
    ],
    ids=["staggered", "lazy"],
)
def test_subspaces_are_chosen_how_and_when_the_settings_say(params, settings):
    expected = galore_optax.galore(
        optax.adamw(LR),
        **{"rank": 4, "update_proj_gap": 2, "weight_dimension_numbers": dimension_numbers}
        | {"diagnostics": True, **settings},
    )
    tx = optimizers.make_optimizer(constant(optimizer="galore_adamw", **settings))
    states = jax.jit(lambda params: (tx.init(params), expected.init(params)))(params)
    updates = jax.jit(tx.update), jax.jit(expected.update)
    for step in range(5):
        gradients = gradients_at(params, step)
        states = [u(gradients, s, params)[1] for u, s in zip(updates, states, strict=True)]
    one, other = (optax.tree.get(state, "subspace") for state in states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_gradients_are_clipped_before_everything_else_and_zero_does_not_clip(params):
    unclipped = trajectory(optimizers.make_optimizer(constant(optimizer="sgd")), params, 1)
    gradients = gradients_at(params, 0)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    clipped = trajectory(optimizers.make_optimizer(constant(optimizer="sgd", clip=2.0)), params, 1)
    jax.tree.map(
        lambda p, a, b, g: (
            np.testing.assert_allclose(p - a, LR * g, atol=1e-6),
            np.testing.assert_allclose(p - b, LR * g * 2 / norm, atol=1e-6),
        ),
        *(params, unclipped, clipped, gradients),
    )


def fraction(schedule, k, warmup):
    """Of the peak, at the k-th of 10 updates."""
    if k <= warmup:
        return k / warmup
    progress = (k - warmup) / (STEPS - warmup)
    return {
        "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - 0.9 * progress,
        "constant": 1.0,
        "wsd": 1 - 0.9 * max(0, k - 6) / 4,
    }[schedule]


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_rise_to_the_peak_and_end_at_the_last_update(schedule, warmup):
    rate = schedules.learning_rate(
        config(schedule=schedule, warmup=warmup / STEPS, cooldown=0.4, final_lr=0.1)
    )
    expected = [LR * fraction(schedule, k, warmup) for k in range(1, STEPS + 1)]
    np.testing.assert_allclose([rate(count) for count in range(STEPS)], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "galore_adamw"])
def test_an_update_that_is_not_finite_is_skipped_whole(params, name):
    tx = optimizers.make_optimizer(config(optimizer=name, on_nan="skip"))
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(gradients_at(params, 0), state, params)
    bad = gradients_at(params, 1)
    bad["head"]["kernel"][3, 2] = np.nan
    updates, after = update(bad, state, params)
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert schedule_count(after) == 1
    assert skipped_updates(after) == {"skipped": 1, "skipped_in_a_row": 1}
    _, after = update(gradients_at(params, 2), after, params)
    assert schedule_count(after) == 2
    assert skipped_updates(after) == {"skipped": 1, "skipped_in_a_row": 0}


def test_a_state_started_anew_keeps_its_positions_alone(params):
    old_tx = optimizers.make_optimizer(config(rank=4))
    old, update = jax.jit(old_tx.init)(params), jax.jit(old_tx.update)
    for step in range(5):
        _, old = update(gradients_at(params, step), old, params)
    tx = optimizers.make_optimizer(config(rank=3))
    fresh = jax.jit(tx.init)(params)
    state = start_anew(fresh, old, config(rank=3))
    assert schedule_count(state) == optax.tree.get(state, "step") == 5
    assert schedule_count(fresh) == 0
    for name in ("mu", "nu", "subspace"):
        before, after = optax.tree.get(fresh, name), optax.tree.get(state, name)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    _, state = jax.jit(tx.update)(gradients_at(params, 5), state, params)
    due = optax.tree.get(state, "subspace").due["blocks"]["mlp"]["down"]["kernel"]
    # Chosen at once, and again when the run would have: at multiples of the gap, 2.
    np.testing.assert_array_equal(due, [6, 6])


def test_galore_counts_from_zero_where_its_count_is_that_of_the_moments(params):
    old_tx = optimizers.make_optimizer(config())
    old, update = jax.jit(old_tx.init)(params), jax.jit(old_tx.update)
    for step in range(3):
        _, old = update(gradients_at(params, step), old, params)
    settings = constant(transport="reset")
    tx = optimizers.make_optimizer(settings)
    state = start_anew(jax.jit(tx.init)(params), old, settings)
    assert schedule_count(state) == 3
    assert optax.tree.get(state, "step") == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layerwise": True}, 4),
        ({"layerwise": True, "optimizer": "grass_adamw"}, 4),
        ({}, 1),
        ({"layerwise": True, "clip": 1.0}, 1),
        # Each update chooses a subspace, which the mean gradient is wanted for.
        ({"layerwise": True, "update_proj_gap": 1}, 1),
        ({"layerwise": True, "update_proj_gap": 1, "refresh": "lazy"}, 4),
        # Something of the gradient outside of the subspace is used.
        ({"layerwise": True, "optimizer": "fira_adamw"}, 1),
        ({"layerwise": True, "optimizer": "fira_adamw", "residual": "discard"}, 4),
        ({"layerwise": True, "optimizer": "apollo_mini_adamw_8bit"}, 1),
        ({"layerwise": True, "residual": "error_feedback"}, 1),
        # What comes after GaLore would take each micro-batch for an update.
        ({"layerwise": True, "optimizer": "flora"}, 1),
        ({"layerwise": True, "optimizer": "galore_muon"}, 1),
    ],
)
def test_micro_batches_are_averaged_at_rank_r_where_they_can_be(settings, expected):
    found = config(**{"optimizer": "galore_adamw", "accumulate": 4, "batch": 8} | settings)
    assert optimizers.micro_batches_at_rank(found) == expected
    optimizers.make_optimizer(found)


def test_choices_are_those_of_the_library():
    assert tuple(_transports.TRANSPORTS) == TRANSPORTS
    assert tuple(_residuals.RESIDUALS) == RESIDUALS


@pytest.mark.parametrize("name", ["galore_adamw", pytest.param("ldadamw", marks=pytest.mark.ci)])
def test_with_adamw_inside_all_transports_and_residuals_can_go(name):
    for transport in TRANSPORTS:
        for residual in RESIDUALS:
            settings = config(optimizer=name, transport=transport, residual=residual)
            optimizers.make_optimizer(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "galore_lion", "transport": "rotate"},
            r'^--optimizer galore_lion --transport rotate: transport="rotate" needs the decay '
            r"rates of the moments, which it cannot see in the inner transformation\. What would "
            r"work is --transport keep, --transport reset, --transport project\.$",
        ),
        (
            {"optimizer": "galore_adafactor", "residual": "error_feedback"},
            r"^--optimizer galore_adafactor --residual error_feedback: .*\. What would work is "
            r"--residual discard\.$",
        ),
        (
            {"projector": "gaussian", "transport": "rotate"},
            r"^--optimizer galore_adamw --projector gaussian --transport rotate: .*orthonormal",
        ),
    ],
)
def test_what_cannot_go_together_is_told_with_what_can(settings, message):
    with pytest.raises(UsageError, match=message) as error:
        optimizers.make_optimizer(config(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "adam"},
            "optimizer='adam': expected one of adamw, adafactor, lion, sgd, adamw_8bit, l",
        ),
        ({"schedule": "step"}, "schedule='step': expected one of cosine, linear, constant, wsd"),
        ({"projector": "none"}, "projector=.*: expected one of svd"),
        ({"projector_dtype": "float8"}, "projector_dtype=.*: expected"),
        ({"refresh": "never"}, "refresh"),
    ],
)
def test_unknown_names_list_what_there_is(settings, message):
    with pytest.raises(UsageError, match=message):
        optimizers.make_optimizer(config(**settings))
