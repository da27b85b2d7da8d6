"""One update, compiled: gradients of micro-batches, divided over a mesh, and the optimizer.

Sizes: K micro-batches, B sequences of a micro-batch, S tokens of a sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax
from examples.flax_llama.adapters import RELORA, Adapter, trained_of, with_parts
from examples.flax_llama.config import Config, LlamaConfig, UsageError
from examples.flax_llama.layerwise import make_layerwise
from examples.flax_llama.loss import loss_sum
from examples.flax_llama.model import Llama, Params, draw_layers
from examples.flax_llama.optimizer_state import schedule_count, skipped_updates
from examples.flax_llama.relora import begin_again
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.sharding import (
    ROWS,
    AnyMesh,
    by_rows,
    computing_on,
    divided,
    is_quantized,
    is_spec,
    laid_as_parameters,
    make_mesh,
    parameter_specs,
    replicated,
    row_parts,
    shardings_of,
)
from examples.flax_llama.spaces import to_device, to_host

Metrics = dict[str, Any]


class State(NamedTuple):
    """What an update changes."""

    params: Any
    optimizer: Any


class Batch(NamedTuple):
    """The sequences of an update."""

    tokens_KxBxS1: jax.Array
    # The targets, tokens 1..S of each row, that count.
    mask_KxBxS: jax.Array
    # Numbers of the texts in each row, which attend to themselves alone; None where it is one.
    segments_KxBxS1: jax.Array | None = None


def initial_params(config: Config, shape: LlamaConfig) -> Params:
    """The parameters that a run of a resolved configuration starts from.

    Each layer is drawn before the next one where it is then quantized, or put into the memory of
    the machine: a model that is larger than the device need not be there.
    """
    params = nnx.to_pure_dict(nnx.state(Llama(shape, rngs=nnx.Rngs(config.seed)), nnx.Param))
    on_host = "weights" in config.offload

    def finish(layer: Params) -> Params:
        if config.int8_weights:
            layer = galore_optax.quantize_params({"blocks": layer}, rank=config.rank)["blocks"]
        return to_host(layer) if on_host else layer

    if config.int8_weights or on_host:
        params["blocks"] = draw_layers(shape, nnx.Rngs(config.seed), finish)
    return params


def initial_state(
    config: Config, shape: LlamaConfig, optimizer: optax.GradientTransformation
) -> State:
    """The parameters and the optimizer's state that a run starts from."""
    params = initial_params(config, shape)
    return State(params, optimizer.init(to_device(params)))


def trained_model(config: Config, graphdef: nnx.GraphDef, params: Params) -> Llama:
    """The model of parameters, with weights as they are computed with.

    They stay in codes where the layers lie in the memory of the machine, since they need not fit
    into the device's: the model decodes one at a time.
    """
    whole = params if "weights" in config.offload else galore_optax.dequantize_params(params)
    return nnx.merge(graphdef, whole)


def first_optimizer_state(
    optimizer: optax.GradientTransformation, params: Params, where: Any
) -> Any:
    """The state that an optimizer starts from, where `state_shardings` says."""
    of_state = where.optimizer if isinstance(where, State) else where
    return jax.jit(lambda params: optimizer.init(to_device(params)), out_shardings=of_state)(params)


def state_shardings(
    config: Config, optimizer: optax.GradientTransformation, params: Params, mesh: AnyMesh
) -> Any:
    """Where the state lies with these parameters, or their shapes; see `shardings_of`.

    Raises:
      UsageError: what `offload` names is not there, or cannot lie in the memory of the machine.
    """
    if not config.offload:
        return shardings_of(lambda params: State(params, optimizer.init(params)), params, mesh)
    where = parameter_specs(params, mesh)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), where, is_leaf=is_spec)
    try:
        return State(
            *galore_optax.layerwise_shardings(optimizer, params, where, offload=config.offload)
        )
    except ValueError as error:
        raise UsageError(f"{error}.") from error


def check_divides(config: Config) -> None:
    """Refuses a mesh of other devices than are here, and a batch that does not divide over it.

    Raises:
      UsageError: says which, and what would be right.
    """
    mesh = make_mesh(config.mesh)
    rows, parts = config.batch // config.accumulate, row_parts(mesh)
    if rows % parts:
        what = f"the {parts} parts of mesh={config.mesh!r}" if config.mesh else f"{parts} devices"
        raise UsageError(
            f"batch={config.batch} in accumulate={config.accumulate} micro-batches makes {rows} "
            f"sequences each, which do not divide among {what}: choose a multiple of "
            f"{config.accumulate * parts}."
        )


def has_segments(config: Config) -> bool:
    """Whether the rows of a run are of several texts each, none of which attends to another one."""
    return config.packing and (config.data_format != "text" or not config.attend_across)


def put_batch(batch: dict[str, np.ndarray], accumulate: int, mesh: jax.sharding.Mesh) -> Batch:
    """This process' sequences of an update, on its devices, as its part of the whole batch."""
    sharding = by_rows(mesh, axis=1)

    def put(rows: np.ndarray) -> jax.Array:
        local = rows.reshape(accumulate, -1, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local)

    segments = batch.get("segments")
    return Batch(
        put(batch["tokens"]), put(batch["mask"]), None if segments is None else put(segments)
    )


def make_gradients(
    graphdef: nnx.GraphDef, mesh: jax.sharding.Mesh, adapter: Adapter | None = None
) -> Callable[[Params, Batch], tuple[jax.Array, Params]]:
    """Function of parameters and a batch: the mean loss of the targets, and its gradients.

    These are of what is trained beside the adapter, as it is itself.

    Every device goes through its rows of one micro-batch after the other, and where it has all
    parameters these are added up over the devices once. Sums over all targets, divided by their
    number, are the mean of one big batch however its rows are split up and however many targets
    each has.
    """

    def sums(params: Params, batch: Batch, targets: jax.Array) -> tuple[jax.Array, Params]:
        def loss(trained: Params, *micro: Any) -> jax.Array:
            whole = with_parts(params, trained)
            return loss_sum(nnx.merge(graphdef, whole), *micro) / targets

        trained = trained_of(params, adapter)
        value_and_grad = galore_optax.value_and_grad(loss)
        if len(batch.tokens_KxBxS1) == 1:
            micro = jax.tree.map(lambda x: x[0], batch)
            return value_and_grad(trained, *micro)

        def add(so_far: Any, micro: Batch) -> tuple[Any, None]:
            new = value_and_grad(trained, *micro)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), so_far, new), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros(jnp.shape(x), jnp.float32), (0.0, trained), is_leaf=is_quantized
        )
        return jax.lax.scan(add, zeros, batch)[0]

    whole, rows = PartitionSpec(), PartitionSpec(None, ROWS)
    of_mesh = divided(sums, mesh, (whole, rows, whole))

    def gradients(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        total, found = of_mesh(params, batch, jnp.maximum(batch.mask_KxBxS.sum(), 1))
        trained = trained_of(params, adapter)
        found = jax.tree.map(lambda p, g: g.astype(p.dtype), trained, found, is_leaf=is_quantized)
        return total, laid_as_parameters(found, mesh)

    return gradients


def make_update(
    config: Config,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    where: Any = None,
) -> jax.stages.Wrapped:
    """The jitted function from a state and a batch to the next state and metrics of the update.

    The next state takes the memory of the one that is given, and lies `where` that does, by default
    on every device.
    """
    adapter = config.adapter
    gradients_of = make_gradients(graphdef, mesh, adapter)
    schedule = learning_rate(config)

    def ordinary(params: Params, old: Any, batch: Batch, key: jax.Array) -> Any:
        loss, gradients = gradients_of(params, batch)
        updates, new = optimizer.update(gradients, old, params)
        norms = {"grad_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates)}
        trained = galore_optax.apply_updates(
            trained_of(params, adapter),
            *(updates, key),
            round_bfloat16=config.stochastic_rounding,
        )
        params = with_parts(params, trained)
        if config.optimizer == RELORA:
            params, new = begin_again(config, params, old, new, key)
        return params, new, {"loss": loss, **norms}

    step = make_layerwise(config, graphdef, optimizer, mesh) if config.layerwise else ordinary
    step = computing_on(mesh, step)

    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        count = schedule_count(state.optimizer)
        # Of its own for every update, for what is rounded at random.
        key = jax.random.fold_in(jax.random.key(config.seed), count)
        params, new_optimizer, metrics = step(state.params, state.optimizer, batch, key)
        metrics |= {"lr": schedule(count), "tokens": batch.mask_KxBxS.sum()}
        metrics |= galore_optax.metrics(new_optimizer)
        if config.on_nan == "skip":
            metrics |= skipped_updates(new_optimizer)
        return State(params, new_optimizer), metrics

    everywhere = replicated(mesh)
    return jax.jit(update, donate_argnums=0, out_shardings=(where or everywhere, everywhere))
