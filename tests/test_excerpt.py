"""That galore and low_bit hear which layer they update, through whatever is around them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax._excerpt import Excerpt, Ordinal
from tests import layerwise_model as model

# What depends on the excerpt: random bases of each matrix' own, refreshed at steps of its own, and
# moments rounded at random.
RANDOM = galore_optax.galore(
    galore_optax.low_bit(optax.lion(0.01), bits=16, min_size=16),
    rank=4,
    projector="orthonormal",
    stagger=True,
    update_proj_gap=3,
    weight_dimension_numbers=model.numbers,
)
BIT_16 = galore_optax.low_bit(optax.adam(0.01), bits=16, min_size=16)
STEPS = 5


def compiled(tx):
    return tx._replace(init=jax.jit(tx.init), update=jax.jit(tx.update))


def split(random, bit_16):
    return model.partition(up=random, down=random, rest=bit_16)


def train(tx):
    params = model.init(jnp.float32)
    return model.train(model.layerwise(tx).step, params, tx.init(params), model.batches(STEPS))


@pytest.fixture(scope="module")
def expected():
    return train(split(RANDOM, BIT_16))


@pytest.mark.parametrize(
    "tx",
    [
        compiled(split(RANDOM, BIT_16)),
        split(optax.chain(compiled(RANDOM)), optax.chain(compiled(BIT_16))),
    ],
    ids=["the whole", "members of chains"],
)
def test_an_update_compiled_by_itself_trains_the_same(tx, expected):
    params, state, metrics = train(tx)
    # XLA fuses otherwise what is compiled by itself; a moment between two bfloat16 may go the other
    # way then. Bases of another matrix, or refreshes on another step, would change far more.
    chex.assert_trees_all_close(params, expected[0], atol=2e-4)
    counters = [
        [x for x in jax.tree.leaves(s) if x.dtype == jnp.int32] for s in (state, expected[1])
    ]
    chex.assert_trees_all_equal(*counters)
    chex.assert_trees_all_close(metrics, expected[2], rtol=1e-3)


def excerpt_of(layer, ordinals=(), layers=4):
    layer, turn = (jnp.asarray(x, jnp.int32) for x in (layer, 7 + layer))
    return Excerpt(layer, turn, layers, ordinals, micro_batches=1, complete=True)


def test_an_excerpt_is_a_layer_of_the_whole_update():
    """Each layer by itself, with its own random bases, against the update of the stack."""
    numbers = {name: galore_optax.DimensionNumbers(1, 2) for name in "ab"}
    tx = galore_optax.galore(
        optax.sgd(1.0),
        rank=2,
        projector="gaussian",
        stagger=True,
        update_proj_gap=9,
        weight_dimension_numbers=numbers,
    )
    keys = jax.random.split(jax.random.key(0))
    gradients = {name: jax.random.normal(k, (4, 6, 5)) for name, k in zip("ab", keys, strict=True)}
    state = tx.init(gradients)
    whole, whole_state = jax.jit(tx.update)(gradients, state)
    ordinals = (("a", Ordinal(0, 8)), ("b", Ordinal(4, 8)))
    update = jax.jit(tx.update)
    for i in range(4):
        one, one_state = (
            jax.tree.map(lambda x, i=i: x[i : i + 1] if x.ndim else x, tree)
            for tree in (gradients, state)
        )
        updates, one_state = update(one, one_state, excerpt=excerpt_of(i, ordinals))
        chex.assert_trees_all_close(updates, jax.tree.map(lambda x, i=i: x[i : i + 1], whole))
        for name in "ab":
            assert one_state.subspace.due[name] == whole_state.subspace.due[name][i]
    assert update._cache_size() == 2  # One program for all layers, beside that of the stack.


def test_moments_of_each_layer_are_rounded_with_random_numbers_of_its_own():
    gradients = {"kernel": jnp.linspace(0.0, 1.0, 1024).reshape(1, 32, 32)}
    state = BIT_16.init(gradients)
    layers = [0, 1, 1]
    moments = [
        optax.tree.get(BIT_16.update(gradients, state, excerpt=excerpt_of(i))[1], "mu")["kernel"]
        for i in layers
    ]
    assert (moments[0] != moments[1]).any()
    chex.assert_trees_all_equal(moments[1], moments[2])
    assert all(abs(m - 0.1 * gradients["kernel"]).max() < 1e-3 for m in moments)


def test_an_excerpt_is_static_but_for_its_numbers():
    leaves, structure = jax.tree.flatten(excerpt_of(3))
    assert leaves == [3, 10]
    other = dataclasses.replace(excerpt_of(1), complete=False)
    assert structure == jax.tree.structure(excerpt_of(1)) != jax.tree.structure(other)
    assert hash(structure) == hash(jax.tree.structure(excerpt_of(1)))


def dropping(tx):
    """A wrapper that is written as if there were no extra arguments."""
    return optax.GradientTransformation(
        tx.init, lambda updates, state, params=None: tx.update(updates, state, params)
    )


@pytest.mark.parametrize(
    ("tx", "match"),
    [
        (dropping(RANDOM), "around galore drops"),
        (compiled(dropping(RANDOM)), "around galore drops"),
        (optax.chain(optax.scale(2.0), dropping(BIT_16)), "around low_bit, .* state's 1, drops"),
        (split(dropping(RANDOM), BIT_16), "around galore, .* inner_states/down/inner_state, drops"),
        (
            galore_optax.galore(dropping(BIT_16), rank=4, weight_dimension_numbers=model.numbers),
            "around low_bit, .* state's inner, drops",
        ),
    ],
    ids=["around all", "compiled", "in a chain", "in a partition", "inside galore"],
)
def test_error_of_a_wrapper_that_drops_the_excerpt(tx, match):
    with pytest.raises(ValueError, match=f"{match}.*GradientTransformationExtraArgs.*extra_args"):
        model.layerwise(tx).init(model.init(jnp.float32))


def on_some_steps(tx):
    """A wrapper that updates on steps of its choice, as optax.apply_if_finite does."""

    def update(updates, state, params=None, **extra_args):
        def go_on():
            return tx.update(updates, state, params, **extra_args)

        return jax.lax.cond(state.step < 100, go_on, lambda: (updates, state))

    return optax.GradientTransformationExtraArgs(tx.init, update)


@optax.inject_hyperparams
def injected(learning_rate):
    return galore_optax.galore_adamw(
        learning_rate, rank=4, projector="gaussian", weight_dimension_numbers=model.numbers
    )


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(RANDOM, optax.chain(optax.identity(), BIT_16)),
        optax.masked(RANDOM, {"blocks": True, "embed": False, "norm": False, "head": True}),
        injected(learning_rate=0.1),
        on_some_steps(RANDOM),
        optax.MultiSteps(RANDOM, 2),
        galore_optax.low_bit(RANDOM, names={"subspace": None}),
        dropping(optax.sgd(0.1)),
        # Its codes are the same wherever they belong.
        dropping(galore_optax.low_bit(optax.adam(0.1))),
    ],
    ids=["chain", "masked", "inject", "cond", "multi", "low_bit around", "no galore", "8 bits"],
)
def test_no_error_of_wrappers_that_lose_nothing(tx):
    model.layerwise(tx).init(model.init(jnp.float32))
