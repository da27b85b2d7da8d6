"""The table of codecs: one more row, codes of eight bits that float, and codes as they were."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import apply_updates, dequantize_params, quantize, quantize_params
from galore_optax._codec import Codec, Coded
from galore_optax._codecs import CODECS, Integer
from tests import old_codes

FLOAT8 = {"float8_e4m3": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
TINY = float(np.finfo(np.float32).tiny)
# As their docstring says: the error relative to the number, or to the maximum of its block.
ERRORS = {"float8_e4m3": (1 / 17, 2.2e-6), "float8_e5m2": (1 / 9, 1.4e-10)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Symmetric(Codec):
    """Integers from -7 to 7, two to a byte, relative to the absolute maximum; for a test."""

    rounds_at_random: ClassVar[bool] = True

    @property
    def codes_per_byte(self):
        return 2

    def encode(self, blocks, key=None):
        scales = jnp.max(jnp.abs(blocks), axis=-1) / 7
        numbers = blocks / scales[..., None]
        shift = 0.5 if key is None else jax.random.uniform(key, numbers.shape)
        return Coded((jnp.floor(numbers + shift) + 7).astype(jnp.uint8), scales)

    def decode(self, coded):
        return (coded.codes.astype(jnp.float32) - 7) * coded.scales[..., None]


def symmetric(array, size=256):
    """What its codes stand for, by NumPy."""
    blocks = array.astype(np.float64).reshape(-1, size)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 7
    return (np.rint(blocks / scales) * scales).reshape(array.shape)


@pytest.fixture
def _one_more_row(monkeypatch):
    monkeypatch.setitem(CODECS, "symmetric", Symmetric())


@pytest.mark.usefixtures("_one_more_row")
def test_a_class_and_a_row_make_a_scheme_of_quantize():
    x = normal(3, 512)
    quantized = quantize(x, "symmetric")
    assert quantized.codes.shape == (3, 256)
    np.testing.assert_allclose(quantized.dequantize(), symmetric(x), atol=1e-6)


@pytest.mark.usefixtures("_one_more_row")
def test_a_class_and_a_row_make_a_projector_dtype():
    gradients = {"w": normal(64, 96)}
    updates, states = [], []
    for dtype in (None, "symmetric"):
        tx = galore_optax.galore(optax.identity(), rank=8, scale=1.0, projector_dtype=dtype)
        update = jax.jit(lambda grads, tx=tx: tx.update(grads, tx.init(grads), grads))
        updated, state = update(gradients)
        updates.append(updated["w"])
        states.append(state)
    ideal, kept = (state.subspace.left["w"] for state in states)
    assert (kept.scheme, kept.codes.nbytes) == ("symmetric", ideal.size / 2)
    basis = symmetric(np.asarray(ideal))
    np.testing.assert_allclose(kept.dequantize(), basis, atol=1e-6)
    expected = basis @ basis.T @ gradients["w"].astype(np.float64)
    np.testing.assert_allclose(updates[1], expected, atol=1e-5)


@pytest.mark.usefixtures("_one_more_row")
def test_a_class_and_a_row_make_weights_if_the_codec_rounds_at_random():
    params = {"w": np.tile(np.array([-1, 1], np.float32), (64, 128))}
    quantized = quantize_params(params, rank=8, scheme="symmetric")
    # A fiftieth of a step of 2/7 each time, on average; the extremes cannot shrink together.
    small = {"w": np.where(np.arange(256) % 64 < 2, 0, -params["w"] / 175).astype(np.float32)}
    add = jax.jit(apply_updates)
    for i in range(20):
        quantized = add(quantized, small, jax.random.key(i))
    moved = dequantize_params(quantized)["w"] - params["w"]
    np.testing.assert_allclose(jnp.mean(moved * params["w"]), -20 / 175 * 62 / 64, rtol=0.1)


@pytest.mark.parametrize("scheme", [name for name, codec in CODECS.items() if codec.in_blocks])
def test_codes_are_unpacked_as_they_were_packed(scheme):
    codec = CODECS[scheme]
    codes = np.random.default_rng(0).integers(2 ** (8 // codec.codes_per_byte), size=(3, 64))
    packed = codec.pack(jnp.asarray(codes, jnp.uint8))
    assert packed.nbytes == codes.size / codec.codes_per_byte
    np.testing.assert_array_equal(codec.unpack(packed), codes)


of_float8 = pytest.mark.since(jax="0.8")  # before which CPUs round to float16 first.


@pytest.mark.parametrize("scheme", FLOAT8)
@of_float8
def test_float8_codes_are_the_bits_of_ml_dtypes(scheme):
    """With a scale that is a power of 2, and around the middle of any two neighbours."""
    dtype = FLOAT8[scheme]
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)]
    x = np.concatenate(
        [values, middle, *near, values[-1:] * 10.0 ** normal(600).astype(np.float32)]
    )
    x = np.clip(x, values[0], values[-1])
    quantized = quantize(x * np.float32(2.0**-20), scheme, block_size=2 * x.size)
    assert (quantized.codes.dtype, quantized.scales) == (jnp.uint8, 2.0**-20)
    np.testing.assert_array_equal(quantized.codes[: x.size], x.astype(dtype).view(np.uint8))
    expected = x.astype(dtype).astype(np.float32) * np.float32(2.0**-20)
    np.testing.assert_array_equal(quantized.dequantize(), expected)


@pytest.mark.parametrize("scheme", FLOAT8)
@of_float8
def test_float8_is_as_near_as_any_of_its_values(scheme):
    x = normal(8, 256) * 10.0 ** normal(8, 256, seed=1)
    x[0] *= 1e-37  # the scale is the smallest normal number, below which devices flush to 0
    x[1] *= 1e34 / np.abs(x[1]).max()
    x[2] = 0
    values = np.arange(256, dtype=np.uint8).view(FLOAT8[scheme]).astype(np.float64)
    largest = float(ml_dtypes.finfo(FLOAT8[scheme]).max)
    peaks = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    values = values[np.isfinite(values)] * np.maximum(peaks / largest, TINY)[..., None]
    nearest = np.abs(x[..., None] - values).min(axis=-1)
    quantized = quantize(x, scheme)
    error = np.abs(np.asarray(quantized.dequantize(), np.float64) - x)
    assert np.all(error <= nearest + 1e-6 * np.abs(x) + TINY)
    of_number, of_maximum = ERRORS[scheme]
    bound = np.maximum(of_number * np.abs(x), of_maximum * peaks)
    assert np.all(error[1:] <= bound[1:] * (1 + 1e-5))
    assert np.any(error[1:] > 0.9 * bound[1:], where=x[1:] != 0)


def test_codes_are_those_of_the_first_version():
    """To the bit; but of scales the compiler may divide by a constant in more than one way."""
    found, expected = old_codes.codes(), np.load(old_codes.PATH)
    assert sorted(found) == sorted(expected)
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        if array.dtype == np.float32:
            np.testing.assert_allclose(array, expected[name], rtol=4e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (9, 10), (2, 256)])
def test_two_bits_are_a_row_of_the_table(monkeypatch, shape):
    """Four codes share a byte, and whole bytes fill every block, whatever the shape."""
    monkeypatch.setitem(CODECS, "int2", Integer(2))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    quantized = galore_optax.quantize(jnp.asarray(x), "int2")
    assert quantized.codes.size == -(-x.size // 4)
    step = np.ptp(np.append(x, 0)) / 2  # at most: of the block with the widest range
    np.testing.assert_allclose(quantized.dequantize(), x, atol=step / 2 + 1e-6)
    with pytest.raises(ValueError, match="block_size must be a positive multiple of 4; got 6"):
        galore_optax.quantize(jnp.asarray(x), "int2", block_size=6)
