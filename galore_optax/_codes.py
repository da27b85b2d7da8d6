"""Numbers in few bits: the arithmetic of block-wise codes on the blocks of one array.

Blocks are the last axis. Everything is elementwise but one maximum (and minimum) per block, so
that it fuses with what is around it, runs on any device and follows any sharding: a table look-up
would do none of the three.

Dynamic codes are those of Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021: the value 0, the value 1, and seven decades of
magnitude, 1e-7..1e-6 up to 0.1..1. The i-th decade, from 0 on, is cut in n equal intervals whose
midpoints are the values; n = 2^i for signed codes, which share the rest with the negative
numbers, and 2^(i+1) for unsigned ones. Between equidistant values the nearest one is found by
rounding; only which decade a number belongs to takes comparisons.
"""

import jax
import jax.numpy as jnp
import numpy as np

DECADES = 7


def dynamic_map(signed: bool) -> np.ndarray:
    """The values of the dynamic codes.

    Args:
      signed: whether negative numbers have codes too.

    Returns:
      (256,), float32, ascending: the value of each code, in units of its block's scale. It is 0
      at code 127 if signed, else at code 0, and 1 at code 255; there is no -1.
    """
    positive = np.concatenate(
        [unit * np.linspace(0.1, 1.0, 2 * n + 1)[1::2] for unit, n in _decades(signed)]
    )
    negative = -positive[::-1] if signed else positive[:0]
    return np.concatenate([negative, [0.0], positive, [1.0]]).astype(np.float32)


def encode_dynamic(
    blocks: jax.Array, signed: bool, keep_positive: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The codes nearest to the numbers of each block, divided by their absolute maximum.

    Args:
      blocks: (*blocks, size), float32. Without a sign, negative numbers are taken for 0.
      signed: the kind of code.
      keep_positive: whether a positive number too small for any code but 0 gets the smallest
        positive code: a second moment that became 0 would divide by epsilon.

    Returns:
      Codes (*blocks, size), uint8, and scales (*blocks,), float32, which are not finite where a
      block is not.
    """
    # A maximum over a nan need not be nan: XLA's on the CPU is not.
    scales = jnp.max(jnp.where(jnp.isnan(blocks), jnp.inf, jnp.abs(blocks)), axis=-1)
    numbers = blocks / jnp.where(scales > 0, scales, 1)[..., None]
    magnitude = jnp.abs(numbers) if signed else numbers

    # Of the decade that a number belongs to: n, and the reciprocal of its intervals.
    threshold, cuts, slope = 0.0, jnp.zeros_like(magnitude), jnp.zeros_like(magnitude)
    for unit, n in _decades(signed):
        reached = magnitude >= threshold
        cuts = jnp.where(reached, float(n), cuts)
        slope = jnp.where(reached, n / (0.9 * unit), slope)
        # The middle of the last value of this decade and the first one of the next, finer one.
        threshold = unit * (1 + 0.9 / n)
    # Values have the indices 1, 2, ...; the first one of a decade has n, or n - 1 without a sign.
    less = 0 if signed else 1
    index = jnp.floor(magnitude * slope + (cuts * (8 / 9) - less))
    index = jnp.clip(index, 1, 2 * cuts - (1 + less))
    values = dynamic_map(signed)[128 if signed else 1 :].tolist()
    index = jnp.where(magnitude >= (values[-2] + values[-1]) / 2, len(values), index)
    index = jnp.where(magnitude > (0 if keep_positive else values[0] / 2), index, 0)
    if signed:
        # As there is no -1, the code next to it takes its place.
        index = jnp.where(numbers < 0, -jnp.minimum(index, 127), index) + 127
    return index.astype(jnp.uint8), scales


def decode_dynamic(codes: jax.Array, scales: jax.Array, signed: bool) -> jax.Array:
    """The inverse of :func:`encode_dynamic`, up to its rounding: float32, as ``codes``."""
    less = 0 if signed else 1
    index = codes.astype(jnp.int32) - (0 if less else 127)
    magnitude = jnp.abs(index)
    # n is the power of 2 in the number of the value's decade, so the exponent of a float.
    number = (magnitude + less).astype(jnp.float32)
    exponent = jax.lax.bitcast_convert_type(number, jnp.int32) >> 23
    cuts = jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
    above = DECADES - 1 + 127 + less - exponent  # decades above this one, 0 to 6
    # The j-th value of a decade, from 0 on, is its unit times 0.1 + 0.9 (j + 1/2) / n, which is
    # an integer, 18 j + 9 + 2 n, times unit / (20 n). A product, since XLA would rather keep the
    # result of a division in memory than do it in each place of use.
    step = jnp.where((above & 1) > 0, 1 / 5, 1.0) * jnp.where((above & 2) > 0, 1 / 25, 1.0)
    step *= jnp.where((above & 4) > 0, 1 / 625, 1.0) * (1 / (20 * 2 ** (DECADES - 1 + less)))
    values = (18 * number + (9 - 16 * cuts)) * step
    values = jnp.where(magnitude == (255 if less else 128), 1, values)
    values = jnp.where(magnitude == 0, 0, values)
    return jnp.where(index < 0, -values, values) * scales[..., None]


def encode_integer(
    blocks: jax.Array, bits: int, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Asymmetric integer codes: a number is about (code - zero) * scale.

    With the range max - min of a block, which always includes 0, its scale is
    (max - min) / (2^bits - 2) and its zero ceil(-min / scale): an integer, so that 0 is kept
    exactly. One interval less than there could be leaves room to round both extremes without bias.

    Args:
      blocks: (*blocks, size), float32.
      bits: 8 or 4.
      key: of JAX, for stochastic rounding; None for the nearest code.

    Returns:
      Codes (*blocks, size), uint8, below 2^bits; scales (*blocks,), float32, not finite where a
      block is not; zeros (*blocks,), uint8.
    """
    scales, zeros = _integer_grid(blocks, bits)
    numbers = blocks / _divisors(scales)
    return _on_grid(numbers, 0.0, scales, zeros, bits, key)


def update_integer(
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array,
    updates: jax.Array,
    bits: int,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds to numbers in integer codes.

    A block keeps its scale and zero while the new numbers lie between its codes and fill at least
    half of their range. So what is not updated does not move, where a new grid at each step would
    round every number of the block anew, at random.

    Args:
      codes: with ``scales`` and ``zeros``, as from :func:`encode_integer`.
      scales: see there.
      zeros: see there.
      updates: (*blocks, size), float32.
      bits: 8 or 4.
      key: as for :func:`encode_integer`.

    Returns:
      New codes, scales and zeros.
    """
    steps = codes.astype(jnp.float32) - zeros.astype(jnp.float32)[..., None]
    low, high = _range(steps + updates / _divisors(scales))
    last, zero = 2**bits - 1, zeros.astype(jnp.float32)
    # A few roundings of float32 must not be taken for a number beyond the last code.
    fits = (low + zero > -1e-4) & (high + zero < last + 1e-4) & (2 * (high - low) > last)
    fits &= scales > 0

    new_scales, new_zeros = _integer_grid(steps * scales[..., None] + updates, bits)
    new_scales, new_zeros = jnp.where(fits, scales, new_scales), jnp.where(fits, zero, new_zeros)
    # Where the grid stays this is ``steps`` exactly, whose sum with an update could not be.
    ratio = jnp.where(fits, 1, scales / jnp.where(new_scales == 0, 1, new_scales))
    moved = steps * ratio[..., None]
    return _on_grid(moved, updates / _divisors(new_scales), new_scales, new_zeros, bits, key)


def decode_integer(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """The inverse of :func:`encode_integer`, up to its rounding: float32, as ``codes``."""
    steps = codes.astype(jnp.float32) - zeros.astype(jnp.float32)[..., None]
    return steps * scales[..., None]


def pack(codes: jax.Array) -> jax.Array:
    """Two codes of 4 bits to a byte: (*blocks, size) as (*blocks, size / 2), uint8.

    The second half of a block goes beside its first half, which are contiguous, unlike the even
    and the odd ones.
    """
    half = codes.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """The inverse of :func:`pack`."""
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)


def round_to_bfloat16(array: jax.Array, key: jax.Array) -> jax.Array:
    """Stochastic rounding to bfloat16, unbiased.

    Args:
      array: any shape; taken as float32.
      key: of JAX.

    Returns:
      The same shape in bfloat16: of the two neighbours the upper one with the probability that
      makes the mean right. What is not finite stays as it is.
    """
    array = array.astype(jnp.float32)
    # bfloat16 is float32 without its last 16 bits; adding to these carries as often as it should.
    as_bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    as_bits += jax.random.bits(key, array.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(as_bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(array), rounded, array).astype(jnp.bfloat16)


def _decades(signed: bool) -> list[tuple[float, int]]:
    """Of each decade, from the lowest up, its upper end, and the number of its values, n."""
    return [(10.0 ** (i + 1 - DECADES), 2 ** (i if signed else i + 1)) for i in range(DECADES)]


def _range(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each block the least and the greatest number, 0 included."""
    high = jnp.max(jnp.where(jnp.isnan(blocks), jnp.inf, blocks), axis=-1)
    return jnp.minimum(jnp.min(blocks, axis=-1), 0), jnp.maximum(high, 0)


def _integer_grid(blocks: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The scale of each block, 0 where all of it is, and its zero, as float32."""
    low, high = _range(blocks)
    intervals = 2**bits - 2
    scales = high / intervals - low / intervals  # the difference itself might overflow
    # Below the normal numbers it would be flushed to 0 on some devices, and divide by it.
    scales = jnp.where(high == low, 0, jnp.maximum(scales, jnp.finfo(jnp.float32).tiny))
    return scales, jnp.ceil(-low / jnp.where(scales == 0, 1, scales))


def _divisors(scales: jax.Array) -> jax.Array:
    """What the numbers of each block are divided by, (*blocks, 1)."""
    return jnp.where(scales == 0, 1, scales)[..., None]


def _on_grid(
    numbers: jax.Array,
    updates: jax.Array | float,
    scales: jax.Array,
    zeros: jax.Array,
    bits: int,
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds numbers with updates, both in units of their scale.

    A small update would be lost in the float32 sum with a large number. It is added to what the
    nearest integer leaves of that instead, and moves the integer with a probability that is right
    down to updates of 2^-32.
    """
    nearest = jnp.round(numbers)
    rest = (numbers - nearest) + updates
    if key is None:
        moves = jnp.round(rest)
    else:
        # Compared with the fraction, so that an integer does not move whatever is drawn.
        drawn = jax.random.bits(key, numbers.shape, jnp.uint32)
        drawn = jnp.where(rest < 0, ~drawn, drawn).astype(jnp.float32) * 2.0**-32
        size = jnp.abs(rest)
        whole = jnp.floor(size)
        moves = jnp.sign(rest) * (whole + (drawn < size - whole))
    codes = jnp.clip(nearest + moves + zeros[..., None], 0, 2**bits - 1)
    return codes.astype(jnp.uint8), scales, zeros.astype(jnp.uint8)
