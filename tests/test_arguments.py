"""What presets check of the arguments that Optax takes as they come, and galore of odd ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DimensionNumbers, galore

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

PARAMS = {"kernel": np.ones((8, 12), np.float32), "bias": np.ones(12, np.float32)}
INNER = optax.scale_by_adam()
PRESETS = ("galore_adamw", "fira_adamw_8bit", "q_galore_adamw")


def shapes_of_update(tx):
    """Runs init and update without computing anything."""
    state = jax.eval_shape(tx.init, PARAMS)
    return jax.eval_shape(tx.update, PARAMS, state, PARAMS)


@pytest.mark.parametrize("preset", [*PRESETS, "adamw_8bit"])
@pytest.mark.parametrize(
    ("argument", "value", "error", "says"),
    [
        ("learning_rate", "0.1", TypeError, "a number or a schedule of the step; got '0.1'"),
        ("learning_rate", None, TypeError, "a number or a schedule of the step; got None"),
        ("learning_rate", np.nan, ValueError, "finite; got nan"),
        ("learning_rate", np.ones(1), TypeError, "a number or a schedule"),
        ("learning_rate", lambda: 0.1, TypeError, "a number or a schedule"),
        ("b1", 1.5, ValueError, "in [0, 1); got 1.5"),
        ("b2", -0.1, ValueError, "in [0, 1); got -0.1"),
        ("b2", None, TypeError, "a number in [0, 1); got None"),
        ("eps", "1e-8", TypeError, "a number; got '1e-8'"),
        ("eps_root", -1.0, ValueError, "at least 0; got -1.0"),
        ("mu_dtype", "float31", TypeError, "a floating-point dtype; got 'float31'"),
        ("mu_dtype", jnp.int8, ValueError, "a floating-point dtype; got"),
        ("weight_decay", [0.1], TypeError, "a number or a schedule of the step; got [0.1]"),
        ("weight_decay", True, TypeError, "a number or a schedule of the step; got True"),
        ("mask", "kernel", TypeError, "a tree of bools with the structure of the parameters"),
        ("mask", lambda: True, TypeError, "or a function that makes one of them; got"),
        ("nesterov", 1, TypeError, "a bool; got 1"),
    ],
)
def test_arguments_of_adamw(preset, argument, value, error, says):
    with pytest.raises(error, match=re.escape(says)) as caught:
        getattr(galore_optax, preset)(**{"learning_rate": 1e-3, argument: value})
    assert str(caught.value).startswith(f"{argument} must be ")


@pytest.mark.parametrize(
    ("preset", "arguments", "error", "says"),
    [
        ("galore_adamw", {"inject_learning_rate": 1}, TypeError, "inject_learning_rate must be a"),
        ("galore_adamw", {"moment_dtype": True}, ValueError, "moment_dtype must be 'bfloat16'"),
        ("galore_lion", {"b1": 1.0}, ValueError, "b1 must be in [0, 1); got 1.0"),
        ("galore_lion", {"mask": {"kernel": 1}}, TypeError, "got a leaf 1"),
        ("galore_sgd", {"momentum": "0.9"}, TypeError, "momentum must be a number; got '0.9'"),
        ("galore_sgd", {"accumulator_dtype": 3.5}, TypeError, "accumulator_dtype must be a float"),
        ("galore_adafactor", {"decay_rate": None}, TypeError, "decay_rate must be a number"),
        ("galore_adafactor", {"factored": None}, TypeError, "factored must be a bool; got None"),
        ("galore_adafactor", {"clipping_threshold": 0.0}, ValueError, "above 0; got 0.0"),
        ("galore_adafactor", {"dtype_momentum": "x"}, TypeError, "dtype_momentum must be a float"),
        ("galore_adafactor", {"min_dim_size_to_factor": "2"}, TypeError, "must be an int"),
        ("flora", {"scale": jnp.ones(1)}, TypeError, "scale must be a finite number"),
        ("flora", {"scale": "1"}, TypeError, "scale must be a finite number"),
        ("galore_muon", {"beta": 1.0}, ValueError, "beta must be in [0, 1); got 1.0"),
        ("galore_muon", {"ns_steps": 1.5}, TypeError, "ns_steps must be a positive int; got 1.5"),
        ("galore_muon", {"ns_steps": 0}, ValueError, "ns_steps must be at least 1; got 0"),
    ],
)
def test_arguments_of_other_presets(preset, arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        getattr(galore_optax, preset)(1e-3, **arguments)


@pytest.mark.parametrize("preset", ["galore_adamw", "fira_adamw", "adamw_8bit", "galore_lion"])
def test_a_mask_that_does_not_fit_the_parameters(preset):
    options = {"mask": {"other": True}, "weight_decay": 0.1}
    options |= {} if preset == "adamw_8bit" else {"rank": 4}
    with pytest.raises(ValueError, match="mask must be a tree of bools with the structure of"):
        shapes_of_update(getattr(galore_optax, preset)(1e-3, **options))


@pytest.mark.parametrize("mask", [{"kernel": True, "bias": False}, True, None])
@pytest.mark.parametrize("preset", ["galore_adamw", "fira_adamw"])
def test_a_mask_that_fits(preset, mask):
    tx = getattr(galore_optax, preset)(1e-3, mask=mask, weight_decay=0.1, rank=4)
    assert jax.tree.structure(shapes_of_update(tx)[0]) == jax.tree.structure(PARAMS)


def test_decay_rates_that_inject_hyperparams_rounds_to_one():
    """It holds numbers in the dtype of the parameters: with b2 = 1 Adam divides zero by zero."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    make = optax.inject_hyperparams(galore_optax.galore_adamw, static_args=["rank", "seed"])
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\).*hyperparam_dtype=jnp.float32"):
        make(1e-3, rank=4).init(params)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"side": np.asarray(["left"])}, ValueError, "side must be one of short"),
        ({"side": ["left"]}, ValueError, "side must be one of short"),
        ({"scale": np.ones(2)}, TypeError, "scale must be a finite number or an array"),
        ({"scale": np.asarray("a")}, TypeError, "scale must be a finite number or an array"),
        ({"seed": object()}, TypeError, "seed must be an int; got <object"),
        ({"diagnostics": "no"}, TypeError, "diagnostics must be a bool; got 'no'"),
        ({"refresh": galore_optax.Lazy}, ValueError, "refresh must be"),
        ({"update_proj_gap": np.asarray("a")}, TypeError, "update_proj_gap must be a positive int"),
        ({"update_proj_gap": jnp.ones(1)}, TypeError, "update_proj_gap must be a positive int"),
        ({"update_proj_gap": jnp.asarray(np.nan)}, ValueError, "at least 1 step; got nan"),
        ({"update_proj_gap": lambda: 2}, TypeError, "update_proj_gap must be a schedule"),
        ({"update_proj_gap": lambda step: "x"}, TypeError, "schedule that returns a number; got"),
        ({"update_proj_gap": lambda step: jnp.ones(3)}, TypeError, "that returns a number; got"),
        ({"projector": lambda matrix: matrix}, TypeError, "projector must be a name"),
        ({"projector": lambda: 1}, TypeError, "projector must be a name"),
        ({"projector_options": "iterations"}, TypeError, "projector_options must be a dict"),
        ({"projector_options": 0}, TypeError, "projector_options must be a dict"),
        ({"exclude": re.compile(b"kernel")}, TypeError, "exclude must be a regular expression"),
        (
            {"weight_dimension_numbers": DimensionNumbers(True, False)},
            TypeError,
            "axes must be ints or sequences of ints",
        ),
    ],
)
def test_odd_arguments_of_galore(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        shapes_of_update(galore(INNER, rank=4, **arguments))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: galore_optax.Rotate("0.9", 0.999), TypeError, "b1 of Rotate must be a number in"),
        (lambda: galore_optax.Reset(0.9, [0.9]), TypeError, "b2 of Reset must be a number in"),
        (lambda: galore_optax.ErrorFeedback(True), TypeError, "b1 of ErrorFeedback must be a"),
        (lambda: galore_optax.NormScaled(betas=0.9), TypeError, "betas of NormScaled must be a"),
        (lambda: galore_optax.NormScaled(betas=(0.9,)), TypeError, "must be a pair of numbers"),
        (
            lambda: galore_optax.NormScaled(betas=(0.9, None)),
            TypeError,
            "b2 of NormScaled's betas must be a number in [0, 1); got None",
        ),
        (lambda: galore_optax.RankByRole(2, {b"k": 1.0}), TypeError, "regular expressions for"),
        (
            lambda: galore_optax.RankByRole(2, {re.compile(b"k"): 1.0}),
            TypeError,
            "factors of RankByRole must have regular expressions for keys",
        ),
        (lambda: galore_optax.low_bit(INNER, names="mu"), TypeError, "names must be a dict"),
        (lambda: galore_optax.low_bit(INNER, names={3: None}), TypeError, "names of fields for k"),
        (lambda: galore_optax.limit_norm_growth(stacked=3), TypeError, "stacked must be a func"),
    ],
)
def test_odd_arguments_of_parts(make, error, says):
    with pytest.raises(error, match=re.escape(says)):
        make()


@pytest.mark.parametrize(
    ("stacked", "error"), [(lambda path, shape: 9, ValueError), (lambda *_: None, TypeError)]
)
@pytest.mark.parametrize("make", [galore_optax.limit_norm_growth, galore_optax.low_bit])
def test_axes_of_stacks_that_a_leaf_does_not_have(make, stacked, error):
    given = () if make is galore_optax.limit_norm_growth else (INNER,)
    with pytest.raises(error, match=r"stacked\('.*', \(.*\)\) must be"):
        jax.eval_shape(make(*given, stacked=stacked).init, PARAMS)


@pytest.mark.parametrize(
    "number", [0.5, np.float32(0.5), np.asarray(0.5), jnp.asarray(0.5, jnp.bfloat16)]
)
def test_numbers_of_any_kind_are_right(number):
    galore_optax.galore_adamw(number, number, number, weight_decay=number)
    galore(INNER, scale=number)


@pytest.mark.parametrize("scale", [np.float64(0.5), np.asarray(0.5, np.float32), 1])
def test_a_scale_of_numpy_is_a_number_as_any(scale):
    tx = galore(INNER, rank=4, scale=scale)
    state = jax.eval_shape(tx.init, PARAMS)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    updates, _ = jax.eval_shape(tx.update, half, state)
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}
