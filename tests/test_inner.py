"""The inner transformation: it runs in the subspace, and its weight decay on whole matrices."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import DimensionNumbers, galore

SHAPES = {"bias": (6,), "kernel": (4, 6)}
TWO_MATRICES = {"bias": (6,), "tall": (7, 3), "wide": (4, 6)}
RANK, GAP, ALPHA, RATE, DECAY = 2, 2, 0.25, 0.1, 0.3
NOT_AFFINE = "uses the parameters in another way than weight decay"


def normal(shapes, seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def basis(gradient, old=None):
    """The first singular vectors of the shorter side, with the signs of the old ones."""
    matrix = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.T
    new = np.linalg.svd(matrix)[0][:, :RANK]
    return new if old is None else new * np.sign(np.sum(new * old, axis=0))


def down(matrix, basis):
    return basis.T @ matrix if len(basis) == len(matrix) else matrix @ basis


def back(low_rank, basis, shape):
    return basis @ low_rank if len(basis) == shape[0] else low_rank @ basis.T


def trajectory(tx, params, all_gradients):
    """The updates of each step, and the parameters before it."""
    update = jax.jit(tx.update)
    state, result = tx.init(params), []
    for gradients in all_gradients:
        updates, state = update(gradients, state, params)
        updates = jax.tree.map(np.asarray, updates)
        result.append((updates, params))
        params = jax.tree.map(np.add, params, updates)
    return result


def first_update(tx, gradients, params):
    """The updates and the state after them, of one program with the state before."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(gradients, params)


def by_hand(inner_without_decay, all_params, all_gradients):
    """The updates without decay, alpha back(inner(R)): all but the inner part in NumPy."""
    update, bases, state, result = jax.jit(inner_without_decay.update), {}, None, []
    for step, (params, gradients) in enumerate(zip(all_params, all_gradients, strict=True)):
        matrices = [name for name in gradients if name != "bias"]
        if step % GAP == 0:
            bases = {name: basis(gradients[name], bases.get(name)) for name in matrices}
        low_rank, low_rank_params = dict(gradients), dict(params)
        for name in matrices:
            low_rank[name] = down(gradients[name], bases[name])
            low_rank_params[name] = down(params[name], bases[name])
        if state is None:
            state = inner_without_decay.init(low_rank)
        updates, state = update(low_rank, state, low_rank_params)
        updates = jax.tree.map(np.asarray, updates)
        for name in matrices:
            updates[name] = ALPHA * back(updates[name], bases[name], gradients[name].shape)
        result.append(updates)
    return result


def without_decay(factory, *args, **kwargs):
    """The transformation with decay, and the same one without."""
    return factory(*args, **kwargs), factory(*args, **{**kwargs, "weight_decay": 0.0})


def decaying_rate(count):
    return RATE / (1 + count)


def clipped(weight_decay):
    return optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(RATE, weight_decay=weight_decay))


def guarded(weight_decay):
    return optax.apply_if_finite(optax.adamw(RATE, weight_decay=weight_decay), 3)


def injected(weight_decay):
    return optax.inject_hyperparams(optax.adamw)(RATE, weight_decay=weight_decay)


def adafactor(weight_decay):
    return optax.adafactor(
        RATE,
        min_dim_size_to_factor=2,
        multiply_by_parameter_scale=False,
        weight_decay_rate=weight_decay or None,
    )


ALL, ONLY_MATRICES = ("bias", "kernel"), ("kernel",)
CONSTANT = (-RATE * DECAY,) * 3
# Transformation, its arguments, the coefficient of the decay at each step, the decayed leaves.
CASES = {
    "adamw": (optax.adamw, (RATE,), {}, CONSTANT, ALL),
    "schedules": (
        optax.adamw,
        (decaying_rate,),
        {"weight_decay": lambda count: DECAY * (1 + count**2)},
        [-decaying_rate(step) * DECAY * (1 + step**2) for step in range(3)],
        ALL,
    ),
    "mask_callable": (
        optax.adamw,
        (RATE,),
        {"mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params)},
        CONSTANT,
        ONLY_MATRICES,
    ),
    "injected": (injected, (), {}, CONSTANT, ALL),
    "clipped": (clipped, (), {}, CONSTANT, ALL),
    "lion": (optax.lion, (RATE,), {}, CONSTANT, ALL),
    "adan": (optax.adan, (RATE,), {}, CONSTANT, ALL),
    "apply_if_finite": (guarded, (), {}, CONSTANT, ALL),
    "adafactor": (adafactor, (), {}, (-DECAY,) * 3, ALL),  # not times the rate
}


@pytest.mark.parametrize("case", CASES)
def test_update_is_scaled_low_rank_update_plus_decay_of_the_whole_matrix(case):
    factory, args, kwargs, coefficients, decayed = CASES[case]
    with_decay, no_decay = without_decay(factory, *args, **{"weight_decay": DECAY, **kwargs})
    with jax.enable_x64(True):
        all_gradients = [normal(SHAPES, 1 + step) for step in range(3)]
        tx = galore(with_decay, rank=RANK, update_proj_gap=GAP, scale=ALPHA)
        steps = trajectory(tx, normal(SHAPES, 0), all_gradients)
        expected = by_hand(no_decay, [params for _, params in steps], all_gradients)
        for (updates, params), plain, coefficient in zip(
            steps, expected, coefficients, strict=True
        ):
            for name in decayed:
                plain[name] = plain[name] + coefficient * params[name]
            chex.assert_trees_all_close(updates, plain, rtol=0, atol=1e-9)


def test_mask_tree_decays_the_leaves_it_names():
    mask = {"bias": True, "tall": False, "wide": True}
    with_decay, no_decay = without_decay(optax.adamw, RATE, weight_decay=DECAY, mask=mask)
    with jax.enable_x64(True):
        all_gradients = [normal(TWO_MATRICES, 1 + step) for step in range(3)]
        tx = galore(with_decay, rank=RANK, update_proj_gap=GAP, scale=ALPHA)
        steps = trajectory(tx, normal(TWO_MATRICES, 0), all_gradients)
        expected = by_hand(no_decay, [params for _, params in steps], all_gradients)
        for (updates, params), plain in zip(steps, expected, strict=True):
            for name in ("bias", "wide"):
                plain[name] = plain[name] - RATE * DECAY * params[name]
            chex.assert_trees_all_close(updates, plain, rtol=0, atol=1e-9)


def test_decay_is_not_scaled_by_alpha():
    """U(alpha) is a line whose value at 0 is the decay alone."""
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)

    @jax.jit
    def update(alpha):
        tx = galore(optax.adamw(RATE, weight_decay=DECAY), rank=RANK, scale=alpha)
        return tx.update(gradients, tx.init(params), params)[0]["kernel"]

    half, whole = (np.asarray(update(alpha)) for alpha in (0.5, 1.0))
    np.testing.assert_allclose(2 * half - whole, -RATE * DECAY * params["kernel"], atol=1e-6)


def test_decay_reaches_what_lies_outside_the_subspace():
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)
    tx = galore(optax.adamw(RATE, weight_decay=DECAY), rank=RANK)
    updates, state = first_update(tx, gradients, params)
    p = np.asarray(state.subspace.left["kernel"])
    outside = np.eye(4) - p @ p.T
    assert np.linalg.norm(outside @ params["kernel"]) > 1
    np.testing.assert_allclose(
        outside @ updates["kernel"], -RATE * DECAY * outside @ params["kernel"], atol=1e-6
    )


def test_decay_acts_on_every_matrix_of_a_stack_of_tensors():
    rng = np.random.default_rng(0)
    params = rng.standard_normal((2, 4, 3, 2)).astype(np.float32)
    with_decay, no_decay = without_decay(optax.adamw, RATE, weight_decay=DECAY)
    updates = []
    for inner in (with_decay, no_decay):
        tx = galore(inner, rank=RANK, weight_dimension_numbers=DimensionNumbers((1, 3), 2))
        updates.append(np.asarray(first_update(tx, params**2, params)[0]))
    np.testing.assert_allclose(updates[0] - updates[1], -RATE * DECAY * params, atol=1e-6)


def test_unprojected_leaves_get_the_update_of_the_inner_transformation_alone():
    inner = optax.adamw(RATE, weight_decay=DECAY)
    tx = galore(inner, rank=RANK, update_proj_gap=GAP)
    params = normal(SHAPES, 0, np.float32)
    all_gradients = [normal(SHAPES, 1 + step, np.float32) for step in range(3)]
    biases = [{"bias": gradients["bias"]} for gradients in all_gradients]
    steps = trajectory(tx, params, all_gradients)
    alone = trajectory(inner, {"bias": params["bias"]}, biases)
    for (updates, _), (expected, _) in zip(steps, alone, strict=True):
        np.testing.assert_allclose(updates["bias"], expected["bias"], rtol=1e-6)


def test_no_step_is_taken_and_nothing_decays_where_an_inner_guard_rejects_the_gradient():
    tx = galore(optax.apply_if_finite(optax.adamw(RATE, weight_decay=DECAY), 3), rank=RANK)
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)
    gradients["bias"][0] = np.nan
    updates, _ = first_update(tx, gradients, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))


PARAMETER_SCALES = {
    "lamb": lambda: optax.lamb(RATE, weight_decay=DECAY),
    "adafactor": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", PARAMETER_SCALES)
def test_trust_ratios_and_parameter_scales_see_projected_parameters(name):
    inner = PARAMETER_SCALES[name]()
    tx = galore(inner, rank=RANK, update_proj_gap=GAP, scale=ALPHA)
    with jax.enable_x64(True):
        all_gradients = [normal(SHAPES, 1 + step) for step in range(3)]
        with pytest.warns(UserWarning, match=NOT_AFFINE):
            steps = trajectory(tx, normal(SHAPES, 0), all_gradients)
        expected = by_hand(inner, [params for _, params in steps], all_gradients)
        for (updates, _), plain in zip(steps, expected, strict=True):
            chex.assert_trees_all_close(updates, plain, rtol=0, atol=1e-9)


def test_inner_that_uses_params_nonlinearly_sees_them_projected():
    squares = optax.stateless(lambda updates, params: jax.tree.map(jnp.square, params))
    tx = galore(squares, rank=RANK, scale=ALPHA)
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)
    with pytest.warns(UserWarning, match=NOT_AFFINE):
        updates, _ = first_update(tx, gradients, params)
    p = basis(gradients["kernel"])
    # A square has no sign to follow that of the basis, so this takes the sign of a first basis.
    p *= np.sign(p[np.argmax(np.abs(p), axis=0), range(RANK)])
    expected = ALPHA * p @ (p.T @ params["kernel"]) ** 2
    np.testing.assert_allclose(updates["kernel"], expected, atol=1e-5)
    np.testing.assert_allclose(updates["bias"], params["bias"] ** 2, rtol=1e-6)


@pytest.mark.parametrize("name", PARAMETER_SCALES)
def test_warning_about_projected_parameters_comes_once(name):
    tx = galore(PARAMETER_SCALES[name](), rank=RANK)
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(params)
        for _ in range(3):  # traced anew each time
            jax.eval_shape(lambda s: tx.update(gradients, s, params), state)
        tx.init(params)
    assert [w.category for w in caught] == [UserWarning]
    assert NOT_AFFINE in str(caught[0].message)
    assert "optax.add_decayed_weights after galore" in str(caught[0].message)


def test_inner_that_leaves_params_alone_needs_none():
    tx = galore(optax.adam(RATE), rank=RANK)
    params, gradients = normal(SHAPES, 0, np.float32), normal(SHAPES, 1, np.float32)
    state = tx.init(params)
    without, _ = jax.jit(tx.update)(gradients, state)
    given, _ = jax.jit(tx.update)(gradients, state, params)
    chex.assert_trees_all_close(without, given, rtol=1e-6)


def test_inner_that_needs_params_says_so_where_there_are_none():
    tx = galore(optax.adamw(RATE), rank=RANK)
    params = normal(SHAPES, 0, np.float32)
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        jax.eval_shape(tx.update, params, tx.init(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda steps: steps,
        lambda steps: steps.gradient_transformation(),
        lambda steps: optax.chain(optax.clip(1.0), steps.gradient_transformation()),
        lambda steps: optax.masked(
            steps.gradient_transformation(), {"bias": False, "kernel": True}
        ),
    ],
    ids=["bare", "transformation", "in_chain", "in_masked"],
)
def test_multi_steps_inside_is_refused(wrap):
    with pytest.raises(ValueError, match="Put it outside"):
        galore(wrap(optax.MultiSteps(optax.adam(RATE), 2)), rank=RANK).init(normal(SHAPES, 0))
