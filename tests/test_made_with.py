"""That a state whose arrays would mean something else goes on as it did, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import NormScaled, ScaleGradient

PARAMS = {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def make(inner=None, **options):
    return galore_optax.galore(
        optax.scale_by_adam() if inner is None else inner, rank=2, update_proj_gap=3, **options
    )


def low_bit(bits, min_size=0):
    return galore_optax.low_bit(optax.scale_by_adam(), bits, min_size=min_size)


def begun(tx):
    return tx.update(gradients(0), tx.init(PARAMS), PARAMS)[1]


@pytest.mark.parametrize(
    ("before", "after", "was", "now"),
    [
        ({"projector": "rows"}, {"projector": "dct"}, "basis=Rows", "basis=Cosines"),
        ({"projector": "dct"}, {"projector": "random_rows"}, "basis=Cosines", "basis=Rows"),
        (
            {"projector": "gaussian"},
            {"projector": "orthonormal"},
            "projector=gaussian, seed=0",
            "projector=orthonormal, seed=0",
        ),
        (
            {"projector": "gaussian", "seed": 1},
            {"projector": "gaussian", "seed": 2},
            "projector=gaussian, seed=1",
            "projector=gaussian, seed=2",
        ),
        (
            {"residual": NormScaled()},
            {"residual": ScaleGradient()},
            "residual=NormScaled",
            "residual=ScaleGradient",
        ),
    ],
    ids=["rows", "cosines", "kind of random", "seed", "limiter"],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_another_meaning_of_the_same_arrays_is_refused(before, after, was, now, compiled):
    state, tx = begun(make(**before)), make(**after)
    # It is nothing that their shapes would tell.
    fresh = jax.eval_shape(tx.init, PARAMS)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(fresh)
    ]
    update = jax.jit(tx.update) if compiled else tx.update
    with pytest.raises(ValueError, match="belongs to another configuration") as caught:
        update(gradients(1), state, PARAMS)
    assert f"was made with {was}, and this galore has {now}" in str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"projector": "svd"}, {"projector": "eigh"}),
        ({"projector": "rows"}, {"projector": "random_rows"}),
        ({"seed": 1}, {"seed": 2}),
        ({"projector": "gaussian", "seed": 3}, {"projector": "gaussian", "seed": np.int64(3)}),
        ({"stagger": True}, {"update_proj_gap": 5}),
        ({"residual": "discard"}, {"residual": "sign"}),
        ({"transport": "keep"}, {"transport": "project"}),
        ({"scale": 0.25}, {"scale": 1.0}),
    ],
    ids=["svd", "rows", "seed", "same seed", "stagger", "residual", "transport", "scale"],
)
def test_what_is_about_later_steps_alone_may_be_changed(before, after):
    """In the middle of a gap the low-rank gradient, and with it the moments, are the same."""
    state = begun(make(**before))
    after = {"update_proj_gap": 3} | after
    inner = optax.scale_by_adam()
    changed = galore_optax.galore(inner, rank=2, **after)
    (_, found), (_, expected) = (
        tx.update(gradients(1), state, PARAMS) for tx in (changed, make(**before))
    )
    jax.tree.map(np.testing.assert_array_equal, found.inner, expected.inner)
    jax.tree.map(np.testing.assert_array_equal, found.subspace.left, expected.subspace.left)


@pytest.mark.parametrize("projector", ["gaussian", "orthonormal"])
@pytest.mark.parametrize(
    ("before", "after"), [(0, jnp.int32(1)), (jnp.int32(1), 0)], ids=["later", "at first"]
)
def test_a_seed_that_is_an_array_is_not_known_and_not_compared(projector, before, after):
    state = begun(make(projector=projector, seed=before))
    make(projector=projector, seed=after).update(gradients(1), state, PARAMS)


def test_what_goes_with_an_unknown_seed_is_compared():
    state = begun(make(projector="gaussian", seed=jnp.int32(0)))
    with pytest.raises(ValueError, match="projector=gaussian, and this galore has projector=ortho"):
        make(projector="orthonormal").update(gradients(1), state, PARAMS)


def test_injected_hyperparameters_make_the_seed_an_array():
    tx = optax.inject_hyperparams(galore_optax.apollo_adamw, static_args=("rank",))(0.1, rank=2)
    _, state = tx.update(gradients(0), tx.init(PARAMS), PARAMS)
    tx.update(gradients(1), state, PARAMS)


@pytest.mark.parametrize(("before", "after"), [(8, 16), (16, 8)])
@pytest.mark.parametrize("size", [0, 4096])
def test_other_bits_of_moments_are_refused_also_where_none_is_in_codes(before, after, size):
    state = low_bit(before, 4096 if before == 8 else size).init(PARAMS)
    with pytest.raises(ValueError, match=f"made with bits={before}.* has bits={after}"):
        low_bit(after, 4096).update(gradients(0), state, PARAMS)
