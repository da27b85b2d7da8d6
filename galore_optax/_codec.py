"""Defines what a codec is: how numbers are written in few bits, and how they are read again.

A codec does the arithmetic of one kind of code, on arrays that `galore_optax._quantized` has cut in
blocks, (*blocks, size). To add one, write a class and a row: derive a frozen dataclass from
:class:`Codec` that has an ``encode`` and a ``decode``, and give an instance of it a name in
`galore_optax._codecs.CODECS`. From then on `galore_optax.quantize` takes that name, and so does
everything else that asks for a codec by its name, as ``projector_dtype`` of `galore_optax.galore`.

All arithmetic should be elementwise but for one maximum or so per block. Then it fuses with what is
around it, runs on any device and follows any sharding. A look-up in a table would do none of the
three.
"""

import abc
import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PRNGKeyArray, PyTree, UInt8

ABSENT: PyTree = optax.MaskedNode()
"""Stands for the scales or zeros of a codec that has none."""


class Coded(NamedTuple):
    """Blocks in codes; what a codec makes, and what it reads.

    Attributes:
      codes: the codes, (*blocks, size), uint8; for a codec that works without blocks, of its own
        dtype.
      scales: the scale of each block, not finite where the block is not; or :data:`ABSENT`.
      zeros: the code that stands for 0 in each block; or :data:`ABSENT`.
    """

    codes: UInt8[Array, "*blocks size"]
    scales: Float32[Array, "*blocks"] = ABSENT
    zeros: UInt8[Array, "*blocks"] = ABSENT


@dataclasses.dataclass(frozen=True)
class Codec(abc.ABC):
    """One kind of code. Subclasses define ``encode`` and ``decode``, and override what differs.

    Attributes:
      in_blocks: whether the elements of a block share a scale. A codec without blocks is a dtype:
        it encodes arrays of any shape, and its codes are numbers that need no decoding.
      rounds_at_random: whether ``encode`` and ``add`` take a key, and then round at random so that
        the mean is right. Weights need that: an update of less than half a step would be lost.
    """

    in_blocks: ClassVar[bool] = True
    rounds_at_random: ClassVar[bool] = False

    @property
    def has_sign(self) -> bool:
        """Whether negative numbers have codes, too."""
        return True

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte in memory: 1, or 2 for codes below 16, or 4 below 4."""
        return 1

    @abc.abstractmethod
    def encode(
        self, blocks: Float32[Array, "*blocks size"], key: PRNGKeyArray | None = None
    ) -> Coded:
        """Writes numbers in codes.

        Args:
          blocks: the numbers, (*blocks, size), float32.
          key: a key of JAX for stochastic rounding; None rounds to the nearest code. It is always
            None for a codec that does not round at random.
        """

    @abc.abstractmethod
    def decode(self, coded: Coded) -> Float32[Array, "*blocks size"]:
        """Returns the numbers that codes stand for: all NaN in a block that is not finite."""

    def add(
        self,
        coded: Coded,
        updates: Float32[Array, "*blocks size"],
        key: PRNGKeyArray | None = None,
    ) -> Coded:
        """Adds updates to numbers in codes; ``key`` is that of ``encode``."""
        return self.encode(self.decode(coded) + updates, key)

    def keeping_positive(self) -> "Codec | None":
        """Returns the codec that reads the same codes, but never writes a positive number as 0.

        A second moment that became 0 would divide by epsilon. None says that there is no such
        codec.
        """
        return None

    def pack(self, codes: UInt8[Array, "*blocks size"]) -> UInt8[Array, "*blocks bytes"]:
        """Puts the codes of each block in as few bytes as they need.

        The second half of a block goes beside its first half, and likewise with quarters. Each is
        contiguous, which the even and the odd codes are not.
        """
        if self.codes_per_byte == 1:
            return codes
        size, bits = codes.shape[-1] // self.codes_per_byte, 8 // self.codes_per_byte
        parts = [codes[..., i * size : (i + 1) * size] for i in range(self.codes_per_byte)]
        return functools.reduce(jnp.bitwise_or, (p << (bits * i) for i, p in enumerate(parts)))

    def unpack(self, packed: UInt8[Array, "*blocks bytes"]) -> UInt8[Array, "*blocks size"]:
        """Undoes :meth:`pack`."""
        if self.codes_per_byte == 1:
            return packed
        bits = 8 // self.codes_per_byte
        parts = [(packed >> (bits * i)) & (2**bits - 1) for i in range(self.codes_per_byte)]
        return jnp.concatenate(parts, axis=-1)


class ByElement(Codec):
    """A codec that codes each number by itself, once the scale of its block is known.

    So its arithmetic need not be done in blocks: numbers and codes may lie as they do elsewhere,
    with the scale of its block beside each.

    Attributes:
      zero: the code of 0.
    """

    @property
    @abc.abstractmethod
    def zero(self) -> int: ...

    @abc.abstractmethod
    def peaks(self, numbers: Float32[Array, "..."]) -> Float32[Array, "..."]:
        """Returns for each number what the scale of its block must be at least."""

    @abc.abstractmethod
    def write(
        self, numbers: Float32[Array, "..."], scales: Float32[Array, "..."]
    ) -> UInt8[Array, "..."]:
        """Returns the code of each number, whose block has the scale beside it."""

    @abc.abstractmethod
    def read(
        self, codes: UInt8[Array, "..."], scales: Float32[Array, "..."]
    ) -> Float32[Array, "..."]:
        """Returns the numbers that :meth:`write` wrote."""

    def encode(
        self, blocks: Float32[Array, "*blocks size"], key: PRNGKeyArray | None = None
    ) -> Coded:
        """Finds the scale of each block, and codes its numbers; there must be no key."""
        scales = jnp.max(self.peaks(blocks), axis=-1)
        return Coded(self.write(blocks, scales[..., None]), scales)

    def decode(self, coded: Coded) -> Float32[Array, "*blocks size"]:
        """Reads each code with the scale of its block."""
        return self.read(coded.codes, coded.scales[..., None])
