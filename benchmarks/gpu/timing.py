"""Times of programs that run one after the other on a device, without waiting in between."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def per_step(
    step: Callable[[Any], Any], carry: Any, steps: int, runs: int
) -> tuple[Any, dict[str, float]]:
    """Seconds of a step that takes what the one before returns, as a mean over long runs.

    The host queues all steps of a run before it waits, as training does.

    Returns:
      The last carry; and the median, the least and the most of the runs' means.
    """
    carry = jax.block_until_ready(step(carry))
    means = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(steps):
            carry = step(carry)
        jax.block_until_ready(carry)
        means.append((time.perf_counter() - start) / steps)
    return carry, {"median": statistics.median(means), "least": min(means), "most": max(means)}


def one_by_one(step: Callable[[Any], Any], carry: Any, steps: int) -> tuple[Any, list[float]]:
    """Seconds of each step, waited for."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        carry = jax.block_until_ready(step(carry))
        seconds.append(time.perf_counter() - start)
    return carry, seconds


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))
