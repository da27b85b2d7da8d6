"""Averages gradients of micro-batches at rank r until there are enough for a step."""

import numbers
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, PyTree, PyTreeDef

from galore_optax._excerpt import Excerpt
from galore_optax._subspace import ABSENT, is_absent

Result = TypeVar("Result")


class Accumulator(NamedTuple):
    """The micro-batches of a step so far."""

    count: PyTree  # (), int32: how many there are.
    mean: PyTree  # the sum of their low-rank gradients over ``whole``; R's shapes.
    whole: PyTree = ABSENT  # (), int32: how many made a step when this was written; 0: as now.


def check_accumulation_steps(steps: object) -> None:
    """Raises an error where galore's argument ``accumulation_steps`` cannot be right."""
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        raise TypeError(
            "accumulation_steps must be a positive int, since it decides what is compiled; got "
            f"{steps!r}. Under optax.inject_hyperparams, name it in static_args."
        )
    if steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1; got {steps}")


def init_accumulator(low_rank: PyTree, steps: int) -> PyTree:
    """Returns the accumulator before the first micro-batch, which is absent for steps of one."""
    if steps == 1:
        return ABSENT
    zeros = jax.tree.map(jnp.zeros_like, low_rank)
    return Accumulator(jnp.zeros([], jnp.int32), zeros, jnp.asarray(steps, jnp.int32))


def is_first(accumulator: PyTree) -> Bool[Array, ""] | bool:
    """Whether a step begins with this micro-batch."""
    return is_absent(accumulator) or accumulator.count == 0


def accumulate(
    accumulator: PyTree,
    low_rank: list[Inexact[Array, "..."]],
    treedef: PyTreeDef,
    steps: int,
    excerpt: Excerpt | None,
    finish: Callable[[list[Inexact[Array, "..."]]], Result],
    wait: Callable[[], Result],
) -> tuple[Result, PyTree]:
    """Adds a micro-batch to those of a step, and finishes the step with the last one.

    A step that was begun with another number is finished as soon as there are as many as make one
    now, with the mean of those that there are.

    Args:
      accumulator: the accumulator that the state holds.
      low_rank: the low-rank gradients of the micro-batch.
      treedef: the structure of the accumulated tree.
      steps: how many micro-batches make a step.
      excerpt: says whether this is the mean of all of them already; None where it is not.
      finish: makes a result from the mean of all low-rank gradients of a step.
      wait: makes a result of the same shapes where the step is not complete.

    Returns:
      The result and the next accumulator.

    Raises:
      ValueError: the state accumulates and should not, or the reverse.
    """
    if is_absent(accumulator) != (steps == 1):
        raise ValueError(
            "the state belongs to another configuration: it was made with accumulation_steps "
            f"{'= 1' if is_absent(accumulator) else '> 1'}, and this galore has {steps}"
        )
    if steps == 1:
        return finish(low_rank), ABSENT
    if excerpt is not None and steps != excerpt.micro_batches:
        raise ValueError(
            f"accumulation_steps of galore is {steps}, and layerwise has {excerpt.micro_batches} "
            "micro-batches: give both the same number, or galore none"
        )
    if excerpt is not None and excerpt.complete:
        return finish(low_rank), accumulator
    count, begun = accumulator.count + 1, accumulator.whole
    done = count >= steps
    # Both are 1 unless the step was begun with another number.
    again = jnp.where(begun == 0, 1, begun / steps)
    of_all = steps / jnp.maximum(count, steps)
    before = treedef.flatten_up_to(accumulator.mean)
    pairs = zip(before, low_rank, strict=True)
    mean = [_times(a, again) + r / steps for a, r in pairs]
    result = jax.lax.cond(done, lambda: finish([_times(x, of_all) for x in mean]), wait)
    kept = [jnp.where(done, 0, x).astype(x.dtype) for x in mean]
    whole = jnp.asarray(steps, jnp.int32)
    return result, Accumulator(jnp.where(done, 0, count), treedef.unflatten(kept), whole)


def _times(array: Inexact[Array, "..."], factor: Array) -> Inexact[Array, "..."]:
    return array * factor.astype(array.dtype)
