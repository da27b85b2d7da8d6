"""Moments that are computed twice rather than kept: where, with what result, and what for."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from benchmarks import bytes as benchmark
from benchmarks.kernels import kernels
from examples.flax_llama.devices import device_named
from examples.flax_llama.topology import check_needs_driver, cuda_extra
from galore_optax import _coding as coding
from galore_optax._blocks import spread
from galore_optax._codecs import CODECS
from galore_optax._quantized import fitting_block_size
from galore_optax._twice import hidden, twice

KINDS = ["signed", "unsigned"]


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) ** 3
    x.flat[1::7] = 0
    return x


@pytest.mark.parametrize("shape", [(2, 512), (3, 5), (9, 300), (1024,)])
@pytest.mark.parametrize("scheme", ["signed", "unsigned"])
def test_what_a_gpu_does_is_what_others_do_to_the_bit(scheme, shape):
    codec = CODECS[scheme].keeping_positive() or CODECS[scheme]
    x = normal(4, *shape)
    x[1].flat[0] = np.nan
    form = shape, fitting_block_size(shape, 256, scheme)
    blocks, in_place = (
        jax.jit(functools.partial(way, codec, form=form))(x, x)
        for way in (coding.written_in_blocks, coding.written_in_place)
    )
    chex.assert_trees_all_equal(blocks, in_place)
    one, other = (
        jax.jit(functools.partial(way, codec, form=form, dtype=jnp.float32))(blocks)
        for way in (coding.read_in_blocks, coding.read_in_place)
    )
    chex.assert_shape(other, x.shape)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(np.isnan(one).any(axis=tuple(range(1, one.ndim))), [0, 1, 0, 0])


def test_scales_are_those_of_the_twin():
    x = jnp.ones((2, 512))
    for way in (coding.written_in_blocks, coding.written_in_place):
        coded = way(CODECS["signed"], x, 4 * x, form=((2, 512), 256))
        np.testing.assert_array_equal(coded.scales, np.full((2, 2), 4))
        found = CODECS["signed"].read(coded.codes, spread(coded.scales, 256))
        np.testing.assert_allclose(found, np.ones((2, 2, 256)), rtol=0.01)


def lowered(tx, platform):
    params = {"w": jnp.zeros((64, 512))}
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # A function that is called twice counts twice.
    bodies = {
        match[1]: match[0]
        for match in re.finditer(r"func\.func \w+ @(\w+).*?^  }", text, re.M | re.S)
    }

    def count(name):
        body = bodies.get(name, "")  # a library's has none
        called = re.findall(r"call @(\w+)", body)
        return body.count("stablehlo.optimization_barrier") + sum(map(count, called))

    return count("main")


@pytest.mark.parametrize(
    ("inner", "barriers"),
    [
        # Of both moments the codes and scales are hidden, and codes read, the first time too.
        pytest.param(optax.adamw(0.1), 2 * 2 + 2 * 2, id="AdamW"),
        pytest.param(optax.trace(0.9), 2 + 2, id="momentum"),
        # To compute these twice might take long: codes are read once, and nothing is hidden.
        pytest.param(
            optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()), 2, id="clipping"
        ),
        pytest.param(galore_optax.galore(optax.trace(0.9), rank=16), 1, id="projection"),
    ],
)
def test_a_gpu_computes_twice_what_is_made_element_by_element(inner, barriers):
    tx = galore_optax.low_bit(inner, min_size=0)
    assert lowered(tx, "cuda") == barriers
    assert lowered(tx, "cpu") == 0


def test_a_function_is_traced_once_and_its_results_are_the_same():
    calls = []

    def step(moments):
        calls.append(moments)
        return {"update": jnp.sum(moments[0])}, [0.9 * moments[0] + 1, moments[1] ** 2]

    given = [jnp.arange(3.0), jnp.ones(2)]
    updates, moments, twins = jax.jit(lambda x: twice(step, x, lambda: hidden(x), KINDS))(given)
    assert len(calls) == 1
    expected = step(given)
    chex.assert_trees_all_close((updates, moments), expected)
    chex.assert_trees_all_close(twins, expected[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / jnp.linalg.norm(x),
        lambda x: x @ x,
        lambda x: jnp.cumsum(x, axis=0),
        lambda x: jax.lax.fori_loop(0, 3, lambda _, y: 2 * y, x),
        lambda x: jnp.sort(x, axis=0),
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: 2 * x),
    ],
    ids=["norm", "product", "sum", "loop", "sort", "conditional"],
)
def test_what_may_take_long_is_computed_once(function):
    given = [jnp.ones((3, 3))]

    def again():
        raise AssertionError

    def step(moments):
        return moments[0], [function(moments[0]), moments[0] + 1]

    updates, moments, twins = twice(step, given, again, KINDS)
    assert twins is None
    # What is not wanted may be anything.
    assert twice(step, given, lambda: given, [None, "signed"])[2] is not None
    np.testing.assert_allclose(moments[0], function(given[0]), rtol=1e-6)
    np.testing.assert_array_equal(updates, given[0])


def test_what_has_effects_is_computed_once():
    seen = []

    def step(moments):
        jax.debug.callback(lambda x: seen.append(float(x)), moments[0][0])
        return moments[0], [2 * moments[0], 3 * moments[0]]

    _, _, twins = jax.jit(lambda x: twice(step, x, lambda: hidden(x), KINDS))([jnp.ones(2)])
    jax.effects_barrier()
    assert twins is None
    assert seen == [1.0]


@pytest.mark.ci
@pytest.mark.long("compiles four steps for a GPU")
@pytest.mark.skipif(cuda_extra() is None, reason="JAX for CUDA is not installed")
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("adamw_8bit", 15),
        ("galore_adamw_8bit, rows", 9),
        ("galore_adamw_8bit, rows, without decay", 8),
        ("galore_adamw, power_iteration, without decay", 17),
    ],
)
def test_bytes_of_a_step_on_a_gpu_that_is_not_here(name, bound):
    with check_needs_driver():
        device = device_named(benchmark.DEVICE).mesh().devices.flat[0]
        shapes = [{k: v for k, v in benchmark.blocks(1)[0].items() if k in ("q", "gate", "down")}]
        text = benchmark.Step.of(benchmark.OPTIMIZERS[name], shapes).text(device)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert sum(kernel.bytes for kernel in kernels(text)) <= bound * count
