"""Holds arrays in codes: a pytree stands for an array of another shape and dtype."""

import dataclasses
import functools
import math
import numbers
from collections.abc import Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped

from galore_optax._arguments import static_hint
from galore_optax._blocks import (
    lying_as,
    merge,
    split,
    stored_shape,
    stored_spec,
    to_blocks,
)
from galore_optax._codec import Coded
from galore_optax._codecs import CODECS
from galore_optax._coding import read, write
from galore_optax._types import Shape


def schemes(*, at_random: bool = False) -> list[str]:
    """Returns the names of the codecs that a `QuantizedArray` may be in.

    Args:
      at_random: whether to name only those that round at random without bias, as weights need.
    """
    return [
        name
        for name, codec in CODECS.items()
        if codec.in_blocks and (codec.rounds_at_random or not at_random)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array in block-wise codes of 8 or 4 bits; made by `galore_optax.quantize`.

    It is a pytree whose leaves are the arrays it is made of. Their leading axes are those of the
    array that were batch axes, so that ``scan`` and ``vmap`` over these give the quantized array
    of one item.

    The codes have the shape of the item itself where blocks divide its last axis, and so take the
    sharding of the array they stand for; else they have the shape of the flattened item, padded to
    whole blocks.

    Attributes:
      codes: the codes, (*batch, *item) or (*batch, padded), uint8; half as long in the last axis
        for ``"int4"``, two codes to a byte.
      scales: the scale of each block, with the leading axes of ``codes``, float32.
      zeros: the code of 0 in each block, with the same axes, uint8, for integer schemes; else
        ``optax.MaskedNode()``.
      item_shape: the shape of the array without batch axes.
      dtype: the dtype of what :meth:`dequantize` returns.
      scheme: the name of the codes, as `galore_optax.quantize` takes it.
      block_size: the number of elements of a block.
    """

    # These are arrays, or what functions of trees put in their places: jax.ShapeDtypeStruct, say.
    codes: PyTree
    scales: PyTree
    zeros: PyTree
    item_shape: Shape = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    scheme: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> Shape:
        """The shape of the array that this stands for."""
        batch_axes = np.ndim(self.codes) - len(stored_shape(self.item_shape, self.block_size))
        return (*np.shape(self.codes)[: max(0, batch_axes)], *self.item_shape)

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes that the codes, scales and zeros take."""
        arrays = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)

    def dequantize(self) -> Float[Array, "..."]:
        """Returns the array in its own shape and dtype; it is computed in float32.

        Raises:
          ValueError: an axis of the item itself was sliced, not a batch axis.
        """
        return dequantized(self)

    def blocks(self) -> Coded:
        """Returns the blocks as their codec reads them: unpacked codes (..., block, element).

        Raises:
          ValueError: an axis of the item itself was sliced, not a batch axis.
        """
        if np.ndim(self.codes) < len(stored_shape(self.item_shape, self.block_size)):
            raise ValueError(
                f"a quantized array of item shape {self.item_shape} was sliced or mapped along an "
                f"axis that is not a batch axis: its codes have shape {np.shape(self.codes)}. "
                "Quantize with batch_axes=1 to slice along the first axis."
            )
        codec = CODECS[self.scheme]
        packed = split(self.codes, self.block_size // codec.codes_per_byte)
        return Coded(codec.unpack(packed), self.scales, self.zeros)

    def __jax_array__(self) -> Float[Array, "..."]:
        """Lets functions of ``jax.numpy`` dequantize it where they use it."""
        return self.dequantize()

    def __rmul__(self, other: object) -> None:
        # A decaying moment or a weight decay comes to this; jax.numpy multiplies without it.
        raise TypeError(
            f"{other!r} times a QuantizedArray of shape {self.shape}: if this is a transformation "
            "of Optax, it cannot update quantized parameters. galore, low_bit and the presets of "
            "galore_optax can, with others inside them; elsewhere, dequantize() first."
        )


def is_quantized(x: object) -> TypeGuard[QuantizedArray]:
    """Whether this is a quantized array; a predicate for ``is_leaf``."""
    return isinstance(x, QuantizedArray)


def quantize(
    array: jax.typing.ArrayLike,
    scheme: str = "int8",
    block_size: int = 256,
    batch_axes: int = 0,
    key: PRNGKeyArray | None = None,
    *,
    keep_positive: bool = False,
) -> QuantizedArray:
    """Codes an array in blocks of consecutive elements, last axis first.

    Args:
      array: an array of any shape and of a real floating-point dtype; it is taken as float32.
      scheme: the name of the codes. ``"signed"`` and ``"unsigned"`` are the dynamic 8-bit codes for
        moments of optimizers, for each block relative to its absolute maximum; unsigned ones take
        negative numbers for 0. ``"int8"`` and ``"int4"`` are asymmetric integers, (code - zero) *
        scale, whose range includes 0. ``"float8_e4m3"`` and ``"float8_e5m2"`` are floating-point
        numbers of 8 bits, kept as their bits in uint8, for each block relative to its absolute
        maximum, which becomes the largest of them; they are off by at most 1/17 and 1/9 of a
        number, unless it is tiny beside that maximum.
      block_size: the number of elements that share a scale, even. Fewer elements than that make
        one smaller block.
      batch_axes: how many leading axes are batch axes: no block straddles them, and the result may
        be sliced along them, as ``scan`` and ``vmap`` do.
      key: a key of JAX for stochastic rounding, which is unbiased up to and including the extremes
        of a block; integer schemes only. None rounds to the nearest code.
      keep_positive: with ``"unsigned"``, whether a positive number is coded as the smallest
        positive value at least, never as 0.

    Returns:
      A `QuantizedArray`. A block that is not finite dequantizes to NaN.

    Raises:
      TypeError: the array is not of a real floating-point dtype.
      ValueError: another argument is out of range, or the codes cannot do what ``key`` or
        ``keep_positive`` asks for.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> array = jnp.linspace(-1, 1, 1024).reshape(2, 512)
      >>> quantized = galore_optax.quantize(array)
      >>> quantized.shape, quantized.codes.dtype, quantized.nbytes
      ((2, 512), dtype('uint8'), 1044)
      >>> bool(jnp.max(jnp.abs(quantized.dequantize() - array)) < 1 / 254)
      True

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021, section 2 (dynamic codes);
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section 3.3 (integers
      with stochastic rounding; the scale here leaves room to round extremes);
      Micikevicius et al., `FP8 Formats for Deep Learning <https://arxiv.org/abs/2209.05433>`_,
      2022 (e4m3 and e5m2).
    """
    array = jnp.asarray(array)
    if scheme not in schemes():
        raise ValueError(f"scheme must be one of {', '.join(schemes())}; got {scheme!r}")
    check_block_size(block_size, scheme)
    if not 0 <= batch_axes <= array.ndim:
        raise ValueError(
            f"batch_axes must be between 0 and the {array.ndim} axes of the array; got {batch_axes}"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"quantize needs an array of a real floating-point dtype; got {array.dtype}"
        )
    if key is not None and not CODECS[scheme].rounds_at_random:
        raise ValueError(
            f"stochastic rounding needs scheme {either(schemes(at_random=True))}; got {scheme!r}, "
            "whose codes can only be rounded to the nearest. Pass key=None."
        )
    if keep_positive and CODECS[scheme].keeping_positive() is None:
        possible = [name for name in schemes() if CODECS[name].keeping_positive() is not None]
        raise ValueError(f"keep_positive is for scheme {either(possible)}; got {scheme!r}")
    return quantized_as(array, None, key, scheme, block_size, batch_axes, keep_positive)


# Each of these functions is compiled as one, since init often runs outside of a compiled function,
# and once for all arrays of a shape.
@jax.jit
def requantize(
    quantized: QuantizedArray, updates: Shaped[Array, "..."], key: PRNGKeyArray | None
) -> QuantizedArray:
    """Adds to an array in codes; see :meth:`galore_optax._codec.Codec.add`.

    Args:
      quantized: the array in codes; they must round at random if there is a key.
      updates: what to add, of the shape of the array.
      key: a key of JAX for stochastic rounding, or None.

    Returns:
      The sum, with the same static attributes.
    """
    codec, blocks = CODECS[quantized.scheme], quantized.blocks()
    where = PartitionSpec(*jax.typeof(blocks.codes).sharding.spec[:-1])
    updates = to_blocks(updates, quantized.item_shape, quantized.block_size, where)
    updates = updates.astype(jnp.float32)
    codes, scales, zeros = codec.add(blocks, updates, key)
    codes = merge(codec.pack(codes))
    return lying_as(
        quantized, dataclasses.replace(quantized, codes=codes, scales=scales, zeros=zeros)
    )


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def quantized_as(
    array: Float[Array, "..."],
    twin: Float[Array, "..."] | None,
    key: PRNGKeyArray | None,
    scheme: str,
    block_size: int,
    batch_axes: int,
    keep_positive: bool,
) -> QuantizedArray:
    """Returns what :func:`quantize` does; all but the twin is as there, and not checked.

    Args:
      array: the array.
      twin: the same numbers, computed once more: of these are the scales of codes that are written
        element by element. So neither need be kept in memory until the other is done.
      key: see :func:`quantize`, as for all that follows.
      scheme: the name of the codes.
      block_size: the number of elements of a block.
      batch_axes: how many leading axes are batch axes.
      keep_positive: whether a positive number never becomes 0.
    """
    item_shape, dtype = array.shape[batch_axes:], array.dtype
    block_size = fitting_block_size(item_shape, block_size, scheme)
    codec = CODECS[scheme]
    if keep_positive:
        codec = codec.keeping_positive() or codec
    coded = write(codec, array, twin, key, (item_shape, block_size))
    codes = merge(codec.pack(coded.codes))
    return QuantizedArray(codes, coded.scales, coded.zeros, item_shape, dtype, scheme, block_size)


@functools.partial(jax.jit, static_argnums=1)
def dequantized(
    quantized: QuantizedArray, where: PartitionSpec | None = None
) -> Float[Array, "..."]:
    """Returns the array that this stands for; see :func:`galore_optax._blocks.from_blocks`."""
    form = quantized.item_shape, quantized.block_size
    return read(CODECS[quantized.scheme], quantized.blocks(), form, quantized.dtype, where)


def placed(
    quantized: QuantizedArray, spec: PartitionSpec, mesh: AbstractMesh | None
) -> QuantizedArray:
    """Says where codes lie on a mesh; see :func:`galore_optax._blocks.stored_spec`.

    Args:
      quantized: the array in codes, or its shapes.
      spec: that of the array, with an entry for each axis.
      mesh: the mesh, or None where anything can be divided.

    Returns:
      A quantized array with a ``PartitionSpec`` in the place of each array.
    """
    where = stored_spec(quantized.item_shape, quantized.block_size, spec, mesh)
    parts = jax.tree.map(lambda _: where, (quantized.codes, quantized.scales, quantized.zeros))
    return dataclasses.replace(quantized, codes=parts[0], scales=parts[1], zeros=parts[2])


def either(names: Sequence[str]) -> str:
    """Returns names as an error lists them: ``'int8' or 'int4'``."""
    return " or ".join(map(repr, names))


def check_block_size(block_size: object, scheme: str | None = None) -> None:
    """Raises for what is not a positive multiple of 2, and of the codes of the scheme in a byte."""
    unit = _unit(scheme)
    if (
        isinstance(block_size, bool)
        or not isinstance(block_size, numbers.Integral)
        or block_size < unit
        or block_size % unit
    ):
        raise ValueError(
            f"block_size must be a positive multiple of {unit}; got {block_size!r}"
            + static_hint(block_size)
        )


def _unit(scheme: str | None) -> int:
    """What the size of a block is a multiple of, so that blocks fill whole bytes."""
    return 2 if scheme is None else max(2, CODECS[scheme].codes_per_byte)


def fitting_block_size(item_shape: Shape, block_size: int, scheme: str) -> int:
    """Returns the block size of an item, which is smaller where the whole item is."""
    unit = _unit(scheme)
    return min(block_size, max(unit, -(-math.prod(item_shape) // unit) * unit))
