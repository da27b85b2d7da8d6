"""Errors say which argument, which value and what would be right, and which leaf it is about."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DimensionNumbers, projectors

INNER = optax.scale_by_adam()
PARAMS = {"layer": {"kernel": np.ones((8, 12), np.float32), "bias": np.ones(12, np.float32)}}


def make_and_init(params=PARAMS, **arguments):
    return galore_optax.galore(INNER, **{"rank": 4, **arguments}).init(params)


def assert_says(error, *fragments):
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        (0, ValueError, ("rank must be positive", "got 0")),
        (-1, ValueError, ("rank must be positive", "got -1")),
        (True, TypeError, ("rank must be a positive int", "fraction of the short side", "True")),
        (False, TypeError, ("rank must be a positive int", "fraction of the short side", "False")),
        (
            128.0,
            ValueError,
            ("rank must be an int", "fraction of the short side in (0, 1)", "128.0"),
        ),
        (1.5, ValueError, ("rank must be an int", "fraction of the short side in (0, 1)", "1.5")),
        (1.0, ValueError, ("rank must be an int", "fraction of the short side in (0, 1)", "1.0")),
        (0.0, ValueError, ("rank must be an int", "fraction of the short side in (0, 1)", "0.0")),
        (-0.5, ValueError, ("rank must be an int", "fraction of the short side in (0, 1)", "-0.5")),
        (np.nan, ValueError, ("rank must be an int", "fraction of the short side", "nan")),
        ("8", TypeError, ("rank must be a positive int", "callable of path and shape", "'8'")),
        (None, TypeError, ("rank must be a positive int", "callable of path and shape", "None")),
        (2j, TypeError, ("rank must be a positive int", "callable of path and shape", "2j")),
        ([8], TypeError, ("rank must be a positive int", "callable of path and shape", "[8]")),
    ],
)
def test_rank(rank, error, says):
    with pytest.raises(error) as caught:
        galore_optax.galore(INNER, rank=rank)
    assert_says(caught, *says)


def test_rank_that_is_an_array():
    with pytest.raises(TypeError, match="rank must be a Python number") as caught:
        galore_optax.galore(INNER, rank=jnp.asarray(8))
    assert_says(caught, 'static_args=("rank",)')


def test_rank_that_inject_hyperparams_made_an_array():
    with pytest.raises(TypeError, match="rank must be a Python number") as caught:
        optax.inject_hyperparams(galore_optax.galore_adamw)(1e-3, rank=8).init(PARAMS)
    assert_says(caught, 'static_args=("rank",)')


@pytest.mark.parametrize(
    ("returned", "error", "says"),
    [
        (0, ValueError, ("must be positive", "got 0")),
        (-4, ValueError, ("must be positive", "got -4")),
        (8.0, ValueError, ("must be an int", "fraction of the short side in (0, 1)", "got 8.0")),
        (True, TypeError, ("must be a positive int", "got True")),
        ("8", TypeError, ("must be a positive int", "got '8'")),
        (None, TypeError, ("must be a positive int", "got None")),
    ],
)
def test_rank_returned_by_a_callable(returned, error, says):
    with pytest.raises(error) as caught:
        make_and_init(rank=lambda path, shape: returned)
    assert_says(caught, "rank('layer/kernel', (8, 12))", *says)


@pytest.mark.parametrize(
    ("gap", "error", "says"),
    [
        (0, ValueError, ("at least 1 step", "got 0")),
        (-3, ValueError, ("at least 1 step", "got -3")),
        (2.5, TypeError, ("positive int, a schedule or an array", "got 2.5")),
        (200.0, TypeError, ("positive int, a schedule or an array", "got 200.0")),
        (True, TypeError, ("positive int, a schedule or an array", "got True")),
        ("x", TypeError, ("positive int, a schedule or an array", "got 'x'")),
        (None, TypeError, ("positive int, a schedule or an array", "got None")),
    ],
)
def test_update_proj_gap(gap, error, says):
    with pytest.raises(error) as caught:
        galore_optax.galore(INNER, update_proj_gap=gap)
    assert_says(caught, "update_proj_gap must be", *says)


@pytest.mark.parametrize(
    ("scale", "error", "says"),
    [
        (np.nan, ValueError, ("finite", "got nan")),
        (np.inf, ValueError, ("finite", "got inf")),
        (-np.inf, ValueError, ("finite", "got -inf")),
        ("x", TypeError, ("a finite number or an array", "got 'x'")),
        (True, TypeError, ("a finite number or an array", "got True")),
        (None, TypeError, ("a finite number or an array", "got None")),
        (1j, TypeError, ("a finite number or an array", "got 1j")),
    ],
)
def test_scale(scale, error, says):
    with pytest.raises(error) as caught:
        galore_optax.galore(INNER, scale=scale)
    assert_says(caught, "scale must be", *says)


@pytest.mark.parametrize("projector", ["SVD", "", "random"])
def test_name_of_no_projector(projector):
    with pytest.raises(ValueError, match=r"projector must be one of .*svd") as caught:
        galore_optax.galore(INNER, projector=projector)
    assert_says(caught, f"got {projector!r}")


@pytest.mark.parametrize("projector", [None, 3, np.ones(2)])
def test_projector_of_a_wrong_type(projector):
    with pytest.raises(TypeError, match=r"projector must be a name .*svd.* or a") as caught:
        galore_optax.galore(INNER, projector=projector)
    assert_says(caught, "(matrix, rank) -> basis", f"got {projector!r}")


@pytest.mark.parametrize(
    ("projector", "options", "error", "says"),
    [
        ("svd", {"iterations": 2}, TypeError, "'iterations', which svd does not take; it takes no"),
        ("power_iteration", {"oversampling": 2}, TypeError, "power_iteration does not take"),
        ("randomized_svd", {"key": 1}, TypeError, "it takes oversampling, power_iterations"),
        ("randomized_svd", {"oversampling": -1}, ValueError, "int of at least 0; got -1"),
        ("randomized_svd", {"oversampling": 1.5}, ValueError, "int of at least 0; got 1.5"),
        ("power_iteration", {"iterations": 0}, ValueError, "int of at least 1; got 0"),
    ],
)
def test_options_of_projectors(projector, options, error, says):
    with pytest.raises(error) as caught:
        galore_optax.galore(INNER, projector=projector, projector_options=options)
    assert_says(caught, says)


@pytest.mark.parametrize("name", ["rows", "dct", "orthonormal"])
def test_more_columns_than_rows(name):
    with pytest.raises(ValueError, match=f"rank of {name} must be at most the 4 rows; got 5"):
        projectors.resolve(name, {})(
            jnp.ones((4, 9)), 5, key=jax.random.key(0), old=jnp.arange(5), first=jnp.asarray(True)
        )


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"refresh": "always"}, ValueError, 'refresh must be "periodic", "lazy" or a'),
        ({"refresh": True}, ValueError, "got True"),
        (
            {"projector_dtype": "int3"},
            ValueError,
            "projector_dtype must be one of float32, bfloat16, int8, int4, float8_e4m3, "
            "float8_e5m2, signed, or None; got 'int3'",
        ),
        ({"projector_dtype": "unsigned"}, ValueError, "or None; got 'unsigned'"),
        ({"stagger": 1}, TypeError, "stagger must be a bool; got 1"),
        ({"seed": 0.5}, TypeError, "seed must be an int; got 0.5"),
        ({"seed": True}, TypeError, "seed must be an int; got True"),
    ],
)
def test_arguments_of_the_refresh(arguments, error, says):
    with pytest.raises(error) as caught:
        galore_optax.galore(INNER, **arguments)
    assert_says(caught, says)


@pytest.mark.parametrize("projector", ["gaussian", "orthonormal"])
def test_lazy_refresh_of_random_subspaces(projector):
    with pytest.raises(ValueError, match="is for subspaces that can stand still") as caught:
        galore_optax.galore(INNER, projector=projector, refresh="lazy")
    assert_says(caught, 'refresh="lazy"', 'Use refresh="periodic"')


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"threshold": 0.0}, "threshold must be a number in (0, 1]; got 0.0"),
        ({"threshold": True}, "threshold must be a number in (0, 1]; got True"),
        ({"queue": 0}, "queue must be a positive int; got 0"),
        ({"queue": 2.0}, "queue must be a positive int; got 2.0"),
    ],
)
def test_lazy(arguments, says):
    with pytest.raises(ValueError, match="must be") as caught:
        galore_optax.Lazy(**arguments)
    assert_says(caught, says)


@pytest.mark.parametrize("refresh", [1, "yes", np.True_, jnp.asarray(True)])
def test_refresh_that_is_no_python_bool(refresh):
    tx = galore_optax.galore(INNER, rank=4)
    with pytest.raises(TypeError, match="refresh must be None or a Python bool"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, refresh=refresh)


@pytest.mark.parametrize("side", ["std", "Short", "", None, 0])
def test_side(side):
    with pytest.raises(ValueError, match="side must be one of") as caught:
        galore_optax.galore(INNER, side=side)
    assert_says(caught, "short, long, left, right, both", f"got {side!r}")


@pytest.mark.parametrize("pattern", ["(", "*kernel", "[a-"])
def test_exclude_that_is_no_regular_expression(pattern):
    with pytest.raises(ValueError, match="exclude must be a valid regular expression") as caught:
        galore_optax.galore(INNER, exclude=pattern)
    assert_says(caught, repr(pattern))


@pytest.mark.parametrize(
    ("exclude", "value"),
    [
        (3, "3"),
        (0.5, "0.5"),
        ({"layer": "kernel"}, "'kernel'"),
        ({"layer": {"kernel": 1, "bias": False}}, "1"),
    ],
)
def test_exclude_of_a_wrong_type(exclude, value):
    with pytest.raises(TypeError, match="exclude must be a regular expression") as caught:
        make_and_init(exclude=exclude)
    assert_says(caught, "callable of path and shape", "tree of bools", value)


@pytest.mark.parametrize(
    "exclude",
    [
        {"other": True},
        {"layer": {"kernel": True}},
        {"layer": {"kernel": True, "bias": False, "more": False}},
        ["embed", "head"],
    ],
)
def test_exclude_of_another_structure(exclude):
    with pytest.raises(ValueError, match="exclude must have the structure of the parameters"):
        make_and_init(exclude=exclude)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (DimensionNumbers(0, 2), ("there is no axis 2",)),
        (DimensionNumbers(-3, 1), ("there is no axis -3",)),
        (DimensionNumbers(0, 0), ("at most once",)),
        (DimensionNumbers(1, -1), ("at most once",)),
        (DimensionNumbers((0, 1), 1), ("at most once",)),
        (DimensionNumbers((0, 0), 1), ("at most once",)),
        (DimensionNumbers((), 1), ("at least one reduction",)),
        (DimensionNumbers(0, ()), ("one output axis",)),
    ],
)
def test_dimension_numbers_that_do_not_fit_a_leaf(numbers, says):
    with pytest.raises(ValueError, match="weight_dimension_numbers of 'layer/kernel'") as caught:
        make_and_init(weight_dimension_numbers={"layer": {"kernel": numbers, "bias": None}})
    assert_says(caught, repr(numbers), "(8, 12)", *says)


@pytest.mark.parametrize(
    "numbers", [DimensionNumbers(0, 0), DimensionNumbers((), 1)], ids=["overlapping", "empty"]
)
def test_dimension_numbers_that_fit_no_leaf_of_their_subtree(numbers):
    with pytest.raises(ValueError, match="weight_dimension_numbers of 'layer/kernel'"):
        make_and_init(weight_dimension_numbers=numbers)


@pytest.mark.parametrize(
    ("numbers", "value"),
    [
        (0, "0"),
        ("kernel", "'kernel'"),
        ({"layer": {"kernel": True, "bias": None}}, "True"),
        (lambda params: 1.5, "1.5"),
    ],
)
def test_dimension_numbers_of_a_wrong_type(numbers, value):
    with pytest.raises(TypeError, match="weight_dimension_numbers must be Dimension") as caught:
        make_and_init(weight_dimension_numbers=numbers)
    assert_says(caught, "None where a leaf is not to be projected", f"got a leaf {value}")


@pytest.mark.parametrize(
    "numbers",
    [
        {"other": None},
        {"layer": {"kernel": DimensionNumbers()}},
        lambda params: {"layer": [None, None]},
        (0, 1),
    ],
)
def test_dimension_numbers_of_another_structure(numbers):
    with pytest.raises(ValueError, match="weight_dimension_numbers must have the structure of"):
        make_and_init(weight_dimension_numbers=numbers)


@pytest.mark.parametrize(
    "axes", ["a", 0.5, None, ("a",), (0.5,)], ids=["text", "float", "none", "texts", "floats"]
)
def test_axes_that_are_no_integers(axes):
    with pytest.raises((TypeError, ValueError), match="layer/kernel"):
        make_and_init(
            weight_dimension_numbers={"layer": {"kernel": DimensionNumbers(axes, 1), "bias": None}}
        )


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool, jnp.uint8])
@pytest.mark.parametrize("shape", [(8, 12), (12,)], ids=["matrix", "vector"])
def test_leaves_that_are_not_real_floating_point(shape, dtype):
    params = {"layer": {"odd": jnp.ones(shape, dtype), "kernel": jnp.ones((8, 12))}}
    with pytest.raises(TypeError, match="layer/odd") as caught:
        make_and_init(params)
    assert_says(caught, jnp.dtype(dtype).name, "optax.masked")


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_gradients_that_are_not_real_floating_point(dtype):
    tx = galore_optax.galore(INNER, rank=4)
    gradients = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    with pytest.raises(TypeError, match="layer/") as caught:
        tx.update(gradients, tx.init(PARAMS), PARAMS)
    assert_says(caught, jnp.dtype(dtype).name)


@pytest.mark.filterwarnings("ignore:the inner transformation of galore uses the parameters")
@pytest.mark.parametrize(
    "inner", [optax.adamw(0.1, weight_decay=0.1), optax.lamb(0.1)], ids=["adamw", "lamb"]
)
def test_missing_params_where_the_inner_transformation_needs_them(inner):
    tx = galore_optax.galore(inner, rank=4)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=re.escape("update(updates, state, params)")):
        jax.eval_shape(tx.update, PARAMS, state)


@pytest.mark.parametrize(
    ("made_by", "used_by"),
    [
        (optax.adam(0.1), optax.sgd(0.1, momentum=0.9)),
        (optax.sgd(0.1), optax.adam(0.1)),
        (optax.adam(0.1), optax.lion(0.1)),
    ],
    ids=["adam-sgd", "sgd-adam", "adam-lion"],
)
def test_state_of_another_inner_transformation(made_by, used_by):
    state = galore_optax.galore(made_by, rank=4).init(PARAMS)
    tx = galore_optax.galore(used_by, rank=4)
    with pytest.raises(ValueError, match="belongs to another configuration: its inner state"):
        jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_params_of_other_shapes_than_the_gradients():
    tx = galore_optax.galore(INNER, rank=4)
    transposed = jax.tree.map(jnp.transpose, PARAMS)
    with pytest.raises(ValueError, match="params and gradients must have the same shapes; 'layer/"):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), transposed)


def test_projector_that_returns_other_shapes():
    def transposed(matrix, rank):
        return galore_optax.projectors.svd(matrix, rank).T

    tx = galore_optax.galore(INNER, rank=4, projector=transposed)
    with pytest.raises(ValueError, match=r"must return a basis of shape \(8, 4\)"):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)


def state_of(**arguments):
    return make_and_init(**{"rank": 4, "side": "short", **arguments})


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"rank": 3}, "'left': 'float32[8, 3]'"),
        ({"side": "long"}, "the state has {'right': 'float32[12, 4]'"),
        ({"side": "both"}, "'left': 'float32[8, 4]', 'right': 'float32[12, 4]'"),
        ({"exclude": lambda path, shape: True}, "the state has {}"),
        (
            {"weight_dimension_numbers": DimensionNumbers(1, 0), "side": "left"},
            "'left': 'float32[12, 4]'",
        ),
        ({"projector": "gaussian"}, "the state has {'refreshes'"),
        ({"projector_dtype": "bfloat16"}, "'left': 'bfloat16[8, 4]'"),
        ({"projector_dtype": "int8"}, "'left': 'int8[8, 4] in blocks of 32'"),
        ({"projector_dtype": "int4"}, "'left': 'int4[8, 4] in blocks of 32'"),
        ({"projector_dtype": "float8_e5m2"}, "'left': 'float8_e5m2[8, 4] in blocks of 32'"),
        ({"refresh": "lazy"}, "'similarities': 'float32[5]'"),
        ({"diagnostics": True}, "'energy': 'float32[]'"),
    ],
    ids=[
        "rank",
        "side",
        "both_sides",
        "exclude",
        "dimension_numbers",
        "projector",
        "bfloat16_projector",
        "int8_projector",
        "int4_projector",
        "float8_projector",
        "refresh",
        "diagnostics",
    ],
)
@pytest.mark.filterwarnings("ignore:galore projects nothing")
def test_state_of_another_configuration(other, found):
    tx = galore_optax.galore(INNER, rank=4)
    with pytest.raises(ValueError, match="state belongs to another configuration") as caught:
        tx.update(PARAMS, state_of(**other), PARAMS)
    assert_says(
        caught, "'layer/kernel'", "(8, 12)", "needs {'left': 'float32[8, 4]'", found, "init"
    )


@pytest.mark.filterwarnings("ignore:galore projects nothing")
def test_state_of_a_matrix_that_is_now_excluded():
    tx = galore_optax.galore(INNER, rank=4, exclude="kernel")
    with pytest.raises(ValueError, match="state belongs to another configuration") as caught:
        tx.update(PARAMS, state_of(), PARAMS)
    assert_says(caught, "'layer/kernel'", "exclude")


@pytest.mark.parametrize(
    "make_state",
    [INNER.init, lambda params: (), lambda params: (state_of(), optax.EmptyState())],
    ids=["adam", "empty", "chain"],
)
def test_state_of_another_transformation(make_state):
    state = make_state(PARAMS)
    with pytest.raises(TypeError, match="needs the GaloreState that its init made") as caught:
        galore_optax.galore(INNER, rank=4).update(PARAMS, state, PARAMS)
    assert_says(caught, f"got a {type(state).__name__}")


@pytest.mark.parametrize(
    "gradients",
    [
        {"layer": {"kernel": PARAMS["layer"]["kernel"]}},
        {"layer": {**PARAMS["layer"], "more": np.ones(3, np.float32)}},
        {"other": PARAMS["layer"]},
        [PARAMS["layer"]["kernel"], PARAMS["layer"]["bias"]],
    ],
    ids=["fewer", "more", "other_name", "list"],
)
def test_gradients_of_another_structure(gradients):
    tx = galore_optax.galore(INNER, rank=4)
    with pytest.raises(ValueError, match="gradients have another structure than") as caught:
        tx.update(gradients, tx.init(PARAMS), PARAMS)
    assert_says(caught, "Pass gradients of the parameters that the state was made for")


def test_params_of_another_structure():
    tx = galore_optax.galore(INNER, rank=4)
    with pytest.raises(ValueError, match="gradients have another structure than params"):
        tx.update(PARAMS, tx.init(PARAMS), {"layer": PARAMS["layer"]["kernel"]})


@pytest.mark.parametrize(
    "inner", [128, "adamw", optax.adamw, PARAMS], ids=["rank", "name", "function", "params"]
)
def test_inner_that_is_no_transformation(inner):
    with pytest.raises(TypeError, match="inner must be an Optax transformation") as caught:
        galore_optax.galore(inner)
    assert_says(caught, "galore(rank=128)", repr(inner))


def test_multi_steps_as_inner():
    with pytest.raises(ValueError, match=r"must not contain optax\.MultiSteps") as caught:
        galore_optax.galore(optax.MultiSteps(INNER, 4))
    assert_says(caught, "Put it outside: optax.MultiSteps(galore(...)")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["bare", "in_chain", "in_wrapper"],
)
def test_multi_steps_anywhere_inside(wrap):
    inner = wrap(optax.MultiSteps(INNER, 4).gradient_transformation())
    with pytest.raises(ValueError, match=r"must not contain optax\.MultiSteps") as caught:
        galore_optax.galore(inner, rank=4).init(PARAMS)
    assert_says(caught, "Put it outside: optax.MultiSteps(galore(...)")
