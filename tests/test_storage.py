"""In how many bits an array is held between steps."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from galore_optax import QuantizedArray, quantize
from galore_optax._storage import Storage, resolve_storage


def normal(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_name_holds_an_array_as_it_is(dtype):
    x = normal(3, 5, dtype=dtype)
    assert resolve_storage("projector_dtype", None).keep(x) is x


def test_plain_dtypes_are_rounded_to_the_nearest_and_stay_so():
    x = normal(3, 5)
    storage = resolve_storage("projector_dtype", "bfloat16")
    expected = np.asarray(x).astype(ml_dtypes.bfloat16)
    for kept in (storage.keep(x), storage.load(storage.keep(x))):
        assert kept.dtype == jnp.bfloat16
        np.testing.assert_array_equal(kept, expected)
    single = Storage("float32").keep(x.astype(jnp.bfloat16))
    assert single.dtype == jnp.float32
    np.testing.assert_array_equal(single, expected.astype(np.float32))


def test_bfloat16_is_rounded_at_random_with_a_key():
    x = jnp.full(4000, 1 + 2.0**-9)  # a quarter of the way from 1 to the next bfloat16
    kept = Storage("bfloat16").keep(x, key=jax.random.key(0))
    numbers, counts = np.unique(np.asarray(kept, np.float64), return_counts=True)
    np.testing.assert_array_equal(numbers, [1, 1 + 2.0**-7])
    assert abs(counts[1] - 1000) < 4 * np.sqrt(4000 * 0.25 * 0.75)


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3", "float8_e5m2", "signed"])
def test_codes_are_those_of_quantize(name):
    x = normal(2, 3, 100, dtype=jnp.bfloat16)
    storage = Storage(name, block_size=20)
    kept = jax.jit(lambda x: storage.keep(x, batch_axes=1))(x)
    expected = quantize(x, name, 20, batch_axes=1)
    assert isinstance(kept, QuantizedArray)
    assert jax.tree.structure(kept) == jax.tree.structure(expected)
    for found, leaf in zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, leaf)
    loaded = storage.load(kept)
    assert (loaded.shape, loaded.dtype) == (x.shape, x.dtype)
    np.testing.assert_allclose(loaded, x, atol=0.3)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4", "float8_e4m3"])
def test_another_array_is_held_likewise(name):
    kept = Storage(name, block_size=20).keep(normal(3, 100))
    again = Storage.of(kept).keep(1 - normal(3, 100))
    assert jax.tree.map(jax.typeof, again) == jax.tree.map(jax.typeof, kept)


def test_an_array_in_another_dtype_is_held_likewise_as_it_is():
    with jax.enable_x64(True):
        x = jnp.ones(3, jnp.float64)  # which is no codec
        assert Storage.of(x).keep(x) is x


def test_a_positive_number_never_becomes_zero_if_asked():
    x = jnp.asarray([1.0, 1e-30])
    for keep_positive in (False, True):
        storage = Storage("unsigned")
        loaded = storage.load(storage.keep(x, keep_positive=keep_positive))
        assert (loaded[1] > 0) == keep_positive


def test_names_that_there_are_not():
    message = "^dtype must be one of float32, bfloat16, int8, .*, or None; got "
    # Codes without a sign cannot hold a basis.
    for name in ("int3", "unsigned"):
        with pytest.raises(ValueError, match=f"{message}'{name}'"):
            resolve_storage("dtype", name)


@pytest.mark.parametrize("name", [None, "float32", "signed"])
def test_what_is_never_rounded_at_random_refuses_a_key(name):
    with pytest.raises(ValueError, match="key=None"):
        Storage(name).keep(normal(64), key=jax.random.key(0))
