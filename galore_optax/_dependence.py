"""Which inputs of a function its outputs depend on, found by tracing it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def dependence(function: Callable[..., Any], *args: Any) -> Any:
    """For each output the set of inputs that it may depend on.

    Control flow counts: what is chosen by a predicate depends on it. Loops are not looked into:
    each of their outputs depends on all of their inputs.

    Args:
      function: of trees of arrays, to a tree of arrays; traced, never run.
      *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.

    Returns:
      A tree like the function's result of frozensets of positions among ``jax.tree.leaves(args)``.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = [frozenset([i]) for i in range(len(closed.jaxpr.invars))]
    return jax.tree.unflatten(jax.tree.structure(shapes), _of_jaxpr(closed.jaxpr, inputs))


_Sets = list[frozenset[int]]


def _of_jaxpr(jaxpr: Jaxpr, inputs: Sequence[frozenset[int]]) -> _Sets:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(variable: Any) -> frozenset[int]:
        return frozenset() if isinstance(variable, Literal) else known.get(variable, frozenset())

    for equation in jaxpr.eqns:
        outputs = _of_equation(equation, [read(v) for v in equation.invars])
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _of_equation(equation: Any, inputs: _Sets) -> _Sets:
    if "branches" in equation.params:
        predicate, *operands = inputs
        branches = [_of_jaxpr(b.jaxpr, operands) for b in equation.params["branches"]]
        return [predicate.union(*outputs) for outputs in zip(*branches, strict=True)]
    jaxpr = called_once(equation)
    if jaxpr is not None:
        return _of_jaxpr(jaxpr, inputs)
    return [frozenset().union(*inputs)] * len(equation.outvars)


def called_once(equation: Any) -> Jaxpr | None:
    """What an equation applies to its operands as they are, once; None of any other equation."""
    called = [p for p in equation.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if len(called) != 1 or equation.primitive.name in ("scan", "while", "pallas_call"):
        return None
    jaxpr = called[0].jaxpr if isinstance(called[0], ClosedJaxpr) else called[0]

    def shapes(variables: Sequence[Any]) -> list[Any]:
        return [getattr(v.aval, "shape", None) for v in variables]

    # A reduction, for one, has the function of two numbers that it applies again and again.
    return jaxpr if shapes(jaxpr.invars) == shapes(equation.invars) else None
