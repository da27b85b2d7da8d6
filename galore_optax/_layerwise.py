"""layerwise(): the weights are updated inside the backward pass, one layer at a time."""

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._dependence import dependence
from galore_optax._parts import Parts
from galore_optax._state import accumulates, at_a_step, is_due
from galore_optax._sweep import Settings, Sweep

Params = Any  # a mapping; whatever mapping the model has.
Metrics = dict[str, jax.Array]


class Layerwise(NamedTuple):
    """What :func:`layerwise` returns."""

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, Any, jax.Array | None], tuple[Params, Any, Metrics]]


def layerwise(
    tx: optax.GradientTransformation,
    *,
    embed: Callable[[Params, Any], Any],
    block: Callable[[Any, Any], Any],
    head_loss: Callable[[Params, Any, Any], jax.Array],
    blocks: str = "blocks",
    micro_batches: int = 1,
    clip_norm: float | None = None,
    clip_by: str = "global",
    slice_size: int | None = 2**23,
    round_bfloat16: bool = False,
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
      embed: ``(params, batch) -> x``; the parameters are those without the blocks, and x is a
        floating-point array, or a tree of such.
      block: ``(layer_params, x) -> x``, one layer; the parameters are those of the blocks without
        their leading axis. Quantized ones stay in codes, for it to dequantize where it uses them.
      head_loss: ``(params, x, batch) -> loss``, a scalar; parameters as for ``embed``.
      blocks: the key of ``params`` under which the layers are, stacked on the leading axis of
        each leaf, which must be a batch axis of its matrices.
      micro_batches: K. With more than one each leaf of ``batch`` has a leading axis of that size,
        and the loss is the mean of all. With ``galore(..., accumulation_steps=K)`` their gradients
        are averaged at rank r, but for steps with a refresh. On these, with any other
        transformation, and with ``clip_norm``, the inputs of the layers of all micro-batches are
        kept, so that one layer's gradient is averaged at a time.
      clip_norm: the greatest norm of a gradient, or None.
      clip_by: ``"global"``: the norm of the whole gradient, for which there is another backward
        pass, before the one that updates; or ``"layer"``: the norm of each layer by itself, and of
        what is used by ``embed`` and only by ``head_loss``, which costs nothing.
      slice_size: elements of a leaf outside of the blocks to update at a time, so that nothing else
        has the size of an embedding; where ``tx`` treats each row of the leaf by itself. None
        for whole leaves, as is best where their rows are sharded.
      round_bfloat16: see `galore_optax.apply_updates`.

    Returns:
      A pair of functions. ``init(params) -> state``. ``step(params, state, batch, key) -> params,
      state, metrics``, to be compiled with ``jax.jit(step, donate_argnums=(0, 1))``; the key is for
      what is rounded at random, another one for each step, or None. The metrics are scalars:
      ``"loss"``, ``"grad_norm"``, before clipping, and ``"update_norm"``. While gradients are
      averaged at rank r ``"grad_norm"`` is the root of the mean square of those of micro-batches.

    Raises:
      TypeError: arguments of a wrong type.
      ValueError: layers that are not stacked alike; a block that changes the shape or dtype of x;
        a transformation that needs the gradients of several leaves at once; parameters on a mesh
        of Explicit axes; arguments out of range. All of these before anything is computed.

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
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise TypeError(f"tx must be an Optax transformation; got {tx!r}")
    for name, function in {"embed": embed, "block": block, "head_loss": head_loss}.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function; got {function!r}")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, numbers.Integral):
        raise TypeError(f"micro_batches must be a positive int; got {micro_batches!r}")
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1; got {micro_batches}")
    if clip_norm is not None and not isinstance(clip_norm, numbers.Real):
        raise TypeError(f"clip_norm must be a number, or None; got {clip_norm!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None; got {clip_norm!r}")
    if slice_size is not None and not isinstance(slice_size, numbers.Integral):
        raise TypeError(f"slice_size must be a positive int, or None; got {slice_size!r}")
    if slice_size is not None and slice_size < 1:
        raise ValueError(f"slice_size must be at least 1, or None; got {slice_size}")
    if clip_by not in ("global", "layer"):
        raise ValueError(f'clip_by must be "global" or "layer"; got {clip_by!r}')
    if clip_norm is None and clip_by != "global":
        raise ValueError(f"clip_by={clip_by!r} needs clip_norm, the norm to clip to")
    settings = Settings(
        tx,
        embed,
        block,
        head_loss,
        blocks,
        int(micro_batches),
        clip_norm,
        clip_by,
        slice_size,
        round_bfloat16,
    )

    def init(params: Params) -> Any:
        Parts(tx, params, blocks)
        return tx.init(params)

    def step(
        params: Params, state: Any, batch: Any, key: jax.Array | None
    ) -> tuple[Params, Any, Metrics]:
        return _Step(settings, params, batch, key)(params, state, batch)

    return Layerwise(init, step)


class _Step:
    """One step, for parameters and a batch of some shapes."""

    def __init__(self, settings: Settings, params: Any, batch: Any, key: jax.Array | None):
        self.settings, self.key = settings, key
        self.parts = parts = Parts(settings.tx, params, settings.blocks)
        if settings.micro_batches > 1:
            _check_batch(batch, settings.micro_batches)
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        rest, stacked = parts.divide(parts.shapes)
        x = jax.eval_shape(settings.embed, rest, batch)
        _check_block(settings.block, stacked, x)
        loss = jax.eval_shape(settings.head_loss, rest, x, batch)
        if getattr(loss, "shape", None) != ():
            raise ValueError(f"head_loss must return a scalar; got {loss}")
        by_embed = self._used(settings.embed, rest, batch)
        by_head = self._used(settings.head_loss, rest, x, batch)
        outside = [not inside for inside in parts.in_blocks]
        # What embed does not use has its whole gradient before the layers have any.
        before = [a and not b for a, b in zip(outside, by_embed, strict=True)]
        self.before = parts.pieces(before, settings.slice_size)
        self.after = parts.pieces(by_embed, settings.slice_size)
        self.of_head = [a or b for a, b in zip(before, by_head, strict=True)]

    def __call__(self, params: Any, state: Any, batch: Any) -> tuple[Any, Any, Metrics]:
        parts, settings = self.parts, self.settings
        leaves = parts.treedef.flatten_up_to(params)
        low_rank = accumulates(state) and settings.micro_batches > 1
        if low_rank and settings.clip_norm is not None:
            raise ValueError(
                "clip_norm needs the gradients of all micro-batches of a layer at once: leave out "
                "galore's accumulation_steps"
            )
        if low_rank:
            parts.check_accumulates(state)
            state = at_a_step(state)
        state_leaves = parts.state_leaves(state)
        if low_rank:
            leaves, state_leaves, metrics = jax.lax.cond(
                is_due(state), self._at_once, self._one_by_one, leaves, state_leaves, batch
            )
        else:
            leaves, state_leaves, metrics = self._at_once(leaves, state_leaves, batch)
        new = parts.treedef.unflatten(leaves), parts.state_treedef.unflatten(state_leaves)
        return *new, metrics

    def _at_once(self, leaves: list[Any], state: list[jax.Array], batch: Any) -> Any:
        """All micro-batches of a layer, then its update."""
        return self._sweep(self.settings.micro_batches, complete=True).run(leaves, state, batch)

    def _one_by_one(self, leaves: list[Any], state: list[jax.Array], batch: Any) -> Any:
        """All layers of a micro-batch, whose gradients galore adds up; updates with the last."""
        count, sweep = self.settings.micro_batches, self._sweep(1, complete=False)

        def micro(k: Any) -> Any:
            return jax.tree.map(lambda x: x[k], batch)

        def add(k: jax.Array, carry: Any) -> Any:
            state, loss, square = carry
            _, state, metrics = sweep.run(leaves, state, micro(k), write=False)
            return state, loss + metrics["loss"], square + metrics["grad_norm"] ** 2

        zero = jnp.zeros([], sweep.dtype)
        state, loss, square = jax.lax.fori_loop(0, count - 1, add, (state, zero, zero))
        leaves, state, metrics = sweep.run(leaves, state, micro(count - 1))
        loss += metrics["loss"]
        square += metrics["grad_norm"] ** 2
        means = {"loss": loss / count, "grad_norm": jnp.sqrt(square / count)}
        return leaves, state, metrics | means

    def _sweep(self, count: int, complete: bool) -> Sweep:
        own = self.settings, self.parts, self.before, self.after, self.of_head, self.key
        return Sweep(*own, count, complete)

    def _used(self, function: Callable[..., Any], rest: Any, *args: Any) -> list[bool]:
        """Which leaves of the parameters a function of those without the blocks uses."""
        sets = jax.tree.leaves(dependence(function, rest, *args), is_leaf=_is_set)
        used = frozenset().union(*sets)
        shapes, arrays = self.parts.shapes, iter(range(len(jax.tree.leaves(rest))))
        result = [False] * len(shapes)
        # In the order that they have without the blocks.
        for i in jax.tree.leaves(self.parts.divide(list(range(len(shapes))))[0]):
            result[i] = any([next(arrays) in used for _ in jax.tree.leaves(shapes[i])])
        return result


def _is_set(x: Any) -> bool:
    return isinstance(x, frozenset)


def _check_batch(batch: Any, count: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"with micro_batches={count} each leaf of batch has a leading axis of {count}; "
                f"{jax.tree_util.keystr(path) or 'it'} has the shape {jnp.shape(leaf)}"
            )


def _check_block(block: Callable[[Any, Any], Any], stacked: Any, x: Any) -> None:
    """Raises where a layer does not return what the next one takes."""
    for leaf in jax.tree.leaves(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"embed must return floating-point arrays; got {leaf.dtype}")
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), stacked)
    y = jax.eval_shape(block, one, x)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree)

    if jax.tree.structure(y) != jax.tree.structure(x) or described(y) != described(x):
        raise ValueError(
            f"block must return an x of the shape and dtype it gets: {described(x)}; got "
            f"{described(y)}"
        )
