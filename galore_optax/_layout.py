"""Gives arrays a layout in memory, under the names that this has had since JAX 0.5."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
from jaxtyping import Array, Shaped

if TYPE_CHECKING or jax.__version_info__ >= (0, 7):
    from jax.experimental.layout import Layout, with_layout_constraint
else:
    from jax.experimental.layout import DeviceLocalLayout as Layout

    try:
        from jax.experimental.layout import with_layout_constraint
    except ImportError:
        # JAX 0.5 has no such function. Without a layout only memory is lost.
        def with_layout_constraint(x: Array, layout: Layout) -> Array:
            """Returns an array as it is."""
            del layout
            return x


def with_layout(
    x: Shaped[Array, "*shape"], major_to_minor: Sequence[int]
) -> Shaped[Array, "*shape"]:
    """Returns an array as it is, with its axes in this order in memory, the last one contiguous."""
    return with_layout_constraint(x, Layout(tuple(major_to_minor)))
