"""layerwise(): the weights are updated inside the backward pass, one layer at a time."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._dependence import dependence
from galore_optax._matrix import moment_dtype
from galore_optax._parts import Parts, Piece
from galore_optax._quantized_params import apply_updates, attach, carrier
from galore_optax._state import accumulates, is_due

Params = Mapping[str, Any]
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
        any optimizer of Optax or of this library. Masks and labels inside it must be callables.
        Clipping by the global norm is an argument here instead.
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
        a transformation that needs the gradients of several leaves at once; arguments out of
        range. All of these before anything is computed.

    Notes:
      What a transformation computes over a whole leaf, such as the root mean square that
      ``optax.clip_by_block_rms`` clips or the trust ratio of ``optax.lamb``, is one of each layer
      of that leaf here.

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
    for name, function in {"embed": embed, "block": block, "head_loss": head_loss}.items():
        if not callable(function):
            raise TypeError(f"{name} must be a function; got {function!r}")
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, numbers.Integral):
        raise TypeError(f"micro_batches must be a positive int; got {micro_batches!r}")
    if micro_batches < 1:
        raise ValueError(f"micro_batches must be at least 1; got {micro_batches}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, or None; got {clip_norm!r}")
    if clip_by not in ("global", "layer"):
        raise ValueError(f'clip_by must be "global" or "layer"; got {clip_by!r}')
    settings = _Settings(
        tx, embed, block, head_loss, blocks, int(micro_batches), clip_norm, clip_by, round_bfloat16
    )

    def init(params: Params) -> Any:
        Parts(tx, params, blocks)
        return tx.init(params)

    def step(
        params: Params, state: Any, batch: Any, key: jax.Array | None
    ) -> tuple[Params, Any, Metrics]:
        return _Step(settings, params, batch, key)(params, state, batch)

    return Layerwise(init, step)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of :func:`layerwise`, checked."""

    tx: optax.GradientTransformation
    embed: Callable[[Any, Any], Any]
    block: Callable[[Any, Any], Any]
    head_loss: Callable[[Any, Any, Any], jax.Array]
    blocks: str
    micro_batches: int
    clip_norm: float | None
    clip_by: str
    round_bfloat16: bool


class _Step:
    """One step, for parameters and a batch of some shapes."""

    def __init__(self, settings: _Settings, params: Any, batch: Any, key: jax.Array | None):
        self.settings, self.key = settings, key
        self.parts = parts = Parts(settings.tx, params, settings.blocks)
        if settings.micro_batches > 1:
            _check_batch(batch, settings.micro_batches)
            batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        rest, stacked = parts.divide(parts.shapes)
        x = jax.eval_shape(settings.embed, rest, batch)
        _check_block(settings.block, stacked, x)
        by_embed = self._used(settings.embed, rest, batch)
        by_head = self._used(settings.head_loss, rest, x, batch)
        outside = [not inside for inside in parts.in_blocks]
        # What embed does not use has its whole gradient before the layers have any.
        self.before = parts.piece([a and not b for a, b in zip(outside, by_embed, strict=True)])
        self.after = parts.piece(by_embed)
        self.of_head = [a or b for a, b in zip(self.before.chosen, by_head, strict=True)]

    def __call__(self, params: Any, state: Any, batch: Any) -> tuple[Any, Any, Metrics]:
        parts, settings = self.parts, self.settings
        leaves = parts.treedef.flatten_up_to(params)
        state_leaves = parts.state_leaves(state)
        low_rank = accumulates(state) and settings.micro_batches > 1
        if low_rank and settings.clip_norm is not None:
            raise ValueError(
                "clip_norm needs the gradients of all micro-batches of a layer at once: leave out "
                "galore's accumulation_steps"
            )
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
        count = self.settings.micro_batches
        return _Sweep(self, count, complete=True).run(leaves, state, batch)

    def _one_by_one(self, leaves: list[Any], state: list[jax.Array], batch: Any) -> Any:
        """All layers of a micro-batch, whose gradients galore adds up; updates with the last."""
        count, sweep = self.settings.micro_batches, _Sweep(self, 1, complete=False)

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

    def _used(self, function: Callable[..., Any], rest: Any, *args: Any) -> list[bool]:
        """Which leaves of the parameters a function of those without the blocks uses."""
        sets = jax.tree.leaves(dependence(function, rest, *args), is_leaf=_is_set)
        used = frozenset().union(*sets)
        arrays = iter(range(len(jax.tree.leaves(rest))))
        return [
            not inside and any([next(arrays) in used for _ in jax.tree.leaves(leaf)])
            for leaf, inside in zip(self.parts.shapes, self.parts.in_blocks, strict=True)
        ]


class _Sweep:
    """Forward through all layers and back, for so many micro-batches of a layer at a time.

    Lists are over all leaves of the parameters, with None for those that have no part in them.

    Args:
      step: what it is part of.
      count: of micro-batches.
      complete: whether these are all there are.
    """

    def __init__(self, step: _Step, count: int, complete: bool):
        self.step, self.settings, self.parts = step, step.settings, step.parts
        self.count, self.complete = count, complete
        # Of norms and of the loss.
        self.dtype = moment_dtype(jnp.result_type(*(x.dtype for x in step.parts.shapes)))

    def run(
        self, leaves: list[Any], state: list[jax.Array], batch: Any, write: bool = True
    ) -> tuple[list[Any], list[jax.Array], Metrics]:
        """The next parameters and state, and the metrics; without ``write`` the old parameters."""
        step = self.step
        x, inputs = self._forward(leaves, batch)
        (loss, of_head), dx = self._head(leaves, x, batch)
        before, after, factor = _only(step.before.chosen, of_head), None, None
        if self.settings.clip_norm is not None and self.settings.clip_by == "global":
            first_dx, square = self._measure(leaves, inputs, dx)
            after = self._embed(leaves, of_head, first_dx, batch)
            factor = self._clip_factor(square + self._square(before) + self._square(after))

        def updated(piece: Piece, gradients: list[Any], key: int) -> _Updated:
            old = [state[i] for i in piece.positions]
            place = {"layer": None, "key": key, "factor": factor, "write": write}
            return self._update(piece, gradients, leaves, old, **place)

        layers = self.parts.layers
        parts = [(step.before, updated(step.before, before, layers))]
        dx, of_layers = self._update_layers(leaves, state, inputs, dx, factor, write)
        parts.append((self.parts.layer, of_layers))
        if after is None:
            after = self._embed(leaves, of_head, dx, batch)
        parts.append((step.after, updated(step.after, after, layers + 1)))

        new_leaves, new_state = list(leaves), list(state)
        for piece, part in parts:
            for i, (own, leaf) in enumerate(zip(piece.chosen, part.leaves, strict=True)):
                new_leaves[i] = leaf if own else new_leaves[i]
            for i, leaf in zip(piece.positions, part.state, strict=True):
                new_state[i] = leaf
        metrics = {
            "loss": loss.astype(self.dtype),
            "grad_norm": jnp.sqrt(sum(part.square for _, part in parts)),
            "update_norm": jnp.sqrt(sum(part.update_square for _, part in parts)),
        }
        return new_leaves, new_state, metrics

    def _forward(self, leaves: list[Any], batch: Any) -> tuple[Any, Any]:
        """What the last layer returns, and the inputs of all, with an axis of layers."""
        rest, stacked = self.parts.divide(leaves)
        block = self.settings.block

        def one(batch: Any) -> tuple[Any, Any]:
            x = self.settings.embed(rest, batch)
            return jax.lax.scan(lambda x, layer: (block(layer, x), x), x, stacked)

        return one(batch) if self.count == 1 else jax.lax.map(one, batch)

    def _head(self, leaves: list[Any], x: Any, batch: Any) -> tuple[tuple[jax.Array, Any], Any]:
        """The loss, the gradient of what the head uses, and that of x."""
        own = _only(self.step.of_head, leaves)

        def one(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
            x, batch = inputs

            def loss_of(carriers: list[Any], x: Any) -> jax.Array:
                rest, _ = self.parts.divide(_attached(leaves, carriers))
                return self.settings.head_loss(rest, x, batch)

            loss, vjp = jax.vjp(loss_of, _carriers(own), x)
            gradients, dx = vjp(jnp.ones_like(loss))
            return (loss, gradients), dx

        return self._mean(one, (x, batch))

    def _embed(self, leaves: list[Any], of_head: list[Any], dx: Any, batch: Any) -> list[Any]:
        """The gradient of what the embedding uses, with the head's part in it."""
        chosen = self.step.after.chosen
        own = _only(chosen, leaves)

        def one(inputs: tuple[Any, Any]) -> tuple[list[Any], None]:
            dx, batch = inputs

            def embed(carriers: list[Any]) -> Any:
                return self.settings.embed(self.parts.divide(_attached(leaves, carriers))[0], batch)

            return jax.vjp(embed, _carriers(own))[1](dx)[0], None

        of_embed, _ = self._mean(one, (dx, batch))
        pairs = zip(of_embed, _only(chosen, of_head), strict=True)
        return [a if b is None else a + b for a, b in pairs]

    def _backward(
        self,
        inputs: Any,
        dx: Any,
        stacked: Callable[[Any], list[Any]],
        visit: Callable[[jax.Array, list[Any], list[Any], Any], Any],
        carry: Any,
    ) -> tuple[Any, Any]:
        """Goes through the layers from the last to the first.

        Args:
          inputs: of all layers.
          dx: the gradient of what the last one returns.
          stacked: of a carry the parameters of the blocks.
          visit: of a layer's index, parameters and gradient and a carry the next carry.
          carry: the first one.

        Returns:
          The gradient of the first layer's input, and the last carry.
        """
        layers, axis = self.parts.layers, 0 if self.count == 1 else 1

        def body(i: jax.Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
            dx, carry = both
            layer = layers - 1 - i
            params = _index(stacked(carry), layer)
            x = _index(inputs, layer, axis)

            def one(pair: tuple[Any, Any]) -> tuple[list[Any], Any]:
                x, dx = pair

                def apply(carriers: list[Any], x: Any) -> Any:
                    _, layer_params = self.parts.divide(_attached(params, carriers))
                    return self.settings.block(layer_params, x)

                return jax.vjp(apply, _carriers(params), x)[1](dx)

            gradients, dx = self._mean(one, (x, dx))
            return dx, visit(layer, params, gradients, carry)

        return jax.lax.fori_loop(0, layers, body, (dx, carry))

    def _measure(self, leaves: list[Any], inputs: Any, dx: Any) -> tuple[Any, jax.Array]:
        """The gradient of the first layer's input, and the square of the norm of the layers'."""
        stacked = _only(self.parts.in_blocks, leaves)

        def visit(_: Any, __: Any, gradients: list[Any], square: jax.Array) -> jax.Array:
            return square + self._square(gradients)

        return self._backward(inputs, dx, lambda _: stacked, visit, jnp.zeros([], self.dtype))

    def _update_layers(
        self,
        leaves: list[Any],
        state: list[jax.Array],
        inputs: Any,
        dx: Any,
        factor: jax.Array | None,
        write: bool,
    ) -> tuple[Any, "_Updated"]:
        """The gradient of the first layer's input, and the blocks after their update."""
        piece = self.parts.layer
        layered = [self.parts.layered[i] for i in piece.positions]
        old = [state[i] for i in piece.positions]

        def visit(layer: jax.Array, params: Any, gradients: Any, carry: _Updated) -> _Updated:
            # What is shared by all layers, such as a step counter, is for all of them the old one.
            own = [
                _index(s, layer)[None] if has else shared
                for s, shared, has in zip(carry.state, old, layered, strict=True)
            ]
            gradients, params = jax.tree.map(lambda x: x[None], (gradients, params))
            new = self._update(
                piece, gradients, params, own, layer=layer, key=layer, factor=factor, write=write
            )
            kept = [
                _replace(s, n[0], layer) if has else n
                for s, n, has in zip(carry.state, new.state, layered, strict=True)
            ]
            stacked = carry.leaves
            if write:
                stacked = jax.tree.map(lambda s, n: _replace(s, n[0], layer), stacked, new.leaves)
            squares = carry.square + new.square, carry.update_square + new.update_square
            return _Updated(stacked, kept, *squares)

        zero = jnp.zeros([], self.dtype)
        first = _Updated(_only(piece.chosen, leaves), old, zero, zero)
        return self._backward(inputs, dx, lambda carry: carry.leaves, visit, first)

    def _update(
        self,
        piece: Piece,
        gradients: list[Any],
        leaves: list[Any],
        state: list[jax.Array],
        *,
        layer: jax.Array | None,
        key: jax.Array | int,
        factor: jax.Array | None,
        write: bool,
    ) -> "_Updated":
        """One part after its update; a layer's leaves have a leading axis of size 1."""
        settings, parts = self.settings, self.parts
        square = self._square(gradients)
        if settings.clip_norm is not None and settings.clip_by == "layer":
            factor = self._clip_factor(square)
        leaves = _only(piece.chosen, leaves)

        def scaled(gradient: jax.Array, leaf: Any) -> jax.Array:
            gradient = gradient if factor is None else gradient * factor
            return gradient.astype(leaf.dtype)

        updates, new_state = parts.update(
            piece,
            [None if g is None else scaled(g, x) for g, x in zip(gradients, leaves, strict=True)],
            state,
            leaves,
            layer=layer,
            micro_batches=settings.micro_batches,
            complete=self.complete,
        )
        new = leaves
        if write:
            key = None if self.step.key is None else jax.random.fold_in(self.step.key, key)
            new = apply_updates(leaves, updates, key, round_bfloat16=settings.round_bfloat16)
        return _Updated(new, new_state, square, self._square(updates))

    def _mean(self, function: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
        """The mean of a function's first result over micro-batches, and all of its second."""
        if self.count == 1:
            return function(xs)

        def add(sums: Any, x: Any) -> tuple[Any, Any]:
            new, mapped = function(x)
            return jax.tree.map(lambda s, n: s + n / self.count, sums, new), mapped

        first, _ = jax.eval_shape(function, jax.tree.map(lambda x: x[0], xs))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, moment_dtype(x.dtype)), first)
        return jax.lax.scan(add, zeros, xs)

    def _square(self, arrays: list[Any]) -> jax.Array:
        """The square of the norm of all arrays together."""
        zero = jnp.zeros([], self.dtype)
        return sum(
            (jnp.sum(jnp.square(x.astype(self.dtype))) for x in jax.tree.leaves(arrays)), zero
        )

    def _clip_factor(self, square: jax.Array) -> jax.Array:
        """What makes a gradient of that norm no longer than it may be."""
        norm, limit = jnp.sqrt(square), self.settings.clip_norm
        return jnp.where(norm < limit, 1, limit / norm)


class _Updated(NamedTuple):
    """A part after its update; of the blocks, what the backward pass changes layer by layer."""

    leaves: list[Any]
    state: list[jax.Array]
    square: jax.Array  # of the norm of the gradient.
    update_square: jax.Array  # of that of the update.


def _only(chosen: Sequence[bool], leaves: list[Any]) -> list[Any]:
    return [leaf if own else None for own, leaf in zip(chosen, leaves, strict=True)]


def _carriers(leaves: list[Any]) -> list[Any]:
    return [None if leaf is None else carrier(leaf) for leaf in leaves]


def _attached(leaves: list[Any], carriers: list[Any]) -> list[Any]:
    """The leaves, those with a carrier to be differentiated with respect to it."""
    pairs = zip(leaves, carriers, strict=True)
    return [leaf if carrier is None else attach(leaf, carrier) for leaf, carrier in pairs]


def _index(tree: Any, layer: jax.Array, axis: int = 0) -> Any:
    def index(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, layer, axis, keepdims=False)

    return jax.tree.map(index, tree)


def _replace(stacked: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, one, layer, 0)


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
