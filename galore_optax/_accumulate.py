"""Gradients of micro-batches, averaged at rank r until there are enough for a step."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax._part import Part
from galore_optax._subspace import ABSENT, is_absent


class Accumulator(NamedTuple):
    """The micro-batches of a step so far."""

    count: Any  # (), int32: how many there are.
    mean: Any  # the sum of their low-rank gradients over the number of a whole step; R's shapes.


def check_accumulation_steps(steps: Any) -> None:
    """Raises where an argument of galore cannot be right."""
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral):
        raise TypeError(
            "accumulation_steps must be a positive int, since it decides what is compiled; got "
            f"{steps!r}. Under optax.inject_hyperparams, name it in static_args."
        )
    if steps < 1:
        raise ValueError(f"accumulation_steps must be at least 1; got {steps}")


def init_accumulator(low_rank: Any, steps: int) -> Any:
    """What the state holds of micro-batches before the first, for steps of so many."""
    if steps == 1:
        return ABSENT
    zeros = jax.tree.map(jnp.zeros_like, low_rank)
    return Accumulator(jnp.zeros([], jnp.int32), zeros)


def is_first(accumulator: Any) -> jax.Array | bool:
    """Whether a step begins with this micro-batch."""
    return is_absent(accumulator) or accumulator.count == 0


def accumulate(
    accumulator: Any,
    low_rank: list[jax.Array],
    treedef: Any,
    steps: int,
    part: Part,
    finish: Callable[[list[jax.Array]], Any],
    wait: Callable[[], Any],
) -> tuple[Any, Any]:
    """Adds a micro-batch; with the last one of a step, finishes the step.

    Args:
      accumulator: of the state.
      low_rank: the low-rank gradients of the micro-batch.
      treedef: of the accumulated tree.
      steps: micro-batches of a step.
      part: whether this is the mean of all of them already.
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
    if steps != part.micro_batches:
        raise ValueError(
            f"accumulation_steps of galore is {steps}, and layerwise has {part.micro_batches} "
            "micro-batches: give both the same number, or galore none"
        )
    if part.complete:
        return finish(low_rank), accumulator
    count = accumulator.count + 1
    before = treedef.flatten_up_to(accumulator.mean)
    mean = [a + r / steps for a, r in zip(before, low_rank, strict=True)]
    result = jax.lax.cond(count == steps, lambda: finish(mean), wait)
    kept = [jnp.where(count == steps, 0, x).astype(x.dtype) for x in mean]
    return result, Accumulator(count % steps, treedef.unflatten(kept))
