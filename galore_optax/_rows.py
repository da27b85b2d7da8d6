"""Whether a function treats each row of its arguments by itself, found by tracing it."""

import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from galore_optax._dependence import called_once


class Use(enum.Enum):
    """What a value has to do with the rows of the arguments."""

    SAME = enum.auto()  # it does not depend on them, and is one number or the same for each row.
    ROWS = enum.auto()  # its leading axis is theirs, and each row depends on the same row only.
    ALL = enum.auto()  # anything else.


def use_of_rows(function: Callable[..., Any], *args: Any, rows: Sequence[bool]) -> Any:
    """For each output what it has to do with the rows of the arguments.

    Args:
      function: of trees of arrays, to a tree of arrays; traced, never run.
      *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
      rows: for each of ``jax.tree.leaves(args)`` whether its leading axis is one of rows.

    Returns:
      A tree like the function's result of `Use`. What is not known to work by rows, such as a
      product of matrices or a loop, counts as `Use.ALL`; so does what differs from row to row by
      itself, such as random numbers.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = zip(closed.jaxpr.invars, rows, strict=True)
    uses = _of_jaxpr(closed.jaxpr, [Use.ROWS if x else _of_constant(v) for v, x in inputs])
    return jax.tree.unflatten(jax.tree.structure(shapes), uses)


_ELEMENTWISE = frozenset(
    (
        *("abs", "add", "add_any", "and", "bitcast_convert_type", "cbrt", "ceil", "clamp"),
        *("convert_element_type", "copy", "cos", "div", "eq", "erf", "exp", "exp2", "expm1"),
        *("floor", "ge", "gt", "integer_pow", "is_finite", "layout_constraint", "le", "log"),
        *("log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or"),
        *("pow", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic"),
        *("shift_right_logical", "sign", "sin", "sqrt", "square", "stop_gradient", "sub"),
        *("tanh", "xor"),
    )
)
_REDUCTIONS = frozenset(
    (
        *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or"),
        *("reduce_prod", "reduce_sum"),
    )
)


def _of_jaxpr(jaxpr: Jaxpr, inputs: Sequence[Use]) -> list[Use]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> Use:
        if isinstance(variable, Literal) or variable not in known:
            return _of_constant(variable)
        return known[variable]

    for equation in jaxpr.eqns:
        uses = _of_equation(equation, [read(v) for v in equation.invars])
        known.update(zip(equation.outvars, uses, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _of_constant(variable: Any) -> Use:
    return Use.ALL if variable.aval.shape else Use.SAME


def _of_equation(equation: Any, uses: list[Use]) -> list[Use]:
    if Use.ALL in uses:
        return [Use.ALL] * len(equation.outvars)
    if "branches" in equation.params and uses[0] is Use.SAME:  # as by the platform
        branches = [_of_jaxpr(b.jaxpr, uses[1:]) for b in equation.params["branches"]]
        alike = [set(outputs) for outputs in zip(*branches, strict=True)]
        return [use.pop() if len(use) == 1 else Use.ALL for use in alike]
    jaxpr = called_once(equation)
    if jaxpr is not None:
        return _of_jaxpr(jaxpr, uses)
    if Use.ROWS in uses:
        by_rows = _keeps_rows(equation, [x is Use.ROWS for x in uses])
        return [Use.ROWS if by_rows else Use.ALL] * len(equation.outvars)
    name = equation.primitive.name
    spreads = name == "broadcast_in_dim" and 0 not in equation.params["broadcast_dimensions"]
    if spreads or (name in _ELEMENTWISE and uses):
        return [Use.SAME] * len(equation.outvars)
    return [_of_constant(v) for v in equation.outvars]


def _keeps_rows(equation: Any, has_rows: list[bool]) -> bool:
    """Whether each row of the results depends on the same row of the operands only."""
    name, params = equation.primitive.name, equation.params
    shapes = [v.aval.shape for v in equation.invars]
    shape = equation.outvars[0].aval.shape
    operand = shapes[0]
    if name in _ELEMENTWISE:
        # Of the other axes one of size 1 may be spread over that of another operand.
        pairs = zip(has_rows, shapes, strict=True)
        return all(len(s) == len(shape) and s[0] == shape[0] for has, s in pairs if has)
    if name in _REDUCTIONS:
        return 0 not in params["axes"]
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][:1] == (0,) and shape[0] == operand[0]
    if name == "reshape":
        return params["dimensions"] is None and shape[:1] == operand[:1]
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
