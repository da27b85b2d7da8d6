"""Goes forward through the model and back: the loss, and the gradients of one layer at a time."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from galore_optax._layerwise.division import Division, select
from galore_optax._layerwise.inputs import one_of
from galore_optax._layerwise.settings import WEIGHTS, Activations, Batch, Leaf, Settings
from galore_optax._quantized_params import attach, carrier
from galore_optax._sharding import shaped, zeros_like
from galore_optax._types import Params
from galore_optax._view import moment_dtype

Carry = TypeVar("Carry")
_Both: TypeAlias = tuple[list[Leaf], PyTree]
"""A layer's parameters, none where they are not fetched ahead, and what else is carried."""
Gradients = list[Array | None]
"""A gradient for each leaf of the parameters, None for those that have no part in it."""


@dataclasses.dataclass(frozen=True)
class Passes:
    """The parts of a forward and a backward pass, over some micro-batches at a time.

    Gradients are the mean of those of the micro-batches. With more than one of these, what depends
    on the batch has a leading axis for them.

    Attributes:
      settings: the arguments of `galore_optax.layerwise`.
      division: how the parameters divide.
      count: how many micro-batches there are.
    """

    settings: Settings
    division: Division
    count: int

    def forward(self, leaves: list[Leaf], batch: Batch) -> tuple[Activations, PyTree]:
        """Returns what the last layer returns, and what is kept of the layers' inputs, stacked."""
        rest, stacked = self.division.divide(leaves)
        block, inputs = self.settings.block, self.settings.inputs
        last = self.division.layers - 1

        def layer_and_next(
            both: tuple[Activations, Params], layer: Int[Array, ""]
        ) -> tuple[tuple[Activations, Params], None]:
            x, own = both
            # The next layer comes out of the memory of the machine while this one is computed.
            after = one_of(stacked, jnp.minimum(layer + 1, last))
            return (block(own, x), after), None

        def group_and_next(
            both: tuple[Activations, Params], first: Int[Array, ""]
        ) -> tuple[tuple[Activations, Params], PyTree]:
            kept = inputs.keep(both[0])
            both, _ = jax.lax.scan(layer_and_next, both, first + jnp.arange(inputs.every))
            return both, kept

        def group(x: Activations, layers: Params) -> tuple[Activations, PyTree]:
            kept = inputs.keep(x)
            if inputs.every == 1:
                return block(layers, x), kept
            x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, layers)
            return x, kept

        def one(batch: Batch) -> tuple[Activations, PyTree]:
            x = self.settings.embed(rest, batch)
            if not self.settings.offloads(WEIGHTS):
                return jax.lax.scan(group, x, inputs.in_groups(stacked))
            firsts = jnp.arange(0, self.division.layers, inputs.every)
            (x, _), kept = jax.lax.scan(group_and_next, (x, one_of(stacked, 0)), firsts)
            return x, kept

        return one(batch) if self.count == 1 else jax.lax.map(one, batch)

    def head(
        self, leaves: list[Leaf], chosen: Sequence[bool], x: Activations, batch: Batch
    ) -> tuple[tuple[Float[Array, ""], Gradients], Activations]:
        """Returns the loss, its gradient with respect to the chosen leaves, and that to x."""
        own = select(chosen, leaves)

        def one(inputs: tuple[Activations, Batch]) -> tuple[tuple[Array, Gradients], Activations]:
            x, batch = inputs

            def loss_of(carriers: list[Array | None], floating: Activations) -> Float[Array, ""]:
                rest, _ = self.division.divide(_attached(leaves, carriers))
                return self.settings.head_loss(rest, _with_others(floating, x), batch)

            loss, vjp = jax.vjp(loss_of, _carriers(own), _floating(x))
            gradients, dx = vjp(jnp.ones_like(loss))
            return (loss, gradients), dx

        return self._mean(one, (x, batch))

    def embed(
        self, leaves: list[Leaf], chosen: Sequence[bool], dx: Activations, batch: Batch
    ) -> Gradients:
        """Returns the gradient of the chosen leaves by way of the embedding.

        Args:
          leaves: the parameters.
          chosen: for each leaf whether to return its gradient.
          dx: the gradient of what the embedding returns.
          batch: the batch.
        """
        own = select(chosen, leaves)

        def one(inputs: tuple[Activations, Batch]) -> tuple[Gradients, None]:
            dx, batch = inputs

            def embed(carriers: list[Array | None]) -> Activations:
                rest, _ = self.division.divide(_attached(leaves, carriers))
                return _floating(self.settings.embed(rest, batch))

            return jax.vjp(embed, _carriers(own))[1](dx)[0], None

        return self._mean(one, (dx, batch))[0]

    def layers(
        self,
        kept: PyTree,
        last: Activations,
        dx: Activations,
        stacked: Callable[[Carry], list[Leaf]],
        visit: Callable[[Int[Array, ""], list[Leaf], Gradients, Carry], Carry],
        carry: Carry,
    ) -> tuple[Activations, Carry]:
        """Goes through the layers from the last to the first.

        Args:
          kept: what is kept of what each layer got in the forward pass.
          last: what the last layer returned.
          dx: the gradient of what the last layer returns.
          stacked: finds the parameters of the blocks in a carry.
          visit: makes the next carry from a layer's index, parameters and gradients, and a carry.
          carry: the first carry.

        Returns:
          The gradient of the first layer's input, and the last carry.
        """
        inputs, axis = self.settings.inputs, 0 if self.count == 1 else 1
        every, groups = inputs.every, self.division.layers // inputs.every

        def one_layer(
            layer: Int[Array, ""], x: Activations, dx: Activations, both: _Both
        ) -> tuple[Activations, _Both]:
            params, carry = both
            before: list[Leaf] = []
            if self.settings.offloads(WEIGHTS):
                before = one_of(stacked(carry), jnp.maximum(layer - 1, 0))
            else:
                params = one_of(stacked(carry), layer)

            def one(pair: tuple[Activations, Activations]) -> tuple[Gradients, Activations]:
                x, dx = pair

                def apply(carriers: list[Array | None], floating: Activations) -> Activations:
                    _, layer_params = self.division.divide(_attached(params, carriers))
                    return _floating(self.settings.block(layer_params, _with_others(floating, x)))

                return jax.vjp(apply, _carriers(params), _floating(x))[1](dx)

            gradients, dx = self._mean(one, (x, dx))
            if before:
                # The layer before is there when this one is written, or XLA would copy all of them
                # for the one that still reads.
                before, gradients = jax.lax.optimization_barrier((before, gradients))
            return dx, (before, visit(layer, params, gradients, carry))

        def one_group(
            i: Int[Array, ""], all_of_it: tuple[Activations, _Both]
        ) -> tuple[Activations, _Both]:
            first = (groups - 1 - i) * every
            x = inputs.load(one_of(kept, groups - 1 - i, axis), last)
            if every == 1:
                return one_layer(first, x, *all_of_it)
            xs = self._again(first, x, stacked(all_of_it[1][1]))

            def back(
                j: Int[Array, ""], all_of_it: tuple[Activations, _Both]
            ) -> tuple[Activations, _Both]:
                own = every - 1 - j
                return one_layer(first + own, one_of(xs, own), *all_of_it)

            return jax.lax.fori_loop(0, every, back, all_of_it)

        ahead: list[Leaf] = []
        if self.settings.offloads(WEIGHTS):
            ahead = one_of(stacked(carry), self.division.layers - 1)
        dx, (_, carry) = jax.lax.fori_loop(0, groups, one_group, (dx, (ahead, carry)))
        return dx, carry

    def _again(self, first: Int[Array, ""], x: Activations, stacked: list[Leaf]) -> Activations:
        """Returns the inputs of the layers of a group, stacked, from that of its first one."""

        def next_one(
            j: Int[Array, ""], both: tuple[Activations, Activations]
        ) -> tuple[Activations, Activations]:
            x, xs = both
            _, params = self.division.divide(one_of(stacked, first + j))
            call = functools.partial(self.settings.block, params)
            x = call(x) if self.count == 1 else jax.lax.map(call, x)
            return x, jax.tree.map(
                lambda xs, x: jax.lax.dynamic_update_index_in_dim(xs, x, j + 1, 0), xs, x
            )

        every = self.settings.inputs.every
        xs = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (every, *x.shape)), x)
        return jax.lax.fori_loop(0, every - 1, next_one, (x, xs))[1]

    def _mean(
        self, function: Callable[[PyTree], tuple[PyTree, PyTree]], xs: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Returns the mean of a function's first result over micro-batches, and all its second."""
        if self.count == 1:
            return function(xs)

        def add(sums: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
            new, mapped = function(x)
            return jax.tree.map(lambda s, n: s + n.astype(s.dtype) / self.count, sums, new), mapped

        first, _ = jax.eval_shape(function, jax.tree.map(functools.partial(shaped, item=True), xs))
        zeros = jax.tree.map(lambda x: zeros_like(x, moment_dtype(x.dtype)), first)
        return jax.lax.scan(add, zeros, xs)


def _carriers(leaves: list[Leaf]) -> list[Array | None]:
    """Returns for each leaf the array to differentiate with respect to, and None for None."""
    return [None if leaf is None else carrier(leaf) for leaf in leaves]


def _attached(leaves: list[Leaf], carriers: list[Array | None]) -> list[Leaf]:
    """Returns the leaves, of which those with a carrier are differentiated with respect to it."""
    pairs = zip(leaves, carriers, strict=True)
    return [leaf if carrier is None else attach(leaf, carrier) for leaf, carrier in pairs]


def _floating(x: Activations) -> Activations:
    """Returns the floating-point arrays of a tree, and None in the place of the others."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.floating) else None, x)


def _with_others(floating: Activations, x: Activations) -> Activations:
    """Returns a tree of `_floating`, with the other arrays of ``x`` in their places."""
    return jax.tree.map(lambda own, a: a if own is None else own, floating, x, is_leaf=_is_none)


def _is_none(x: object) -> bool:
    return x is None
