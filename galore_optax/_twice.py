"""Computes numbers twice where this moves fewer bytes than to keep them.

The scale of a block is that of all its numbers, and each of these is coded with it. Between the one
and the other XLA would keep the numbers in float32, which takes four times the bytes of the codes
and the gradient that they are made of.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import PyTree

from galore_optax._jaxpr import by_element

Updates = TypeVar("Updates")


def twice(
    function: Callable[[PyTree], tuple[Updates, list[PyTree]]],
    given: PyTree,
    again: Callable[[], PyTree],
    kinds: Sequence[str | None],
) -> tuple[Updates, list[PyTree], list[PyTree] | None]:
    """Returns what a function makes of its argument, and a part of that, computed another time.

    Args:
      function: returns updates and moments; it is traced once.
      given: its argument, a tree of arrays.
      again: returns the same argument, made of what is :func:`hidden`.
      kinds: for each moment whether it is wanted once more, which None says it is not.

    Returns:
      The updates, the moments, and the moments once more; None in place of these where one that is
      wanted is not made element by element, so that to compute it twice might take long.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(given)
    structure = jax.tree.structure(shapes)
    _, cheap = structure.unflatten(by_element(closed.jaxpr))
    run = jaxpr_as_fun(closed)

    def result(argument: PyTree) -> tuple[Updates, list[PyTree]]:
        return structure.unflatten(run(*jax.tree.leaves(argument)))

    wanted = [parts for parts, kind in zip(cheap, kinds, strict=True) if kind is not None]
    if closed.effects or not all(jax.tree.leaves(wanted)):
        return *result(given), None
    _, twins = result(given)
    return *result(again()), twins


def hidden(tree: PyTree) -> PyTree:
    """Returns the same arrays, which the compiler takes for others on a GPU.

    Elsewhere it sees through it and computes nothing twice: a CPU has less arithmetic to spare.
    """
    hide = functools.partial(jax.tree.map, jax.lax.optimization_barrier)
    return jax.lax.platform_dependent(tree, cuda=hide, rocm=hide, default=lambda same: same)
