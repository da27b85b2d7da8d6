"""One update, and one evaluation."""

import functools
from collections.abc import Callable, Sequence
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
from examples.flax_llama.train import planned_bytes

Metrics = dict[str, Any]


def graph_of(encoder: EncoderConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Encoder(encoder, rngs=nnx.Rngs(0))))


def shapes_of(tree: Any) -> Any:
    return jax.eval_shape(lambda x: x, tree)


def text_of(batch: Batch) -> Text:
    return Text(batch["tokens"], batch["types"], batch["mask"])


def losses(outputs: jax.Array, labels: Any) -> jax.Array:
    """The loss of each text, (B,): cross entropy of classes, squared difference of numbers."""
    if outputs.shape[1] == 1:
        return jnp.square(outputs[:, 0] - labels)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def keys_of(seed: Any, count: jax.Array) -> jax.Array:
    """Keys of dropout and of rounding, others for every update.

    They are functions of the seed and of a count, so that a run that goes on needs nothing else.
    """
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), count))


def gradients_of(encoder: EncoderConfig) -> Callable[..., tuple[jax.Array, Params]]:
    """Function of trained and frozen parameters, a batch, seed and count: loss and gradients."""
    graphdef = graph_of(encoder)

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> jax.Array:
        outputs = nnx.merge(graphdef, joined(params, frozen))(text_of(batch), key)
        weights = batch["weights"]
        return jnp.sum(losses(outputs, batch["labels"]) * weights) / weights.sum()

    def gradients(
        params: Params, frozen: Params, batch: Batch, seed: Any, count: jax.Array
    ) -> tuple[jax.Array, Params]:
        key, _ = keys_of(seed, count)
        return galore_optax.value_and_grad(loss)(params, frozen, batch, key)

    return gradients


@functools.lru_cache(64)
def compile_gradients(
    encoder: EncoderConfig, treedef: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]
) -> jax.stages.Compiled:
    """The program of `gradients_of` for arguments of these shapes, which several runs share."""
    return jax.jit(gradients_of(encoder)).lower(*treedef.unflatten(leaves)).compile()


class Update:
    """One update, in two programs: of the gradients, and of what the optimizer makes of them.

    The first is compiled for each length of texts, and is the same whatever the optimizer and its
    learning rate are; the second, which takes longer to compile, is one for all lengths.

    Args:
      config: of the run.
      encoder: the model.
      optimizer: of the trained parameters.
      updates: in the end.
    """

    def __init__(
        self,
        config: Config,
        encoder: EncoderConfig,
        optimizer: optax.GradientTransformation,
        updates: int,
    ):
        self._encoder, self._seed = encoder, np.uint32(config.seed)
        schedule = learning_rate(config, updates)

        def apply(state: State, gradients: Params) -> tuple[State, Metrics]:
            count = schedule_count(state.optimizer)
            _, key = keys_of(self._seed, count)
            changes, new = optimizer.update(gradients, state.optimizer, state.params)
            params = galore_optax.apply_updates(state.params, changes, key)
            metrics = {
                "grad_norm": optax.tree.norm(gradients),
                "update_norm": optax.tree.norm(changes),
                "lr": schedule(count),
            }
            return State(params, new), metrics | galore_optax.metrics(new)

        # The next state takes the memory of the one that is given.
        self._apply: Any = jax.jit(apply, donate_argnums=0)

    def _gradients(self, state: State, frozen: Params, batch: Batch) -> tuple[Any, Any]:
        """The program for such a batch, and its arguments."""
        count = schedule_count(state.optimizer)
        arguments = state.params, frozen, batch, self._seed, count
        leaves, treedef = jax.tree.flatten(shapes_of(arguments))
        return compile_gradients(self._encoder, treedef, tuple(leaves)), arguments

    def compile(self, state: State, frozen: Params, batches: Sequence[Batch]) -> int | None:
        """Compiles ahead, for batches from the shortest to the longest.

        Returns:
          The bytes that XLA plans for an update with the longest one: in the larger of the two
          programs, the optimizer's state included. None where it does not tell.
        """
        programs = [self._gradients(state, frozen, batch)[0] for batch in batches]
        gradients = galore_optax.dequantize_params(shapes_of(state.params))
        self._apply = self._apply.lower(state, gradients).compile()
        of_gradients, of_all = planned_bytes(programs[-1]), planned_bytes(self._apply)
        if of_gradients is None or of_all is None:
            return None
        held = sum(x.nbytes for x in jax.tree.leaves(state.optimizer))
        return max(of_gradients + held, of_all)

    def __call__(self, state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        """The next state, and metrics of the update."""
        program, arguments = self._gradients(state, frozen, batch)
        loss, gradients = program(*arguments)
        state, metrics = self._apply(state, gradients)
        return state, metrics | {"loss": loss, "tokens": batch["mask"].sum()}


@functools.lru_cache(8)
def make_predict(
    encoder: EncoderConfig,
) -> Callable[[Params, Params, Texts], tuple[np.ndarray, float]]:
    """Function of trained and frozen parameters and texts: outputs of all, and the mean loss.

    It compiles once for each length, and several runs share it.
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
