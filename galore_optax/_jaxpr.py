"""Finds by tracing a function which inputs an output needs, and whether rows mix.

A traced function is a list of equations, each of them an operation on arrays, some with functions
of their own. Both analyses go through that list from the inputs to the outputs, with a fact about
each value instead of the value.
"""

import enum
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import PyTree

from galore_optax._types import Shape

Fact = TypeVar("Fact")
Inputs: TypeAlias = frozenset[int]
"""The inputs that a value depends on, as positions among all of them."""


def dependence(function: Callable[..., PyTree], *args: PyTree) -> PyTree[Inputs]:
    """Returns for each output the set of inputs that it may depend on.

    Control flow counts: what is chosen by a predicate depends on it. Loops are not looked into:
    each of their outputs depends on all of their inputs.

    Args:
      function: a function from trees of arrays to a tree of arrays; it is traced, never run.
      *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like the function's result, whose leaves are frozensets of positions among
      ``jax.tree.leaves(args)``.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = [frozenset([i]) for i in range(len(closed.jaxpr.invars))]
    return jax.tree.unflatten(jax.tree.structure(shapes), _inputs_of_outputs(closed.jaxpr, inputs))


class Use(enum.Enum):
    """What a value has to do with the rows of the arguments."""

    SAME = enum.auto()  # it does not depend on them, and is one number or the same for each row.
    ROWS = enum.auto()  # its leading axis is theirs, and each row depends on the same row only.
    ALL = enum.auto()  # anything else.


def use_of_rows(
    function: Callable[..., PyTree],
    *args: PyTree,
    rows: Sequence[bool],
    twice: Sequence[PyTree] | None = None,
) -> PyTree[Use]:
    """Returns for each output what it has to do with the rows of the arguments.

    Args:
      function: a function from trees of arrays to a tree of arrays; it is traced, never run.
      *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
      rows: for each of ``jax.tree.leaves(args)``, whether its leading axis is one of rows.
      twice: the arguments for twice as many rows, if these count together: inside of the function,
        the same numbers may then be rows of another length, as blocks of codes are that straddle
        two rows. That such rows are of the same numbers, and of no others, shows in that there are
        twice as many of them; where anything else of the function is another, nothing is by rows.

    Returns:
      A tree like the function's result, whose leaves are `Use`. What is not known to work by rows,
      such as a product of matrices or a loop, counts as `Use.ALL`; so does what differs from row to
      row by itself, such as random numbers.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = zip(closed.jaxpr.invars, rows, strict=True)
    uses = [Use.ROWS if x else _use_of_constant(v) for v, x in inputs]
    together = twice is not None
    if together and not _doubles(closed.jaxpr, jax.make_jaxpr(function)(*twice).jaxpr):
        uses = [Use.ALL] * len(uses)
    found = _uses_of_outputs(closed.jaxpr, uses, together)
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def _doubles(one: Jaxpr, other: Jaxpr) -> bool:
    """Whether another function is the same but for leading axes that are twice as long."""

    def alike(mine: Var | Literal, theirs: Var | Literal) -> bool:
        if isinstance(mine, Literal) and isinstance(theirs, Literal):
            return bool(np.array_equal(mine.val, theirs.val, equal_nan=True))
        (shape,), (longer,) = _shapes([mine]), _shapes([theirs])
        doubled = (2 * shape[0], *shape[1:]) if shape else ()
        return longer in (shape, doubled)

    def equal(mine: JaxprEqn, theirs: JaxprEqn) -> bool:
        variables = ([*equation.invars, *equation.outvars] for equation in (mine, theirs))
        inside = (_functions(equation) for equation in (mine, theirs))
        return (
            mine.primitive is theirs.primitive
            and _all(alike, *variables)
            and _all(_doubles, *inside)
        )

    return _all(equal, one.eqns, other.eqns) and _all(alike, one.outvars, other.outvars)


def _all(holds: Callable[[Fact, Fact], bool], some: Sequence[Fact], others: Sequence[Fact]) -> bool:
    """Whether something is true of each of some and the one at its place among others."""
    return len(some) == len(others) and all(map(holds, some, others))


def by_element(jaxpr: Jaxpr) -> list[bool]:
    """Returns for each output whether it is made of the inputs element by element.

    Such an output takes no more than a few operations for each of its elements. What the function
    closes over is there already.
    """
    inputs = [True] * len(jaxpr.invars)
    return _interpreted(jaxpr, inputs, _by_element_in_equation, lambda _: True)


def _by_element_in_equation(equation: JaxprEqn, inputs: list[bool]) -> list[bool]:
    jaxpr = _called_once(equation)
    if jaxpr is not None and all(inputs):
        return by_element(jaxpr)
    numbers = {(), *_shapes(equation.invars), *_shapes(equation.outvars)} == {()}
    moves = equation.primitive.name in ("broadcast_in_dim", "reshape", "squeeze")
    cheap = numbers or moves or equation.primitive.name in _ELEMENTWISE
    return [all(inputs) and cheap] * len(equation.outvars)


def _interpreted(
    jaxpr: Jaxpr,
    inputs: Sequence[Fact],
    of_equation: Callable[[JaxprEqn, list[Fact]], list[Fact]],
    of_constant: Callable[[Var | Literal], Fact],
) -> list[Fact]:
    """Returns the fact about each output, derived from the facts about the inputs.

    Args:
      jaxpr: the traced function.
      inputs: the fact about each of its arguments.
      of_equation: returns the facts about the results of an equation, from those of its operands.
      of_constant: returns the fact about a value that does not depend on the arguments.
    """
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Var | Literal) -> Fact:
        if isinstance(variable, Literal) or variable not in known:
            return of_constant(variable)
        return known[variable]

    for equation in jaxpr.eqns:
        facts = of_equation(equation, [read(v) for v in equation.invars])
        known.update(zip(equation.outvars, facts, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _functions(equation: JaxprEqn) -> list[Jaxpr]:
    """Returns the functions among the parameters of an equation."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                found.append(each.jaxpr if isinstance(each, ClosedJaxpr) else each)
    return found


def _called_once(equation: JaxprEqn) -> Jaxpr | None:
    """Returns the function that an equation applies once to its operands as they are, or None."""
    called = [p for p in equation.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if len(called) != 1 or equation.primitive.name in ("scan", "while", "pallas_call"):
        return None
    (jaxpr,) = _functions(equation)
    # A reduction, for one, has the function of two numbers that it applies again and again.
    return jaxpr if _shapes(jaxpr.invars) == _shapes(equation.invars) else None


def _shapes(variables: Sequence[Var | Literal]) -> list[Shape]:
    """Returns the shapes of values, and () for what is no array."""
    return [getattr(v.aval, "shape", ()) for v in variables]


def _inputs_of_outputs(jaxpr: Jaxpr, inputs: Sequence[Inputs]) -> list[Inputs]:
    return _interpreted(jaxpr, inputs, _inputs_of_equation, lambda _: frozenset())


def _inputs_of_equation(equation: JaxprEqn, inputs: list[Inputs]) -> list[Inputs]:
    if "branches" in equation.params:
        predicate, *operands = inputs
        branches = [_inputs_of_outputs(b.jaxpr, operands) for b in equation.params["branches"]]
        return [predicate.union(*outputs) for outputs in zip(*branches, strict=True)]
    jaxpr = _called_once(equation)
    if jaxpr is not None:
        return _inputs_of_outputs(jaxpr, inputs)
    return [frozenset().union(*inputs)] * len(equation.outvars)


def _uses_of_outputs(jaxpr: Jaxpr, inputs: Sequence[Use], together: bool) -> list[Use]:
    def of_equation(equation: JaxprEqn, uses: list[Use]) -> list[Use]:
        return _uses_of_equation(equation, uses, together)

    return _interpreted(jaxpr, inputs, of_equation, _use_of_constant)


def _use_of_constant(variable: Var | Literal) -> Use:
    return Use.SAME if _shapes([variable]) == [()] else Use.ALL


_ELEMENTWISE = frozenset(
    (
        *("abs", "add", "add_any", "and", "bitcast_convert_type", "cbrt", "ceil", "clamp"),
        *("convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1"),
        *("floor", "ge", "gt", "integer_pow", "is_finite", "layout_constraint", "le", "log"),
        *("log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not"),
        *("optimization_barrier", "or", "pow", "reduce_precision", "rem", "round", "rsqrt"),
        *("select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign"),
        *("sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor"),
    )
)
_REDUCTIONS = frozenset(
    (
        *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or"),
        *("reduce_prod", "reduce_sum"),
    )
)


def _uses_of_equation(equation: JaxprEqn, uses: list[Use], together: bool) -> list[Use]:
    if Use.ALL in uses:
        return [Use.ALL] * len(equation.outvars)
    if "branches" in equation.params and uses[0] is Use.SAME:  # as where the platform decides
        branches = [
            _uses_of_outputs(b.jaxpr, uses[1:], together) for b in equation.params["branches"]
        ]
        alike = [set(outputs) for outputs in zip(*branches, strict=True)]
        return [use.pop() if len(use) == 1 else Use.ALL for use in alike]
    jaxpr = _called_once(equation)
    if jaxpr is not None:
        return _uses_of_outputs(jaxpr, uses, together)
    if Use.ROWS in uses:
        by_rows = _keeps_rows(equation, [x is Use.ROWS for x in uses], together)
        return [Use.ROWS if by_rows else Use.ALL] * len(equation.outvars)
    name = equation.primitive.name
    spreads = name == "broadcast_in_dim" and 0 not in equation.params["broadcast_dimensions"]
    if spreads or (name in _ELEMENTWISE and uses):
        return [Use.SAME] * len(equation.outvars)
    return [_use_of_constant(v) for v in equation.outvars]


def _keeps_rows(equation: JaxprEqn, has_rows: list[bool], together: bool) -> bool:
    """Whether each row of the results depends on the same row of the operands only.

    Where rows count ``together``, those of the results may have another length.
    """
    name, params = equation.primitive.name, equation.params
    (shape, *_), shapes = _shapes(equation.outvars), _shapes(equation.invars)
    operand = shapes[0]
    if name in _ELEMENTWISE:
        # Among the other axes, one of size 1 may be spread over that of another operand.
        pairs = zip(has_rows, shapes, strict=True)
        return all(len(s) == len(shape) and s[0] == shape[0] for has, s in pairs if has)
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,) and shape[0] == operand[0]
    if name == "reshape":
        return params["dimensions"] is None and (together or shape[:1] == operand[:1])
    if name == "squeeze":
        return 0 not in params["dimensions"]
    if name == "transpose":
        return params["permutation"][0] == 0
    if name == "slice":
        whole = params["start_indices"][0] == 0 and params["limit_indices"][0] == operand[0]
        return whole and (params["strides"] is None or params["strides"][0] == 1)
    if name == "concatenate":
        return params["dimension"] != 0
    if name == "pad":
        return params["padding_config"][0] == (0, 0, 0)
    return False
