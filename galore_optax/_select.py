"""Decides which leaves are projected, along which axes, on which side, and to which rank."""

import dataclasses
import math
import operator
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from galore_optax._callables import is_function, is_pattern, takes
from galore_optax._names import DEFAULT_EXCLUDE, routers, stacked_vectors
from galore_optax._ranks import RankByRole, RankSpec, check_rank, rank_of, uniform
from galore_optax._trees import bare, leaves_with_paths, logical
from galore_optax._types import Params, Shape
from galore_optax._view import DimensionNumbers, LeafView, MatrixView, Unprojected

SIDES = ("short", "long", "left", "right", "both")

ExcludeSpec: TypeAlias = str | re.Pattern[str] | Callable[[str, Shape], bool] | PyTree | None
DimensionNumbersSpec: TypeAlias = (
    PyTree | Callable[[Params], PyTree] | Callable[[str, Shape], DimensionNumbers | None]
)
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
        if not isinstance(self.side, str) or self.side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}; got {self.side!r}")
        if isinstance(self.exclude, str):
            try:
                re.compile(self.exclude)
            except re.error as error:
                raise ValueError(
                    f"exclude must be a valid regular expression; got {self.exclude!r}: {error}"
                ) from error

    def views(
        self,
        tree: Params,
        ranks: Mapping[str, int] | None = None,
        projected: Collection[str] | None = None,
    ) -> list[LeafView]:
        """Returns the view of each leaf, in the order of ``jax.tree.leaves(tree)``.

        A view depends on paths, shapes and dtypes only, so that it is the same for parameters,
        quantized or not, gradients and ``jax.ShapeDtypeStruct``.

        Args:
          tree: the tree.
          ranks: the ranks of leaves, by path, where they are known; others have the uniform rank.
          projected: where the tree is a part of a larger one, the paths of all leaves that are
            projected there. What lies beside a leaf, which tells stacks of vectors, is not here.

        Raises:
          TypeError: a leaf is of no real floating-point dtype, or is complex and not excluded.
          ValueError: dimension numbers, exclusions or ranks that do not fit a leaf.
        """
        tree = bare(logical(tree))
        leaves = leaves_with_paths(tree)
        if not leaves:  # nothing to look at, or the placeholder of optax.tree.map_params
            return []
        numbers = self._dimension_numbers(leaves, tree)
        excluded = self._excluded(leaves, tree)
        vectors = self._vectors(leaves, numbers) if projected is None else {}
        views = []
        for i, (path, leaf) in enumerate(leaves):
            reason = "excluded" if excluded[i] else None
            if projected is not None and path not in projected:
                reason = reason or "not projected in the whole tree"
            elif i in vectors:
                reason = reason or f"{_STACKED} {vectors[i]}"
            views.append(self._view(path, leaf, reason, (ranks or {}).get(path), *numbers[i]))
        return views

    def warn(self, views: Sequence[LeafView], stacklevel: int) -> None:
        """Warns of what the user most likely did not intend, one warning each for all leaves."""
        stacklevel += 1
        full_size = [view for view in views if isinstance(view, Unprojected)]
        ambiguous = [view.path for view in full_size if view.reason == _AMBIGUOUS]
        vectors = [view.path for view in full_size if view.reason.startswith(_STACKED)]
        if self.weight_dimension_numbers is None and (ambiguous or vectors):
            reasons = [
                f"{', '.join(paths)} at full size: {why}"
                for paths, why in ((ambiguous, _AXES_NOT_KNOWN), (vectors, _SEEM_VECTORS))
                if paths
            ]
            warnings.warn(
                f"galore leaves {'; and '.join(reasons)}. Pass weight_dimension_numbers, e.g. "
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
        if len(full_size) == len(views):
            reasons = ", ".join(f"{v.path} {v.shape} ({v.reason})" for v in full_size)
            warnings.warn(
                f"galore projects nothing: {reasons}. A smaller rank "
                f"(it is {uniform(self.rank)!r}), another exclude or weight_dimension_numbers "
                "would change that.",
                UserWarning,
                stacklevel,
            )

    def _excluded(self, leaves: Sequence[tuple[str, PyTree]], tree: Params) -> list[bool]:
        exclude = self.exclude
        if exclude is None:
            return [False] * len(leaves)
        if is_pattern(exclude):
            found = [re.search(exclude, path) is not None for path, _ in leaves]
            of_experts = routers([path for path, _ in leaves]) if exclude == DEFAULT_EXCLUDE else ()
            return [flag or i in of_experts for i, flag in enumerate(found)]
        must_be = (
            "exclude must be a regular expression, a callable of path and shape, None, or a tree "
            "of bools with the structure of the parameters"
        )
        if is_function(exclude, tree):
            if not takes(exclude, 2):
                raise TypeError(f"{must_be}; got {exclude!r}")
            return [bool(exclude(path, np.shape(leaf))) for path, leaf in leaves]
        mask = [flag for flag, _ in _broadcast_prefix(exclude, tree, "exclude")]
        wrong = [flag for flag in mask if not isinstance(flag, bool | np.bool)]
        if wrong:
            raise TypeError(f"{must_be}; got a leaf {wrong[0]!r}")
        return mask

    def _dimension_numbers(
        self, leaves: Sequence[tuple[str, PyTree]], tree: Params
    ) -> list[_NumbersOfLeaf]:
        """Returns each leaf's dimension numbers, and whether a whole subtree was given them."""
        given = self.weight_dimension_numbers
        must_be = (
            "weight_dimension_numbers must be DimensionNumbers, a tree of them (None where a leaf "
            "is not to be projected), or a callable that makes such a tree from the parameters, or "
            "one of them from a path and a shape"
        )
        is_callable = is_function(given, tree)
        if is_callable and not takes(given, 1) and takes(given, 2):
            of_leaf = cast(Callable[[str, Shape], DimensionNumbers | None], given)
            pairs = [(of_leaf(path, np.shape(leaf)), False) for path, leaf in leaves]
        else:
            if is_callable and not takes(given, 1):
                raise TypeError(f"{must_be}; got {given!r}")
            if is_callable:
                given = cast(Callable[[Params], PyTree], given)(tree)
            pairs = _broadcast_prefix(
                given, tree, "weight_dimension_numbers", _is_dimension_numbers
            )
        wrong = [numbers for numbers, _ in pairs if not _is_dimension_numbers(numbers)]
        if wrong:
            raise TypeError(f"{must_be}; got a leaf {wrong[0]!r}")
        return pairs

    def _vectors(
        self, leaves: Sequence[tuple[str, PyTree]], numbers: Sequence[_NumbersOfLeaf]
    ) -> dict[int, str]:
        """Returns the positions of the leaves that are taken for stacks of vectors.

        Numbers given for a leaf by itself are right as they are. Those given for many leaves at
        once must agree that the leading axes are those of a stack, where there are more axes.
        """
        paths, shapes = [path for path, _ in leaves], [np.shape(leaf) for _, leaf in leaves]
        found = {}
        for i, witness in stacked_vectors(paths, shapes).items():
            if self.weight_dimension_numbers is None:
                found[i] = paths[witness]
                continue
            of_leaf, shared = numbers[i]
            of_witness, _ = numbers[witness]
            if not shared or of_leaf is None or of_witness is None:
                continue
            axes = len(shapes[witness])
            try:
                named = _axes(of_witness.reduction_axis, axes) + _axes(of_witness.output_axis, axes)
            except (TypeError, IndexError):  # of which the view of the leaf gives an error
                continue
            if min(named, default=0) >= len(shapes[i]) - 1:
                found[i] = paths[witness]
        return found

    def _view(
        self,
        path: str,
        leaf: PyTree,
        reason: str | None,
        rank: int | None,
        dimension_numbers: DimensionNumbers | None,
        shared: bool,
    ) -> LeafView:
        shape, dtype = np.shape(leaf), jnp.result_type(leaf)
        given = self.weight_dimension_numbers is not None
        # What is not to be projected may be complex, if the inner transformation can use it.
        is_free = reason is not None or (given and dimension_numbers is None)
        if (
            not jnp.issubdtype(dtype, jnp.inexact if is_free else jnp.floating)
            or jnp.finfo(dtype).bits < 16
        ):
            raise TypeError(
                "galore needs real floating-point leaves of 16 bits or more; "
                f"{path or 'the leaf'} has dtype {dtype}. "
                "Keep it away from galore with optax.masked or optax.partition"
                + (
                    ", add it to exclude, or write "
                    "optax.contrib.split_real_and_imaginary(galore(...))."
                    if jnp.issubdtype(dtype, jnp.complexfloating)
                    else "."
                )
            )

        def unprojected(reason: str) -> Unprojected:
            return Unprojected(path, shape, dtype, reason)

        if len(shape) < 2:
            return unprojected("fewer than two axes")
        if reason is not None:
            return unprojected(reason)
        if not given:
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
_STACKED = "vectors stacked like the matrices of"
_AXES_NOT_KNOWN = "shape alone cannot tell the axes of a matrix from layers or heads"
_SEEM_VECTORS = "by what lies beside them they are stacks of vectors"


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
        jax.tree.map(spread, bare(prefix), tree, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"{argument} must have the structure of the parameters, or be a prefix of it: {error}"
        ) from error
    return pairs


def _axes(axes: int | Sequence[int], ndim: int) -> Shape:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(isinstance(axis, bool) for axis in axes):
        raise TypeError
    axes = tuple(map(operator.index, axes))
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise IndexError(f"there is no axis {axis}")
    return tuple(axis % ndim for axis in axes)
