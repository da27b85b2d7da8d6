"""Checks the arguments of layerwise, and names what its signatures speak of."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
from jaxtyping import Array, Float, PyTree

from galore_optax._errors import check_transformation
from galore_optax._layerwise.inputs import MEMORIES, Activations, Inputs
from galore_optax._storage import resolve_storage
from galore_optax._types import Params, Transformation

Batch: TypeAlias = PyTree
Gradient: TypeAlias = Array | tuple[Array, Array]
"""Of a leaf: one array, or two that are added up where they are used."""
Leaf: TypeAlias = PyTree
"""An array, a `QuantizedArray`, or None for a leaf that has no part in what is done."""

MOMENTS, WEIGHTS = OFFLOAD = ("moments", "weights")
"""What of the layers can lie in the memory of the machine."""

Embed: TypeAlias = Callable[[Params, Batch], Activations]
Block: TypeAlias = Callable[[Params, Activations], Activations]
HeadLoss: TypeAlias = Callable[[Params, Activations, Batch], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `galore_optax.layerwise`, which says what they mean."""

    tx: Transformation
    embed: Embed
    block: Block
    head_loss: HeadLoss
    blocks: str
    micro_batches: int
    clip_norm: float | None
    clip_by: str
    slice_size: int | None
    round_bfloat16: bool
    inputs_dtype: str | None = None
    inputs_every: int = 1
    inputs_memory: str = "device"
    offload: tuple[str, ...] = ()

    def __post_init__(self):
        check_transformation("tx", self.tx)
        for name in ("embed", "block", "head_loss"):
            if not callable(function := getattr(self, name)):
                raise TypeError(f"{name} must be a function; got {function!r}")
        _check_positive_int("micro_batches", self.micro_batches)
        if self.clip_norm is not None and not isinstance(self.clip_norm, numbers.Real):
            raise TypeError(f"clip_norm must be a number, or None; got {self.clip_norm!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None; got {self.clip_norm!r}")
        if self.slice_size is not None:
            _check_positive_int("slice_size", self.slice_size, ", or None")
        _check_positive_int("inputs_every", self.inputs_every)
        resolve_storage("inputs_dtype", self.inputs_dtype)
        if self.inputs_memory not in MEMORIES:
            raise ValueError(
                f"inputs_memory must be one of {', '.join(map(repr, MEMORIES))}; got "
                f"{self.inputs_memory!r}"
            )
        if self.inputs_memory != "device" and not hasattr(jax, "memory"):
            raise ValueError(
                f"inputs_memory={self.inputs_memory!r} needs a later jax; this is {jax.__version__}"
            )
        if self.clip_by not in ("global", "layer"):
            raise ValueError(f'clip_by must be "global" or "layer"; got {self.clip_by!r}')
        if self.clip_norm is None and self.clip_by != "global":
            raise ValueError(f"clip_by={self.clip_by!r} needs clip_norm, the norm to clip to")

    @property
    def inputs(self) -> Inputs:
        """How the inputs of layers are kept."""
        return Inputs(
            resolve_storage("inputs_dtype", self.inputs_dtype),
            self.inputs_every,
            self.inputs_memory,
        )

    def offloads(self, what: str) -> bool:
        """Whether what is named so lies in the memory of the machine."""
        return what in self.offload

    def clips_by(self, what: str) -> bool:
        """Whether gradients are clipped, and by the norm of ``what``."""
        return self.clip_norm is not None and self.clip_by == what


def checked_offload(offload: Sequence[str]) -> tuple[str, ...]:
    """Returns what is to lie in the memory of the machine, in a fixed order.

    Raises:
      TypeError: it is no sequence of words.
      ValueError: a word is none of ``OFFLOAD``, or jax has no memories.
    """
    expected = f"a tuple of {' and '.join(map(repr, OFFLOAD))}, or ()"
    if isinstance(offload, str) or not isinstance(offload, Sequence):
        raise TypeError(f"offload must be {expected}; got {offload!r}")
    for word in offload:
        if word not in OFFLOAD:
            raise ValueError(f"offload must be {expected}; got {word!r} in it")
    if offload and not hasattr(jax, "memory"):
        raise ValueError(f"offload={offload!r} needs a later jax; this is {jax.__version__}")
    return tuple(word for word in OFFLOAD if word in offload)


def _check_positive_int(name: str, value: object, or_else: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a positive int{or_else}; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1{or_else}; got {value}")
