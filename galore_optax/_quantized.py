"""Arrays in codes: a pytree that stands for an array of another shape and dtype."""

import dataclasses
import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from galore_optax import _codes

SCHEMES = ("signed", "unsigned", "int8", "int4")
_BITS = {"int8": 8, "int4": 4}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array in block-wise codes of 8 or 4 bits; made by `galore_optax.quantize`.

    A pytree whose leaves are the arrays it is made of. Their leading axes are those of the array
    that were batch axes, so that ``scan`` and ``vmap`` over these give the quantized array of one
    item.

    The codes have the shape of the item itself where blocks divide its last axis, and so take the
    sharding of the array they stand for; else those of the flattened item, padded to whole blocks.

    Attributes:
      codes: (*batch, *item) or (*batch, padded), uint8; half as long in the last axis for
        ``"int4"``, two codes to a byte.
      scales: one of each block, with the leading axes of ``codes``, float32.
      zeros: the code of 0, likewise, uint8, for integer schemes; else ``optax.MaskedNode()``.
      item_shape: the shape without batch axes.
      dtype: of what :meth:`dequantize` returns.
      scheme: ``"signed"``, ``"unsigned"``, ``"int8"`` or ``"int4"``.
      block_size: elements of a block.
    """

    codes: Any
    scales: Any
    zeros: Any
    item_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    scheme: str = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        batch_axes = jnp.ndim(self.codes) - len(_stored_shape(self.item_shape, self.block_size))
        return (*jnp.shape(self.codes)[: max(0, batch_axes)], *self.item_shape)

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
        """What the codes, scales and zeros take, in bytes."""
        arrays = jax.tree.leaves(self)
        return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)

    def dequantize(self) -> jax.Array:
        """The array, in its own shape and dtype; computed in float32.

        Raises:
          ValueError: an axis of the item itself was sliced, not a batch axis.
        """
        return _dequantized(self)

    def blocks(self) -> tuple[jax.Array, jax.Array, Any]:
        """Unpacked codes (..., block, element), scales and zeros (..., block)."""
        if jnp.ndim(self.codes) < len(_stored_shape(self.item_shape, self.block_size)):
            raise ValueError(
                f"a quantized array of item shape {self.item_shape} was sliced or mapped along an "
                f"axis that is not a batch axis: its codes have shape {jnp.shape(self.codes)}. "
                "Quantize with batch_axes=1 to slice along the first axis."
            )
        if self.scheme == "int4":
            codes = _codes.unpack(_split(self.codes, self.block_size // 2))
        else:
            codes = _split(self.codes, self.block_size)
        return codes, self.scales, self.zeros

    def __jax_array__(self) -> jax.Array:
        """Lets functions of ``jax.numpy`` dequantize it where they use it."""
        return self.dequantize()

    def __rmul__(self, other: Any) -> Any:
        # What a decaying moment or a weight decay comes to; jax.numpy multiplies without this.
        raise TypeError(
            f"{other!r} times a QuantizedArray of shape {self.shape}: if this is a transformation "
            "of Optax, it cannot update quantized parameters. galore, low_bit and the presets of "
            "galore_optax can, with others inside them; elsewhere, dequantize() first."
        )


def is_quantized(x: Any) -> bool:
    """Whether this is a quantized array; a predicate for ``is_leaf``."""
    return isinstance(x, QuantizedArray)


def quantize(
    array: jax.Array,
    scheme: str = "int8",
    block_size: int = 256,
    batch_axes: int = 0,
    key: jax.Array | None = None,
    *,
    keep_positive: bool = False,
) -> QuantizedArray:
    """Codes an array in blocks of consecutive elements, last axis first.

    Args:
      array: of any shape, of a real floating-point dtype; taken as float32.
      scheme: ``"signed"`` and ``"unsigned"`` are the dynamic 8-bit codes for moments of
        optimizers, for each block relative to its absolute maximum; unsigned ones take negative
        numbers for 0. ``"int8"`` and ``"int4"`` are asymmetric integers, (code - zero) * scale,
        whose range includes 0.
      block_size: elements that share a scale, even. Less than that many make one smaller block.
      batch_axes: how many leading axes are batch axes: no block straddles them, and the result may
        be sliced along them, as ``scan`` and ``vmap`` do.
      key: of JAX, for stochastic rounding, which is unbiased up to and including the extremes of a
        block; integer schemes only. None rounds to the nearest code.
      keep_positive: with ``"unsigned"``, whether a positive number is coded as the smallest
        positive value at least, never as 0.

    Returns:
      A `QuantizedArray`. A block that is not finite dequantizes to NaN.

    Raises:
      TypeError: the array is not of a real floating-point dtype.
      ValueError: another argument is out of range.

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
      with stochastic rounding; the scale here leaves room to round extremes).
    """
    array = jnp.asarray(array)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
    check_block_size(block_size)
    if not 0 <= batch_axes <= array.ndim:
        raise ValueError(
            f"batch_axes must be between 0 and the {array.ndim} axes of the array; got {batch_axes}"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"quantize needs an array of a real floating-point dtype; got {array.dtype}"
        )
    if key is not None and scheme not in _BITS:
        raise ValueError(
            f"stochastic rounding needs scheme 'int8' or 'int4'; got {scheme!r}, whose codes have "
            "no value beyond the extremes of a block. Pass key=None."
        )
    if keep_positive and scheme != "unsigned":
        raise ValueError(f"keep_positive is for scheme 'unsigned'; got {scheme!r}")
    return _quantized(array, key, scheme, block_size, batch_axes, keep_positive)


# This and what follows is compiled as one outside of a compiled function too: init often is.
@functools.partial(jax.jit, inline=True)
def requantize(
    quantized: QuantizedArray, updates: jax.Array, key: jax.Array | None
) -> QuantizedArray:
    """Adds to an array in integer codes; see :func:`galore_optax._codes.update_integer`.

    Args:
      quantized: of scheme ``"int8"`` or ``"int4"``.
      updates: of its shape.
      key: of JAX, for stochastic rounding, or None.

    Returns:
      The sum, with the same static attributes.
    """
    codes, scales, zeros = _codes.update_integer(
        *quantized.blocks(),
        to_blocks(updates, quantized.item_shape, quantized.block_size),
        _BITS[quantized.scheme],
        key,
    )
    if quantized.scheme == "int4":
        codes = _codes.pack(codes)
    return dataclasses.replace(quantized, codes=_merge(codes), scales=scales, zeros=zeros)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5), inline=True)
def _quantized(
    array: jax.Array,
    key: jax.Array | None,
    scheme: str,
    block_size: int,
    batch_axes: int,
    keep_positive: bool,
) -> QuantizedArray:
    item_shape = array.shape[batch_axes:]
    block_size = fitting_block_size(item_shape, block_size)
    blocks = to_blocks(array, item_shape, block_size)
    if scheme in _BITS:
        codes, scales, zeros = _codes.encode_integer(blocks, _BITS[scheme], key)
    else:
        codes, scales = _codes.encode_dynamic(blocks, scheme == "signed", keep_positive)
        zeros = optax.MaskedNode()
    if scheme == "int4":
        codes = _codes.pack(codes)
    return QuantizedArray(_merge(codes), scales, zeros, item_shape, array.dtype, scheme, block_size)


@functools.partial(jax.jit, inline=True)
def _dequantized(quantized: QuantizedArray) -> jax.Array:
    codes, scales, zeros = quantized.blocks()
    if quantized.scheme in _BITS:
        values = _codes.decode_integer(codes, scales, zeros)
    else:
        values = _codes.decode_dynamic(codes, scales, quantized.scheme == "signed")
    values = values.astype(quantized.dtype)
    return _from_blocks(values, quantized.item_shape, quantized.block_size)


def check_block_size(block_size: Any) -> None:
    """Raises for what is not a positive multiple of 2."""
    if (
        isinstance(block_size, bool)
        or not isinstance(block_size, numbers.Integral)
        or block_size < 2
        or block_size % 2
    ):
        raise ValueError(
            f"block_size must be a positive multiple of 2; got {block_size!r}"
            + static_hint(block_size)
        )


def static_hint(value: Any) -> str:
    """What to add to the error of an argument that must not be an array."""
    if isinstance(value, jax.Array):
        return ". Under optax.inject_hyperparams, name it in static_args."
    return ""


def fitting_block_size(item_shape: tuple[int, ...], block_size: int) -> int:
    """The block size of an item, which is smaller where the whole item is; even."""
    size = math.prod(item_shape)
    return min(block_size, max(2, size + size % 2))


def to_blocks(array: jax.Array, item_shape: tuple[int, ...], block_size: int) -> jax.Array:
    """(*batch, *item) as (..., blocks, block size), float32; padded with zeros."""
    array = jnp.asarray(array)
    stored = _stored_shape(item_shape, block_size)
    if stored != item_shape:
        batch = array.shape[: array.ndim - len(item_shape)]
        array = _gathered(array, range(len(batch), array.ndim))
        size = math.prod(item_shape)
        array = array.reshape(*batch, size)
        array = jnp.pad(array, [(0, 0)] * len(batch) + [(0, stored[0] - size)])
    return _split(array, block_size).astype(jnp.float32)


def _from_blocks(blocks: jax.Array, item_shape: tuple[int, ...], block_size: int) -> jax.Array:
    """The inverse of :func:`to_blocks`."""
    array = _merge(blocks)
    if _stored_shape(item_shape, block_size) == item_shape:
        return array
    array = _gathered(array, [array.ndim - 1])
    return array[..., : math.prod(item_shape)].reshape(*array.shape[:-1], *item_shape)


def _stored_shape(item_shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    """The shape in which the codes of an item are kept, before packing."""
    if item_shape and item_shape[-1] % block_size == 0:
        return item_shape
    return (-(-math.prod(item_shape) // block_size) * block_size,)


def _split(array: jax.Array, size: int) -> jax.Array:
    """Splits the last axis in blocks."""
    count = array.shape[-1] // size
    over = _spec(array)[-1]
    if over is not None:
        mesh = jax.typeof(array).sharding.mesh.shape
        if count % math.prod(mesh[axis] for axis in (over if isinstance(over, tuple) else (over,))):
            array = _gathered(array, [array.ndim - 1])
    return _rows_last(array.reshape(*array.shape[:-1], count, size))


def _merge(blocks: jax.Array) -> jax.Array:
    blocks = _rows_last(blocks)
    return blocks.reshape(*blocks.shape[:-2], blocks.shape[-2] * blocks.shape[-1])


def _rows_last(blocks: jax.Array) -> jax.Array:
    """Blocks (..., rows, blocks, size) in the layout that suits a TPU, where rows fill its lanes.

    Its tiles are of 128 elements of the last axis in memory and 8 or more of the one before. With
    rows last a block is a run of whole tiles: to split an axis in blocks moves nothing, and what
    is computed fuses. Else float32 arrays of full size are moved, several at a time.
    """
    last = blocks.ndim - 3
    if last < 0 or blocks.shape[last] < 128:
        return blocks
    layout = Layout((*range(last), last + 1, last + 2, last))
    return jax.lax.platform_dependent(
        blocks, tpu=lambda x: with_layout_constraint(x, layout), default=lambda x: x
    )


def _gathered(array: jax.Array, axes: Any) -> jax.Array:
    """The array with some axes not sharded: under Explicit sharding they could not be reshaped."""
    spec = _spec(array)
    if all(spec[axis] is None for axis in axes):
        return array
    kept = [None if axis in axes else name for axis, name in enumerate(spec)]
    return jax.sharding.reshard(array, PartitionSpec(*kept))


def _spec(array: jax.Array) -> tuple[Any, ...]:
    """The axes of an Explicit mesh that each axis is sharded over; None elsewhere."""
    return tuple(jax.typeof(array).sharding.spec)
