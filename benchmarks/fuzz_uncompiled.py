"""Configurations of which nothing is compiled: arguments, paths, dimension numbers, masks."""

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import optax
from hypothesis import strategies as st

from benchmarks import fuzz_arguments, fuzz_names, fuzz_transformations, fuzz_trees
from benchmarks.fuzz_clear import Configuration, as_in_optax, check_clear
from benchmarks.fuzz_compiled import check_types
from benchmarks.fuzz_search import Wrong
from galore_optax import DimensionNumbers

# A tree on which each argument matters.
TREE = "{'layer': {'kernel': array(8, 12), 'bias': array(12)}, 'stack': array(3, 4, 6)}"


@st.composite
def calls(draw: st.DrawFn) -> Configuration:
    """Draws galore or a preset with one wrong argument, or a galore or preset of right ones."""
    if draw(st.integers(0, 4)) == 0:
        code, wrong, values = draw(st.sampled_from(fuzz_arguments.PARTS))
        return Configuration(TREE, code.format(draw(st.sampled_from(values))), wrong=wrong)
    function = draw(st.sampled_from(("galore", *fuzz_arguments.PRESETS)))
    names = (*fuzz_arguments.names_of(function), "ranks")
    wrong = draw(st.sampled_from(names)) if draw(st.integers(0, 3)) else None
    # Arguments that do not go together are another case.
    most = 5 if wrong is None else 0
    inner = "optax.scale_by_adam()" if function == "galore" else ""
    tx = draw(fuzz_arguments.calls(function, most, wrong, inner))
    return Configuration(TREE, tx, wrong=wrong)


@st.composite
def cases(draw: st.DrawFn) -> Configuration:
    """Draws any tree and any transformation; now and then a tree that cannot be trained."""
    dtypes = fuzz_trees.DTYPES
    if draw(st.integers(0, 9)) == 0:
        dtypes = (*dtypes, "int32", "bool", "complex64", "float8_e4m3fn")
    drawn = draw(fuzz_transformations.transformations())
    return Configuration(draw(fuzz_trees.trees(dtypes)), **drawn)


@as_in_optax
def check(configuration: Configuration) -> str:
    """Raises `Wrong` unless a configuration is right, or is refused in one clear error."""
    wrong = configuration.wrong
    with configuration.in_its_dtypes():
        params = configuration.make_params()
        try:
            tx = configuration.make_tx(params)
            state = jax.eval_shape(tx.init, params)
            updates, new = jax.eval_shape(tx.update, params, state, params)
        except Exception as error:
            check_clear(error, wrong)
            return "refused"
        if wrong is not None:
            raise Wrong(f"nothing is said of {wrong}")
        check_types("updates", updates, params)
        check_types("the state", new, state)
        try:
            jax.eval_shape(tx.update, params, state)
        except Exception as error:
            check_clear(error)
            return "taken with parameters alone"
    return "taken"


_AXES = st.integers(-4, 4)


@st.composite
def _numbers(draw: st.DrawFn, ndim: int) -> str:
    """Draws dimension numbers for a leaf of so many axes, mostly right ones; or None."""
    if draw(st.integers(0, 5)) == 0:
        return "None"
    if ndim < 2 or draw(st.integers(0, 9)) == 0:
        some = st.lists(_AXES, max_size=2).map(tuple)
        return f"DimensionNumbers({draw(st.one_of(_AXES, some))}, {draw(st.one_of(_AXES, some))})"
    axes = draw(st.permutations(range(ndim)))
    signed = [axis - ndim if draw(st.booleans()) else axis for axis in axes]
    first = draw(st.integers(1, ndim - 1))
    second = draw(st.integers(1, ndim - first))
    reduction, output = signed[:first], signed[first : first + second]
    one = draw(st.booleans()) and first == second == 1
    return (
        f"DimensionNumbers({reduction[0]}, {output[0]})"
        if one
        else (f"DimensionNumbers({tuple(reduction)}, {output})")
    )


_PATTERNS = ("None", "'kernel'", "'bias|0'", "'(^|/)k'", "''", "'[a-f]/'", "re.compile('W', re.I)")


@dataclasses.dataclass(frozen=True)
class Views(Configuration):
    """A configuration whose moments have shapes that can be told otherwise.

    Attributes:
      arguments: the code of the arguments of galore but the dimension numbers.
      numbers: the code of a dict of dimension numbers by the number of axes.
    """

    arguments: str = ""
    numbers: str = ""


@st.composite
def views(draw: st.DrawFn) -> Views:
    """Draws a tree, and for each number of axes dimension numbers."""
    table = ", ".join(f"{ndim}: {draw(_numbers(ndim))}" for ndim in range(5))
    rank = draw(st.sampled_from(("1", "2", "3", "0.5", "0.3")))
    side = draw(st.sampled_from(fuzz_arguments.RIGHT["side"]))
    exclude = draw(st.sampled_from(_PATTERNS))
    given = draw(
        st.sampled_from(
            (
                f"lambda path, shape: {{{table}}}[len(shape)]",
                f"jax.tree.map(lambda x: {{{table}}}[x.ndim], params)",
                f"lambda p: jax.tree.map(lambda x: {{{table}}}[x.ndim], p)",
            )
        )
    )
    arguments = f"rank={rank}, side={side}, exclude={exclude}"
    return Views(
        draw(fuzz_trees.trees()),
        f"galore_optax.galore(optax.trace(0.9), {arguments}, weight_dimension_numbers={given})",
        arguments=arguments,
        numbers=f"{{{table}}}",
    )


def check_views(configuration: Views) -> str:
    """Raises `Wrong` unless moments have the shapes that another reading of the arguments gives."""
    with configuration.in_its_dtypes():
        params = configuration.make_params()
        arguments = eval(f"dict({configuration.arguments})", vars(fuzz_names))
        numbers = eval(configuration.numbers, vars(fuzz_names))
        right = _low_rank_shapes(params, numbers, **arguments)
        try:
            state = jax.eval_shape(configuration.make_tx(params).init, params)
        except Exception as error:
            check_clear(error)
            if right is not None:
                raise Wrong(f"refused, where {right} is right: {error}") from error
            return "refused"
    found = [np.shape(x) for x in jax.tree.leaves(optax.tree.get(state, "trace"))]
    if found != right:
        raise Wrong(f"moments of shapes {found}, where {right or 'an error'} is right")
    return "taken"


def _low_rank_shapes(
    params: Any,
    numbers: dict[int, DimensionNumbers | None],
    rank: float,
    side: str,
    exclude: str | re.Pattern | None,
) -> list[tuple[int, ...]] | None:
    """Returns the shapes of the moments of all leaves, or None where that is an error."""
    shapes = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")
        shape, of_leaf = np.shape(leaf), numbers[np.ndim(leaf)]
        excluded = exclude is not None and re.search(exclude, path)
        shapes.append(shape)
        if len(shape) < 2 or excluded or of_leaf is None:
            continue
        reduction, output = (np.ravel(axes).astype(int).tolist() for axes in of_leaf)
        if not all(-len(shape) <= axis < len(shape) for axis in reduction + output):
            return None
        reduction, output = ([axis % len(shape) for axis in axes] for axes in (reduction, output))
        if not reduction or not output or len({*reduction, *output}) < len(reduction + output):
            return None
        m, n = (math.prod(shape[axis] for axis in axes) for axes in (reduction, output))
        r = rank if isinstance(rank, int) else max(1, round(rank * min(m, n)))
        if r >= min(m, n):
            continue
        is_left = {"short": m <= n, "long": m > n, "left": True, "right": False, "both": True}[side]
        is_right = side == "both" or not is_left
        batch = [size for axis, size in enumerate(shape) if axis not in reduction + output]
        shapes[-1] = (*batch, r if is_left else m, r if is_right else n)
    return shapes
