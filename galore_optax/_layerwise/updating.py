"""Updates one unit, within the stacks of layers or rows that it is cut out of."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from galore_optax._excerpt import Excerpt
from galore_optax._layerwise.division import Division, Unit
from galore_optax._layerwise.norms import squared_norm, summed
from galore_optax._layerwise.row_major import row_major
from galore_optax._layerwise.settings import MOMENTS, WEIGHTS, Gradient, Leaf, Settings
from galore_optax._layerwise.spaces import is_on_host, to_device, to_host
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import apply_updates
from galore_optax._types import DType


class Updated(NamedTuple):
    """A unit after its update, or the stacks of such after some updates."""

    leaves: list[Leaf]  # one for each leaf of the parameters, None for those not in the unit.
    state: list[Array]  # the leaves of the unit's state.
    update_square: Float[Array, ""]  # the square of the norm of the update.


class _Call(NamedTuple):
    """What the update of a unit needs beside the unit's state."""

    gradients: list[Gradient | None]
    leaves: list[Leaf]  # the parameters.
    factor: Float[Array, ""] | None  # the factor that clips the gradients, or None.
    excerpt: Excerpt
    key: PRNGKeyArray | None  # the key of what is rounded at random.


@dataclasses.dataclass(frozen=True)
class Updater:
    """Updates units.

    Attributes:
      settings: the arguments of `galore_optax.layerwise`.
      division: how the parameters and the state divide.
      dtype: the dtype in which norms are computed.
      key: the key of what is rounded at random in this step, or None.
      complete: whether the gradients are the mean of those of all micro-batches.
      write: whether to change the parameters, beside the state.
    """

    settings: Settings
    division: Division
    dtype: DType
    key: PRNGKeyArray | None
    complete: bool
    write: bool

    def layer(
        self,
        layer: Int[Array, ""],
        params: list[Leaf],
        gradients: list[Array | None],
        factor: Float[Array, ""] | None,
        old: list[Array],
        stacks: Updated,
    ) -> Updated:
        """Updates a layer in place.

        Args:
          layer: the index of the layer.
          params: the parameters of the layer.
          gradients: the gradients of the layer.
          factor: the factor that clips the gradients, or None.
          old: the state of all layers before the update of any.
          stacks: all layers, those behind this one already updated.

        Returns:
          The stacks with this layer updated.
        """
        gradients = jax.tree.map(lambda x: x[None], gradients)
        # Codes are read again: if they were kept from the gradient on, they would take memory in
        # between.
        late, gradients = jax.lax.optimization_barrier((layer, gradients))
        # What lies in the memory of the machine has been fetched, or is while the gradient is
        # computed.
        early = self.settings.offloads(MOMENTS)
        params = [
            jax.tree.map(lambda x: _cut(x, late, self.division.layers), stack)
            if is_quantized(stack) and not self.settings.offloads(WEIGHTS)
            else jax.tree.map(lambda x: x[None], own)
            for stack, own in zip(stacks.leaves, params, strict=True)
        ]
        excerpt = self.division.excerpt(late, late, self.complete)
        call = _Call(gradients, params, factor, excerpt, self._key(late))
        place = layer if early else late
        return self._in_place(self.division.layer, call, old, stacks, place, self.division.layers)

    def outside(
        self,
        unit: Unit,
        leaves: list[Leaf],
        gradients: list[Gradient | None],
        factor: Float[Array, ""] | None,
        old: list[Array],
    ) -> Updated:
        """Updates a leaf outside of the blocks, as a whole or in slices of its rows."""
        place = unit.chosen.index(True)
        turn = self.division.layers + place
        excerpt, key = self.division.excerpt(None, turn, self.complete), self._key(turn)
        if unit.slices == 1:
            return self._update(unit, _Call(gradients, leaves, factor, excerpt, key), old)
        count = unit.slices

        def body(i: Int[Array, ""], new: Updated) -> Updated:
            own, params = jax.tree.map(lambda x: _cut(x, i, count), (gradients, new.leaves))
            own_key = None if key is None else jax.random.fold_in(key, i)
            call = _Call(own, params, factor, excerpt, own_key)
            return self._in_place(unit, call, old, new, i, count)

        first = Updated(leaves, old, jnp.zeros([], self.dtype))
        return jax.lax.fori_loop(0, unit.slices, body, first)

    def _in_place(
        self,
        unit: Unit,
        call: _Call,
        old: list[Array],
        stacks: Updated,
        i: Int[Array, ""],
        count: int,
    ) -> Updated:
        """Updates the i-th of ``count`` slices of stacks within them."""
        # All slices get the old value of what they share, such as a step counter.
        own = [
            _cut(stack, i, count) if is_stacked else shared
            for stack, shared, is_stacked in zip(stacks.state, old, unit.stacked, strict=True)
        ]
        new = self._update(unit, call, own)
        state = [
            _paste(stack, part, i) if is_stacked else part
            for stack, part, is_stacked in zip(stacks.state, new.state, unit.stacked, strict=True)
        ]
        leaves = stacks.leaves
        if self.write:
            leaves = jax.tree.map(lambda stack, part: _paste(stack, part, i), leaves, new.leaves)
        return Updated(leaves, state, stacks.update_square + new.update_square)

    def _update(self, unit: Unit, call: _Call, state: list[Array]) -> Updated:
        """Returns the unit after its update."""
        leaves = call.leaves

        def scaled(gradient: Gradient, leaf: Leaf) -> Array:
            whole = summed(gradient)
            whole = whole if call.factor is None else whole * call.factor
            return whole.astype(leaf.dtype)

        pairs = zip(call.gradients, leaves, strict=True)
        gradients = [None if g is None else scaled(g, leaf) for g, leaf in pairs]
        updates, new_state = self.division.update(unit, gradients, state, leaves, call.excerpt)
        if self.write:
            leaves = apply_updates(
                leaves, updates, call.key, round_bfloat16=self.settings.round_bfloat16
            )
        return Updated(leaves, new_state, squared_norm(updates, self.dtype))

    def _key(self, turn: Int[Array, ""] | int) -> PRNGKeyArray | None:
        return None if self.key is None else jax.random.fold_in(self.key, turn)


def _cut(stack: Array, i: Int[Array, ""], count: int) -> Array:
    """Returns the i-th of so many slices of a stack along its leading axis."""
    size = stack.shape[0] // count
    return row_major(to_device(jax.lax.dynamic_slice_in_dim(stack, i * size, size)))


def _paste(stack: Array, part: Array, i: Int[Array, ""]) -> Array:
    """Returns the stack with another i-th slice."""
    start, part = i * part.shape[0], row_major(part)
    # What is written must lie in the memory of what it is written into.
    part = to_host(part) if is_on_host(stack) else part
    return jax.lax.dynamic_update_slice_in_dim(stack, part, start, 0)
