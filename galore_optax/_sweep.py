"""Forward through all layers and back, where each part of the parameters is updated in its turn."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._matrix import moment_dtype
from galore_optax._parts import Parts, Piece
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import apply_updates, attach, carrier
from galore_optax._row_major import row_major


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `galore_optax.layerwise`, checked."""

    tx: optax.GradientTransformation
    embed: Callable[[Any, Any], Any]
    block: Callable[[Any, Any], Any]
    head_loss: Callable[[Any, Any, Any], jax.Array]
    blocks: str
    micro_batches: int
    clip_norm: float | None
    clip_by: str
    slice_size: int | None
    round_bfloat16: bool


class Updated(NamedTuple):
    """A part of the parameters after its update, and the leaves of its state."""

    leaves: list[Any]
    state: list[jax.Array]
    update_square: jax.Array  # of the norm of the update.


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Forward through all layers and back, for so many micro-batches of a layer at a time.

    Lists are over all leaves of the parameters, with None for those that have no part in them.

    Attributes:
      settings: the arguments of `galore_optax.layerwise`.
      parts: of the parameters and the state.
      before: the leaves outside of the blocks whose gradient is complete before that of any layer.
      after: the other ones.
      of_head: which leaves the head uses.
      key: for what is rounded at random, or None.
      count: of micro-batches.
      complete: whether these are all there are.
    """

    settings: Settings
    parts: Parts
    before: list[Piece]
    after: list[Piece]
    of_head: list[bool]
    key: jax.Array | None
    count: int
    complete: bool

    @property
    def dtype(self) -> Any:
        """Of norms and of the loss."""
        return moment_dtype(jnp.result_type(*(x.dtype for x in self.parts.shapes)))

    def run(
        self, leaves: list[Any], state: list[jax.Array], batch: Any, write: bool = True
    ) -> tuple[list[Any], list[jax.Array], dict[str, jax.Array]]:
        """The next parameters and state, and the metrics; without ``write`` the old parameters."""
        x, inputs = self._forward(leaves, batch)
        (loss, of_head), dx = self._head(leaves, x, batch)
        before, after, factor = _only(_union(self.before, len(leaves)), of_head), None, None
        square = self._square(before)
        if self.settings.clip_norm is not None and self.settings.clip_by == "global":
            first_dx, of_layers = self._measure(leaves, inputs, dx)
            after = self._embed(leaves, of_head, first_dx, batch)
            factor = self._clip_factor(square + of_layers + self._square(after))

        new_leaves, new_state, update_square = list(leaves), list(state), jnp.zeros([], self.dtype)

        def take(piece: Piece, new: Updated) -> None:
            nonlocal update_square
            for i, own in enumerate(piece.chosen):
                new_leaves[i] = new.leaves[i] if own else new_leaves[i]
            for i, leaf in zip(piece.positions, new.state, strict=True):
                new_state[i] = leaf
            update_square += new.update_square

        def update(pieces: list[Piece], gradients: list[Any]) -> None:
            own = factor
            if self.settings.clip_norm is not None and self.settings.clip_by == "layer":
                own = self._clip_factor(self._square(gradients))
            for piece in pieces:
                of_piece = _only(piece.chosen, gradients), _only(piece.chosen, leaves)
                take(piece, self._outside(piece, *of_piece, _take(piece, state), own, write))

        update(self.before, before)
        dx, of_layers, blocks = self._layers(leaves, state, inputs, dx, factor, write)
        take(self.parts.layer, blocks)
        after = self._embed(leaves, of_head, dx, batch) if after is None else after
        update(self.after, after)
        metrics = {
            "loss": loss.astype(self.dtype),
            "grad_norm": jnp.sqrt(square + of_layers + self._square(after)),
            "update_norm": jnp.sqrt(update_square),
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
        own = _only(self.of_head, leaves)

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
        chosen = _union(self.after, len(leaves))
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

    def _layers(
        self,
        leaves: list[Any],
        state: list[jax.Array],
        inputs: Any,
        dx: Any,
        factor: jax.Array | None,
        write: bool,
    ) -> tuple[Any, jax.Array, Updated]:
        """Updates the blocks, layer by layer, in place.

        Returns:
          The gradient of the first layer's input, the square of the norm of the gradients, and the
          blocks after their update.
        """
        piece = self.parts.layer
        old = _take(piece, state)

        def visit(layer: jax.Array, params: Any, gradients: Any, carry: Any) -> Any:
            square, new = carry
            own, scale = self._square(gradients), factor
            if self.settings.clip_norm is not None and self.settings.clip_by == "layer":
                scale = self._clip_factor(own)
            gradients = jax.tree.map(lambda x: x[None], gradients)
            # Codes are read again: kept from the gradient on, they would take memory in between.
            layer, gradients = jax.lax.optimization_barrier((layer, gradients))
            params = [
                jax.tree.map(lambda x: _cut(x, layer, 1), stack)
                if is_quantized(stack)
                else jax.tree.map(lambda x: x[None], own)
                for stack, own in zip(new.leaves, params, strict=True)
            ]
            call = _Call(gradients, params, scale, layer, layer, self._key(layer), write)
            return square + own, self._in_place(piece, call, old, new, layer, 1)

        zero = jnp.zeros([], self.dtype)
        first = zero, Updated(_only(piece.chosen, leaves), old, zero)
        dx, (square, new) = self._backward(inputs, dx, lambda carry: carry[1].leaves, visit, first)
        return dx, square, new

    def _outside(
        self,
        piece: Piece,
        gradients: list[Any],
        leaves: list[Any],
        old: list[jax.Array],
        factor: jax.Array | None,
        write: bool,
    ) -> Updated:
        """Updates a leaf outside of the blocks, as a whole or in slices of its rows."""
        place = piece.chosen.index(True)
        turn = self.parts.layers + place
        key = self._key(turn)
        if piece.slices == 1:
            return self._update(
                piece, _Call(gradients, leaves, factor, None, turn, key, write), old
            )
        size = leaves[place].shape[0] // piece.slices

        def body(i: jax.Array, new: Updated) -> Updated:
            rows = jax.tree.map(lambda x: _cut(x, i, size), (gradients, new.leaves))
            own = None if key is None else jax.random.fold_in(key, i)
            call = _Call(rows[0], rows[1], factor, None, turn, own, write)
            return self._in_place(piece, call, old, new, i, size)

        first = Updated(leaves, old, jnp.zeros([], self.dtype))
        return jax.lax.fori_loop(0, piece.slices, body, first)

    def _in_place(
        self,
        piece: Piece,
        call: "_Call",
        old: list[jax.Array],
        stacks: Updated,
        i: jax.Array,
        size: int,
    ) -> Updated:
        """Updates the i-th part of stacks, of so many of their leading entries, within them."""
        # What all parts share, such as a step counter, is for all of them the old one.
        own = [
            _cut(stack, i, size) if has else shared
            for stack, shared, has in zip(stacks.state, old, piece.stacked, strict=True)
        ]
        new = self._update(piece, call, own)
        state = [
            _paste(stack, part, i) if has else part
            for stack, part, has in zip(stacks.state, new.state, piece.stacked, strict=True)
        ]
        leaves = stacks.leaves
        if call.write:
            leaves = jax.tree.map(lambda stack, part: _paste(stack, part, i), leaves, new.leaves)
        return Updated(leaves, state, stacks.update_square + new.update_square)

    def _update(self, piece: Piece, call: "_Call", state: list[jax.Array]) -> Updated:
        """What is updated at a time, after its update."""
        leaves = call.leaves

        def scaled(gradient: jax.Array, leaf: Any) -> jax.Array:
            gradient = gradient if call.factor is None else gradient * call.factor
            return gradient.astype(leaf.dtype)

        pairs = zip(call.gradients, leaves, strict=True)
        updates, new_state = self.parts.update(
            piece,
            [None if g is None else scaled(g, leaf) for g, leaf in pairs],
            state,
            leaves,
            layer=call.layer,
            turn=call.turn,
            micro_batches=self.settings.micro_batches,
            complete=self.complete,
        )
        if call.write:
            leaves = apply_updates(
                leaves, updates, call.key, round_bfloat16=self.settings.round_bfloat16
            )
        return Updated(leaves, new_state, self._square(updates))

    def _key(self, place: jax.Array | int) -> jax.Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, place)

    def _mean(self, function: Callable[[Any], tuple[Any, Any]], xs: Any) -> tuple[Any, Any]:
        """The mean of a function's first result over micro-batches, and all of its second."""
        if self.count == 1:
            return function(xs)

        def add(sums: Any, x: Any) -> tuple[Any, Any]:
            new, mapped = function(x)
            return jax.tree.map(lambda s, n: s + n.astype(s.dtype) / self.count, sums, new), mapped

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
        limit = jnp.asarray(self.settings.clip_norm, self.dtype)
        norm = jnp.sqrt(square)
        return jnp.where(norm < limit, 1, limit / norm)


class _Call(NamedTuple):
    """What there is to know for the update of a part."""

    gradients: list[Any]
    leaves: list[Any]  # of the parameters.
    factor: jax.Array | None  # to clip them by.
    layer: jax.Array | None
    turn: jax.Array | int  # of the layer, or the leaf.
    key: jax.Array | None  # for what is rounded at random.
    write: bool  # whether to change the parameters.


def _only(chosen: Sequence[bool], leaves: list[Any]) -> list[Any]:
    return [leaf if own else None for own, leaf in zip(chosen, leaves, strict=True)]


def _carriers(leaves: list[Any]) -> list[Any]:
    return [None if leaf is None else carrier(leaf) for leaf in leaves]


def _attached(leaves: list[Any], carriers: list[Any]) -> list[Any]:
    """The leaves, those with a carrier to be differentiated with respect to it."""
    pairs = zip(leaves, carriers, strict=True)
    return [leaf if carrier is None else attach(leaf, carrier) for leaf, carrier in pairs]


def _union(pieces: list[Piece], count: int) -> list[bool]:
    return [any(piece.chosen[i] for piece in pieces) for i in range(count)]


def _take(piece: Piece, state: list[jax.Array]) -> list[jax.Array]:
    return [state[i] for i in piece.positions]


def _index(tree: Any, layer: jax.Array, axis: int = 0) -> Any:
    def index(x: jax.Array) -> jax.Array:
        return row_major(jax.lax.dynamic_index_in_dim(x, layer, axis, keepdims=False))

    return jax.tree.map(index, tree)


def _cut(stack: jax.Array, i: jax.Array, size: int) -> jax.Array:
    return row_major(jax.lax.dynamic_slice_in_dim(stack, i * size, size))


def _paste(stack: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
    start = i * part.shape[0]
    return jax.lax.dynamic_update_slice_in_dim(stack, row_major(part), start, 0)
