"""Writes arrays in codes, and reads them again: in blocks, or each number where it lies.

A codec works on blocks. One that codes each number by itself, once the scales are known, may as
well see an array as it lies, with the scale of its block beside each number. Then nothing but codes
changes its shape, and on a GPU what is read is computed in the kernel that uses it, and what is
written in the one that makes it.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from galore_optax._blocks import from_blocks, is_divided, spread, to_blocks
from galore_optax._codec import ByElement, Codec, Coded
from galore_optax._types import DType, Shape

Form: TypeAlias = tuple[Shape, int]
"""The shape of an array without batch axes, and the size of its blocks."""
Result = TypeVar("Result")


def write(
    codec: Codec,
    array: Float[Array, "..."],
    twin: Float[Array, "..."] | None,
    key: PRNGKeyArray | None,
    form: Form,
) -> Coded:
    """Returns the blocks of an array in codes, before these are packed.

    Args:
      codec: the codec.
      array: the array.
      twin: the same numbers, computed once more, from which scales are taken where they can be;
        None takes them from the array.
      key: a key of JAX for stochastic rounding, or None.
      form: the shape of the array without batch axes, and the size of its blocks.
    """
    if not isinstance(codec, ByElement):
        return codec.encode(to_blocks(array, *form).astype(jnp.float32), key)
    twin = array if twin is None else twin
    if is_divided(array):
        return written_in_blocks(codec, array, twin, form)
    there, elsewhere = (
        functools.partial(way, codec, form=form) for way in (written_in_place, written_in_blocks)
    )
    return _on_a_gpu(there, elsewhere)(array, twin)


def read(
    codec: Codec, coded: Coded, form: Form, dtype: DType, where: PartitionSpec | None
) -> Float[Array, "..."]:
    """Returns the array that blocks of codes stand for.

    Args:
      codec: the codec.
      coded: the blocks, their codes unpacked.
      form: the shape of the array without batch axes, and the size of its blocks.
      dtype: the dtype of the array; it is computed in float32.
      where: where it shall lie; see :func:`galore_optax._blocks.from_blocks`.
    """
    if not isinstance(codec, ByElement) or is_divided(coded.codes) or any(where or ()):
        return read_in_blocks(codec, coded, form, dtype, where)
    there, elsewhere = (
        functools.partial(way, codec, form=form, dtype=dtype)
        for way in (read_in_place, read_in_blocks)
    )
    return _on_a_gpu(there, elsewhere)(coded)


def written_in_blocks(codec: ByElement, array: Array, twin: Array, form: Form) -> Coded:
    """Cuts an array in blocks, and codes these with the scales of the twin's."""
    blocks, others = (to_blocks(x, *form).astype(jnp.float32) for x in (array, twin))
    scales = jnp.max(codec.peaks(others), axis=-1)
    return Coded(codec.write(blocks, scales[..., None]), scales)


def written_in_place(codec: ByElement, array: Array, twin: Array, form: Form) -> Coded:
    """Does the same, but cuts only the codes, and what scales are the maxima of."""
    array, twin = (x.astype(jnp.float32) for x in (array, twin))
    scales = jnp.max(to_blocks(codec.peaks(twin), *form), axis=-1)
    codes = codec.write(array, from_blocks(spread(scales, form[1]), *form))
    return Coded(to_blocks(codes, *form, fill=codec.zero), scales)


def read_in_blocks(
    codec: Codec, coded: Coded, form: Form, dtype: DType, where: PartitionSpec | None = None
) -> Float[Array, "..."]:
    """Reads codes in blocks, and puts these together."""
    return from_blocks(codec.decode(coded).astype(dtype), *form, where)


def read_in_place(codec: ByElement, coded: Coded, form: Form, dtype: DType) -> Float[Array, "..."]:
    """Does the same, but puts only the codes together, and the scales beside them."""
    # XLA would put off the change of shape until the numbers are read, and then keep them.
    codes = jax.lax.optimization_barrier(from_blocks(coded.codes, *form))
    return codec.read(codes, from_blocks(spread(coded.scales, form[1]), *form)).astype(dtype)


def _on_a_gpu(
    there: Callable[..., Result], elsewhere: Callable[..., Result]
) -> Callable[..., Result]:
    """Returns a function that is compiled as one on a GPU, elsewhere as one that does the same.

    A CPU is no faster by it. On a TPU, whose memory has tiles, the scales of blocks have no place
    beside each number.
    """
    return functools.partial(jax.lax.platform_dependent, cuda=there, rocm=there, default=elsewhere)
