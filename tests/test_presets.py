"""Every preset takes every argument of galore, and is the transformation that it stands for."""

import functools
import inspect
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from family_runs import run
from programs import programs

import galore_optax
from galore_optax import DimensionNumbers, NormScaled, Project, Reset, Rotate, ScaleGradient, galore
from galore_optax._options import GaloreOptions
from galore_optax._residual import Discard

RANDOM_ROWS = {"rank": 0.25, "scale": 1.0, "projector": "random_rows"}
# By preset of AdamW: which options have other defaults than those of galore.
ADAMW = {
    "galore_adamw": {},
    "fira_adamw": {"residual": "norm_scaled"},
    "apollo_adamw": {
        "rank": 0.25,
        "scale": 1.0,
        "projector": "gaussian",
        "residual": ScaleGradient("channel"),
    },
    "apollo_mini_adamw": {
        "rank": 1,
        "scale": 128**0.5,
        "projector": "gaussian",
        "residual": ScaleGradient("tensor"),
    },
    "ldadamw": {
        "update_proj_gap": 1,
        "scale": 1.0,
        "projector": "momentum_iteration",
        "transport": "rotate",
    },
    "tracked_adamw": {
        "update_proj_gap": 1,
        "projector": "momentum_iteration",
        "transport": "rotate",
        "residual": NormScaled(beta=2.0),
    },
    "frugal_adamw": RANDOM_ROWS | {"transport": "reset", "residual": "sign"},
    "grass_adamw": {"projector": "rows", "transport": "reset"},
    "dct_adamw": {"update_proj_gap": 1, "scale": 1.0, "projector": "dct", "transport": "rotate"},
}
IN_8_BITS = {f"{name}_8bit": defaults for name, defaults in ADAMW.items()}
IN_8_BITS["q_galore_adamw"] = {"projector_dtype": "int4", "refresh": "lazy"}
OTHERS = {
    "galore_adafactor": {},
    "galore_lion": {},
    "galore_sgd": {},
    "flora": {
        "update_proj_gap": 1000,
        "scale": 1.0,
        "projector": "gaussian",
        "transport": "project",
    },
    "galore_muon": {"scale": 1.0, "transport": "project"},
}
DEFAULTS = ADAMW | IN_8_BITS | OTHERS
OWN = {
    "galore_adafactor": {"multiply_by_parameter_scale": False, "momentum": 0.9},
    "galore_sgd": {"momentum": 0.9},
    "flora": {"clipping_threshold": None},
}
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


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tree():
    return {name: normal(*shape) for name, shape in SHAPES.items()}


def keyword_arguments(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_options_are_those_of_galore():
    names = keyword_arguments(galore)
    assert OPTIONS.keys() == names.keys() == typing.get_type_hints(GaloreOptions).keys()
    assert not [name for name in OPTIONS if OPTIONS[name] == names[name]]


@pytest.mark.parametrize("name", DEFAULTS)
def test_signature_has_the_options_of_galore_with_their_defaults(name):
    shown = keyword_arguments(getattr(galore_optax, name))
    assert keyword_arguments(galore) | DEFAULTS[name] == {k: shown[k] for k in OPTIONS}


def flora_of_parts(options):
    """Without clipping, so that the scale of matrices is all that follows Adafactor."""
    scale = {"stack": options["scale"], "out": 1.0}
    return optax.chain(
        galore(optax.ema(0.9, debias=False), **options | {"scale": 1.0}),
        optax.scale_by_factored_rms(),
        optax.stateless(lambda u, _: {k: u[k] * scale[k] if scale[k] != 1 else u[k] for k in u}),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(0.1),
    )


def muon_of_parts(options):
    """At full size the matrices of the stack are (6, 9)."""
    numbers = {"stack": optax.contrib.MuonDimensionNumbers(-2, -1)}
    numbers["out"] = optax.MaskedNode()
    muon = optax.contrib.scale_by_muon(eps=1e-8, weight_dimension_numbers=numbers)
    widened = optax.stateless(lambda u, _: jax.tree.map(lambda x: x * 1.5**0.5, u))
    parts = {
        "muon": optax.chain(galore(muon, **options | {"exclude": None}), widened),
        "adam": optax.scale_by_adam(),
    }
    return optax.chain(
        optax.partition(parts, {"stack": "muon", "out": "adam"}),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(0.1),
    )


# Of what a preset is made where all options are given, be it with other defaults or not.
MADE_OF = {
    **dict.fromkeys(ADAMW, lambda options: galore(optax.adamw(0.1), **options)),
    **dict.fromkeys(IN_8_BITS, lambda options: galore(galore_optax.adamw_8bit(0.1), **options)),
    "galore_adafactor": lambda options: galore(
        optax.adafactor(0.1, multiply_by_parameter_scale=False, momentum=0.9), **options
    ),
    "galore_lion": lambda options: galore(optax.lion(0.1), **options),
    "galore_sgd": lambda options: galore(optax.sgd(0.1, momentum=0.9), **options),
    "flora": flora_of_parts,
    "galore_muon": muon_of_parts,
}


@functools.cache
def programs_of_parts(make):
    return programs(make(options_for(make)), tree())


def options_for(make):
    """All options, but for one that Flora and Muon refuse; see test_suitability."""
    refused = {"accumulation_steps"} if make in (flora_of_parts, muon_of_parts) else set()
    return {name: value for name, value in OPTIONS.items() if name not in refused}


@pytest.mark.parametrize("name", DEFAULTS)
def test_all_options_are_passed_on(name):
    make = MADE_OF[name]
    preset = getattr(galore_optax, name)(0.1, **OWN.get(name, {}), **options_for(make))
    assert programs(preset, tree()) == programs_of_parts(make)


# One for each kind of answer that presets must tell something about the moments.
KINDS = ["fira_adamw_8bit", "ldadamw_8bit", "grass_adamw_8bit", "q_galore_adamw"]


def test_moments_in_bfloat16_are_those_of_low_bit_with_16_bits():
    by_name, by_type = (
        galore_optax.galore_adamw(0.1, moment_dtype=dtype, **OPTIONS)
        for dtype in ("bfloat16", jnp.bfloat16)
    )
    inner = galore_optax.low_bit(optax.adamw(0.1), bits=16, min_size=0)
    expected = programs(galore(inner, **OPTIONS), tree())
    assert programs(by_name, tree()) == programs(by_type, tree()) == expected
    _, state = jax.eval_shape(lambda x: by_name.update(x, by_name.init(x), x), tree())
    moments = jax.tree.leaves(optax.tree.get(state, "mu"))
    assert moments
    assert {x.dtype for x in moments} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", ["float16", "int8", jnp.int8], ids=str)
def test_moments_in_another_dtype_are_refused(dtype):
    message = r"moment_dtype must be 'bfloat16'.* or None for float32; got .*(16|int8).*_8bit"
    with pytest.raises(ValueError, match=message):
        galore_optax.fira_adamw(0.1, moment_dtype=dtype)


@pytest.mark.parametrize("name", KINDS)
def test_moments_in_8_bits_of_defaults_that_differ_from_those_of_galore(name):
    """Where moments are arrays every step is compared with NumPy, in test_family_presets."""
    betas = {"b1": 0.9, "b2": 0.999}
    rules = {"rotate": Rotate(**betas), "reset": Reset(**betas)}
    given = {name: OPTIONS[name] for name in ("rank", "weight_dimension_numbers")}
    options = DEFAULTS[name] | given
    if options.get("transport") in rules:
        options["transport"] = rules[options["transport"]]
    if options.get("projector") == "momentum_iteration":
        options["projector_options"] = {"b1": 0.9}
    if "residual" in options:
        scaling = galore_optax.low_bit(optax.scale_by_adam(), min_size=0)
        expected = optax.chain(
            galore(scaling, **options),
            optax.add_decayed_weights(1e-4),
            optax.scale_by_learning_rate(0.1),
        )
    else:
        expected = galore(galore_optax.adamw_8bit(0.1, min_size=0), **options)
    preset = getattr(galore_optax, name)(0.1, min_size=0, **given)
    assert programs(preset, tree()) == programs(expected, tree())


# What may change while a run goes on, and what it is at first.
INJECTED = {
    "learning_rate": (0.1, 0.3),
    "b1": (0.8, 0.5),
    "b2": (0.95, 0.9),
    "beta": (0.8, 0.5),
    "adam_b1": (0.8, 0.5),
    "adam_b2": (0.95, 0.9),
    "eps": (1e-2, 1e-1),
    "decay_rate": (0.7, 0.6),
    "weight_decay": (0.2, 0.0),
    "scale": (0.5, 2.0),
    "seed": (5, 6),
    "update_proj_gap": (2, 3),
}
STATIC = (
    "rank",
    "block_size",
    "min_size",
    "min_dim_size_to_factor",
    "ns_steps",
    "dtype_momentum",
    "accumulation_steps",
)


@pytest.mark.parametrize("name", [*ADAMW, "fira_adamw_8bit", "q_galore_adamw", *OTHERS])
def test_hyperparameters_can_be_injected_and_changed(name):
    preset = getattr(galore_optax, name)
    takes = inspect.signature(preset).parameters
    wanted, other = ({k: v[i] for k, v in INJECTED.items() if k in takes} for i in (0, 1))
    rest = OWN.get(name, {}) | {"rank": 3, "weight_dimension_numbers": DimensionNumbers(-2, -1)}
    made = optax.inject_hyperparams(preset, static_args=[k for k in STATIC if k in takes])(
        **other, **rest
    )

    def init(params):
        state = made.init(params)
        changed = {k: jnp.asarray(v, state.hyperparams[k].dtype) for k, v in wanted.items()}
        return state._replace(hyperparams=state.hyperparams | changed)

    gradients = {"kernel": normal(4, 6, 9), "bias": normal(4, 9)}
    params = {name: x[0] for name, x in gradients.items()}
    found, _ = run(made._replace(init=init), gradients, params)
    expected, _ = run(preset(**wanted, **rest), gradients, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("fira_adamw_8bit", "block_size"),
        ("galore_adamw_8bit", "min_size"),
        ("galore_adamw_8bit", "accumulation_steps"),
        ("flora", "min_dim_size_to_factor"),
        ("galore_adafactor", "min_dim_size_to_factor"),
    ],
)
def test_numbers_that_must_not_be_injected_say_how(name, argument):
    preset = getattr(galore_optax, name)
    static = {*STATIC} & inspect.signature(preset).parameters.keys() - {argument}
    steps = {argument: 2} if argument == "accumulation_steps" else {}
    injected = optax.inject_hyperparams(preset, static_args=static)
    with pytest.raises((TypeError, ValueError), match=rf"{argument} must be .*name it in static_"):
        injected(0.1, rank=3, **steps).init(tree())


def test_an_option_that_there_is_not():
    with pytest.raises(TypeError, match="unexpected keyword argument 'gap'"):
        galore_optax.galore_adamw(0.1, gap=10)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", "fira_adamw", "adamw_8bit"])
def test_without_decay_weights_are_not_multiplied_by_zero(name):
    """The state is the same, and so are updates, but where zero times a weight is no zero."""
    options = {} if name == "adamw_8bit" else {"rank": 4}
    preset = functools.partial(getattr(galore_optax, name), 0.1, **options)
    gradients = {"kernel": jax.random.normal(jax.random.key(0), (16, 24))}
    params = jax.tree.map(jnp.ones_like, gradients)
    states, updates = [], []
    for decay in (0.0, jnp.zeros([])):
        tx = preset(weight_decay=decay)
        states.append(tx.init(params))
        updates.append(jax.jit(tx.update)(gradients, states[-1], params)[0])
    chex.assert_trees_all_equal(*states)
    chex.assert_trees_all_close(*updates, rtol=1e-6)
    infinite = jax.tree.map(lambda x: x + jnp.inf, params)
    found, _ = jax.jit(preset(weight_decay=0.0).update)(gradients, states[0], infinite)
    chex.assert_trees_all_equal(found, updates[0])
