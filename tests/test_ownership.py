"""Whose each leaf of a state is, against what it depends on and how it answers to gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import galore_optax
from galore_optax import DimensionNumbers, QuantizedArray, galore, low_bit
from galore_optax._jaxpr import dependence
from galore_optax._ownership import moments_of, ownership, presumed_batch_axes
from galore_optax._select import Selection
from galore_optax._view import MatrixView

# Parameters called like fields, hyperparameters, labels and positions of a chain.
NAMED_LIKE_FIELDS = {
    "0": {"count": (3, 5), "nu": (4,)},
    "learning_rate": (6,),
    "mu": (5, 7),
    "nu": (8, 9),
    "sgd": {"mu": (10,)},
    "v": (11, 20),
}
LABELS = {"0": "mu", "learning_rate": "mu", "mu": "sgd", "nu": "mu", "sgd": "sgd", "v": "mu"}
FACTORED = {"min_dim_size_to_factor": 4, "multiply_by_parameter_scale": False}
FEW_BITS = {"min_size": 16, "block_size": 4}


def masked(tx):
    return optax.masked(tx, {name: name != "nu" for name in NAMED_LIKE_FIELDS})


TRANSFORMATIONS = {
    "adamw": optax.adamw(1e-3),
    "schedules": optax.adamw(optax.constant_schedule(1e-3), weight_decay=lambda count: 0.1),
    "adafactor": optax.adafactor(1e-3, momentum=0.9, **FACTORED),
    "adan": optax.adan(1e-3),
    "sm3": optax.sm3(1e-3),
    "chain": optax.chain(optax.clip(1.0), optax.trace(0.9), optax.lion(1e-3)),
    "named_chain": optax.named_chain(("mu", optax.trace(0.9)), ("v", optax.scale_by_adam())),
    "masked": optax.chain(masked(optax.adam(1e-3)), optax.trace(0.9)),
    "partition": optax.partition({"mu": optax.adam(1e-3), "sgd": optax.sgd(0.1, 0.9)}, LABELS),
    "inject": optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3, momentum=0.9),
    "multi_steps": optax.MultiSteps(optax.adam(1e-3), 3).gradient_transformation(),
    "low_bit": low_bit(optax.adamw(1e-3), **FEW_BITS),
    "galore": galore(optax.adamw(1e-3), rank=2, exclude="^v"),
    "low_bit_in_galore": galore(low_bit(optax.adamw(1e-3), **FEW_BITS), rank=2, exclude=None),
}
TREES = {
    "names": NAMED_LIKE_FIELDS,
    "list": [(5, 7), (4,), [(6,), (8, 9)]],
    "array": (8, 9),
    "number": (),
}


def is_shape(x):
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def ones(shapes):
    return jax.tree.map(lambda shape: jnp.ones(shape), shapes, is_leaf=is_shape)


def is_quantized(x):
    return isinstance(x, QuantizedArray)


def leaves_of(state):
    return jax.tree.leaves(state, is_leaf=is_quantized)


def gradients_in(tx, params):
    """For each leaf of the state that an update makes, the gradients that went into it."""
    gradients = jax.tree.map(jnp.ones_like, params)
    state = jax.eval_shape(tx.init, params)
    _, sets = dependence(tx.update, gradients, state, params)
    count = len(jax.tree.leaves(params))
    below = jax.tree.structure(state, is_leaf=is_quantized).flatten_up_to(sets)
    is_set = {"is_leaf": lambda x: isinstance(x, frozenset)}
    union = [frozenset().union(*jax.tree.leaves(x, **is_set)) for x in below]
    return state, [{i for i in depends if i < count} for depends in union]


def assert_is_what_it_depends_on(tx, params):
    state, gradients = gradients_in(tx, params)
    owned = ownership(state, params)
    assert len(owned) == len(gradients) == len(leaves_of(state))
    for leaf, depends, array in zip(owned, gradients, leaves_of(state), strict=True):
        if depends:
            assert {leaf.owner} == depends, leaf
        else:
            # A counter, a hyperparameter, or one element where nothing is kept of a parameter; but
            # galore counts the refreshes of each matrix.
            of_matrix = "subspace" in leaf.path
            assert leaf.owner is None or of_matrix or array.shape == (1,), leaf
    return owned


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_the_owner_is_the_parameter_whose_gradient_a_leaf_depends_on(name):
    tx = TRANSFORMATIONS[name]
    owned = assert_is_what_it_depends_on(tx, ones(NAMED_LIKE_FIELDS))
    owners = {leaf.owner for leaf in owned} - {None}
    assert owners == set(range(7))


@pytest.mark.parametrize("tree", ["list", "array", "number"])
@pytest.mark.parametrize("name", ["schedules", "adafactor", "chain", "inject", "multi_steps"])
def test_owners_among_parameters_without_names(name, tree):
    assert_is_what_it_depends_on(TRANSFORMATIONS[name], ones(TREES[tree]))


@pytest.mark.parametrize("tree", ["list", "array"])
def test_owners_of_several_arrays_in_the_place_of_one(tree):
    assert_is_what_it_depends_on(TRANSFORMATIONS["sm3"], ones(TREES[tree]))


def test_a_leaf_changes_when_the_gradient_of_its_owner_does():
    """Values in the place of traces, of moments in codes."""
    tx, params = TRANSFORMATIONS["low_bit"], ones(NAMED_LIKE_FIELDS)
    state = tx.init(params)
    update = jax.jit(lambda gradients: tx.update(gradients, state, params)[1])
    gradients, treedef = jax.tree.flatten(params)

    def values(gradients):
        leaves = leaves_of(update(treedef.unflatten(gradients)))
        return [np.asarray(x.dequantize() if is_quantized(x) else x) for x in leaves]

    before, owned = values(gradients), ownership(state, params)
    for i, gradient in enumerate(gradients):
        after = values([*gradients[:i], 2 * gradient, *gradients[i + 1 :]])
        changed = [not np.array_equal(a, b) for a, b in zip(after, before, strict=True)]
        assert changed == [leaf.owner == i for leaf in owned]


def in_nnx():
    return nnx.state(nnx.Linear(8, 20, rngs=nnx.Rngs(0)), nnx.Param)


def in_linen():
    module = linen.Dense(20, kernel_init=linen.with_partitioning(linen.zeros, (None, "x")))
    return jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 8)))["params"]


@pytest.mark.parametrize("boxes", [in_nnx, in_linen])
@pytest.mark.parametrize("min_size", [16, 100, 1000])
def test_boxes_of_flax_make_no_difference(boxes, min_size):
    """Whether all, the larger one or no moment is taken out of its box, since it is in codes."""
    params = boxes()
    tx = low_bit(optax.adamw(1e-3), min_size=min_size, block_size=4)
    plain = jax.eval_shape(lambda: {"bias": jnp.ones(20), "kernel": jnp.ones((8, 20))})
    pairs = [(jax.eval_shape(tx.init, tree), tree) for tree in (params, plain)]
    found, expected = (ownership(state, tree) for state, tree in pairs)
    assert found == expected
    assert [leaf.owner for leaf in found] == [None, 0, 1, 0, 1]
    mixed = ownership(pairs[0][0], plain)  # Gradients come without boxes, too.
    assert [leaf.size for leaf in mixed] == [leaf.size for leaf in found]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", {"first", "second"}),
        ("chain", {"first"}),
        ("adan", {"first"}),
        ("sm3", {"first"}),
        ("multi_steps", {"first", "second"}),
        ("adafactor", {"first", "second"}),
    ],
)
def test_first_moments_are_odd_in_the_gradients_and_second_ones_even(name, expected):
    tx, params = TRANSFORMATIONS[name], ones(NAMED_LIKE_FIELDS)
    rng = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda p: rng.standard_normal(p.shape).astype(np.float32), params)
        for _ in range(3)
    ]

    @jax.jit
    def moments(sign):
        state = tx.init(params)
        for gradient in gradients:
            gradient = jax.tree.map(lambda g: sign * g, gradient)
            state = tx.update(gradient, state, params)[1]
        return jax.tree.leaves(state)

    owned = ownership(jax.eval_shape(tx.init, params), params)
    roles = [leaf.role for leaf in owned]
    assert set(roles) - {None} == expected
    for role, plus, minus in zip(roles, moments(1.0), moments(-1.0), strict=True):
        if role is not None:
            np.testing.assert_allclose(minus, -plus if role == "first" else plus, rtol=1e-6)
        if role == "second":
            assert np.all(np.asarray(plus) >= 0)


def test_the_moments_of_a_parameter_by_their_role():
    params = ones(NAMED_LIKE_FIELDS)
    tx = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    state = tx.init(params)
    marked = jax.tree.leaves(
        (
            optax.TraceState(jax.tree.map(lambda _: "trace", params)),
            state[1]._replace(
                count="", mu=jax.tree.map(lambda _: "mu", params), nu=LABELS | {"sgd": {"mu": ""}}
            ),
        )
    )
    owned = ownership(state, params)
    for i, parameter in enumerate(jax.tree.leaves(params)):
        moments = moments_of(owned, i)
        assert set(moments) == {"first", "second"}
        assert [marked[k] for k in moments["first"]] == ["trace", "mu"]
        positions = moments["first"] + moments["second"]
        assert all(leaves_of(state)[k].shape == parameter.shape for k in positions)


def test_a_field_is_the_part_of_the_state_that_looks_like_the_parameters():
    params = ones(NAMED_LIKE_FIELDS)
    owned = ownership(TRANSFORMATIONS["schedules"].init(params), params)
    fields = [leaf.field for leaf in owned if leaf.owner is not None]
    assert fields == ["0/mu"] * 7 + ["0/nu"] * 7
    assert {leaf.path for leaf in owned if leaf.owner is None} >= {"0/count"}
    assert [leaf.path for leaf in owned[1:3]] == ["0/mu/0/count", "0/mu/0/nu"]


def test_galore_says_which_axes_of_a_moment_are_batch_axes():
    """Of items so small that their axes would not be presumed to be batch axes."""
    params = {"heads": jnp.ones((3, 5, 4, 2)), "bias": jnp.ones((3, 2, 2))}
    numbers = {"heads": DimensionNumbers(1, 2), "bias": None}
    views = Selection(1, "short", None, numbers).views(params)
    heads = next(view for view in views if isinstance(view, MatrixView))
    low_rank = params | {"heads": jnp.zeros(heads.low_rank_shape)}
    state = optax.adam(1e-3).init(low_rank)
    with_views = {leaf.path: leaf for leaf in ownership(state, low_rank, views)}
    assert with_views["0/mu/heads"].batch_axes == len(heads.batch) == 2
    assert with_views["0/mu/heads"].size == 1 * 5
    assert with_views["0/mu/bias"].batch_axes == 0
    presumed = {leaf.path: leaf for leaf in ownership(state, low_rank)}
    assert presumed["0/mu/heads"].batch_axes == 0
    assert presumed["0/mu/heads"].size == 3 * 2 * 5


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((), 0), ((8,), 0), ((64, 3), 0), ((64, 8, 2), 1), ((64, 5, 3), 0), ((2, 3, 4, 4), 2)],
)
def test_leading_axes_are_presumed_to_be_batch_axes_of_items_that_are_not_tiny(shape, axes):
    assert presumed_batch_axes(shape) == axes


def test_stacked_says_so_instead_where_a_leaf_has_those_axes():
    params = ones({"a": (3, 8, 5), "b": (4, 6)})
    paths = []

    def stacked(path, shape):
        paths.append((path, shape))
        return {"a": 1, "b": 0}[path]

    tx = optax.adafactor(1e-3, momentum=0.9, **FACTORED)
    owned = ownership(tx.init(params), params, stacked=stacked)
    assert set(paths) == {("a", (3, 8, 5)), ("b", (4, 6))}
    for leaf, array in zip(owned, leaves_of(tx.init(params)), strict=True):
        of_a = leaf.owner == 0 and array.shape[:1] == (3,)
        assert leaf.batch_axes == (1 if of_a else 0), leaf
        assert leaf.size == (array.size // 3 if of_a else array.size), leaf


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        (None, TypeError, r"stacked\('w', \(4, 6\)\) must be a number of axes; got None"),
        (3, ValueError, r"stacked\('w', \(4, 6\)\) must be between 0 and the 2 axes.*got 3"),
        (-1, ValueError, "between 0 and the 2 axes.*got -1"),
    ],
)
def test_error_of_a_stacked_that_returns_what_cannot_be(axes, error, match):
    tx = galore_optax.adamw_8bit(1e-3, stacked=lambda path, shape: axes)
    with pytest.raises(error, match=match):
        tx.init(ones({"w": (4, 6)}))
