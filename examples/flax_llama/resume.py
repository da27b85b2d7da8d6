"""The state that a run goes on with, or begins with where that is another run's."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import galore_optax
from examples.flax_llama.adapters import LOW_RANK, lora_of, merged, with_lora, without_lora
from examples.flax_llama.beginning import Beginning
from examples.flax_llama.changes import config_of
from examples.flax_llama.checkpoint import Checkpoints, load_params, on, open_run
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data, position_in_batches
from examples.flax_llama.model import Params
from examples.flax_llama.optimizer_state import arrays, carry_over, from_the_start, start_anew
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.step import State, replicated
from examples.flax_llama.usage import UsageError

Initial = Callable[[], State]


def first_state(
    checkpoints: Checkpoints | None,
    beginning: Beginning,
    config: Config,
    initial_state: Initial,
    dataset: Data,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state before the first update of this process; see `restore` and `from_other_run`."""
    if checkpoints is not None and beginning.step:
        return restore(checkpoints, beginning, config, initial_state, dataset, mesh)
    if config.init_from is not None:
        return from_other_run(config, initial_state, beginning, mesh)
    return jax.jit(initial_state, out_shardings=replicated(mesh))()


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
    like = jax.eval_shape(initial_state)
    if beginning.changes:
        init = make_optimizer(stored).init
        like = State(like.params, jax.eval_shape(init, like.params))
    state, position = checkpoints.restore(beginning.step, on(replicated(mesh), like))
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
    new = jax.jit(optimizer.init, out_shardings=replicated(mesh))(state.params)
    if not beginning.anew:
        if (kept := carry_over(new, state.optimizer)) is not None:
            return kept
        beginning.notes.append(
            "the optimizer's state would have other arrays, and begins anew but for the position "
            "in the learning-rate schedule"
        )
    return start_anew(new, state.optimizer, config)


def from_other_run(
    config: Config, initial_state: Initial, beginning: Beginning, mesh: jax.sharding.Mesh
) -> State:
    """The weights of another run's checkpoint, with its optimizer's state where that is asked for.

    Raises:
      UsageError: the checkpoint cannot be read, or the optimizer has other arrays.
    """
    source = config.init_from
    assert source is not None
    everywhere, like = replicated(mesh), jax.eval_shape(initial_state)
    with open_run(source) as checkpoints:
        step = checkpoints.find(config.init_step, "init_step")
        stored = config_of(checkpoints.settings(step))
        what = "weights" if config.weights_only else "weights and the state of the optimizer"
        beginning.notes.append(f"begins with the {what} of {source} after update {step}")
        if config.weights_only:
            params = load_params(source, step, everywhere)
            params = in_the_model_of(initial_state, params, stored, config, mesh)
            init = jax.jit(make_optimizer(config).init, out_shardings=everywhere)
            return State(params, init(params))
        old = jax.eval_shape(make_optimizer(stored).init, like.params)
        state, _ = checkpoints.restore(step, on(everywhere, State(like.params, old)))
    init = jax.jit(make_optimizer(config).init, out_shardings=everywhere)
    kept = carry_over(init(state.params), state.optimizer)
    if kept is None:
        raise UsageError(
            f"init_from={source}: the state of its optimizer has other arrays than this one's: "
            "weights_only=True takes the weights alone."
        )
    return State(state.params, from_the_start(kept))


def in_the_model_of(
    initial_state: Initial, params: Params, stored: Config, config: Config, mesh: jax.sharding.Mesh
) -> Params:
    """Weights of another run as those of this one, where one of them, or both, have adapters.

    Raises:
      UsageError: a product of matrices should be made of a whole one.
    """
    like = jax.eval_shape(lambda: initial_state().params)
    if stored.adapter == config.adapter:
        return in_the_form_of(like, params, config, mesh)
    if config.optimizer == LOW_RANK:
        raise UsageError(
            f"init_from={config.init_from} has whole matrices, of which optimizer='low_rank' makes "
            "no products: choose lora, which is beside them."
        )
    whole = jax.jit(merged, static_argnums=1)(params, stored.adapter)
    whole = in_the_form_of(without_lora(like), whole, config, mesh)
    # Of all the initial weights, those of LoRA alone are computed.
    new = jax.jit(lambda: lora_of(initial_state().params), out_shardings=replicated(mesh))()
    return with_lora(whole, new)


def in_the_form_of(like: Params, params: Params, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Weights in the dtypes of others, and in 8 bits where those are."""
    if arrays(params) == arrays(like):
        return params

    def quantize(layer: Params) -> Params:
        return galore_optax.quantize_params({"blocks": layer}, rank=config.rank)["blocks"]

    def convert(params: Params) -> Params:
        dense, wanted = map(galore_optax.dequantize_params, (params, like))
        dense = jax.tree.map(lambda x, as_in: x.astype(as_in.dtype), dense, wanted)
        if config.int8_weights:
            # One after the other, as when they are drawn.
            dense["blocks"] = jax.lax.map(quantize, dense["blocks"])
        return dense

    return jax.jit(convert, out_shardings=replicated(mesh))(params)
