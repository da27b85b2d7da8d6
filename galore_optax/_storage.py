"""Says in how many bits an array is held between steps."""

import dataclasses
from typing import TypeAlias

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from galore_optax._codecs import CODECS
from galore_optax._quantized import dequantized, is_quantized, quantized_as

Stored: TypeAlias = PyTree
"""What is held of an array: a `QuantizedArray`, or an array of some floating-point dtype."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How an array is held between steps: in a dtype, or in codes, block by block.

    Attributes:
      codec: a name in `galore_optax._codecs.CODECS`; None holds an array in the dtype it has.
      block_size: the number of elements that share a scale, even; without effect where there are
        no blocks.
    """

    codec: str | None = None
    block_size: int = 256

    @classmethod
    def of(cls, stored: Stored) -> "Storage":
        """Returns the storage that holds another array as this one is held.

        Where this one has a dtype that is no codec, such as float64, the other keeps its own dtype.
        """
        if is_quantized(stored):
            return cls(stored.scheme, stored.block_size)
        name = str(stored.dtype)
        return cls(name if name in CODECS else None)

    @property
    def rounds_at_random(self) -> bool:
        """Whether :meth:`keep` takes a key."""
        return self.codec is not None and CODECS[self.codec].rounds_at_random

    def keep(
        self,
        array: Float[Array, "..."],
        *,
        batch_axes: int = 0,
        key: PRNGKeyArray | None = None,
        keep_positive: bool = False,
        twin: Float[Array, "..."] | None = None,
    ) -> Stored:
        """Returns what is held of an array.

        Args:
          array: an array of any shape and of a real floating-point dtype.
          batch_axes: how many leading axes are batch axes, which no block straddles.
          key: a key of JAX for stochastic rounding; None rounds to the nearest.
          keep_positive: whether a positive number never becomes 0; for codes without a sign.
          twin: the same array, computed once more; see
            :func:`galore_optax._quantized.quantized_as`.

        Returns:
          A `QuantizedArray` of the array's shape and dtype where the codec works in blocks, else
          an array of the codec's dtype.

        Raises:
          ValueError: a key is given, and the codec rounds to the nearest only.
        """
        if key is not None and not self.rounds_at_random:
            raise ValueError(
                f"key is for a codec that rounds at random, which {self.codec} does not; pass "
                "key=None"
            )
        if self.codec is None:
            return array
        if not CODECS[self.codec].in_blocks:
            return CODECS[self.codec].encode(array, key).codes
        return quantized_as(
            array, twin, key, self.codec, self.block_size, batch_axes, keep_positive
        )

    def load(self, stored: Stored, where: PartitionSpec | None = None) -> Float[Array, "..."]:
        """Returns the array that is held: out of codes in its own dtype, else as it is held.

        Args:
          stored: what is held of it.
          where: where it shall lie if it is in codes on a mesh of Explicit axes; see
            :func:`galore_optax._quantized.dequantized`.
        """
        return dequantized(stored, where) if is_quantized(stored) else stored


def resolve_storage(argument: str, name: str | None) -> Storage:
    """Returns the storage of that name, for numbers of either sign.

    Args:
      argument: the argument by which the user gave the name; an error speaks of it.
      name: the name of a codec that has negative numbers, or None for the dtype that an array has.

    Raises:
      ValueError: there is no such codec.
    """
    names = [known for known, codec in CODECS.items() if codec.has_sign]
    if name is not None and name not in names:
        raise ValueError(f"{argument} must be one of {', '.join(names)}, or None; got {name!r}")
    return Storage(None if name is None else str(name))
