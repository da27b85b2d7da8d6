"""Tells other libraries how to save what is no array and no tree that they know.

Pickle, NumPy and Orbax see the leaves of a pytree, or its attributes, and need nothing. Flax'
``serialization`` and ``jax.export`` know types that were registered with them.
"""

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from galore_optax._accumulate import Accumulator
from galore_optax._limiter import LimitNormGrowthState
from galore_optax._low_bit import LowBitState
from galore_optax._numbered import Sampled
from galore_optax._quantized import QuantizedArray
from galore_optax._state import GaloreState
from galore_optax._subspace import Subspace

_ARRAYS = ("codes", "scales", "zeros")


@functools.cache
def register() -> None:
    """Registers the types of this library with ``jax.export``, and with Flax if it is there.

    It is done once, when the library is imported, and not again where that is reloaded.
    """
    jax.export.register_pytree_node_serialization(
        QuantizedArray,
        serialized_name="galore_optax.QuantizedArray",
        serialize_auxdata=lambda static: _text(*static).encode(),
        deserialize_auxdata=lambda data: _static(data.decode()),
    )
    for named in (GaloreState, Subspace, Accumulator, LowBitState, LimitNormGrowthState, Sampled):
        jax.export.register_namedtuple_serialization(
            named, serialized_name=f"galore_optax.{named.__name__}"
        )
    # Flax is no dependency.
    with contextlib.suppress(ImportError):
        _register_with_flax()


def _register_with_flax() -> None:
    from flax import serialization

    def to_state_dict(array: QuantizedArray) -> dict[str, Any]:
        arrays = {name: serialization.to_state_dict(getattr(array, name)) for name in _ARRAYS}
        # As bytes in an array it passes wherever arrays do.
        return arrays | {"static": np.frombuffer(_about(array).encode(), np.uint8)}

    def from_state_dict(like: QuantizedArray, state: Mapping[str, Any]) -> QuantizedArray:
        found, wanted = np.asarray(state["static"], np.uint8).tobytes().decode(), _about(like)
        if found != wanted:
            raise ValueError(
                f"the state dict holds a QuantizedArray of {found} at "
                f"{serialization.current_path()}, and the target one of {wanted}: use the "
                "settings that it was made with"
            )
        arrays = {
            name: serialization.from_state_dict(getattr(like, name), state[name], name=name)
            for name in _ARRAYS
        }
        return QuantizedArray(
            **arrays,
            item_shape=like.item_shape,
            dtype=like.dtype,
            scheme=like.scheme,
            block_size=like.block_size,
        )

    serialization.register_serialization_state(QuantizedArray, to_state_dict, from_state_dict)


def _about(array: QuantizedArray) -> str:
    return _text(array.item_shape, array.dtype, array.scheme, array.block_size)


def _text(item_shape: tuple[int, ...], dtype: jnp.dtype, scheme: str, block_size: int) -> str:
    """Returns the static attributes of a `QuantizedArray`, in their order."""
    return json.dumps([list(item_shape), jnp.dtype(dtype).name, scheme, block_size])


def _static(text: str) -> tuple[tuple[int, ...], jnp.dtype, str, int]:
    """Undoes :func:`_text`."""
    item_shape, dtype, scheme, block_size = json.loads(text)
    return tuple(item_shape), jnp.dtype(dtype), scheme, block_size
