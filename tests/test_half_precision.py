"""That of gradients of 16 bits nothing but operands of products is computed in 16 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

SHAPES = {
    "wide": (12, 20),
    "tall": (20, 12),
    "stack": (2, 12, 20),
    "bias": (20,),
    "conv": (3, 4, 4),
}
NUMBERS = {
    "wide": galore_optax.DimensionNumbers(),
    "tall": galore_optax.DimensionNumbers(),
    "stack": galore_optax.DimensionNumbers(1, 2),
    "bias": None,
    "conv": None,
}
OPTIONS = {"rank": 4, "weight_dimension_numbers": NUMBERS}
NAMES = [
    "galore_adafactor",
    "galore_lion",
    "galore_muon",
    "galore_sgd",
    "flora",
    "q_galore_adamw",
    *(
        f"{name}{bits}"
        for name in (
            "galore_adamw",
            "fira_adamw",
            "apollo_adamw",
            "apollo_mini_adamw",
            "ldadamw",
            "tracked_adamw",
            "frugal_adamw",
            "grass_adamw",
            "dct_adamw",
        )
        for bits in ("", "_8bit")
    ),
]
MAKE = {name: functools.partial(getattr(galore_optax, name), **OPTIONS) for name in NAMES}
PLAIN = functools.partial(galore_optax.galore_adamw, **OPTIONS)
MAKE |= {
    "adamw_8bit": galore_optax.adamw_8bit,
    "low_bit": lambda rate: galore_optax.low_bit(
        optax.sgd(rate, momentum=0.9, nesterov=True), bits=16, min_size=0
    ),
    "limit_norm_growth": lambda rate: galore_optax.limit_norm_growth(),
    "bfloat16 state": functools.partial(PLAIN, moment_dtype="bfloat16", projector_dtype="bfloat16"),
    "accumulation": functools.partial(PLAIN, accumulation_steps=2),
    "both sides": functools.partial(PLAIN, side="both", diagnostics=True, refresh="lazy"),
    "error feedback": functools.partial(galore_optax.ldadamw, residual="error_feedback", **OPTIONS),
    "int4": functools.partial(PLAIN, projector_dtype="int4"),
    "rows without decay": functools.partial(PLAIN, projector="rows", weight_decay=0.0),
    **{
        projector: functools.partial(PLAIN, projector=projector)
        for projector in (
            "eigh",
            "randomized_svd",
            "power_iteration",
            "orthonormal",
            "random_rows",
            "sampled_rows",
        )
    },
}

# What is exact in any dtype: it moves numbers, compares them, or changes their sign.
EXACT = {
    *("convert_element_type", "bitcast_convert_type", "reshape", "transpose", "squeeze", "slice"),
    *("broadcast_in_dim", "dynamic_slice", "dynamic_update_slice", "gather", "scatter", "split"),
    *("concatenate", "pad", "rev", "copy", "select_n", "device_put", "optimization_barrier"),
    *("sharding_constraint", "layout_constraint", "sort", "argsort", "is_finite", "eq", "ne"),
    *("lt", "gt", "le", "ge", "max", "min", "reduce_max", "reduce_min", "neg", "abs", "sign"),
}


def inner_jaxprs(equation):
    """The programs in an equation, as those of the branches of a conditional."""
    for value in equation.params.values():
        for part in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "jaxpr")):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def is_half(variable):
    dtype = getattr(variable.aval, "dtype", None)
    return dtype in (jnp.bfloat16, jnp.float16)


def rounded_in_half(jaxpr):
    """The names of operations of a program whose result is rounded to 16 bits."""
    found = []
    for equation in jaxpr.eqns:
        inside = list(inner_jaxprs(equation))
        for part in inside:
            found += rounded_in_half(part)
        name = equation.primitive.name
        variables = (
            equation.outvars
            if name == "dot_general"
            else (
                *equation.invars,
                *equation.outvars,
            )
        )
        if not inside and name not in EXACT and any(map(is_half, variables)):
            found.append(name)
    return found


def of_update(tx, dtype):
    params = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, params)
    return jax.make_jaxpr(tx.update)(params, state, params).jaxpr


@pytest.mark.filterwarnings("ignore:the inner transformation of galore uses the parameters")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.bfloat16) for name in MAKE),
        *((name, jnp.float16) for name in ("galore_muon", "flora", "fira_adamw", "adamw_8bit")),
    ],
)
def test_nothing_is_rounded_to_half_precision_before_the_end(name, dtype):
    assert rounded_in_half(of_update(MAKE[name](1e-3), dtype)) == []


def test_what_looks_for_it_finds_it_in_optax():
    assert {"mul", "add"} <= set(rounded_in_half(of_update(optax.adamw(1e-3), jnp.bfloat16)))
    product = jax.make_jaxpr(lambda a: jax.lax.cond(True, lambda: a @ a, lambda: a))
    assert rounded_in_half(product(jnp.ones((2, 2), jnp.float16)).jaxpr) == ["dot_general"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.ci)])
@pytest.mark.parametrize(
    "name",
    ["frugal_adamw", "grass_adamw", "adamw_8bit", "rows without decay", "flora", "fira_adamw"],
)
def test_updates_are_those_of_float32_rounded_once(name, dtype):
    """With rows, and without galore, no product has operands of 16 bits, at any leaf."""
    rng = np.random.default_rng(0)
    tx = MAKE[name](0.123)
    grads, params = (
        {n: jnp.asarray(rng.normal(size=s), dtype) for n, s in SHAPES.items()} for _ in range(2)
    )
    leaves = ["bias", "conv"] if name in ("flora", "fira_adamw") else list(SHAPES)
    update, finfo = jax.jit(tx.update), jnp.finfo(dtype)
    as_float32 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    found, state = update(grads, tx.init(params), params)
    wide = as_float32(params)
    expected, wide_state = update(as_float32(grads), tx.init(wide), wide)
    for leaf in leaves:
        assert found[leaf].dtype == dtype
        # The nearest number of 16 bits is off by half of eps at most; the rest is round-off.
        error = np.abs(np.asarray(found[leaf], np.float32) - expected[leaf])
        half, least = (float(x) / 2 for x in (finfo.eps, finfo.smallest_subnormal))
        assert np.all(error <= 1.01 * (half * np.abs(expected[leaf]) + least)), leaf
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wide_state), strict=True):
        assert one.dtype == other.dtype
