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
from galore_optax import _coding as coding
from galore_optax._blocks import spread
from galore_optax._codecs import CODECS
from galore_optax._quantized import fitting_block_size
from galore_optax._twice import twice


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


@pytest.mark.since(jax="0.7")  # Of older versions the compiler leaves out other platforms.
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


TOTAL = jnp.cumsum(jnp.ones([3, 3]), axis=0)


def same(codes):
    return codes


def test_a_step_is_traced_once_and_its_results_are_the_same():
    calls = []

    def step(moments):
        calls.append(moments)
        return {"update": jnp.sum(moments[0])}, [0.9 * moments[0] + 1, moments[1] ** 2]

    given = [jnp.arange(3.0), jnp.ones(2)]
    updates, moments, twins = jax.jit(lambda x: twice(step, same, x))(given)
    assert len(calls) == 1
    expected = step(given)
    chex.assert_trees_all_close((updates, moments), expected)
    chex.assert_trees_all_close(twins, expected[1])


@pytest.mark.parametrize(
    ("function", "is_cheap"),
    [
        (lambda x: jnp.where(x > 0, 0.9 * x + 1, 0), True),
        (lambda x: x * TOTAL, True),
        (lambda x: x / jnp.linalg.norm(x), False),
        (lambda x: x @ x, False),
        (lambda x: jnp.cumsum(x, axis=0), False),
        (lambda x: jax.lax.fori_loop(0, 3, lambda _, y: 2 * y, x), False),
        (lambda x: jnp.sort(x, axis=0), False),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: 2 * x), False),
    ],
    ids=["elements", "closed over", "norm", "product", "sum", "loop", "sort", "conditional"],
)
def test_what_may_take_long_is_computed_once(function, is_cheap):
    """But what is returned beside the moments may be anything."""
    given = [jnp.ones((3, 3))]

    @jax.jit
    def run(given):
        rest, new, twins = twice(lambda x: (x[0] @ x[0], [function(x[0]), x[0] + 1]), same, given)
        assert (twins is not None) == is_cheap
        return rest, new

    rest, moments = run(given)
    np.testing.assert_allclose(moments[0], function(given[0]), rtol=1e-6)
    np.testing.assert_array_equal(rest, np.full((3, 3), 3))


def test_what_has_effects_is_computed_once():
    seen = []

    def step(moments):
        jax.debug.callback(lambda x: seen.append(float(x)), moments[0][0])
        return moments[0], [2 * moments[0]]

    @jax.jit
    def run(given):
        *found, twins = twice(step, same, given)
        assert twins is None
        return found

    run([jnp.ones(2)])
    jax.effects_barrier()
    assert seen == [1.0]


def test_what_is_not_compiled_is_computed_once_and_may_look_at_values():
    tx = galore_optax.low_bit(optax.adam(lambda step: 0.1 if step < 1 else 0.2), min_size=0)
    params = {"w": jnp.ones((4, 64))}
    first, state = tx.update(params, tx.init(params), params)
    second, _ = tx.update(params, state, params)
    np.testing.assert_allclose(second["w"], 2 * first["w"], rtol=0.02)
    assert twice(lambda x: (None, [x[0] + 1]), same, [jnp.ones(2)])[2] is None


def tree(seed):
    return {"w": jnp.asarray(normal(24, 64, seed=seed)), "b": jnp.asarray(normal(64, seed=seed))}


CODES = {"min_size": 8, "block_size": 16}
GALORE = CODES | {"rank": 8, "update_proj_gap": 2}
WRAPPED = {
    "AdamW": lambda: galore_optax.adamw_8bit(0.1, **CODES),
    "rows": lambda: galore_optax.galore_adamw_8bit(0.1, projector="rows", **GALORE),
    "products": lambda: galore_optax.galore_adamw_8bit(
        0.1, projector="gaussian", accumulation_steps=2, **GALORE
    ),
    "several steps": lambda: optax.MultiSteps(WRAPPED["AdamW"](), 2).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(WRAPPED["AdamW"](), 3),
}


def three_steps(make, mapped):
    """All updates and the last state; the second gradient is not finite."""
    tx = make()
    gradients = [tree(seed) for seed in range(3)]
    gradients[1]["b"] = gradients[1]["b"].at[0].set(jnp.inf)
    params, update, init = tree(3), tx.update, tx.init
    if mapped:
        gradients, params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (gradients, params))
        update, init = jax.vmap(update), jax.vmap(init)
    update, state, found = jax.jit(update), init(params), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    ("name", "mapped"),
    [("AdamW", True), *((name, False) for name in WRAPPED if name != "AdamW")],
)
def test_what_a_gpu_would_compute_is_what_a_cpu_does(name, mapped, monkeypatch):
    """On a CPU, which is made to run the branches of a GPU."""
    expected = three_steps(WRAPPED[name], mapped)
    elsewhere = jax.lax.platform_dependent
    ran = []

    def on_a_gpu(*args, default, **branches):
        if "cuda" not in branches:
            return elsewhere(*args, default=default, **branches)
        ran.append(branches["cuda"])
        return branches["cuda"](*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_a_gpu)
    jax.clear_caches()
    found = three_steps(WRAPPED[name], mapped)
    jax.clear_caches()
    assert any("twice" in getattr(branch, "__qualname__", "") for branch in ran)
    chex.assert_trees_all_equal(found, expected)


def test_one_program_for_several_platforms():
    tx = WRAPPED["AdamW"]()
    gradients, params = tree(0), tree(1)
    state, update = tx.init(params), jax.jit(tx.update)
    exported = jax.export.export(update, platforms=("cpu", "cuda", "tpu"))(gradients, state, params)
    treedef = jax.tree.structure((params, state))
    assert jax.tree.structure(exported.out_tree.unflatten(exported.out_avals)) == treedef
    chex.assert_trees_all_equal(
        exported.call(gradients, state, params), update(gradients, state, params)
    )
