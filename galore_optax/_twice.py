"""Computes numbers twice where this moves fewer bytes than to keep them.

The scale of a block is that of all its numbers, and each of these is coded with it. Between the one
and the other XLA would keep the numbers in float32, which takes four times the bytes of the codes
and the gradient that they are made of.
"""

from collections.abc import Callable
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
) -> tuple[Updates, list[PyTree], list[PyTree] | None]:
    """Returns what a function makes of its argument, and a part of that, computed another time.

    Args:
      function: returns updates and moments; it is traced once.
      given: its argument, a tree of arrays.
      again: returns the same argument, made so that the compiler does not see that it is.

    Returns:
      The updates, the moments, and the moments once more; None in place of these where the moments
      are not made element by element, so that to compute them twice might take long.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(given)
    structure = jax.tree.structure(shapes)
    _, cheap = structure.unflatten(by_element(closed.jaxpr))
    run = jaxpr_as_fun(closed)

    def result(argument: PyTree) -> tuple[Updates, list[PyTree]]:
        return structure.unflatten(run(*jax.tree.leaves(argument)))

    if closed.effects or not all(jax.tree.leaves(cheap)):
        return *result(given), None
    _, twins = result(given)
    return *result(again()), twins
