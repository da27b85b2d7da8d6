"""The codecs, each a class, and :data:`CODECS`, the table of their names.

`galore_optax._codec` says what a codec is, and how to add one.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray, UInt

from galore_optax._blocks import lying_as
from galore_optax._codec import ByElement, Codec, Coded
from galore_optax._types import DType


@dataclasses.dataclass(frozen=True)
class Integer(Codec):
    """Asymmetric integers: a number is about (code - zero) * scale.

    With the range max - min of a block, which always includes 0, its scale is
    (max - min) / (2^bits - 2) and its zero ceil(-min / scale): an integer, so that 0 is kept
    exactly. One interval less than there could be leaves room to round both extremes without bias.

    Attributes:
      bits: the number of bits of a code, 8 or 4; codes are below 2^bits.
    """

    bits: int
    rounds_at_random: ClassVar[bool] = True

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte: two of 4 bits, or one of 8."""
        return 8 // self.bits

    def encode(
        self, blocks: Float32[Array, "*blocks size"], key: PRNGKeyArray | None = None
    ) -> Coded:
        """Rounds each number to one of its two neighbours on the grid of its block."""
        scales, zeros = self._grid(blocks)
        return self._on_grid(blocks / _divisors(scales), 0.0, scales, zeros, key)

    def decode(self, coded: Coded) -> Float32[Array, "*blocks size"]:
        """Multiplies the steps from zero by the scale."""
        return _steps(coded) * coded.scales[..., None]

    def add(
        self,
        coded: Coded,
        updates: Float32[Array, "*blocks size"],
        key: PRNGKeyArray | None = None,
    ) -> Coded:
        """Adds updates on the old grid of a block where that still suits it.

        A block keeps its scale and zero while the new numbers lie between its codes and fill at
        least half of their range. So what is not updated does not move, where a new grid at each
        step would round every number of the block anew, at random.
        """
        scales, zero = coded.scales, coded.zeros.astype(jnp.float32)
        steps = _steps(coded)
        low, high = _range(steps + updates / _divisors(scales))
        last = 2**self.bits - 1
        # A few roundings of float32 must not be taken for a number beyond the last code.
        fits = (low + zero > -1e-4) & (high + zero < last + 1e-4) & (2 * (high - low) > last)
        fits &= scales > 0

        new_scales, new_zeros = self._grid(steps * scales[..., None] + updates)
        new_scales = jnp.where(fits, scales, new_scales)
        new_zeros = jnp.where(fits, zero, new_zeros)
        # Where the grid stays ``moved`` is ``steps`` exactly. A sum of these with an update would
        # be rounded, hence the update is handed on by itself.
        ratio = jnp.where(fits, 1, scales / jnp.where(new_scales == 0, 1, new_scales))
        moved = steps * ratio[..., None]
        return self._on_grid(moved, updates / _divisors(new_scales), new_scales, new_zeros, key)

    def _grid(
        self, blocks: Float32[Array, "*blocks size"]
    ) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"]]:
        """Returns the scale of each block, which is 0 where all of the block is, and its zero."""
        low, high = _range(blocks)
        intervals = 2**self.bits - 2
        scales = high / intervals - low / intervals  # the difference itself might overflow
        scales = jnp.where(high == low, 0, _normal(scales))
        return scales, jnp.ceil(-low / jnp.where(scales == 0, 1, scales))

    def _on_grid(
        self,
        numbers: Float32[Array, "*blocks size"],
        updates: Float32[Array, "*blocks size"] | float,
        scales: Float32[Array, "*blocks"],
        zeros: Float32[Array, "*blocks"],
        key: PRNGKeyArray | None,
    ) -> Coded:
        """Rounds numbers with updates, both in units of their scale.

        A small update would be lost in the float32 sum with a large number. It is added to what the
        nearest integer leaves of that instead, and moves the integer with a probability that is
        right down to updates of 2^-32.
        """
        nearest = jnp.round(numbers)
        rest = (numbers - nearest) + updates
        if key is None:
            moves = jnp.round(rest)
        else:
            # What is drawn is compared with the fraction, so that an integer never moves.
            drawn = _draw(key, numbers, jnp.uint32)
            drawn = jnp.where(rest < 0, ~drawn, drawn).astype(jnp.float32) * 2.0**-32
            size = jnp.abs(rest)
            whole = jnp.floor(size)
            moves = jnp.sign(rest) * (whole + (drawn < size - whole).astype(rest.dtype))
        codes = jnp.clip(nearest + moves + zeros[..., None], 0, 2**self.bits - 1)
        return Coded(codes.astype(jnp.uint8), scales, zeros.astype(jnp.uint8))


DECADES = 7


@dataclasses.dataclass(frozen=True)
class Dynamic(ByElement):
    """Dynamic 8-bit codes, which are dense near 0; relative to the absolute maximum of a block.

    They are the value 0, the value 1, and seven decades of magnitude, 1e-7..1e-6 up to 0.1..1. The
    i-th decade, from 0 on, is cut in n equal intervals whose midpoints are the values; n = 2^i for
    signed codes, which share the rest with the negative numbers, and 2^(i+1) for unsigned ones.
    Between equidistant values the nearest one is found by rounding; only which decade a number
    belongs to takes comparisons.

    Source: Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.

    Attributes:
      signed: whether negative numbers have codes; without, they are taken for 0.
      keep_positive: whether a positive number too small for any code but 0 gets the smallest
        positive code.
    """

    signed: bool
    keep_positive: bool = False

    @property
    def has_sign(self) -> bool:
        """Whether negative numbers have codes, too; see ``signed``."""
        return self.signed

    def keeping_positive(self) -> "Dynamic | None":
        """Returns such a codec of the unsigned one only, since only second moments need it."""
        return None if self.signed else dataclasses.replace(self, keep_positive=True)

    @property
    def values(self) -> Float32[np.ndarray, "256"]:
        """The value of each code in units of the scale, ascending.

        It is 0 at code 127 if signed, else at code 0, and 1 at code 255; there is no -1.
        """
        positive = np.concatenate(
            [unit * np.linspace(0.1, 1.0, 2 * n + 1)[1::2] for unit, n in self._decades]
        )
        negative = -positive[::-1] if self.signed else positive[:0]
        return np.concatenate([negative, [0.0], positive, [1.0]]).astype(np.float32)

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 127 if self.signed else 0

    def peaks(self, numbers: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """Returns magnitudes, infinite where a number is not finite."""
        return _magnitudes(numbers)

    def write(
        self, numbers: Float32[Array, "..."], scales: Float32[Array, "..."]
    ) -> UInt[Array, "..."]:
        """Finds the nearest code of each number, divided by the absolute maximum of its block."""
        numbers = numbers / jnp.where(scales > 0, scales, 1)
        magnitude = jnp.abs(numbers) if self.signed else numbers

        # These are n of the decade that a number belongs to, and the reciprocal of its intervals.
        threshold, cuts, slope = 0.0, jnp.zeros_like(magnitude), jnp.zeros_like(magnitude)
        for unit, n in self._decades:
            reached = magnitude >= threshold
            cuts = jnp.where(reached, float(n), cuts)
            slope = jnp.where(reached, n / (0.9 * unit), slope)
            # This is the middle of the last value of this decade and the first of the next, finer
            # one.
            threshold = unit * (1 + 0.9 / n)
        # Values have the indices 1, 2, ...; the first one of a decade has n, or n - 1 without sign.
        less = 0 if self.signed else 1
        index = jnp.floor(magnitude * slope + (cuts * (8 / 9) - less))
        index = jnp.clip(index, 1, 2 * cuts - (1 + less))
        values = self.values[128 if self.signed else 1 :].tolist()
        index = jnp.where(magnitude >= (values[-2] + values[-1]) / 2, len(values), index)
        index = jnp.where(magnitude > (0 if self.keep_positive else values[0] / 2), index, 0)
        if self.signed:
            # As there is no -1, the code next to it takes its place.
            index = jnp.where(numbers < 0, -jnp.minimum(index, 127), index) + 127
        return index.astype(jnp.uint8)

    def read(
        self, codes: UInt[Array, "..."], scales: Float32[Array, "..."]
    ) -> Float32[Array, "..."]:
        """Computes the values from their codes, all of it element by element.

        On the way there is no bit cast: XLA would take what comes before it for so expensive that
        it must be kept in memory rather than computed in each place of use.
        """
        less = 0 if self.signed else 1
        index = codes.astype(jnp.float32) - self.zero
        magnitude = jnp.abs(index)
        number = magnitude + less
        # n is the power of 2 in the number of the value's decade: what that is rounded to without
        # a mantissa, as a little less than 3/4 n to 3/2 n.
        cuts = jax.lax.reduce_precision(0.75 * number + 0.375, 8, 0)
        # The j-th value of a decade, from 0 on, is its unit times 0.1 + 0.9 (j + 1/2) / n, which is
        # an integer, 18 j + 9 + 2 n, times unit / (20 n).
        (_, step), *steps = self._steps
        for n, of_decade in steps:
            step = jnp.where(number >= n, of_decade, step)
        values = (18 * number + (9 - 16 * cuts)) * step
        values = jnp.where(magnitude == (255 if less else 128), 1, values)
        values = jnp.where(magnitude == 0, 0, values)
        return jnp.where(index < 0, -values, values) * scales

    @property
    def _steps(self) -> list[tuple[int, np.float32]]:
        """The number of values of each decade, n, and its unit over 20 n."""
        found = []
        for above, (_, n) in zip(reversed(range(DECADES)), self._decades, strict=True):
            # Rounded to float32 in this order, so that codes mean the same to the last bit as ever.
            fifths = [np.float32(5.0**-k if above & k else 1) for k in (1, 2, 4)]
            unit = np.float32(1 / (20 * self._decades[-1][1]))
            found.append((n, (fifths[0] * fifths[1]) * (fifths[2] * unit)))
        return found

    @property
    def _decades(self) -> list[tuple[float, int]]:
        """The upper end of each decade, from the lowest up, and the number of its values, n."""
        more = 0 if self.signed else 1
        return [(10.0 ** (i + 1 - DECADES), 2 ** (i + more)) for i in range(DECADES)]


@dataclasses.dataclass(frozen=True)
class Float8(Codec):
    """Floating-point numbers of 8 bits, scaled so that the extreme of a block is the largest one.

    A number is about float8 * scale, with scale = max |block| / (largest finite float8). Codes are
    the bits of the float8 as uint8, which every checkpoint library can save. Rounding to the
    nearest is off by at most 1/17 of the number itself with e4m3 and 1/9 with e5m2, down to 3.5e-5
    and 1.1e-9 of the block's maximum; what is smaller is off by at most 2.2e-6 and 1.4e-10 of that
    maximum.

    Source: Micikevicius et al., `FP8 Formats for Deep Learning
    <https://arxiv.org/abs/2209.05433>`_, 2022.

    Attributes:
      dtype: the dtype of a number, ``jnp.float8_e4m3fn`` or ``jnp.float8_e5m2``.
    """

    dtype: DType

    def encode(
        self, blocks: Float32[Array, "*blocks size"], key: PRNGKeyArray | None = None
    ) -> Coded:
        """Rounds each number to the nearest float8, ties to even."""
        maxima = _absolute_maximum(blocks)
        largest = float(jnp.finfo(self.dtype).max)
        scales = jnp.where(maxima == 0, 0, _normal(maxima / largest))
        # A quotient that exceeds the largest float8 by a rounding of float32 is rounded down to it.
        rounded = (blocks / _divisors(scales)).astype(self.dtype)
        return Coded(jax.lax.bitcast_convert_type(rounded, jnp.uint8), scales)

    def decode(self, coded: Coded) -> Float32[Array, "*blocks size"]:
        """Multiplies by the scale, which gives NaN in a block that is not finite: 0 * infinity."""
        numbers = jax.lax.bitcast_convert_type(coded.codes, self.dtype)
        return numbers.astype(jnp.float32) * coded.scales[..., None]


@dataclasses.dataclass(frozen=True)
class Plain(Codec):
    """No code but a floating-point dtype, to whose nearest number each one is rounded.

    Attributes:
      dtype: the dtype of the codes.
    """

    dtype: DType
    in_blocks: ClassVar[bool] = False

    def encode(self, blocks: Float[Array, "*shape"], key: PRNGKeyArray | None = None) -> Coded:
        """Rounds an array of any shape and floating-point dtype to the dtype."""
        return Coded(blocks.astype(self.dtype))

    def decode(self, coded: Coded) -> Float[Array, "*shape"]:
        """Returns the numbers as they are kept."""
        return coded.codes


@dataclasses.dataclass(frozen=True)
class BFloat16(Plain):
    """bfloat16, to which numbers are rounded at random without bias where there is a key."""

    dtype: DType = jnp.bfloat16
    rounds_at_random: ClassVar[bool] = True

    def encode(self, blocks: Float[Array, "*shape"], key: PRNGKeyArray | None = None) -> Coded:
        """Rounds to bfloat16: to the nearest, or with a key so that the mean is right.

        With a key it takes the upper of two neighbours as often as makes the mean right. What is
        not finite stays as it is. Numbers are taken as float32.
        """
        if key is None:
            return super().encode(blocks)
        array = blocks.astype(jnp.float32)
        # bfloat16 is float32 without its last 16 bits; adding to these carries as often as it
        # should.
        as_bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
        as_bits += _draw(key, array, jnp.uint16).astype(jnp.uint32)
        rounded = jax.lax.bitcast_convert_type(as_bits & jnp.uint32(0xFFFF0000), jnp.float32)
        return Coded(jnp.where(jnp.isfinite(array), rounded, array).astype(self.dtype))


CODECS: dict[str, Codec] = {
    "float32": Plain(jnp.float32),
    "bfloat16": BFloat16(),
    "int8": Integer(8),
    "int4": Integer(4),
    "float8_e4m3": Float8(jnp.float8_e4m3fn),
    "float8_e5m2": Float8(jnp.float8_e5m2),
    "signed": Dynamic(signed=True),
    "unsigned": Dynamic(signed=False),
}
"""Every codec by its name. Saved states contain these names."""


def _draw(key: PRNGKeyArray, like: Float[Array, "*shape"], dtype: DType) -> UInt[Array, "*shape"]:
    """Returns random bits of the shape of an array, which lie where it does."""
    return lying_as(like, jax.random.bits(key, like.shape, dtype))


def _absolute_maximum(blocks: Float32[Array, "*blocks size"]) -> Float32[Array, "*blocks"]:
    """Returns the largest magnitude in each block; it is infinite where the block is not finite."""
    return jnp.max(_magnitudes(blocks), axis=-1)


def _magnitudes(numbers: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns absolute values, infinite instead of NaN."""
    # A maximum over a nan need not be nan: XLA's on the CPU is not.
    return jnp.where(jnp.isnan(numbers), jnp.inf, jnp.abs(numbers))


def _range(
    blocks: Float32[Array, "*blocks size"],
) -> tuple[Float32[Array, "*blocks"], Float32[Array, "*blocks"]]:
    """Returns the least and the greatest number of each block, 0 included."""
    high = jnp.max(jnp.where(jnp.isnan(blocks), jnp.inf, blocks), axis=-1)
    return jnp.minimum(jnp.min(blocks, axis=-1), 0), jnp.maximum(high, 0)


def _normal(scales: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks"]:
    """Raises scales so that no device flushes them to 0, by which numbers would be divided."""
    return jnp.maximum(scales, jnp.finfo(jnp.float32).tiny)


def _divisors(scales: Float32[Array, "*blocks"]) -> Float32[Array, "*blocks 1"]:
    """Returns what the numbers of each block are divided by."""
    return jnp.where(scales == 0, 1, scales)[..., None]


def _steps(coded: Coded) -> Float32[Array, "*blocks size"]:
    """Returns how many steps of its grid each number is away from 0."""
    return coded.codes.astype(jnp.float32) - coded.zeros.astype(jnp.float32)[..., None]
