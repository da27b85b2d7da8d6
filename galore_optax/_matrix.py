"""The view of a leaf as a batch of matrices: axes, side, rank, and which leaves are projected."""

import dataclasses
import math
import numbers
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax._quantized import is_quantized

DEFAULT_EXCLUDE = (
    r"(?i)(^|/)(([^/]*embed[^/]*|wte|wpe|(lm_|output_|mlm_)?head|logits[^/]*)(/|$)|(scale|bias)$)"
)
"""The leaves that are left at full size by default, as a regular expression on their path.

Embeddings and output heads: a path component that contains ``embed``, is ``wte`` or ``wpe``, is
``head``, ``lm_head``, ``output_head`` or ``mlm_head``, or starts with ``logits``. A last component
``scale`` or ``bias`` too: stacked over layers these vectors look like matrices.
"""

SIDES = ("short", "long", "left", "right", "both")

RankSpec = int | float | Callable[[str, tuple[int, ...]], int | float]
# A regular expression, a callable of path and shape, a tree of bools, or None.
ExcludeSpec = Any


class DimensionNumbers(NamedTuple):
    """Which axes of a leaf form its matrix; all other axes are batch axes.

    The counterpart of ``optax.contrib.MuonDimensionNumbers``, which is accepted as well.

    Attributes:
      reduction_axis: the axis or axes contracted with the layer's input; merged in the order
        given they are the rows m of the matrix.
      output_axis: the axis or axes of the layer's output: the columns n.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


@dataclasses.dataclass(frozen=True)
class Unprojected:
    """A leaf that goes through the inner transformation at full size, and why."""

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    reason: str


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """A projected leaf, seen as a batch of (m, n) matrices.

    Attributes:
      path: the leaf's path, components joined by "/".
      shape: the leaf's shape.
      dtype: the leaf's dtype.
      batch_axes: axes over which the matrices are stacked, in the leaf's order.
      reduction_axes: axes that are merged into the m rows.
      output_axes: axes that are merged into the n columns.
      rank: r, with 0 < r < min(m, n).
      left: whether the rows are projected, by an (m, r) basis.
      right: whether the columns are projected, by an (n, r) basis.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    batch_axes: tuple[int, ...]
    reduction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    rank: int
    left: bool
    right: bool

    @property
    def batch(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def count(self) -> int:
        """How many matrices there are."""
        return math.prod(self.batch)

    @property
    def m(self) -> int:
        """Rows of a matrix."""
        return math.prod(self.shape[axis] for axis in self.reduction_axes)

    @property
    def n(self) -> int:
        """Columns of a matrix."""
        return math.prod(self.shape[axis] for axis in self.output_axes)

    @property
    def low_rank_shape(self) -> tuple[int, ...]:
        """Shape of the low-rank gradient R, and so of the moments: (*batch, r or m, r or n)."""
        return (
            *self.batch,
            self.rank if self.left else self.m,
            self.rank if self.right else self.n,
        )

    @property
    def _order(self) -> tuple[int, ...]:
        return self.batch_axes + self.reduction_axes + self.output_axes

    def to_matrices(self, leaf: jax.Array) -> jax.Array:
        """The leaf as (*batch, m, n)."""
        return leaf.transpose(self._order).reshape(*self.batch, self.m, self.n)

    def from_matrices(self, matrices: jax.Array) -> jax.Array:
        """The inverse of :meth:`to_matrices`."""
        transposed = tuple(self.shape[axis] for axis in self._order)
        inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        return matrices.reshape(transposed).transpose(inverse)


LeafView = MatrixView | Unprojected


def moment_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of factorizations and moments: that of the leaf, but at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def ranging_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype, or float32 in place of one with fewer exponents, such as float16.

    Squares of gradients, and updates after the learning rate, are smaller than those reach.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.dtype(dtype)
    few = jnp.finfo(dtype).minexp > jnp.finfo(jnp.float32).minexp
    return jnp.dtype(jnp.float32 if few else dtype)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Decides for every leaf of a tree how it is seen.

    Attributes are the arguments of :func:`galore_optax.galore` of the same names. Raises
    ``TypeError`` or ``ValueError`` for values that cannot be right.
    """

    rank: RankSpec
    side: str
    exclude: ExcludeSpec
    weight_dimension_numbers: Any

    def __post_init__(self):
        if not callable(self.rank):
            _check_rank(self.rank, "rank")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}; got {self.side!r}")
        if isinstance(self.exclude, str):
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise ValueError(
                    f"exclude must be a valid regular expression; got {self.exclude!r}: {error}"
                ) from error

    def views(self, tree: Any) -> list[LeafView]:
        """The view of each leaf, in the order of ``jax.tree.leaves(tree)``.

        Depends on paths, shapes and dtypes only, so that it is the same for parameters,
        quantized or not, gradients and ``jax.ShapeDtypeStruct``.

        Raises:
          TypeError: a leaf is not of a real floating-point dtype.
          ValueError: dimension numbers, exclusions or ranks that do not fit a leaf.
        """
        tree = logical(tree)
        leaves = leaves_with_paths(tree)
        if not leaves:  # nothing to look at, or the placeholder of optax.tree.map_params
            return []
        return [
            self._view(path, leaf, excluded, *numbers_of_leaf)
            for (path, leaf), excluded, numbers_of_leaf in zip(
                leaves, self._excluded(tree), self._dimension_numbers(tree), strict=True
            )
        ]

    def warn(self, views: Sequence[LeafView], stacklevel: int) -> None:
        """Warns of what the user most likely did not intend, one warning each for all leaves."""
        stacklevel += 1
        ambiguous = [v.path for v in views if isinstance(v, Unprojected) and v.reason == _AMBIGUOUS]
        if ambiguous:
            warnings.warn(
                f"galore leaves {', '.join(ambiguous)} at full size: shape alone cannot tell the "
                "axes of a matrix from layers or heads. Pass weight_dimension_numbers, e.g. "
                "DimensionNumbers(reduction_axis=1, output_axis=2) for kernels stacked over "
                "layers, or add these leaves to exclude.",
                UserWarning,
                stacklevel,
            )
        exclude = self.exclude
        if (
            isinstance(exclude, str | re.Pattern)
            and exclude != DEFAULT_EXCLUDE
            and not any(re.search(exclude, v.path) for v in views)
        ):
            warnings.warn(
                f"exclude={exclude!r} matches none of the leaves "
                f"{', '.join(v.path for v in views)}",
                UserWarning,
                stacklevel,
            )
        full_size = [v for v in views if isinstance(v, Unprojected)]
        if len(full_size) == len(views):
            reasons = ", ".join(f"{v.path} {v.shape} ({v.reason})" for v in full_size)
            warnings.warn(
                f"galore projects nothing: {reasons}. A smaller rank (it is {self.rank!r}), "
                "another exclude or weight_dimension_numbers would change that.",
                UserWarning,
                stacklevel,
            )

    def _excluded(self, tree: Any) -> list[bool]:
        leaves = leaves_with_paths(tree)
        exclude = self.exclude
        if exclude is None:
            return [False] * len(leaves)
        if isinstance(exclude, str | re.Pattern):
            return [re.search(exclude, path) is not None for path, _ in leaves]
        if callable(exclude):
            return [bool(exclude(path, jnp.shape(leaf))) for path, leaf in leaves]
        mask = [flag for flag, _ in _broadcast_prefix(exclude, tree, "exclude")]
        wrong = [flag for flag in mask if not isinstance(flag, bool | np.bool)]
        if wrong:
            raise TypeError(
                "exclude must be a regular expression, a callable of path and shape, None, or a "
                f"tree of bools; got a leaf {wrong[0]!r}"
            )
        return mask

    def _dimension_numbers(self, tree: Any) -> list[tuple[Any, bool]]:
        """Of each leaf its dimension numbers, and whether they were given for a whole subtree."""
        given = self.weight_dimension_numbers
        if callable(given):
            given = given(tree)
        pairs = _broadcast_prefix(given, tree, "weight_dimension_numbers", _is_dimension_numbers)
        wrong = [numbers for numbers, _ in pairs if not _is_dimension_numbers(numbers)]
        if wrong:
            raise TypeError(
                "weight_dimension_numbers must be DimensionNumbers, a tree of them (None where a "
                "leaf is not to be projected), or a callable that makes such a tree from the "
                f"parameters; got a leaf {wrong[0]!r}"
            )
        return pairs

    def _view(
        self, path: str, leaf: Any, excluded: bool, dimension_numbers: Any, shared: bool
    ) -> LeafView:
        shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(
                "galore needs real floating-point leaves of 16 bits or more; "
                f"{path or 'the leaf'} has dtype {dtype}. "
                "Keep it away from galore with optax.masked or optax.partition."
            )

        def unprojected(reason: str) -> Unprojected:
            return Unprojected(path, shape, dtype, reason)

        if len(shape) < 2:
            return unprojected("fewer than two axes")
        if excluded:
            return unprojected("excluded")
        if self.weight_dimension_numbers is None:
            if len(shape) > 2:
                return unprojected(_AMBIGUOUS)
            dimension_numbers = DimensionNumbers()
        if dimension_numbers is None:
            return unprojected("dimension numbers None")
        try:
            reduction = _axes(dimension_numbers.reduction_axis, len(shape))
            output = _axes(dimension_numbers.output_axis, len(shape))
        except TypeError:
            raise TypeError(
                f"weight_dimension_numbers of {path!r}: axes must be ints or sequences of ints; "
                f"got {dimension_numbers}"
            ) from None
        except IndexError as error:
            if shared:
                return unprojected("fewer axes than its subtree's dimension numbers")
            raise ValueError(
                f"weight_dimension_numbers of {path!r}: {dimension_numbers} does not fit its shape "
                f"{shape}: {error}"
            ) from None
        named = reduction + output
        if len(set(named)) != len(named) or not reduction or not output:
            raise ValueError(
                f"weight_dimension_numbers of {path!r}: {dimension_numbers} must name at least one "
                f"reduction and one output axis, and each axis of its shape {shape} at most once"
            )
        m = math.prod(shape[axis] for axis in reduction)
        n = math.prod(shape[axis] for axis in output)
        rank = self._rank(path, shape, min(m, n))
        if min(m, n) <= rank:
            return unprojected(f"short side {min(m, n)} <= rank {rank}")
        batch = tuple(axis for axis in range(len(shape)) if axis not in named)
        left = {"short": m <= n, "long": m > n, "left": True, "right": False, "both": True}
        right = {"short": m > n, "long": m <= n, "left": False, "right": True, "both": True}
        return MatrixView(
            path, shape, dtype, batch, reduction, output, rank, left[self.side], right[self.side]
        )

    def _rank(self, path: str, shape: tuple[int, ...], short: int) -> int:
        rank = self.rank
        if callable(rank):
            rank = rank(path, shape)
            _check_rank(rank, f"rank({path!r}, {shape})")
        return int(rank) if isinstance(rank, numbers.Integral) else max(1, round(rank * short))


def logical(tree: Any) -> Any:
    """The tree with a ``jax.ShapeDtypeStruct`` in the place of each quantized array."""

    def stand_in(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized(leaf) else leaf

    return jax.tree.map(stand_in, tree, is_leaf=is_quantized)


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree and their paths, components joined by "/".

    A path is the same whether or not the leaf is in a box of Flax: an NNX variable, or Linen's
    ``Partitioned``. Leaves are boxed at init and unboxed at update.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_box)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, boxed in found
        for leaf in jax.tree.leaves(boxed)
    ]


def structure(tree: Any, unbox: Sequence[bool]) -> Any:
    """The structure of ``tree`` with some of its leaves taken out of Flax's boxes.

    A box carries the sharding of the parameter, which need not fit state of another shape.

    Args:
      tree: any tree.
      unbox: for each leaf whether to take it out of its box, if it has one.
    """
    boxes, treedef = jax.tree.flatten(logical(tree), is_leaf=_is_box)
    chosen = zip(boxes, unbox, strict=True)
    return jax.tree.structure(treedef.unflatten([0 if out else box for box, out in chosen]))


def _is_box(x: Any) -> bool:
    """Whether this is an ``nnx.Variable`` or an ``AxisMetadata`` of Linen, around one array."""
    is_flax = hasattr(x, "get_metadata") or hasattr(x, "replace_boxed")
    return is_flax and len(jax.tree.leaves(x)) == 1


_AMBIGUOUS = "more than two axes and no dimension numbers"


def _is_dimension_numbers(x: Any) -> bool:
    return x is None or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def _broadcast_prefix(
    prefix: Any, tree: Any, argument: str, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[Any, bool]]:
    """For each leaf of ``tree`` its leaf in ``prefix``, and whether other leaves may share that."""
    pairs = []

    def spread(leaf, subtree):
        structure = jax.tree.structure(subtree)
        shared = not jax.tree_util.treedef_is_leaf(structure)
        pairs.extend([(leaf, shared)] * structure.num_leaves)

    try:
        jax.tree.map(spread, prefix, tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"{argument} must have the structure of the parameters, or be a prefix of it: {error}"
        ) from error
    return pairs


def _axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = tuple(operator.index(a) for a in ((axes,) if isinstance(axes, int) else axes))
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise IndexError(f"there is no axis {axis}")
    return tuple(axis % ndim for axis in axes)


def _check_rank(rank: Any, name: str) -> None:
    if isinstance(rank, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, since it sets shapes; got the array {rank}. Under "
            'optax.inject_hyperparams, pass static_args=("rank",).'
        )
    if isinstance(rank, bool | np.bool) or not isinstance(rank, numbers.Real):
        raise TypeError(
            f"{name} must be a positive int, a fraction of the short side in (0, 1), or a callable "
            f"of path and shape; got {rank!r}"
        )
    if isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"{name} must be positive; got {rank}")
    elif not 0 < float(rank) < 1:
        raise ValueError(
            f"{name} must be an int, or a fraction of the short side in (0, 1); got {rank!r}"
        )
