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

Rest = TypeVar("Rest")


def twice(
    step: Callable[[PyTree], tuple[Rest, PyTree]],
    read: Callable[[PyTree], PyTree],
    codes: PyTree,
) -> tuple[Rest, PyTree, PyTree | None]:
    """Returns what a step makes of moments in codes, and on a GPU the next moments once more.

    Both times the operations are the same. But where a compiler makes them part of another kernel
    it may round otherwise, so that a number and its twin must be allowed to differ in their last
    bit. A CPU has less arithmetic to spare, and computes nothing twice.

    Args:
      step: returns anything, and the next moments, of moments; it is traced once.
      read: returns the moments, out of codes.
      codes: a tree of arrays.

    Returns:
      What the step returns, and its moments once more, which on other platforms are those
      themselves. They are None where a moment is not made element by element, so that to compute it
      twice might take long, and where nothing is compiled.
    """
    moments = read(codes)
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(moments)):
        return *step(moments), None
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(moments)
    structure, run = jax.tree.structure(shapes), jaxpr_as_fun(closed)
    _, cheap = structure.unflatten(by_element(closed.jaxpr))

    def result(moments: PyTree) -> tuple[Rest, PyTree]:
        return structure.unflatten(run(*jax.tree.leaves(moments)))

    if closed.effects or not all(jax.tree.leaves(cheap)):
        return *result(moments), None

    def on_a_gpu(codes: PyTree) -> tuple[Rest, PyTree, PyTree]:
        # The compiler must not see that these are the same, or else it would keep the moments.
        others = read(jax.tree.map(jax.lax.optimization_barrier, codes))
        return *result(others), result(moments)[1]

    def elsewhere(_: PyTree) -> tuple[Rest, PyTree, PyTree]:
        rest, new = result(moments)
        return rest, new, new

    return jax.lax.platform_dependent(codes, cuda=on_a_gpu, rocm=on_a_gpu, default=elsewhere)
