"""That a projector, transport, residual or refresh rule of one's own gets all it may need."""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._refresh import Periodic
from galore_optax._residuals import RESIDUALS, Discard
from galore_optax._transports import TRANSPORTS, Keep

SHAPES = {"wide": (6, 9), "tall": (9, 6), "stack": (3, 6, 9), "bias": (9,)}
NUMBERS = {
    "wide": galore_optax.DimensionNumbers(),
    "tall": galore_optax.DimensionNumbers(),
    "stack": galore_optax.DimensionNumbers(1, 2),
    "bias": None,
}
RANK, GAP, STEPS = 2, 3, 5


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}


def run(inner=None, steps=STEPS, **options):
    """Updates and states after each of some steps."""
    tx = galore_optax.galore(
        optax.scale_by_adam() if inner is None else inner,
        rank=RANK,
        update_proj_gap=GAP,
        weight_dimension_numbers=NUMBERS,
        **options,
    )
    params = random_tree(100)
    state = tx.init(params)
    update, history = jax.jit(tx.update), [(None, state)]
    for step in range(steps):
        updates, state = update(random_tree(step), state, params)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, history[0][1])
        history.append((updates, state))
    return history


def basis_of(state, name):
    left, right = state.subspace.left[name], state.subspace.right[name]
    return np.asarray(right if isinstance(left, optax.MaskedNode) else left, np.float64)


@dataclasses.dataclass(frozen=True)
class Rotate(Keep):
    """A transport that takes first moments to the new basis, and counts how often."""

    moves: tuple[str, ...] = ("first",)

    def initial(self):
        return jnp.zeros([], jnp.int32)

    def move(self, moments, state, turn):
        assert sorted(moments) == ["first"]

        def move(moment):
            if turn.left is not None:
                moment = turn.left @ moment
            if turn.right is not None:
                moment = moment @ turn.right.T
            return moment

        return {
            role: [jnp.where(turn.first, moment, move(moment)) for moment in held]
            for role, held in moments.items()
        }, state + 1


@pytest.mark.parametrize("side", ["short", "both"])
def test_a_transport_gets_the_moments_and_how_the_bases_turned(side):
    """The first moment, taken to the new basis by NumPy, against the library's."""
    before, after = (run(side=side, transport=x, steps=GAP)[-1][1] for x in ("keep", Rotate()))
    # Nothing is moved at the first refresh, nor on steps without one.
    counts = jax.tree.leaves(after.subspace.transport)
    assert {int(count) for x in counts for count in np.ravel(x)} == {1}
    after = after._replace(subspace=after.subspace._replace(transport=before.subspace.transport))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state, kept, moved = before, *(run(side=side, transport=x)[GAP + 1] for x in ("keep", Rotate()))
    gradient = random_tree(GAP)
    for name in ("wide", "tall", "stack"):
        old = np.asarray(optax.tree.get(state, "mu")[name], np.float64)
        for field, subscripts in (("left", "...mr,...ms,...sn->...rn"), ("right", None)):
            was, now = getattr(state.subspace, field)[name], getattr(kept[1].subspace, field)[name]
            if isinstance(was, optax.MaskedNode):
                continue
            turned = np.swapaxes(now, -1, -2) @ was
            old = turned @ old if subscripts else old @ np.swapaxes(turned, -1, -2)
        low_rank = np.asarray(gradient[name], np.float64)
        if not isinstance(kept[1].subspace.left[name], optax.MaskedNode):
            low_rank = np.swapaxes(kept[1].subspace.left[name], -1, -2) @ low_rank
        if not isinstance(kept[1].subspace.right[name], optax.MaskedNode):
            low_rank = low_rank @ kept[1].subspace.right[name]
        expected = 0.9 * old + 0.1 * low_rank
        found = np.asarray(optax.tree.get(moved[1], "mu")[name])
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(found - np.asarray(optax.tree.get(kept[1], "mu")[name])).max() > 1e-2
        np.testing.assert_array_equal(
            optax.tree.get(moved[1], "nu")[name], optax.tree.get(kept[1], "nu")[name]
        )


def test_moments_in_codes_are_moved_in_codes():
    inner = galore_optax.low_bit(optax.scale_by_adam(), min_size=0)
    state = run(inner)[GAP][1]
    kept, moved = (run(inner, transport=x)[GAP + 1][1] for x in ("keep", Rotate()))
    name = "stack"
    old = np.asarray(optax.tree.get(state, "mu")[name].dequantize(), np.float64)
    new, was = (np.asarray(s.subspace.left[name], np.float64) for s in (kept, state))
    low_rank = np.swapaxes(new, -1, -2) @ np.asarray(random_tree(GAP)[name], np.float64)
    expected = 0.9 * np.swapaxes(new, -1, -2) @ was @ old + 0.1 * low_rank
    found = optax.tree.get(moved, "mu")[name]
    assert found.scheme == "signed"
    # Two roundings to 8 bits, relative to the largest of a block.
    np.testing.assert_allclose(found.dequantize(), expected, atol=0.05 * np.abs(expected).max())
    assert np.abs(found.dequantize() - optax.tree.get(kept, "mu")[name].dequantize()).max() > 0.05


def test_a_projector_gets_the_old_basis_and_the_moments():
    """A basis of the moments, lifted by the old basis, and of the gradient."""

    def of_moments(matrix, rank, *, old, first, moments):
        (moment,), (second,) = moments["first"], moments["second"]
        assert moment.shape == second.shape == (rank, matrix.shape[1])
        assert old.shape == (matrix.shape[0], rank)
        seen = matrix + jnp.where(first, 0.0, 10.0) * old @ moment
        return galore_optax.projectors.svd(seen, rank)

    history = run(projector=of_moments)
    state, after = history[GAP][1], history[GAP + 1][1]
    for name in ("wide", "tall"):
        old, new = basis_of(state, name), basis_of(after, name)
        moment = np.asarray(optax.tree.get(state, "mu")[name], np.float64)
        matrix = np.asarray(random_tree(GAP)[name], np.float64)
        if name == "tall":
            matrix, moment = matrix.T, moment.T
        u = np.linalg.svd(matrix + 10 * old @ moment, full_matrices=False)[0][:, :RANK]
        np.testing.assert_allclose(new @ new.T, u @ u.T, atol=1e-4)


class Calls(NamedTuple):
    """What the residual below remembers of a matrix."""

    count: jax.Array
    last: jax.Array


@dataclasses.dataclass(frozen=True)
class AddBack(Discard):
    """A residual that adds what lies outside, divided by how often it was called."""

    uses_gradient: bool = True

    def initial(self, m, n, dtype):
        return Calls(jnp.zeros([], jnp.int32), jnp.zeros((m, n), dtype))

    def update(self, projected, way, state):
        count = state.count + 1
        outside = projected.gradient - way.up(projected.low_rank)
        update = way.scale * (way.up(projected.psi) + outside / count)
        return update, Calls(count, outside)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_residual_sees_the_gradient_and_owns_a_state_of_each_matrix(weight_decay):
    history = run(optax.adamw(1e-3, weight_decay=weight_decay), residual=AddBack(), scale=0.5)
    discarded = run(optax.adamw(1e-3, weight_decay=weight_decay), scale=0.5)
    for step in range(STEPS):
        (updates, state), (without, _) = history[step + 1], discarded[step + 1]
        for name in ("wide", "tall", "stack"):
            matrix, p = np.asarray(random_tree(step)[name], np.float64), basis_of(state, name)
            if name == "tall":
                outside = matrix - matrix @ p @ p.T
            else:
                outside = matrix - p @ np.swapaxes(p, -1, -2) @ matrix
            found = np.asarray(updates[name]) - np.asarray(without[name])
            np.testing.assert_allclose(found, 0.5 * outside / (step + 1), atol=1e-5)
            own = state.subspace.residual[name]
            np.testing.assert_array_equal(own.count, np.full(SHAPES[name][:-2], step + 1))
            np.testing.assert_allclose(own.last, outside, atol=1e-5)
        assert isinstance(state.subspace.residual["bias"], optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class Once(Periodic):
    """A refresh rule by which a matrix is refreshed once, and never again."""

    def next(self, subspace, clock, similarity):
        del clock, similarity
        return subspace._replace(due=jnp.asarray(2**31 - 1, jnp.int32))


def test_a_refresh_rule_says_when_a_matrix_is_due_again():
    state = run(refresh=Once(), steps=3 * GAP)[-1][1]
    assert {int(x) for x in np.ravel(state.subspace.refreshes["stack"])} == {1}
    assert int(run(steps=3 * GAP)[-1][1].subspace.refreshes["wide"]) == 3


def test_values_that_are_the_default_are_named_and_others_are_errors():
    named = run(transport="keep", residual="discard")[-1]
    jax.tree.map(np.testing.assert_array_equal, named, run()[-1])
    for name, table in {"transport": TRANSPORTS, "residual": RESIDUALS}.items():
        expected = f"{name} must be one of {', '.join(table)}; got 'none'"
        with pytest.raises(ValueError, match=re.escape(expected)):
            galore_optax.galore(**{name: "none"})
        for wrong in (3, Rotate, Discard):
            with pytest.raises(TypeError, match=f"{name} must be a name"):
                galore_optax.galore(**{name: wrong})
    with pytest.raises(ValueError, match="accumulation_steps must be 1 with residual="):
        galore_optax.galore(residual=AddBack(), accumulation_steps=2)
    assert galore_optax.galore(residual=Discard(), accumulation_steps=2)


def test_a_refresh_by_hand_moves_the_moments_and_takes_no_step():
    inner, options = optax.scale_by_adam(), {"rank": RANK, "weight_dimension_numbers": NUMBERS}
    states = []
    for transport in ("keep", Rotate()):
        tx = galore_optax.galore(inner, transport=transport, residual=AddBack(), **options)
        params = random_tree(100)
        state = tx.init(params)
        _, state = tx.update(random_tree(0), state, params)
        by_hand = galore_optax.refresh(tx, random_tree(1), state, params)
        states.append((state, by_hand))
    (before, kept), (_, moved) = states
    assert int(kept.step) == int(before.step) == 1
    for name in ("wide", "stack"):
        np.testing.assert_array_equal(kept.subspace.residual[name].count, 1)
        old, new = (np.asarray(s.subspace.left[name], np.float64) for s in (before, kept))
        assert np.abs(old - new).max() > 1e-2
        mu = np.asarray(optax.tree.get(before, "mu")[name], np.float64)
        np.testing.assert_array_equal(optax.tree.get(kept, "mu")[name], mu.astype(np.float32))
        expected = np.swapaxes(new, -1, -2) @ old @ mu
        np.testing.assert_allclose(optax.tree.get(moved, "mu")[name], expected, atol=1e-5)


def test_a_projector_with_moments_goes_with_any_transport_and_at_any_scale():
    def of_moments(matrix, rank, *, moments):
        (first,), (second,) = moments["first"], moments["second"]
        enough = jnp.isfinite(first).all() & jnp.isfinite(second).all()
        return jnp.where(enough, galore_optax.projectors.svd(matrix, rank), jnp.nan)

    for size in (1e-22, 1.0, 1e18):
        tx = galore_optax.galore(
            optax.scale_by_adam(),
            rank=2,
            projector=of_moments,
            transport=Rotate(),
            update_proj_gap=1,
        )
        params = {"w": size * random_tree(0)["wide"]}
        state = tx.init(params)
        for _ in range(3):
            _, state = tx.update(params, state, params)
        assert int(state.subspace.refreshes["w"]) == 3


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_moments_keep_the_dtype_that_they_are_held_in(dtype):
    state = run(optax.scale_by_adam(mu_dtype=dtype), transport=Rotate())[-1][1]
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(state, "mu"))} == {jnp.dtype(dtype)}


def test_errors_and_reports_know_transports_and_residuals():
    numbers = {"w": galore_optax.DimensionNumbers(1, 2)}
    params = {"w": random_tree(0)["stack"]}
    low_bit = galore_optax.low_bit(optax.scale_by_adam(), min_size=0, stacked=lambda *_: 0)
    options = {"rank": RANK, "weight_dimension_numbers": numbers}
    tx = galore_optax.galore(low_bit, transport=Rotate(), **options)
    with pytest.raises(ValueError, match=r"moments of 'w' are in codes of items \(3, 2, 9\)"):
        tx.init(params)

    @dataclasses.dataclass(frozen=True)
    class Loses(Rotate):
        def move(self, moments, state, turn):
            return {}, state

    tx = galore_optax.galore(optax.scale_by_adam(), transport=Loses(), **options)
    with pytest.raises(ValueError, match="a transport must return as many moments as it gets"):
        tx.update(params, tx.init(params), params)

    with_residual = galore_optax.galore(optax.scale_by_adam(), residual=AddBack(), **options)
    without = galore_optax.galore(optax.scale_by_adam(), **options)
    reports = [galore_optax.memory_report(tx, params) for tx in (with_residual, without)]
    assert reports[0].moments - reports[1].moments == 4 * (3 * 6 * 9) + 4 * 3
    with pytest.raises(ValueError, match="residual and diagnostics that it was made with"):
        with_residual.update(params, without.init(params), params)
