"""Decides which leaves are projected, along which axes, on which side, and to which rank."""

import dataclasses
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from galore_optax._ranks import RankByRole, RankSpec, check_rank, rank_of, uniform
from galore_optax._trees import leaves_with_paths, logical
from galore_optax._types import Params, Shape
from galore_optax._view import DimensionNumbers, LeafView, MatrixView, Unprojected

DEFAULT_EXCLUDE = (
    r"(?i)(^|/)(([^/]*embed[^/]*|wte|wpe|(lm_|output_|mlm_)?head|logits[^/]*)(/|$)|(scale|bias)$)"
)
"""The leaves that are left at full size by default, as a regular expression on their path.

They are embeddings and output heads: a path component contains ``embed``, is ``wte`` or ``wpe``, is
``head``, ``lm_head``, ``output_head`` or ``mlm_head``, or starts with ``logits``. Leaves whose last
component is ``scale`` or ``bias`` are left too: stacked over layers these vectors look like
matrices.
"""

SIDES = ("short", "long", "left", "right", "both")

ExcludeSpec: TypeAlias = str | re.Pattern[str] | Callable[[str, Shape], bool] | PyTree | None
DimensionNumbersSpec: TypeAlias = PyTree | Callable[[Params], PyTree]
_NumbersOfLeaf: TypeAlias = tuple[DimensionNumbers | None, bool]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Decides for every leaf of a tree how it is seen.

    Attributes are the arguments of :func:`galore_optax.galore` of the same names. Raises
    ``TypeError`` or ``ValueError`` for values that cannot be right.
    """

    rank: RankSpec = 128
    side: str = "short"
    exclude: ExcludeSpec = DEFAULT_EXCLUDE
    weight_dimension_numbers: DimensionNumbersSpec = None

    def __post_init__(self):
        check_rank(self.rank)
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}; got {self.side!r}")
        if isinstance(self.exclude, str):
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise ValueError(
                    f"exclude must be a valid regular expression; got {self.exclude!r}: {error}"
                ) from error

    def views(self, tree: Params, ranks: Mapping[str, int] | None = None) -> list[LeafView]:
        """Returns the view of each leaf, in the order of ``jax.tree.leaves(tree)``.

        A view depends on paths, shapes and dtypes only, so that it is the same for parameters,
        quantized or not, gradients and ``jax.ShapeDtypeStruct``.

        Args:
          tree: the tree.
          ranks: the ranks of leaves, by path, where they are known; others have the uniform rank.

        Raises:
          TypeError: a leaf is not of a real floating-point dtype.
          ValueError: dimension numbers, exclusions or ranks that do not fit a leaf.
        """
        tree = logical(tree)
        leaves = leaves_with_paths(tree)
        if not leaves:  # nothing to look at, or the placeholder of optax.tree.map_params
            return []
        return [
            self._view(path, leaf, excluded, (ranks or {}).get(path), *numbers_of_leaf)
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
        projected = [v.path for v in views if isinstance(v, MatrixView)]
        if isinstance(self.rank, RankByRole) and projected:
            for pattern in self.rank.unmatched(projected):
                warnings.warn(
                    f"{pattern!r}, one of the factors of rank, matches none of the projected "
                    f"leaves {', '.join(projected)}",
                    UserWarning,
                    stacklevel,
                )
        full_size = [v for v in views if isinstance(v, Unprojected)]
        if len(full_size) == len(views):
            reasons = ", ".join(f"{v.path} {v.shape} ({v.reason})" for v in full_size)
            warnings.warn(
                f"galore projects nothing: {reasons}. A smaller rank "
                f"(it is {uniform(self.rank)!r}), another exclude or weight_dimension_numbers "
                "would change that.",
                UserWarning,
                stacklevel,
            )

    def _excluded(self, tree: Params) -> list[bool]:
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

    def _dimension_numbers(self, tree: Params) -> list[_NumbersOfLeaf]:
        """Returns each leaf's dimension numbers, and whether a whole subtree was given them."""
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
        self,
        path: str,
        leaf: PyTree,
        excluded: bool,
        rank: int | None,
        dimension_numbers: DimensionNumbers | None,
        shared: bool,
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
        if rank is None:
            rank = rank_of(self.rank, path, shape, min(m, n))
        if min(m, n) <= rank:
            return unprojected(f"short side {min(m, n)} <= rank {rank}")
        batch = tuple(axis for axis in range(len(shape)) if axis not in named)
        left = {"short": m <= n, "long": m > n, "left": True, "right": False, "both": True}
        right = {"short": m > n, "long": m <= n, "left": False, "right": True, "both": True}
        return MatrixView(
            path, shape, dtype, batch, reduction, output, rank, left[self.side], right[self.side]
        )


_AMBIGUOUS = "more than two axes and no dimension numbers"


def _is_dimension_numbers(x: object) -> TypeGuard[DimensionNumbers | None]:
    return x is None or (hasattr(x, "reduction_axis") and hasattr(x, "output_axis"))


def _broadcast_prefix(
    prefix: PyTree, tree: PyTree, argument: str, is_leaf: Callable[[object], bool] | None = None
) -> list[tuple[PyTree, bool]]:
    """Returns for each leaf of ``tree`` its leaf in ``prefix``, and whether others may share it."""
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


def _axes(axes: int | Sequence[int], ndim: int) -> Shape:
    axes = tuple(operator.index(a) for a in ((axes,) if isinstance(axes, int) else axes))
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise IndexError(f"there is no axis {axis}")
    return tuple(axis % ndim for axis in axes)
