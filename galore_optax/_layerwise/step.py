"""Does one step of training: one sweep for all micro-batches, or one for each of them."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from galore_optax._layerwise.norms import norm_dtype
from galore_optax._layerwise.offload import check_places
from galore_optax._layerwise.plan import Plan
from galore_optax._layerwise.settings import Batch, Leaf
from galore_optax._layerwise.sweep import Metrics, Sweep
from galore_optax._state import accumulates, at_a_step, is_due
from galore_optax._types import Params, State

_Result: TypeAlias = tuple[list[Leaf], list[Array], Metrics]


def train_step(
    plan: Plan, params: Params, state: State, batch: Batch, key: PRNGKeyArray | None
) -> tuple[Params, State, Metrics]:
    """Does one step of training.

    Args:
      plan: what the step does.
      params: the parameters.
      state: the state of the transformation.
      batch: a batch, or all micro-batches of the step on a leading axis.
      key: the key of what is rounded at random, or None.

    Returns:
      The next parameters and state, and the metrics.

    Raises:
      ValueError: the state belongs to another transformation, or it averages gradients at rank r
        and something else needs whole ones.
    """
    division, settings = plan.division, plan.settings
    leaves = division.treedef.flatten_up_to(params)
    by_micro_batch = accumulates(state) and settings.micro_batches > 1
    if by_micro_batch and settings.clip_norm is not None:
        raise ValueError(
            "clip_norm needs the gradients of all micro-batches of a layer at once: leave out "
            "galore's accumulation_steps"
        )
    if by_micro_batch and settings.offload:
        raise ValueError(
            f"offload={settings.offload!r} takes all micro-batches of a layer at once, or the "
            "layers would be copied for each: leave out galore's accumulation_steps"
        )
    if by_micro_batch:
        division.check_accumulates(state)
        state = at_a_step(state)
    state_leaves = division.state_leaves(state)
    check_places(division, settings.offload, leaves, state_leaves)

    def at_once(leaves: list[Leaf], state: list[Array], batch: Batch) -> _Result:
        count = settings.micro_batches
        return Sweep(plan, leaves, state, batch, count, complete=True, key=key).run()

    def one_by_one(leaves: list[Leaf], state: list[Array], batch: Batch) -> _Result:
        return _one_by_one(plan, leaves, state, batch, key)

    if by_micro_batch:
        result = jax.lax.cond(is_due(state), at_once, one_by_one, leaves, state_leaves, batch)
    else:
        result = at_once(leaves, state_leaves, batch)
    leaves, state_leaves, metrics = result
    new_params = division.treedef.unflatten(leaves)
    return new_params, division.state_treedef.unflatten(state_leaves), metrics


def _one_by_one(
    plan: Plan, leaves: list[Leaf], state: list[Array], batch: Batch, key: PRNGKeyArray | None
) -> _Result:
    """Sweeps once for each micro-batch, whose gradients galore adds up; updates with the last."""
    count = plan.settings.micro_batches

    def sweep(k: Int[Array, ""] | int, state: list[Array], write: bool) -> Sweep:
        micro_batch = jax.tree.map(lambda x: x[k], batch)
        return Sweep(plan, leaves, state, micro_batch, 1, complete=False, key=key, write=write)

    def add(
        k: Int[Array, ""], carry: tuple[list[Array], Array, Array]
    ) -> tuple[list[Array], Array, Array]:
        state, loss, square = carry
        _, state, metrics = sweep(k, state, write=False).run()
        return state, loss + metrics["loss"], square + metrics["grad_norm"] ** 2

    zero = jnp.zeros([], norm_dtype(leaves))
    state, loss, square = jax.lax.fori_loop(0, count - 1, add, (state, zero, zero))
    new_leaves, state, metrics = sweep(count - 1, state, write=True).run()
    loss += metrics["loss"]
    square += metrics["grad_norm"] ** 2
    means = {"loss": loss / count, "grad_norm": jnp.sqrt(square / count)}
    return new_leaves, state, metrics | means
