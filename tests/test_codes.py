"""Block-wise codes and quantized arrays, against tables, exact arithmetic and statistics."""

import functools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from galore_optax import QuantizedArray, apply_updates, low_bit, quantize
from galore_optax._codecs import CODECS
from tests.devices import on_devices

REFERENCE = np.load(pathlib.Path(__file__).parent / "data" / "adam_8bit.npz")
DYNAMIC = ("signed", "unsigned")
SCHEMES = (*DYNAMIC, "int8", "int4", "float8_e4m3", "float8_e5m2")
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
    np.testing.assert_allclose(CODECS[scheme].values, table, rtol=0, atol=1e-7)
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


@functools.partial(jax.jit, static_argnames="scheme")
def draw(x, keys, scheme):
    return jax.vmap(lambda key: quantize(x, scheme, key=key).dequantize())(keys)


@pytest.mark.parametrize("group", ["mixed", "positive", "negative", "constant", "zero_and_one"])
@pytest.mark.parametrize("scheme", LAST)
def test_stochastic_rounding_has_the_right_mean(scheme, group):
    draws, x = 10_000, GROUPS[group]
    keys = jax.random.split(jax.random.key(1), draws)
    drawn = np.asarray(draw(x, keys, scheme), np.float64)
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
    x = np.array([1.001, -1.001, 3e-39, 0.0, 1.0, -255.7, 1e30], np.float32)
    keys = jax.random.split(jax.random.key(0), 10_000)
    draw = jax.jit(jax.vmap(lambda key: CODECS["bfloat16"].encode(jnp.asarray(x), key).codes))
    drawn = np.asarray(draw(keys), np.float64)
    deviation = drawn.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(drawn.mean(0) - np.asarray(x)) <= 4 * deviation)
    np.testing.assert_array_equal(deviation[3:5], 0)
    assert deviation[0] > 0
    assert deviation[1] > 0


def test_rounding_to_bfloat16_keeps_what_is_not_finite():
    odd = np.array([np.inf, -np.inf, np.nan, np.frombuffer(b"\xff\xff\xff\x7f", np.float32)[0]])
    rounded = jax.jit(CODECS["bfloat16"].encode)(odd.astype(np.float32), jax.random.key(0)).codes
    np.testing.assert_array_equal(np.asarray(rounded, np.float32), odd)


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


# Of 8 bits with and without zeros, of 4 bits, which are packed, and of bits of floats.
SCHEMES_AND_SHAPES = [
    *((scheme, shape) for scheme in ("signed", "int4") for shape in SHAPES),
    *(
        (scheme, shape)
        for scheme in ("unsigned", "int8", "float8_e4m3")
        for shape in (SHAPES[4], SHAPES[6])
    ),
]


@functools.cache
def there_and_back(scheme):
    """(array, codes, what they stand for) of shapes, by two compiled programs."""
    cases = [case for name, case in SCHEMES_AND_SHAPES if name == scheme]
    arrays = [np.abs(normal(*shape)).astype(jnp.bfloat16) for shape, _ in cases]

    @jax.jit
    def there(arrays):
        pairs = zip(arrays, cases, strict=True)
        return [quantize(x, scheme, batch_axes=axes) for x, (_, axes) in pairs]

    codes = there(arrays)
    back = jax.jit(lambda codes: [x.dequantize() for x in codes])(codes)
    return dict(zip(cases, zip(arrays, codes, back, strict=True), strict=True))


@pytest.mark.parametrize(("scheme", "case"), SCHEMES_AND_SHAPES)
def test_any_shape_comes_back(scheme, case):
    batch_axes = case[1]
    x, quantized, y = there_and_back(scheme)[case]
    assert (quantized.shape, quantized.dtype) == (x.shape, x.dtype)
    assert (quantized.ndim, quantized.size) == (x.ndim, x.size)
    assert quantized.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    chex.assert_trees_all_equal_shapes_and_dtypes(y, x)
    half_an_interval = {"int4": 0.05, "float8_e4m3": 0.04}.get(scheme, 0.01)
    x, y = x.astype(np.float32), np.asarray(y, np.float32)
    peak = np.max(np.abs(x), initial=0)
    np.testing.assert_allclose(y, x, rtol=0, atol=half_an_interval * peak)
    shapes = jax.eval_shape(lambda x: quantize(x, scheme, batch_axes=batch_axes), x)
    assert (shapes.shape, shapes.nbytes) == (quantized.shape, quantized.nbytes)


@pytest.mark.parametrize(
    ("scheme", "bound"),
    [("signed", 1.02), ("unsigned", 1.02), ("int8", 1.04), ("int4", 0.54), ("float8_e5m2", 1.02)],
)
def test_bytes_of_an_element(scheme, bound):
    x = np.ones((64, 5461), np.float32)  # columns that blocks do not divide
    quantized = jax.eval_shape(lambda x: quantize(x, scheme), x)
    assert quantized.nbytes / x.size <= bound


@pytest.mark.parametrize(
    ("scheme", "columns"), [("signed", 256), ("unsigned", 100), ("int8", 100), ("int4", 256)]
)
def test_batch_axes_work_in_scan_vmap_cond_and_under_donation(scheme, columns):
    x = np.abs(normal(3, 4, columns))

    @jax.jit
    def ways(x):
        whole = quantize(x, scheme, batch_axes=1)
        items = [quantize(item, scheme) for item in x]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *items)
        mapped = jax.vmap(lambda item: quantize(item, scheme))(x)
        _, by_scan = jax.lax.scan(lambda carry, item: (carry, item.dequantize()), 0, whole)
        by_vmap = jax.vmap(QuantizedArray.dequantize)(whole)
        return whole, (stacked, mapped), whole.dequantize(), (by_scan, by_vmap)

    whole, alike, dequantized, also = ways(x)
    for other in alike:
        chex.assert_trees_all_equal(whole, other)
    for other in also:
        np.testing.assert_array_equal(other, dequantized)
    chosen = jax.jit(jax.lax.cond, static_argnums=(1, 2))(
        True, lambda q: q, lambda q: jax.tree.map(jnp.zeros_like, q), whole
    )
    chex.assert_trees_all_equal(chosen, whole)
    donated = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf + 0, q), donate_argnums=0)
    assert donated(jax.tree.map(np.copy, whole)).shape == whole.shape


@pytest.mark.parametrize(
    ("batch", "rows", "minor_to_major"),
    [((), 128, "0, 2, 1"), ((3,), 128, "1, 3, 2, 0"), ((), 127, None)],
)
@pytest.mark.since(jax="0.7")
def test_on_a_tpu_the_rows_of_blocks_are_last_in_memory(batch, rows, minor_to_major):
    """As lowered for one. What moves is what is given: no float32 in the place of narrower."""
    updates = np.zeros((*batch, rows, 512), jnp.bfloat16)
    quantized = jax.eval_shape(lambda x: quantize(x, batch_axes=len(batch)), updates)

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


@pytest.mark.parametrize("spec", [P("d", "m"), P(("d", "m"), None)], ids=str)
@pytest.mark.since(jax="0.7")
def test_types_say_that_codes_lie_as_what_they_stand_for(spec):
    """Of Explicit axes: types name them, of however many devices they are."""
    mesh = jax.make_mesh((1, 1), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    tx = low_bit(optax.adamw(1e-3))
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((64, 1024), np.float32, sharding=NamedSharding(mesh, spec))
        for scheme in ("signed", "int4"):
            quantized = jax.eval_shape(lambda x, scheme=scheme: quantize(x, scheme), x)
            assert quantized.codes.sharding.spec == spec
            y = jax.eval_shape(QuantizedArray.dequantize, quantized)
            assert (y.shape, y.sharding.spec) == (x.shape, spec)
        state = jax.eval_shape(tx.init, x)
        updates, after = jax.eval_shape(tx.update, x, state, x)
    assert updates.sharding.spec == spec
    moments, kept = (optax.tree.get(s.inner, "mu") for s in (state, after))
    assert moments.codes.sharding.spec == kept.codes.sharding.spec == spec
    assert moments.scales.sharding.spec == kept.scales.sharding.spec


def compare_on_eight_devices():
    plain = normal(64, 1024)

    @jax.jit
    def there_and_back(x):
        quantized = [quantize(x, scheme) for scheme in ("signed", "int4")]
        return quantized, [x.dequantize() for x in quantized]

    tx = low_bit(optax.adamw(1e-3))

    @jax.jit
    def two_steps(x):
        state = tx.init(x)
        _, after = tx.update(x, state, x)
        updates, last = tx.update(x, after, x)
        assert jax.tree.map(jax.typeof, after.inner) == jax.tree.map(jax.typeof, last.inner)
        return updates

    for columns, cases in {
        1024: [(P("d", "m"), AxisType.Explicit), (P(("d", "m"), None), AxisType.Auto)],
        768: [(P("d", "m"), AxisType.Auto)],
        500: [(P("d", "m"), AxisType.Explicit)],
    }.items():
        array = plain[:, :columns]
        expected, _ = there_and_back(array)
        expected_updates = two_steps(array)
        for spec, axes in cases:
            mesh = jax.make_mesh((4, 2), ("d", "m"), axis_types=(axes,) * 2)
            with jax.set_mesh(mesh):
                x = jax.device_put(array, NamedSharding(mesh, spec))
                found, back = there_and_back(x)
                updates = two_steps(x)
            for a, b, y in zip(found, expected, back, strict=True):
                assert np.mean(np.asarray(a.codes) == np.asarray(b.codes)) > 0.999
                np.testing.assert_allclose(a.scales, b.scales, rtol=1e-6)
                alone = jax.tree.map(np.asarray, a).dequantize()
                np.testing.assert_allclose(y, alone, rtol=1e-6)
                if columns == 1024:
                    assert a.codes.sharding.spec == spec, a.codes.sharding
            np.testing.assert_allclose(updates, expected_updates, rtol=1e-4, atol=1e-7)


@pytest.mark.ci
@pytest.mark.long("its other devices are of a process of its own")
def test_codes_follow_the_sharding_of_what_they_stand_for():
    """On 8 devices, with Explicit and Auto axes, in a process of its own."""
    on_devices(
        8,
        "-W",
        "error",
        "-c",
        "from tests import test_codes; test_codes.compare_on_eight_devices()",
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scheme": "int3"}, ValueError, "one of int8, int4, .*, signed, unsigned; got 'int3'"),
        ({"scheme": "bfloat16"}, ValueError, "one of int8, int4, .*; got 'bfloat16'"),
        ({"block_size": 0}, ValueError, "positive multiple of 2; got 0"),
        ({"block_size": 255}, ValueError, "positive multiple of 2; got 255"),
        ({"block_size": 256.0}, ValueError, r"positive multiple of 2; got 256\.0"),
        ({"batch_axes": 2}, ValueError, "between 0 and the 1 axes.*got 2"),
        ({"array": np.ones(4, np.int32)}, TypeError, "floating-point dtype; got int32"),
        (
            {"scheme": "signed", "key": jax.random.key(0)},
            ValueError,
            "needs scheme 'int8' or 'int4'; got 'signed'.*key=None",
        ),
        (
            {"scheme": "float8_e4m3", "key": jax.random.key(0)},
            ValueError,
            "needs scheme 'int8' or 'int4'; got 'float8_e4m3'",
        ),
        ({"keep_positive": True}, ValueError, "is for scheme 'unsigned'; got 'int8'"),
        (
            {"scheme": "signed", "keep_positive": True},
            ValueError,
            "is for scheme 'unsigned'; got 'signed'",
        ),
    ],
)
def test_arguments_that_cannot_be_right(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(**{"array": np.ones(4, np.float32), **arguments})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_bad_entry_of_a_large_array_shows_in_its_whole_block_and_no_other(scheme):
    decode = jax.jit(lambda x: quantize(x, scheme).dequantize())
    bad = np.zeros((512, 1024), bool)
    bad[5, 256:512] = True
    for value in (np.nan, np.inf):
        array = np.ones((512, 1024), np.float32)
        array[5, 300] = value
        np.testing.assert_array_equal(np.isnan(decode(array)), bad)


def test_a_bad_update_shows_in_its_whole_block():
    quantized = quantize(np.linspace(-1, 1, 512 * 1024, dtype=np.float32).reshape(512, 1024))
    updates = {"w": np.zeros((512, 1024), np.float32)}
    updates["w"][5, 300] = np.nan
    key = jax.random.key(0)
    new = jax.jit(apply_updates)({"w": quantized}, updates, key)["w"].dequantize()
    bad = np.zeros((512, 1024), bool)
    bad[5, 256:512] = True
    np.testing.assert_array_equal(np.isnan(new), bad)
