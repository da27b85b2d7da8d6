"""The state that a run goes on with."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from examples.flax_llama.beginning import Beginning
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data, position_in_batches
from examples.flax_llama.optimizer_state import arrays, carry_over, start_anew
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import on
from examples.flax_llama.step import State, first_optimizer_state, state_shardings

Initial = Callable[[], State]


def restore(
    checkpoints: Checkpoints,
    beginning: Beginning,
    config: Config,
    initial_state: Initial,
    dataset: Data,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state of a run's last checkpoint, and the data at the batch after it.

    Adds to the notes of `beginning` what is not as it would have been.
    """
    stored = beginning.stored
    assert stored is not None
    like, optimizer = jax.eval_shape(initial_state), make_optimizer(stored)
    if beginning.changes:
        like = State(like.params, jax.eval_shape(optimizer.init, like.params))
    where = state_shardings(config, optimizer, like.params, mesh)
    state, position = checkpoints.restore(beginning.step, on(where, like))
    if not beginning.new_data:
        position, skipped = position_in_batches(position, stored.batch, config.batch)
        dataset.train.set_state(position)
        if skipped:
            beginning.notes.append(f"{skipped} rows are left out, up to the next whole batch")
    if not beginning.changes:
        return state
    optimizer = make_optimizer(config)
    return State(state.params, going_on(state, optimizer, beginning, config, mesh))


def going_on(
    state: State,
    optimizer: optax.GradientTransformation,
    beginning: Beginning,
    config: Config,
    mesh: jax.sharding.Mesh,
) -> Any:
    """The state of a checkpoint's optimizer as that of one with other settings."""
    wanted = arrays(jax.eval_shape(optimizer.init, state.params))
    if not beginning.anew and arrays(state.optimizer) == wanted:
        return state.optimizer
    where = state_shardings(config, optimizer, state.params, mesh)
    new = first_optimizer_state(optimizer, state.params, where)
    if not beginning.anew:
        if (kept := carry_over(new, state.optimizer)) is not None:
            return kept
        beginning.notes.append(
            "the optimizer's state would have other arrays, and begins anew but for the position "
            "in the learning-rate schedule"
        )
    return start_anew(new, state.optimizer, config)
