"""The state that a run begins with: drawn at random, or the weights of another run or a model."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax

import galore_optax
from examples.flax_llama.adapters import lora_of, merged, with_parts, without_lora
from examples.flax_llama.beginning import Beginning
from examples.flax_llama.changes import config_of
from examples.flax_llama.checkpoint import Checkpoints, open_run
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data
from examples.flax_llama.loading import load_params
from examples.flax_llama.model import Params
from examples.flax_llama.optimizer_state import arrays, carry_over, from_the_start
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.pretrained import open_model, settings_of_source
from examples.flax_llama.resume import restore
from examples.flax_llama.run_directory import imported_from
from examples.flax_llama.sharding import on, parameter_shardings
from examples.flax_llama.spaces import to_device, to_host
from examples.flax_llama.step import State, first_optimizer_state, state_shardings
from examples.flax_llama.usage import UsageError
from examples.hf.configuration import is_model
from examples.hf.weights import load

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
    # Never whole on one device, which it need not fit.
    params = jax.eval_shape(initial_state).params
    where = state_shardings(config, make_optimizer(config), params, mesh)
    return jax.jit(initial_state, out_shardings=where)()


def from_other_run(
    config: Config, initial_state: Initial, beginning: Beginning, mesh: jax.sharding.Mesh
) -> State:
    """The weights of another run's checkpoint, with its optimizer's state where that is asked for.

    Raises:
      UsageError: the checkpoint cannot be read, or the optimizer has other arrays.
    """
    source = config.init_from
    assert source is not None
    like, optimizer = jax.eval_shape(initial_state), make_optimizer(config)
    own = functools.partial(parameter_shardings, mesh=mesh, offload=config.offload)
    own_state = state_shardings(config, optimizer, like.params, mesh)
    init = functools.partial(first_optimizer_state, optimizer, where=own_state)
    if is_model(source) or imported_from(source):
        beginning.notes.append(f"begins with the weights of {source}")
        if is_model(source):
            params = of_hugging_face(source, initial_state, config, mesh)
        else:
            params, stored = load_params(source, "last", own), settings_of_source(source)
            params = in_the_model_of(initial_state, params, stored, config, mesh)
        return State(params, init(params))
    with open_run(source) as checkpoints:
        step = checkpoints.find(config.init_step, "init_step")
        stored = config_of(checkpoints.settings(step))
        what = "weights" if config.weights_only else "weights and the state of the optimizer"
        beginning.notes.append(f"begins with the {what} of {source} after update {step}")
        if config.weights_only:
            params = load_params(source, step, own)
            params = in_the_model_of(initial_state, params, stored, config, mesh)
            return State(params, init(params))
        old = make_optimizer(stored)
        whole = State(like.params, jax.eval_shape(old.init, like.params))
        where = state_shardings(config, old, like.params, mesh)
        state, _ = checkpoints.restore(step, on(where, whole))
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
    """Weights of another run as those of this one, where one of them, or both, have adapters."""
    like = jax.eval_shape(lambda: initial_state().params)
    if stored.adapter == config.adapter:
        return in_the_form_of(like, params, config, mesh)
    whole = jax.jit(merged, static_argnums=1)(params, stored.adapter)
    whole = in_the_form_of(without_lora(like), whole, config, mesh)
    return with_parts(whole, initial_lora(initial_state, mesh))


def of_hugging_face(
    source: Path, initial_state: Initial, config: Config, mesh: jax.sharding.Mesh
) -> Params:
    """The weights of a model of Hugging Face, a tensor at a time in the form that is trained.

    Raises:
      UsageError: they cannot be read.
    """
    model = open_model(source)
    like = without_lora(jax.eval_shape(lambda: initial_state().params))
    params = load(model.tensors, model.found.entries, like)
    whole = jax.device_put(params, parameter_shardings(like, mesh, config.offload))
    return with_parts(whole, initial_lora(initial_state, mesh))


def initial_lora(initial_state: Initial, mesh: jax.sharding.Mesh) -> Params:
    """What LoRA begins with, if anything: of all the initial weights, that alone is computed."""

    def lora() -> Params:
        return lora_of(initial_state().params)

    where = parameter_shardings(jax.eval_shape(lora), mesh)
    return jax.jit(lora, out_shardings=where)()


def in_the_form_of(like: Params, params: Params, config: Config, mesh: jax.sharding.Mesh) -> Params:
    """Weights in the dtypes of others, and in 8 bits where those are."""
    if arrays(params) == arrays(like):
        return params

    def quantize(layer: Params) -> Params:
        return galore_optax.quantize_params({"blocks": layer}, rank=config.rank)["blocks"]

    on_host, blocks = "weights" in config.offload, like["blocks"]

    def dense(params: Params, like: Params) -> Params:
        found, wanted = map(galore_optax.dequantize_params, (to_device(params), like))
        return jax.tree.map(lambda x, as_in: x.astype(as_in.dtype), found, wanted)

    def layer(params: Params) -> Params:
        found = dense(params, blocks)
        found = quantize(found) if config.int8_weights else found
        return to_host(found) if on_host else found

    def convert(params: Params) -> Params:
        if not (config.int8_weights or on_host):
            return dense(params, like)
        # One after the other, as when they are drawn.
        rest = {name: x for name, x in params.items() if name != "blocks"}
        whole = dense(rest, {name: x for name, x in like.items() if name != "blocks"})
        return whole | {"blocks": jax.lax.map(layer, params["blocks"])}

    where = parameter_shardings(like, mesh, config.offload)
    return jax.jit(convert, out_shardings=where)(params)
