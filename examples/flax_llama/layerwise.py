"""The update inside the backward pass: the model as `galore_optax.layerwise` wants it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from examples.flax_llama.config import Config
from examples.flax_llama.loss import cross_entropy_sum, inputs_of
from examples.flax_llama.loss_by_vocabulary import cross_entropy_by_vocabulary
from examples.flax_llama.model import (
    Activations,
    Layout,
    Params,
    first_activations,
    head_of,
)
from examples.flax_llama.sharding import laid
from examples.flax_llama.tables import look_up

Step = Callable[[Params, Any, Any, jax.Array], tuple[Params, Any, dict[str, jax.Array]]]


def make_layerwise(
    config: Config,
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> Step:
    """Function of parameters, optimizer state, a batch and a key: the next ones, and metrics.

    Where devices share the batch, each layer's gradient is added up over them when it is there.
    """
    alone = mesh.size == 1

    def step(params: Params, state: Any, batch: Any, key: jax.Array) -> Any:
        model = nnx.merge(graphdef, params)
        block_def, norm_def = nnx.graphdef(model.blocks), nnx.graphdef(model.norm)
        shape, micro_batches = model.config, len(batch.tokens_KxBxS1)
        S = batch.mask_KxBxS.shape[-1]
        layout = Layout.of(shape, jnp.arange(S), S)

        def embed(params: Params, batch: Any) -> Activations:
            table = laid(params["embed"]["embedding"], "table")
            x_BxSxD = look_up(table, batch["tokens"][:, :-1], alone)
            return first_activations(shape, x_BxSxD, inputs_of(batch["segments"]))

        # Products with kernels are kept from a layer's forward to its backward pass; all else, with
        # it the weights out of 8 bits, is made again.
        @functools.partial(
            jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        )
        def block(params: Params, inputs: Activations) -> Activations:
            layer = nnx.merge(block_def, galore_optax.dequantize_params(params))
            return layer(inputs, layout)[0]

        def head_loss(params: Params, outputs: Activations, batch: Any) -> jax.Array:
            x_BxSxD = nnx.merge(norm_def, params["norm"])(outputs.x_BxSxD)
            labels_BxS = batch["tokens"][:, 1:]
            weights_BxS = batch["mask"] * batch["weight"]
            # On several devices the head may be divided by its vocabulary.
            if not alone:
                return cross_entropy_sum(x_BxSxD, head_of(params), labels_BxS, weights_BxS)
            tied = shape.architecture.tied
            head = params["embed"]["embedding"] if tied else head_of(params)
            axis = 0 if tied else 1
            return cross_entropy_by_vocabulary(x_BxSxD, head, labels_BxS, weights_BxS, axis)

        # The mean over micro-batches of these is the mean over all targets, however they lie.
        weight = micro_batches / jnp.maximum(batch.mask_KxBxS.sum(), 1)
        micro = {
            "tokens": batch.tokens_KxBxS1,
            "mask": batch.mask_KxBxS,
            "segments": batch.segments_KxBxS1,
            "weight": jnp.full(micro_batches, weight),
        }
        if micro_batches == 1:
            micro = jax.tree.map(lambda x: x[0], micro)
        training = galore_optax.layerwise(
            optimizer,
            embed=embed,
            block=block,
            head_loss=head_loss,
            micro_batches=micro_batches,
            clip_norm=config.clip or None,
            clip_by=config.clip_by,
            round_bfloat16=config.stochastic_rounding,
            inputs_dtype=config.inputs_dtype,
            inputs_every=config.inputs_every,
            inputs_memory=config.inputs_memory,
            offload=config.offload,
        )
        return training.step(params, state, micro, key)

    return step
