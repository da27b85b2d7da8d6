"""Every preset takes every argument of galore, and is the transformation that it stands for."""

import inspect
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from programs import programs

import galore_optax
from galore_optax import DimensionNumbers, Project, galore
from galore_optax._options import GaloreOptions
from galore_optax._residual import Discard

INNERS = {
    "galore_adamw": lambda: optax.adamw(0.1),
    "galore_adafactor": lambda: optax.adafactor(
        0.1, multiply_by_parameter_scale=False, momentum=0.9
    ),
    "galore_lion": lambda: optax.lion(0.1),
    "galore_sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "galore_adamw_8bit": lambda: galore_optax.adamw_8bit(0.1),
    "q_galore_adamw": lambda: galore_optax.adamw_8bit(0.1),
}
OWN = {
    "galore_adafactor": {"multiply_by_parameter_scale": False, "momentum": 0.9},
    "galore_sgd": {"momentum": 0.9},
}
DEFAULTS = {"q_galore_adamw": {"projector_dtype": "int4", "refresh": "lazy"}}
# None of them the default, and each with a part in the states or updates below.
OPTIONS = {
    "rank": 3,
    "update_proj_gap": 2,
    "scale": 0.5,
    "projector": "randomized_svd",
    "projector_options": {"oversampling": 1, "power_iterations": 0},
    "projector_dtype": "bfloat16",
    "refresh": galore_optax.Lazy(queue=1),
    "stagger": True,
    "transport": Project(),
    "residual": Discard(),
    "side": "long",
    "exclude": "out",
    "weight_dimension_numbers": DimensionNumbers(-2, -1),
    "accumulation_steps": 2,
    "seed": 5,
    "diagnostics": True,
}
SHAPES = {"stack": (2, 6, 9), "out": (6, 8)}


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def trajectory(tx, steps=3):
    params = tree(0)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    found = []
    for i in range(steps):
        updates, state = update(tree(i + 1), state, params)
        found.append((updates, state))
    return found


def keyword_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_options_are_those_of_galore():
    names = keyword_arguments(galore)
    assert OPTIONS.keys() == names.keys() == typing.get_type_hints(GaloreOptions).keys()
    assert not [name for name in OPTIONS if OPTIONS[name] == names[name]]


@pytest.mark.parametrize("name", INNERS)
def test_signature_has_the_options_of_galore_with_their_defaults(name):
    shown = keyword_arguments(getattr(galore_optax, name))
    assert keyword_arguments(galore) | DEFAULTS.get(name, {}) == {k: shown[k] for k in OPTIONS}


@pytest.mark.parametrize("name", INNERS)
def test_all_options_are_passed_on(name):
    preset = getattr(galore_optax, name)(0.1, **OWN.get(name, {}), **OPTIONS)
    expected = galore(INNERS[name](), **OPTIONS)
    assert programs(preset, tree(0)) == programs(expected, tree(0))


def test_defaults_that_differ_from_those_of_galore():
    options = {name: OPTIONS[name] for name in ("rank", "weight_dimension_numbers")}
    preset = galore_optax.q_galore_adamw(0.1, **options)
    expected = galore(galore_optax.adamw_8bit(0.1), **options, **DEFAULTS["q_galore_adamw"])
    assert programs(preset, tree(0)) == programs(expected, tree(0))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16], ids=["name", "type"])
def test_moments_in_bfloat16_are_those_of_low_bit_with_16_bits(dtype):
    preset = galore_optax.galore_adamw(0.1, moment_dtype=dtype, **OPTIONS)
    inner = galore_optax.low_bit(optax.adamw(0.1), bits=16, min_size=0)
    assert programs(preset, tree(0)) == programs(galore(inner, **OPTIONS), tree(0))
    _, state = trajectory(preset)[-1]
    moments = jax.tree.leaves(optax.tree.get(state, "mu"))
    assert moments
    assert {x.dtype for x in moments} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", ["float16", "int8", jnp.int8], ids=str)
def test_moments_in_another_dtype_are_refused(dtype):
    message = r"moment_dtype must be 'bfloat16'.* or None for float32; got .*(16|int8).*_8bit"
    with pytest.raises(ValueError, match=message):
        galore_optax.fira_adamw(0.1, moment_dtype=dtype)


@pytest.mark.parametrize("name", ["galore_sgd", "q_galore_adamw"])
def test_hyperparameters_can_be_injected(name):
    """Those that are numbers become arrays, which the rest of the options must survive."""
    static = {"rank", "projector", "accumulation_steps"}
    static |= {"block_size", "min_size"} if name == "q_galore_adamw" else set()
    preset = getattr(galore_optax, name)
    arguments = {"learning_rate": 0.1, **OWN.get(name, {}), **OPTIONS}
    injected = optax.inject_hyperparams(preset, static_args=static)(**arguments)
    found, expected = trajectory(injected), trajectory(preset(**arguments))
    assert {"scale", "seed", "update_proj_gap"} <= found[0][1].hyperparams.keys()
    for (updates, _), (wanted, _) in zip(found, expected, strict=True):
        chex.assert_trees_all_close(updates, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("argument", ["block_size", "min_size", "accumulation_steps"])
def test_numbers_that_must_not_be_injected_say_how(argument):
    static = {"rank", "block_size", "min_size", "accumulation_steps"} - {argument}
    preset = optax.inject_hyperparams(galore_optax.galore_adamw_8bit, static_args=static)
    with pytest.raises((TypeError, ValueError), match=rf"{argument} must be .*name it in static_"):
        preset(0.1, rank=3, accumulation_steps=2).init(tree(0))


def test_an_option_that_there_is_not():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gap'"):
        galore_optax.galore_adamw(0.1, gap=10)
