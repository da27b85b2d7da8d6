"""Goes forward through all layers and back, and updates each unit when its gradient is there."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from galore_optax._layerwise.division import Unit, select
from galore_optax._layerwise.norms import clip_factor, norm_dtype, squared_norm, summed
from galore_optax._layerwise.passes import Gradients, Passes
from galore_optax._layerwise.plan import Plan, union
from galore_optax._layerwise.settings import Activations, Batch, Gradient, Leaf
from galore_optax._layerwise.updating import Updated, Updater

Metrics: TypeAlias = dict[str, Float[Array, ""]]


class Trained(NamedTuple):
    """The parameters and the state, some of their units updated."""

    leaves: list[Leaf]
    state: list[Array]
    update_square: Float[Array, ""]  # the square of the norm of these updates.

    def take(self, unit: Unit, new: Updated) -> "Trained":
        """Returns the same with a unit as it is after its update."""
        triples = zip(unit.chosen, new.leaves, self.leaves, strict=True)
        leaves = [mine if own else old for own, mine, old in triples]
        state = list(self.state)
        for i, leaf in zip(unit.positions, new.state, strict=True):
            state[i] = leaf
        return Trained(leaves, state, self.update_square + new.update_square)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Goes forward through all layers and back, for some micro-batches of a layer at a time.

    Attributes:
      plan: which units there are, and when each is updated.
      leaves: the parameters.
      state: the leaves of the whole state.
      batch: a batch, or ``count`` of them on a leading axis.
      count: how many micro-batches there are in the sweep.
      complete: whether these are all micro-batches of the step.
      key: the key of what is rounded at random, or None.
      write: whether to change the parameters, beside the state.
    """

    plan: Plan
    leaves: list[Leaf]
    state: list[Array]
    batch: Batch
    count: int
    complete: bool
    key: PRNGKeyArray | None
    write: bool = True

    def run(self) -> tuple[list[Leaf], list[Array], Metrics]:
        """Returns the next parameters and state, and the metrics."""
        plan, settings = self.plan, self.plan.settings
        x, inputs = self._passes.forward(self.leaves, self.batch)
        (loss, of_head), dx = self._passes.head(self.leaves, plan.of_head, x, self.batch)
        before = select(union(plan.before, len(self.leaves)), of_head)
        square = self._square(before)
        after: Sequence[Gradient | None] | None = None
        factor = None
        if settings.clips_by("global"):
            first_dx, of_layers = self._measure(inputs, x, dx)
            # It waits until the layers are updated, which takes less as one array.
            after = _whole(self._embed(of_head, first_dx))
            factor = self._clip_factor(square + of_layers + self._square(after))

        new = Trained(self.leaves, self.state, self._zero)
        new = self._update_outside(new, plan.before, before, factor)
        dx, of_layers, blocks = self._update_layers(inputs, x, dx, factor)
        new = new.take(plan.division.layer, blocks)
        after = self._embed(of_head, dx) if after is None else after
        new = self._update_outside(new, plan.after, after, factor)
        metrics = {
            "loss": loss.astype(self._zero.dtype),
            "grad_norm": jnp.sqrt(square + of_layers + self._square(after)),
            "update_norm": jnp.sqrt(new.update_square),
        }
        return new.leaves, new.state, metrics

    def _embed(self, of_head: Gradients, dx: Activations) -> list[Gradient | None]:
        """Returns the gradient of what the embedding uses, beside the head's part of it.

        The two are added up where they are used: of a table slice by slice, so that the sum takes
        no memory of its own.
        """
        chosen = union(self.plan.after, len(self.leaves))
        of_embed = self._passes.embed(self.leaves, chosen, dx, self.batch)
        pairs = zip(of_embed, select(chosen, of_head), strict=True)
        return [a if a is None or b is None else (a, b) for a, b in pairs]

    def _measure(
        self, inputs: PyTree, x: Activations, dx: Activations
    ) -> tuple[Activations, Float[Array, ""]]:
        """Goes through the layers and updates none of them.

        Returns:
          The gradient of the first layer's input, and the square of the norm of the gradients.
        """
        stacked = self.plan.division.layer.leaves(self.leaves)

        def visit(
            _: Int[Array, ""], __: list[Leaf], gradients: Gradients, square: Float[Array, ""]
        ) -> Float[Array, ""]:
            return square + self._square(gradients)

        return self._passes.layers(inputs, x, dx, lambda _: stacked, visit, self._zero)

    def _update_layers(
        self,
        inputs: PyTree,
        x: Activations,
        dx: Activations,
        factor: Float[Array, ""] | None,
    ) -> tuple[Activations, Float[Array, ""], Updated]:
        """Updates the blocks, layer by layer, in place.

        Returns:
          The gradient of the first layer's input, the square of the norm of the gradients, and the
          blocks after their update.
        """
        unit = self.plan.division.layer
        old = unit.state(self.state)

        def visit(
            layer: Int[Array, ""],
            params: list[Leaf],
            gradients: Gradients,
            carry: tuple[Float[Array, ""], Updated],
        ) -> tuple[Float[Array, ""], Updated]:
            square, new = carry
            own = self._square(gradients)
            scale = self._clip_factor(own) if self.plan.settings.clips_by("layer") else factor
            return square + own, self._updater.layer(layer, params, gradients, scale, old, new)

        first = self._zero, Updated(unit.leaves(self.leaves), old, self._zero)
        dx, (square, new) = self._passes.layers(
            inputs, x, dx, lambda carry: carry[1].leaves, visit, first
        )
        return dx, square, new

    def _update_outside(
        self,
        trained: Trained,
        units: list[Unit],
        gradients: Sequence[Gradient | None],
        factor: Float[Array, ""] | None,
    ) -> Trained:
        """Updates leaves outside of the blocks."""
        if self.plan.settings.clips_by("layer"):
            factor = self._clip_factor(self._square(gradients))
        for unit in units:
            # Each unit gets the old value of what it shares with others, such as a step counter.
            leaves, state = unit.leaves(self.leaves), unit.state(self.state)
            new = self._updater.outside(unit, leaves, unit.leaves(gradients), factor, state)
            trained = trained.take(unit, new)
        return trained

    @property
    def _passes(self) -> Passes:
        return Passes(self.plan.settings, self.plan.division, self.count)

    @property
    def _updater(self) -> Updater:
        settings, division = self.plan.settings, self.plan.division
        return Updater(settings, division, self._zero.dtype, self.key, self.complete, self.write)

    @property
    def _zero(self) -> Float[Array, ""]:
        """A norm that is zero, in the dtype in which norms are computed."""
        return jnp.zeros([], norm_dtype(self.leaves))

    def _square(self, gradients: Sequence[Gradient | None]) -> Float[Array, ""]:
        return squared_norm(_whole(gradients), self._zero.dtype)

    def _clip_factor(self, square: Float[Array, ""]) -> Float[Array, ""]:
        return clip_factor(square, self.plan.settings.clip_norm)


def _whole(gradients: Sequence[Gradient | None]) -> list[Array | None]:
    return [None if gradient is None else summed(gradient) for gradient in gradients]
