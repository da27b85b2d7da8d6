"""Names what signatures speak of, beside the names of jaxtyping.

Arrays are annotated with jaxtyping: ``Float[Array, "m n"]`` is a floating-point array with two
axes. Within one signature the same letter is the same size: m and n are the rows and columns of a
matrix, r is the rank, and ``*batch`` are the axes that matrices are stacked over. Annotations are
checked while the tests run, and only then.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

DType: TypeAlias = jax.typing.DTypeLike
Shape: TypeAlias = tuple[int, ...]
Scalar: TypeAlias = float | Array
"""A Python number, or an array without axes."""

Step: TypeAlias = Int[Array, ""]
"""A number of updates."""

Transformation: TypeAlias = optax.GradientTransformation | optax.MultiSteps
"""Whatever has the ``init`` and the ``update`` of Optax."""

Params: TypeAlias = PyTree
Updates: TypeAlias = PyTree
State: TypeAlias = PyTree
"""Trees of arrays; ``optax.MaskedNode()`` stands where there is nothing, and parameters and moments
may be a `QuantizedArray`."""

Numeric: TypeAlias = float | Array | np.ndarray | np.number
"""A number, or an array that is one."""

Mask: TypeAlias = PyTree | Callable[[Params], PyTree]
"""A tree of bools with the structure of the parameters, or a function that makes one of them."""

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""The axes of a mesh that one axis of an array is sharded over."""
