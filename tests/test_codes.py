"""Block-wise codes and quantized arrays, against tables, exact arithmetic and statistics."""

import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from galore_optax import QuantizedArray, _codes, apply_updates, quantize

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adam_8bit.npz")
DYNAMIC = ("signed", "unsigned")
SCHEMES = (*DYNAMIC, "int8", "int4")
LAST = {"int8": 255, "int4": 15}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def values_of_all_codes(scheme):
    every = jnp.arange(256, dtype=jnp.uint8)
    absent = optax.MaskedNode()
    array = QuantizedArray(every, jnp.ones(1), absent, (256,), np.dtype("float32"), scheme, 256)
    return array.dequantize()


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_codes_are_the_reference_tables(scheme):
    table = REFERENCE[f"map_{scheme}"]
    np.testing.assert_allclose(_codes.dynamic_map(scheme == "signed"), table, rtol=0, atol=1e-7)
    np.testing.assert_allclose(values_of_all_codes(scheme), table, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scheme", DYNAMIC)
def test_dynamic_codes_are_the_nearest(scheme):
    """Against a search of all values in float64, densely around every midpoint."""
    table = REFERENCE[f"map_{scheme}"].astype(np.float64)
    middle = (table[1:] + table[:-1]) / 2
    x = np.concatenate([middle * (1 + 1e-5), middle * (1 - 1e-5), table, [1.0]])
    x = np.concatenate([x, 10 ** np.random.default_rng(0).uniform(-9, 0, 4000)])
    x = np.where(np.arange(x.size) % 2, x, -x) if scheme == "signed" else x
    x = np.concatenate([x, [1.0]]).astype(np.float32)
    codes = quantize(x, scheme, block_size=2 * x.size).codes[: x.size]
    nearest = np.argmin(np.abs(x[:, None].astype(np.float64) - table), axis=1)
    np.testing.assert_array_equal(codes, nearest)


def test_quantization_is_as_good_as_the_reference():
    x = REFERENCE["q_x"]
    quantized = quantize(x, "signed")
    np.testing.assert_array_equal(quantized.scales, REFERENCE["q_absmax"])
    assert np.mean(quantized.codes == REFERENCE["q_codes"].ravel()) >= 0.97
    error = np.abs(quantized.dequantize() - x)
    unit = np.repeat(REFERENCE["q_absmax"], 256).reshape(x.shape)
    assert np.all(error <= np.abs(REFERENCE["q_dequant"] - x) + 2e-7 * unit)
    half = 0.9 / 64 / 2  # of the widest interval
    assert 0.99 * half < np.max(error / unit) < 1.001 * half


def test_a_positive_number_can_be_kept_from_zero():
    x = np.array([1.0, 1e-7, 1e-30, 0.0], np.float32)
    np.testing.assert_array_equal(quantize(x, "unsigned").codes, [255, 0, 0, 0])
    np.testing.assert_array_equal(quantize(x, "unsigned", keep_positive=True).codes, [255, 1, 1, 0])


GROUPS = {
    "mixed": normal(64),
    "positive": 1 + np.abs(normal(64)),
    "negative": -1 - np.abs(normal(64)),
    "constant": np.full(64, 0.3, np.float32),
    "negative_constant": np.full(64, -7e-5, np.float32),
    "zero_and_one": np.arange(64) % 2 * np.float32(1),
    "zeros": np.zeros(64, np.float32),
    "tiny": 1e-37 * normal(64),
    "huge": np.float32(3e38) * np.where(np.arange(64) % 2, 1, -1).astype(np.float32),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scheme", LAST)
def test_integer_codes_are_the_formula(scheme, group):
    x = GROUPS[group].astype(np.float64)
    low, high = min(0, x.min()), max(0, x.max())
    scale = (high - low) / (LAST[scheme] - 1)
    zero = np.ceil(-low / scale - 1e-6) if scale else 0
    quantized = quantize(GROUPS[group], scheme)
    np.testing.assert_allclose(quantized.scales, [scale], rtol=1e-6, atol=1.2e-38)
    if scale > 1e-37:
        np.testing.assert_allclose(quantized.zeros, [zero], atol=1)
    error = np.abs(np.asarray(quantized.dequantize(), np.float64) - x)
    assert np.all(error <= max(scale, 2.4e-38) * (0.5 + 1e-4))
    dequantized = quantize(np.append(GROUPS[group], np.float32(0))[-64:], scheme).dequantize()
    assert dequantized[-1] == 0


def test_four_bits_are_packed_two_to_a_byte():
    x = np.append(np.arange(-7, 8), 3).astype(np.float32)  # 14 steps of 1 between the extremes
    quantized = quantize(x, "int4")
    assert (quantized.codes.shape, quantized.codes.dtype) == ((8,), jnp.uint8)
    nibbles = np.concatenate([np.asarray(quantized.codes) & 15, np.asarray(quantized.codes) >> 4])
    np.testing.assert_array_equal(nibbles, x + quantized.zeros[0])
    np.testing.assert_array_equal(quantized.dequantize(), x)


@pytest.mark.parametrize("group", ["mixed", "positive", "negative", "constant", "zero_and_one"])
@pytest.mark.parametrize("scheme", LAST)
def test_stochastic_rounding_has_the_right_mean(scheme, group):
    draws, x = 10_000, jnp.asarray(GROUPS[group])
    keys = jax.random.split(jax.random.key(1), draws)
    drawn = jax.jit(jax.vmap(lambda key: quantize(x, scheme, key=key).dequantize()))(keys)
    drawn = np.asarray(drawn, np.float64)
    step = float(quantize(x, scheme).scales[0])
    steps = x / step
    fraction = steps - np.floor(steps)
    # Each element is one of its two neighbours, the variance that of a coin with this bias. Where
    # float32 is next to an integer, two draws in all may be the other one.
    error = np.abs(drawn.mean(0) - GROUPS[group])
    deviation = np.sqrt(fraction * (1 - fraction) / draws)
    assert np.all(error <= step * (4 * deviation + 2 / draws))
    assert np.all(np.abs(drawn - GROUPS[group]) < step * (1 + 1e-4))
    if group in ("mixed", "positive"):
        assert np.count_nonzero(drawn.std(0) > 0.1 * step) > 32


def test_stochastic_rounding_to_bfloat16_has_the_right_mean():
    x = jnp.asarray([1.001, -1.001, 3e-39, 0.0, 1.0, -255.7, 1e30], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 10_000)
    drawn = jax.vmap(lambda key: _codes.round_to_bfloat16(x, key))(keys)
    drawn = np.asarray(drawn.astype(jnp.float32), np.float64)
    deviation = drawn.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(drawn.mean(0) - np.asarray(x)) <= 4 * deviation)
    np.testing.assert_array_equal(deviation[3:5], 0)
    assert deviation[0] > 0
    assert deviation[1] > 0


def test_rounding_to_bfloat16_keeps_what_is_not_finite():
    odd = np.array([np.inf, -np.inf, np.nan, np.frombuffer(b"\xff\xff\xff\x7f", np.float32)[0]])
    rounded = _codes.round_to_bfloat16(jnp.asarray(odd, jnp.float32), jax.random.key(0))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), odd)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_that_is_not_finite_shows(scheme, value):
    x = np.ones(512, np.float32)
    x[3] = value
    y = quantize(x, scheme).dequantize()
    assert np.all(np.isnan(y[:256]))
    np.testing.assert_allclose(y[256:], 1, rtol=1e-6)


SHAPES = [
    ((), 0),
    ((5,), 0),
    ((600,), 0),
    ((3, 512), 0),
    ((3, 500), 0),
    ((4, 3, 512), 1),
    ((4, 5, 7), 1),
    ((2, 3, 10, 70), 2),
    ((0, 4), 0),
    ((4, 0), 1),
]


@pytest.mark.parametrize(("shape", "batch_axes"), SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_shape_comes_back(scheme, shape, batch_axes):
    x = jnp.asarray(np.abs(normal(*shape)), jnp.bfloat16)
    quantized = jax.jit(lambda x: quantize(x, scheme, batch_axes=batch_axes))(x)
    assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)
    assert (quantized.ndim, quantized.size) == (x.ndim, x.size)
    assert quantized.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    y = jax.jit(QuantizedArray.dequantize)(quantized)
    chex.assert_trees_all_equal_shapes_and_dtypes(y, x)
    half_an_interval = {"signed": 0.01, "unsigned": 0.01, "int8": 0.01, "int4": 0.05}[scheme]
    peak = np.max(np.abs(x.astype(jnp.float32)), initial=0)
    np.testing.assert_allclose(
        y.astype(jnp.float32), x.astype(jnp.float32), rtol=0, atol=half_an_interval * peak
    )
    shapes = jax.eval_shape(lambda x: quantize(x, scheme, batch_axes=batch_axes), x)
    assert (shapes.shape, shapes.nbytes) == (quantized.shape, quantized.nbytes)


@pytest.mark.parametrize(
    ("scheme", "bound"), [("signed", 1.02), ("unsigned", 1.02), ("int8", 1.04), ("int4", 0.54)]
)
def test_bytes_of_an_element(scheme, bound):
    x = jnp.ones((64, 5461))  # columns that blocks do not divide
    assert quantize(x, scheme).nbytes / x.size <= bound


@pytest.mark.parametrize(
    ("scheme", "columns"), [("signed", 256), ("unsigned", 100), ("int8", 100), ("int4", 256)]
)
def test_batch_axes_work_in_scan_vmap_cond_and_under_donation(scheme, columns):
    x = jnp.abs(jnp.asarray(normal(3, 4, columns)))
    whole = quantize(x, scheme, batch_axes=1)
    items = [quantize(item, scheme) for item in x]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *leaves: jnp.stack(leaves), *items))
    chex.assert_trees_all_equal(whole, jax.vmap(lambda item: quantize(item, scheme))(x))

    dequantized = whole.dequantize()
    _, by_scan = jax.lax.scan(lambda carry, item: (carry, item.dequantize()), 0, whole)
    np.testing.assert_array_equal(by_scan, dequantized)
    np.testing.assert_array_equal(jax.vmap(QuantizedArray.dequantize)(whole), dequantized)
    chosen = jax.jit(jax.lax.cond, static_argnums=(1, 2))(
        True, lambda q: q, lambda q: jax.tree.map(jnp.zeros_like, q), whole
    )
    chex.assert_trees_all_equal(chosen, whole)
    donated = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf + 0, q), donate_argnums=0)
    assert donated(jax.tree.map(jnp.copy, whole)).shape == whole.shape


@pytest.mark.parametrize(
    ("batch", "rows", "minor_to_major"),
    [((), 128, "0, 2, 1"), ((3,), 128, "1, 3, 2, 0"), ((), 127, None)],
)
def test_on_a_tpu_the_rows_of_blocks_are_last_in_memory(batch, rows, minor_to_major):
    """As lowered for one. What moves is what is given: no float32 in the place of narrower."""
    updates = jnp.zeros((*batch, rows, 512), jnp.bfloat16)
    quantized = quantize(updates, batch_axes=len(batch))

    def read_and_write(quantized, updates):
        return quantized.dequantize(), apply_updates(quantized, updates, None)

    traced = jax.jit(read_and_write).trace(quantized, updates)
    tpu, cpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cpu"))
    found = re.findall(
        r"@LayoutConstraint.*result_layouts = \[dense<\[(.*?)\]>.*x(\w+)>$", tpu, re.M
    )
    dtypes = {"ui8", "bf16"} if minor_to_major else set()
    assert set(found) == {(minor_to_major, dtype) for dtype in dtypes}
    assert "LayoutConstraint" not in cpu


def test_slicing_an_axis_that_is_no_batch_axis_is_an_error():
    with pytest.raises(ValueError, match=r"item shape \(2, 3, 256\).*batch_axes=1"):
        jax.vmap(QuantizedArray.dequantize)(quantize(np.ones((2, 3, 256), np.float32)))


def test_key_paths_have_names():
    paths = jax.tree_util.tree_leaves_with_path({"w": quantize(np.ones(256, np.float32))})
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    assert names == ["w/codes", "w/scales", "w/zeros"]


def test_functions_of_jax_numpy_dequantize():
    quantized, x = quantize(normal(8, 256)), normal(3, 8, seed=1)
    expected = x @ np.asarray(quantized.dequantize())
    np.testing.assert_allclose(jnp.matmul(x, quantized), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_checkpoints_are_bit_identical(scheme, tmp_path):
    saved = {"w": quantize(np.abs(normal(3, 5, 100)), scheme, batch_axes=1)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: saved))
    chex.assert_trees_all_equal_structs(restored, saved)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, saved)
    chex.assert_trees_all_equal(restored, saved)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from galore_optax import low_bit, quantize

for types in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(types,) * 2)
    with jax.set_mesh(mesh):
        for spec in (P("d", "m"), P(("d", "m"), None)):
            for columns in (1024, 768, 500) if spec == P("d", "m") else (1024,):
                plain = np.random.default_rng(0).standard_normal((64, columns))
                x = jax.device_put(plain.astype(np.float32), NamedSharding(mesh, spec))
                for scheme in ("signed", "int4"):
                    quantized = jax.jit(lambda x: quantize(x, scheme))(x)
                    expected = quantize(plain.astype(np.float32), scheme)
                    assert np.mean(quantized.codes == expected.codes) > 0.999
                    np.testing.assert_allclose(quantized.scales, expected.scales, rtol=1e-6)
                    y = jax.jit(lambda q: q.dequantize())(quantized)
                    np.testing.assert_allclose(y, quantized.dequantize(), rtol=1e-6)
                    if columns == 1024:
                        assert quantized.codes.sharding.spec == spec, quantized.codes.sharding
                tx = low_bit(optax.adamw(1e-3))
                state = jax.jit(tx.init)(x)
                step = jax.jit(tx.update)
                types_before = jax.tree.map(jax.typeof, state)
                for _ in range(2):
                    updates, state = step(x, state, x)
                assert jax.tree.map(jax.typeof, state) == types_before
                alone = jnp.asarray(plain, jnp.float32)
                reference = jax.jit(tx.init)(alone)
                for _ in range(2):
                    plain_updates, reference = jax.jit(tx.update)(alone, reference, alone)
                np.testing.assert_allclose(updates, plain_updates, rtol=1e-4, atol=1e-7)
"""


def test_codes_follow_the_sharding_of_what_they_stand_for():
    """On 8 devices, with Explicit and Auto axes, in a process of its own."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SHARDED],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "int2"}, ValueError, "scheme must be one of .*'int2'"),
        ({"block_size": 0}, ValueError, "positive multiple of 2; got 0"),
        ({"block_size": 255}, ValueError, "positive multiple of 2; got 255"),
        ({"block_size": 256.0}, ValueError, r"positive multiple of 2; got 256\.0"),
        ({"batch_axes": 2}, ValueError, "between 0 and the 1 axes.*got 2"),
        ({"array": np.ones(4, np.int32)}, TypeError, "floating-point dtype; got int32"),
        ({"scheme": "signed", "key": 0}, ValueError, "needs scheme 'int8' or 'int4'"),
        ({"keep_positive": True}, ValueError, "is for scheme 'unsigned'; got 'int8'"),
    ],
)
def test_arguments_that_cannot_be_right(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"array": np.ones(4, np.float32), **arguments})


@pytest.mark.parametrize("scheme", ["signed", "unsigned", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_entry_of_a_large_array_shows_in_its_whole_block_and_no_other(value, scheme):
    array = jnp.ones((512, 1024)).at[5, 300].set(value)
    decoded = jax.jit(lambda x: quantize(x, scheme).dequantize())(array)
    bad = np.zeros((512, 1024), bool)
    bad[5, 256:512] = True
    np.testing.assert_array_equal(np.isnan(decoded), bad)


def test_a_bad_update_shows_in_its_whole_block():
    quantized = quantize(jnp.linspace(-1, 1, 512 * 1024).reshape(512, 1024))
    updates = {"w": jnp.zeros((512, 1024)).at[5, 300].set(np.nan)}
    key = jax.random.key(0)
    new = jax.jit(apply_updates)({"w": quantized}, updates, key)["w"].dequantize()
    bad = np.zeros((512, 1024), bool)
    bad[5, 256:512] = True
    np.testing.assert_array_equal(np.isnan(new), bad)
