"""layerwise() updates the weights inside the backward pass, one layer at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import optax
from jaxtyping import PRNGKeyArray

from galore_optax._layerwise.places import first_state
from galore_optax._layerwise.plan import Plan, divided
from galore_optax._layerwise.settings import (
    Batch,
    Block,
    Embed,
    HeadLoss,
    Settings,
    checked_offload,
)
from galore_optax._layerwise.step import train_step
from galore_optax._layerwise.sweep import Metrics
from galore_optax._types import Params, State


class Layerwise(NamedTuple):
    """The pair of functions that :func:`layerwise` returns, which says what they do."""

    init: Callable[[Params], State]
    step: Callable[[Params, State, Batch, PRNGKeyArray | None], tuple[Params, State, Metrics]]


def layerwise(
    tx: optax.GradientTransformation,
    *,
    embed: Embed,
    block: Block,
    head_loss: HeadLoss,
    blocks: str = "blocks",
    micro_batches: int = 1,
    clip_norm: float | None = None,
    clip_by: str = "global",
    slice_size: int | None = 2**23,
    round_bfloat16: bool = False,
    inputs_dtype: str | None = None,
    inputs_every: int = 1,
    inputs_memory: str = "device",
    offload: Sequence[str] = (),
) -> Layerwise:
    """Updates each layer inside the backward pass: no two layers have gradients at a time.

    The forward pass keeps the input of each layer. The backward pass, from the last layer to the
    first, computes one layer again, takes its gradient, updates its weights and their optimizer
    state in place, and goes on to the layer before. The result is what ``tx.update`` and
    `galore_optax.apply_updates` make of the whole gradient, and the state is the ordinary one,
    ``tx.init(params)``: a run may change from one way to the other.

    Args:
      tx: any transformation that treats each leaf, and each layer of a stacked leaf, by itself:
        any optimizer of Optax or of this library. Clipping by the global norm is an argument here
        instead.
      embed: a function ``(params, batch) -> x``; the parameters are those without the blocks, and x
        is a floating-point array, or a tree of such. Arrays of integers in the tree, such as the
        layer's number or a mask of the batch, are handed on without a gradient.
      block: a function ``(layer_params, x) -> x``, one layer; the parameters are those of the
        blocks without their leading axis. Quantized ones stay in codes, for it to dequantize where
        it uses them.
      head_loss: a function ``(params, x, batch) -> loss``, a scalar; the parameters are those that
        ``embed`` gets.
      blocks: the key of ``params`` under which the layers are, stacked on the leading axis of
        each leaf, which must be a batch axis of its matrices.
      micro_batches: the number K of gradients that make one step. With more than one each leaf of
        ``batch`` has a leading axis of that size, and the loss is the mean of all. With
        ``galore(..., accumulation_steps=K)`` their gradients are averaged at rank r, but for steps
        with a refresh. On these, with any other transformation, and with ``clip_norm``, the inputs
        of the layers of all micro-batches are kept, so that one layer's gradient is averaged at a
        time.
      clip_norm: the greatest norm of a gradient, or None to clip nothing.
      clip_by: which norm is clipped. ``"global"``: the norm of the whole gradient, for which there
        is another backward pass, before the one that updates; or ``"layer"``: the norm of each
        layer by itself, and of what is used by ``embed`` and only by ``head_loss``, which costs
        nothing.
      slice_size: the number of elements of a leaf outside of the blocks to update at a time, so
        that nothing else has the size of an embedding; where ``tx`` treats each row of the leaf by
        itself, or those together that share a block of codes. None updates whole leaves, as is best
        where their rows are sharded.
      round_bfloat16: whether to round bfloat16 leaves at random; see `galore_optax.apply_updates`.

      inputs_dtype: what the inputs of the layers are kept in from the forward pass to the backward
        one, whose gradients are then those at the rounded inputs: ``"int8"`` takes half the bytes
        of bfloat16, by blocks of 256 numbers of the last axis, each off by at most 1 / 508 of the
        range of its block; any name that ``projector_dtype`` takes will do. None keeps them as they
        are.
      inputs_every: of how many layers in a row the first one's input is kept. Those of the others
        are computed again in the backward pass, some layers at a time, for
        ``1 - 1 / inputs_every`` forward passes more. It must divide the number of layers.
      inputs_memory: where they are kept: ``"device"``, or ``"pinned_host"``, the memory of the
        machine that the device is in, out of which they are copied when they are needed.
      offload: what of the layers lies in ``pinned_host``, the memory of the machine:
        ``("moments",)``, all of their state that has more than a figure for each of them, bases
        too; ``("weights",)``, their parameters; or both. A layer is copied to the device while
        another one is computed, and is written back when it is updated. ``init`` puts the state
        there; `galore_optax.layerwise_shardings` says where to put parameters, and restored state.

    Returns:
      A pair of functions. ``init(params) -> state``. ``step(params, state, batch, key) -> params,
      state, metrics``, to be compiled with ``jax.jit(step, donate_argnums=(0, 1))``; the key is for
      what is rounded at random, another one for each step, or None. The metrics are scalars:
      ``"loss"``, ``"grad_norm"``, before clipping, and ``"update_norm"``. While gradients are
      averaged at rank r ``"grad_norm"`` is the root of the mean square of those of micro-batches.

    Raises:
      TypeError: arguments of a wrong type.
      ValueError: layers that are not stacked alike; a block that changes the shape or dtype of x;
        a transformation that needs the gradients of several leaves at once; a wrapper around
        galore or low_bit that drops the extra arguments of ``update``; arguments out of range;
        arrays in another memory than ``offload`` says, devices without that memory, no state to put
        in it, or micro-batches averaged at rank r, whose layers would be copied for each. All of
        these before anything is computed.

    Notes:
      What a transformation computes over a whole leaf, such as the root mean square that
      ``optax.clip_by_block_rms`` clips or the trust ratio of ``optax.lamb``, is one of each layer
      of that leaf here. Random numbers drawn by the shape of a leaf, as by ``optax.add_noise``, are
      the same for all of its layers.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> params = {"blocks": {"kernel": 0.1 * jnp.ones((4, 8, 8))}, "head": jnp.ones(8)}
      >>> numbers = galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)
      >>> training = galore_optax.layerwise(
      ...     galore_optax.galore_adamw(1e-2, rank=2, weight_dimension_numbers=numbers),
      ...     embed=lambda params, batch: batch,
      ...     block=lambda layer, x: x + jnp.tanh(x @ layer["kernel"]),
      ...     head_loss=lambda params, x, batch: jnp.mean((x @ params["head"]) ** 2),
      ... )
      >>> state = training.init(params)
      >>> step = jax.jit(training.step, donate_argnums=(0, 1))
      >>> params, state, metrics = step(params, state, jnp.ones((2, 8)), None)

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023; Zhao et al., `GaLore
      <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3.
    """
    settings = Settings(
        tx,
        embed,
        block,
        head_loss,
        blocks,
        micro_batches,
        clip_norm,
        clip_by,
        slice_size,
        round_bfloat16,
        inputs_dtype,
        inputs_every,
        inputs_memory,
        checked_offload(offload),
    )

    def init(params: Params) -> State:
        division = divided(settings, params)
        return first_state(settings, division, params) if settings.offload else tx.init(params)

    def step(
        params: Params, state: State, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Params, State, Metrics]:
        return train_step(Plan(settings, params, batch), params, state, batch, key)

    return Layerwise(init, step)
