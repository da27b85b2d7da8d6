"""One update and one evaluation, compiled for texts of each length."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import galore_optax
from examples.flax_glue.batches import Batch, Texts
from examples.flax_glue.config import Config
from examples.flax_glue.model import Encoder, Text
from examples.flax_glue.optimizers import learning_rate
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_glue.weights import Params, joined
from examples.flax_llama.optimizer_state import schedule_count
from examples.flax_llama.step import State

Metrics = dict[str, Any]


def graph_of(encoder: EncoderConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Encoder(encoder, rngs=nnx.Rngs(0))))


def text_of(batch: Batch) -> Text:
    return Text(batch["tokens"], batch["types"], batch["mask"])


def losses(outputs: jax.Array, labels: Any) -> jax.Array:
    """The loss of each text, (B,): cross entropy of classes, squared difference of numbers."""
    if outputs.shape[1] == 1:
        return jnp.square(outputs[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def make_update(
    config: Config,
    encoder: EncoderConfig,
    optimizer: optax.GradientTransformation,
    updates: int,
) -> jax.stages.Wrapped:
    """The jitted function from a state, frozen parameters and a batch to a state and metrics.

    The next state takes the memory of the one that is given.
    """
    graphdef, schedule = graph_of(encoder), learning_rate(config, updates)

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, joined(params, frozen))(text_of(batch), key)
        weights = batch["weights"]
        return jnp.sum(losses(outputs, batch["labels"]) * weights) / weights.sum()

    def update(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        count = schedule_count(state.optimizer)
        # Of its own for every update, so that a run that goes on needs to know no more than that.
        key = jax.random.fold_in(jax.random.key(config.seed), count)
        of_dropout, of_rounding = jax.random.split(key)
        found, gradients = galore_optax.value_and_grad(loss)(
            state.params, frozen, batch, of_dropout
        )
        changes, new = optimizer.update(gradients, state.optimizer, state.params)
        params = galore_optax.apply_updates(state.params, changes, of_rounding)
        metrics = {
            "loss": found,
            "grad_norm": optax.tree.norm(gradients),
            "update_norm": optax.tree.norm(changes),
            "lr": schedule(count),
            "tokens": batch["mask"].sum(),
        }
        return State(params, new), metrics | galore_optax.metrics(new)

    return jax.jit(update, donate_argnums=0)


def make_predict(
    encoder: EncoderConfig,
) -> Callable[[Params, Params, Texts], tuple[np.ndarray, float]]:
    """Function of trained and frozen parameters and texts: outputs of all, and the mean loss.

    It compiles once for each length.
    """
    graphdef = graph_of(encoder)

    @jax.jit
    def outputs_of(params: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = nnx.merge(graphdef, joined(params, frozen))(text_of(batch))
        return outputs, losses(outputs, batch["labels"])

    def predict(params: Params, frozen: Params, texts: Texts) -> tuple[np.ndarray, float]:
        outputs = np.empty((len(texts.labels), encoder.outputs), np.float32)
        total = 0.0
        for index, batch in texts.in_order():
            some, of_each = jax.device_get(outputs_of(params, frozen, batch))
            outputs[index] = some[: len(index)]
            total += float(np.sum(of_each[: len(index)], dtype=np.float64))
        return outputs, total / len(texts.labels)

    return predict
