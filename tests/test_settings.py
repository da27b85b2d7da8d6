"""JAX's strict settings: nothing is promoted or broadcast that is not said, nothing is not finite.

Each setting is asked of init and of an update, which is traced with its refresh, of all that a user
may choose; and of the layer-wise step.
"""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import layerwise_model as model
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import DimensionNumbers, galore, galore_adamw
from galore_optax._codecs import CODECS
from galore_optax._residuals import RESIDUALS
from galore_optax._transports import TRANSPORTS
from galore_optax.projectors import PROJECTORS

ADAM = optax.scale_by_adam()
LOW_BIT = {"min_size": 8, "block_size": 8}
OPTIONS = {"projector": PROJECTORS, "transport": TRANSPORTS, "residual": RESIDUALS}
PRESETS = (
    *("fira_adamw", "apollo_adamw", "apollo_mini_adamw", "ldadamw", "tracked_adamw"),
    *("frugal_adamw", "grass_adamw", "dct_adamw", "q_galore_adamw"),
    *("flora", "galore_lion", "galore_muon"),
)
OPTIMIZERS = {
    **{
        f"{option} {name}": functools.partial(galore_adamw, 1e-2, **{option: name})
        for option, names in OPTIONS.items()
        for name in names
    },
    **{
        f"basis in {name}": functools.partial(galore, ADAM, projector_dtype=name)
        for name, codec in CODECS.items()
        if name not in ("signed", "unsigned")
    },
    **{name: functools.partial(getattr(galore_optax, name), 1e-2) for name in PRESETS},
    "galore_adafactor": functools.partial(
        galore_optax.galore_adafactor, 1e-2, multiply_by_parameter_scale=False
    ),
    "many": functools.partial(
        *(galore, optax.adamw(1e-2)),
        **{"side": "both", "stagger": True, "accumulation_steps": 2, "diagnostics": True},
    ),
    "schedules": functools.partial(
        galore_adamw, optax.cosine_decay_schedule(1e-2, 9), update_proj_gap=lambda count: 1
    ),
    "injected": functools.partial(
        optax.inject_hyperparams(
            galore_adamw, static_args=("rank", "weight_dimension_numbers", "projector")
        ),
        *(1e-2,),
        projector="eigh",
    ),
    "8 bits": functools.partial(galore, galore_optax.low_bit(ADAM, **LOW_BIT)),
    "16 bits": functools.partial(galore, galore_optax.low_bit(ADAM, 16, **LOW_BIT)),
}
SHAPES = {"kernel": (4, 6), "bias": (6,), "stack": (2, 6, 4)}
NUMBERS = {"kernel": DimensionNumbers(), "bias": None, "stack": DimensionNumbers(1, 2)}


def optimizer(name):
    rank = 1 if "mini" in name else 2
    return OPTIMIZERS[name](rank=rank, weight_dimension_numbers=NUMBERS)


SETTINGS = {
    "strict": {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"},
    "x64": {"jax_enable_x64": True},
    "leaks": {"jax_check_tracer_leaks": True},
    "rbg": {"jax_default_prng_impl": "rbg"},
    "threefry": {"jax_default_prng_impl": "threefry2x32"},
    "nans": {"jax_debug_nans": True},
}
# Of optimizers for a setting that asks nothing of most: many parts, moments that move, codes, keys.
FEW = {"many", "ldadamw", "16 bits", "layerwise"}
ASKED = {
    "strict": {*OPTIMIZERS, "layerwise"},
    "strict x64": {name for name in OPTIMIZERS if "projector" in name} | FEW,
    "leaks": FEW,
    "rbg": FEW,
}


@contextlib.contextmanager
def settings(*names):
    new = {key: value for name in names for key, value in SETTINGS[name].items()}
    before = {key: getattr(jax.config, key) for key in new}
    try:
        for key, value in new.items():
            jax.config.update(key, value)
        yield
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


def tree(dtype=jnp.float32, rank=None):
    """A tree of arrays, their matrices of this rank."""
    rng = np.random.default_rng(0)

    def of(shape):
        *_, m, n = shape if len(shape) > 1 else (1, *shape)
        inner = min(m, n) if rank is None else rank
        batch = shape[:-2]
        return rng.normal(size=(*batch, m, inner)) @ rng.normal(size=(*batch, inner, n))

    return {k: jnp.asarray(of(shape).reshape(shape), dtype) for k, shape in SHAPES.items()}


def step(tx, params):
    state = tx.init(params)
    updates, new_state = tx.update(params, state, params)
    return (params, state), (optax.apply_updates(params, updates), new_state)


def layerwise_step(params):
    """A layer-wise step of codes, in micro-batches, that clips."""
    options = {"rank": 4, "weight_dimension_numbers": model.numbers}
    params = galore_optax.quantize_params(params, block_size=16, **options)
    tx = galore_optax.q_galore_adamw(1e-2, **options, **LOW_BIT)
    training = model.layerwise(tx, micro_batches=2, clip_norm=1.0, slice_size=64)
    state, batch = training.init(params), jnp.zeros((2, 3, 5), jnp.int32)
    new_params, new_state, _ = training.step(params, state, batch, jax.random.key(0))
    return (params, state), (new_params, new_state)


@pytest.mark.parametrize("names", ASKED)
def test_every_optimizer_takes_a_step_under(names, subtests):
    """Traced with the refresh and all else that is in a conditional, in a dtype that is widened."""
    params, layers = tree(jnp.bfloat16), model.init(jnp.bfloat16)
    for name in sorted(ASKED[names]):
        one = functools.partial(step, optimizer(name)) if name in OPTIMIZERS else None
        with subtests.test(name), settings(*names.split()):
            before, after = jax.eval_shape(*((one, params) if one else (layerwise_step, layers)))
            chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


def test_no_step_makes_a_nan(subtests):
    """Of zeros neither, as where a projection begins at zero, nor of too few directions."""
    params, of_rank_one = tree(), tree(rank=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name in (*(f"projector {name}" for name in PROJECTORS), *PRESETS):
        with subtests.test(name), settings("nans"):
            tx = optimizer(name)
            update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
            for gradients in (zeros, of_rank_one, params, zeros):
                updates, state = update(gradients, state, params)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_bases_are_the_same_with_other_keys(subtests):
    """So that a run may go on under another setting, with bases that are made again each step."""
    params = tree()
    for name in ("projector gaussian", "projector power_iteration", "frugal_adamw"):
        with subtests.test(name):
            found = []
            for of_keys in ("threefry", "rbg"):
                with settings(of_keys):
                    found.append(jax.jit(functools.partial(step, optimizer(name)))(params))
            chex.assert_trees_all_equal(*found)
