"""Optimizers that take steps in turns, each step timed."""

import statistics
import time
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

import galore_optax


class Run(Protocol):
    """An optimizer with its state.

    Attributes:
      compile_ms: time that compiling a step took, None where nothing is compiled.
      state_bytes: size of the state.
    """

    compile_ms: float | None
    state_bytes: int

    def step(self, params: Any, gradients: Any) -> Any:
        """Takes one step, waits for it, and returns the new parameters."""
        ...

    def make_due(self) -> bool:
        """Makes the next step a refresh of all matrices, if that can be done."""
        ...

    def refreshes(self) -> int:
        """How often a matrix was refreshed so far; 0 where the optimizer does not say."""
        ...


class OptaxRun:
    """An Optax transformation whose step is one compiled program.

    Parameters and state are donated, as in training. All runs are given the same parameters in
    turn and hand them on, since a second copy would not fit beside the states of large models.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, gradients: Any):
        def step(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.state = jax.jit(tx.init)(params)
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, self.state, gradients)
        start = time.perf_counter()
        self.compiled = lowered.compile()
        self.compile_ms: float | None = 1e3 * (time.perf_counter() - start)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))

    def step(self, params: Any, gradients: Any) -> Any:
        params, self.state = jax.block_until_ready(self.compiled(params, self.state, gradients))
        return params

    def make_due(self) -> bool:
        found = []

        def due_now(node: Any) -> Any:
            if not isinstance(node, galore_optax.GaloreState):
                return node
            found.append(node)
            due = jax.tree.map(jnp.zeros_like, node.subspace.due)
            return node._replace(subspace=node.subspace._replace(due=due))

        is_node = lambda x: isinstance(x, galore_optax.GaloreState)  # noqa: E731
        self.state = jax.tree.map(due_now, self.state, is_leaf=is_node)
        return bool(found)

    def refreshes(self) -> int:
        return int(galore_optax.metrics(self.state).get("refreshes", 0))


def timed_step(run: Run, params: Any, gradients: Any) -> tuple[Any, float]:
    """New parameters, and the milliseconds that they took."""
    start = time.perf_counter()
    params = run.step(params, gradients)
    return params, 1e3 * (time.perf_counter() - start)


def refresh_times(
    run: Run, params: Any, gradients: Any, budget_ms: float = 10_000, most: int = 3
) -> tuple[Any, list[float]]:
    """Parameters, and the milliseconds of steps that refresh all matrices; the first is the first.

    It is repeated while that takes no longer than the budget, since a first refresh may have
    another algorithm (`power_iteration` has no old basis then), and touches its memory first.
    """
    params, first = timed_step(run, params, gradients)
    times = [first]
    while len(times) <= most and sum(times) < budget_ms and run.make_due():
        params, elapsed = timed_step(run, params, gradients)
        times.append(elapsed)
    return params, times


def take_turns(
    runs: dict[str, Run], params: Any, gradients: Any, steps: int, warm_up: int = 2
) -> tuple[Any, dict[str, list[float]], dict[str, list[int]]]:
    """Steps of all runs in turns.

    Returns:
      Parameters; of each run the milliseconds of each step; and how many matrices it refreshed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    refreshed: dict[str, list[int]] = {name: [] for name in runs}
    for i in range(warm_up + steps):
        for name, run in runs.items():
            before = run.refreshes()
            params, elapsed = timed_step(run, params, gradients)
            if i >= warm_up:
                times[name].append(elapsed)
                refreshed[name].append(run.refreshes() - before)
    return params, times, refreshed


def paired_ratio(times: list[float], others: list[float]) -> float:
    """Median over neighbouring steps of one time over the other."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))
