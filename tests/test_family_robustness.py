"""Gradients that are zero, inside the subspace, not finite or huge; and moments in few bits."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_runs import galore
from reference_family import Rule

import galore_optax

STEPS, GAP, RANK = 16, 5, 3
SHAPES = {"tall": (9, 6), "stack": (2, 6, 9)}
RULES = {
    "keep": Rule(),
    "project": Rule("project"),
    "rotate": Rule("rotate"),
    "reset": Rule("reset"),
    "fira": Rule(residual="norm_scaled"),
    "fira with rotate": Rule("rotate", "norm_scaled"),
    "fira as published": Rule(residual="norm_scaled", beta=4.0, subtract="scaled"),
    "apollo": Rule(residual="scale_gradient"),
    "apollo mini": Rule(residual="scale_gradient", per="tensor", rank=1),
    "frugal": Rule("reset", "sign"),
    "ldadam": Rule("rotate", "error_feedback"),
    "error feedback with project": Rule("project", "error_feedback"),
}
WRAPPED = ("project", "rotate", "reset", "fira", "apollo", "ldadam")
every_rule = pytest.mark.parametrize("name", RULES)


def rule_of(name):
    rule = RULES[name]
    return Rule(**vars(rule) | {"gap": GAP, "rank": min(rule.rank, RANK)})


def gradients_of(seed=0, steps=STEPS, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(steps, *s)).astype(dtype) for name, s in SHAPES.items()}


def changed(gradients, at, change):
    """The same gradients, but for one step, which is changed in all leaves."""
    found = {name: gradient.copy() for name, gradient in gradients.items()}
    for gradient in found.values():
        gradient[at] = change(gradient[at])
    return found


def with_nan(gradient):
    """One entry of each matrix is no number."""
    gradient[..., 2, 1] = np.nan
    return gradient


@functools.cache
def compiled(name, around=None, bits=32, **changes):
    """Updates of all steps and the states after them, of gradients: a program for many tests."""
    rule = Rule(**vars(rule_of(name)) | changes)
    inner = optax.scale_by_adam(rule.b1, rule.b2)
    if bits == 8:
        inner = galore_optax.low_bit(
            inner, min_size=0, stacked=lambda path, _: int(path == "stack")
        )
    tx = galore(rule, inner=inner)
    tx = optax.apply_if_finite(tx, 3) if around == "apply_if_finite" else tx

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state)

    def history(gradients):
        state = tx.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradients))
        _, (updates, states) = jax.lax.scan(step, state, gradients)
        states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), state, states)
        return updates, states

    return jax.jit(history)


def step_by_step(gradients, name, **options):
    """Updates of all steps, and the states before and after them."""
    updates, states = jax.tree.map(np.asarray, compiled(name, **options)(gradients))
    return (
        [jax.tree.map(operator.itemgetter(k), updates) for k in range(STEPS)],
        [jax.tree.map(operator.itemgetter(k), states) for k in range(STEPS + 1)],
    )


def all_finite(tree):
    return all(np.all(np.isfinite(np.float32(x))) for x in jax.tree.leaves(tree))


@every_rule
@pytest.mark.parametrize("at", [0, 7, GAP], ids=["first", "ordinary", "refresh"])
def test_a_gradient_of_zeros(name, at):
    """Neither moves a basis nor is remembered; what the moments say goes on."""
    rule = rule_of(name)
    gradients = changed(gradients_of(), at, np.zeros_like)
    updates, states = step_by_step(gradients, name)
    assert all_finite((updates, states[-1]))
    before, after = (states[k].subspace for k in (at, at + 1))
    if rule.residual != "error_feedback" or at == 0:  # else the memory is a gradient like others
        for old, new in zip(before[:3], after[:3], strict=True):
            jax.tree.map(np.testing.assert_array_equal, old, new)
    if rule.residual in ("norm_scaled", "scale_gradient"):
        jax.tree.map(np.testing.assert_array_equal, before.residual, after.residual)
    moves = any(np.any(x) for x in jax.tree.leaves(updates[at]))
    assert moves == (at > 0 and rule.residual != "scale_gradient")
    # A refresh that was due is done on the next step.
    assert all(np.all(x == 4) for x in jax.tree.leaves(states[-1].subspace.refreshes))


@every_rule
def test_gradients_of_nothing_but_zeros(name):
    gradients = jax.tree.map(np.zeros_like, gradients_of())
    updates, states = step_by_step(gradients, name)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert all_finite(states)
    assert not any(np.any(x) for x in jax.tree.leaves(states[-1].subspace.refreshes))


def within(gradients, after):
    """Gradients in a subspace of RANK dimensions, and from a step on with something outside."""
    rng = np.random.default_rng(1)
    found = {}
    for name, gradient in gradients.items():
        small = min(gradient.shape[-2:])
        span = np.linalg.qr(rng.normal(size=(*gradient.shape[1:-2], small, RANK)))[0]
        projector = span @ np.swapaxes(span, -1, -2)
        inside = gradient @ projector if name == "tall" else projector @ gradient
        step = np.arange(len(gradient)).reshape(-1, *[1] * (gradient.ndim - 1))
        found[name] = np.where(step < after, inside, gradient).astype(gradient.dtype)
    return found


@pytest.mark.parametrize("dtype", [np.float64, np.float32, jnp.bfloat16], ids=lambda t: t.__name__)
def test_what_is_outside_after_a_gradient_within_the_subspace_is_not_held_back(dtype):
    """As it would be by a limiter that remembered rounding errors, for a thousand steps."""
    after = 3
    gradients = within(gradients_of(dtype=np.float64), after)
    if dtype == jnp.bfloat16:  # whose rounding leads out of all subspaces but of such
        gradients = {name: gradient.copy() for name, gradient in gradients.items()}
        gradients["tall"][:after, ..., RANK:] = 0
        gradients["stack"][:after, ..., RANK:, :] = 0
    with jax.enable_x64(dtype == np.float64):
        gradients = {name: jnp.asarray(g.astype(dtype)) for name, g in gradients.items()}
        updates, states = step_by_step(gradients, "fira")
        free, _ = step_by_step(gradients, "fira", gamma=None)
    assert all_finite((updates, states[-1]))
    for memory in jax.tree.leaves([state.subspace.residual for state in states[: after + 1]]):
        assert not np.any(memory)
    for memory in jax.tree.leaves(states[after + 1].subspace.residual):
        assert np.all(memory > 0)
    for found, expected in zip(updates[: after + 1], free[: after + 1], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_signs_of_what_is_within_the_subspace_but_for_rounding_errors_are_zero():
    gradients = within(gradients_of(), STEPS)
    found, _ = step_by_step(gradients, "frugal")
    expected, _ = step_by_step(gradients, "reset")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@every_rule
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, GAP], ids=["first", "ordinary", "refresh"])
def test_what_is_kept_on_a_step_whose_gradient_is_not_finite(name, at, value):
    """Bases, and what residuals remember; moments are `optax.apply_if_finite`'s business."""

    def spoiled(gradient):
        gradient[..., 2, 1] = value
        return gradient

    gradients = changed(gradients_of(), at, spoiled)
    _, states = step_by_step(gradients, name)
    before, after = (states[k].subspace for k in (at, at + 1))
    for old, new in zip(before, after, strict=True):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    assert all_finite(after)


@pytest.mark.parametrize("name", ["fira", "fira with rotate", "apollo", "ldadam"])
def test_one_matrix_of_a_stack_that_is_not_finite_leaves_the_others_alone(name):
    gradients, spoiled = gradients_of(), gradients_of()
    spoiled["stack"][7, 1, 0, 0] = np.nan
    (found, one), (expected, other) = (step_by_step(x, name) for x in (spoiled, gradients))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a["tall"], b["tall"])
        np.testing.assert_array_equal(a["stack"][0], b["stack"][0])
    for a, b in zip(one[-1].subspace, other[-1].subspace, strict=True):
        if not isinstance(a["stack"], optax.MaskedNode):
            np.testing.assert_array_equal(a["stack"][0], b["stack"][0])


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("at", [0, 7, GAP], ids=["first", "ordinary", "refresh"])
def test_apply_if_finite_goes_on_as_if_a_step_had_not_been(name, at):
    gradients = gradients_of()
    spoiled = changed(gradients, at, with_nan)
    updates, states = step_by_step(spoiled, name, around="apply_if_finite")
    assert not any(np.any(x) for x in updates[at].values())
    assert int(states[-1].total_notfinite) == 1
    # With one more at the end, so that they are as many.
    without = {k: np.concatenate([np.delete(x, at, 0), x[:1]]) for k, x in gradients.items()}
    expected, wanted = step_by_step(without, name, around="apply_if_finite")
    jax.tree.map(np.testing.assert_array_equal, updates[:at] + updates[at + 1 :], expected[:-1])
    jax.tree.map(np.testing.assert_array_equal, states[-1].inner_state, wanted[-2].inner_state)


@every_rule
@pytest.mark.parametrize("size", [1e15, 1e18, 1e25, 1e30])
@pytest.mark.parametrize("at", [0, 7, GAP], ids=["first", "ordinary", "refresh"])
def test_a_huge_gradient_makes_no_update_that_is_not_finite(name, at, size):
    """Also where its square is infinite in float32, and with it Adam's second moment for good."""
    gradients = changed(gradients_of(), at, lambda gradient: np.float32(size) * gradient)
    updates, _ = step_by_step(gradients, name)
    assert [k for k, update in enumerate(updates) if not all_finite(update)] == []


@every_rule
@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_gradients_that_are_all_huge_or_tiny_make_finite_updates(name, size):
    updates, _ = step_by_step(jax.tree.map(lambda g: np.float32(size) * g, gradients_of()), name)
    assert [k for k, update in enumerate(updates) if not all_finite(update)] == []


@pytest.mark.parametrize("name", ["project", "rotate", "reset", "ldadam"])
def test_moments_in_eight_bits_move_about_as_those_of_float32(name):
    gradients = gradients_of()
    found, states = step_by_step(gradients, name, bits=8)
    expected, exact = step_by_step(gradients, name)
    for key in SHAPES:
        a, b = (np.stack([updates[key] for updates in run]) for run in (found, expected))
        assert np.any(a != b)
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)
        for state, wanted in zip(states, exact, strict=True):
            nu = optax.tree.get(state, "nu")[key]
            assert nu.scheme == "unsigned"
            assert np.all(nu.dequantize() >= 0)
            assert np.all(optax.tree.get(wanted, "nu")[key] >= 0)


def test_a_refresh_by_hand_leaves_the_gradient_out_of_the_error_feedback():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 9)), jnp.float32)}
    gradient = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(6, 9)), jnp.float32)}
    tx = galore_optax.galore_adamw(1e-2, rank=3, residual="error_feedback")
    state = tx.init(params)
    by_hand = galore_optax.refresh(tx, gradient, state, params)
    np.testing.assert_array_equal(by_hand.subspace.residual["w"], 0)
    _, state = tx.update(gradient, state, params)
    error, b1 = np.asarray(state.subspace.residual["w"], np.float64), 0.9
    moved = galore_optax.refresh(tx, params, state, params)
    old, new = (np.asarray(s.subspace.left["w"], np.float64) for s in (state, moved))
    moment = np.asarray(optax.tree.get(state, "mu")["w"], np.float64)
    expected = error + b1 / (1 - b1) * (old - new) @ moment
    np.testing.assert_allclose(moved.subspace.residual["w"], expected, atol=1e-5)


def test_the_error_feedback_of_float16_gradients_may_exceed_their_range():
    params = {"w": jnp.zeros((4, 6), jnp.float16)}
    tx = galore_optax.galore_adamw(1e-3, rank=2, residual="error_feedback", update_proj_gap=400)
    state, update = tx.init(params), jax.jit(tx.update)
    first = jnp.zeros((4, 6), jnp.float16).at[:2].set(1000)
    then = jnp.zeros((4, 6), jnp.float16).at[2].set(1000).at[3].set(500)
    for step in range(80):
        updates, state = update({"w": then if step else first}, state, params)
    assert jnp.abs(state.subspace.residual["w"]).max() > jnp.finfo(jnp.float16).max
    assert jnp.isfinite(updates["w"]).all()
