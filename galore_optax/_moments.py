"""Takes the moments of projected leaves out of the inner state, and puts them back into it."""

import dataclasses
from collections.abc import Collection

import jax
import numpy as np
from jaxtyping import PyTree, PyTreeDef

from galore_optax._leaves import Leaves
from galore_optax._ownership import moments_of, ownership
from galore_optax._quantized import is_quantized
from galore_optax._transport import Held
from galore_optax._types import State
from galore_optax._view import MatrixView


@dataclasses.dataclass
class InnerMoments:
    """An inner state, of which the moments of one leaf after the other are replaced.

    Attributes:
      leaves: the leaves of the state, a quantized array being one.
      structure: the structure of the state.
      positions: where the moments of each leaf of the parameters are among the leaves, by role.
    """

    leaves: list[PyTree]
    structure: PyTreeDef
    positions: list[dict[str, list[int]]]

    @classmethod
    def of(cls, state: State, params: Leaves, roles: Collection[str]) -> "InnerMoments":
        """Finds the moments of all projected leaves.

        Args:
          state: the state of the inner transformation.
          params: the leaves of the update.
          roles: the roles of the moments to find; others stay where they are.
        """
        leaves, treedef = jax.tree.flatten(state, is_leaf=is_quantized)
        positions: list[dict[str, list[int]]] = [{} for _ in params.views]
        if roles:
            owned = ownership(state, params.structure.unflatten(params.gradients), params.views)
            for i, view in params.projected:
                for role, found in moments_of(owned, i).items():
                    # A factored second moment, for one, has no coordinates that could be moved.
                    whole = [k for k in found if np.shape(leaves[k]) == view.low_rank_shape]
                    if role in roles and whole:
                        positions[i][role] = whole
                        _check_items([leaves[k] for k in whole], view)
        return cls(leaves, treedef, positions)

    def of_leaf(self, i: int) -> Held:
        """Returns the moments of a leaf of the parameters, as the state holds them."""
        return {role: [self.leaves[k] for k in found] for role, found in self.positions[i].items()}

    def replace(self, i: int, moments: Held) -> None:
        """Puts other moments of a leaf in the place of those that are there."""
        for role, found in self.positions[i].items():
            for k, moment in zip(found, moments[role], strict=True):
                self.leaves[k] = moment

    @property
    def state(self) -> State:
        """The inner state with the moments that are there now."""
        return self.structure.unflatten(self.leaves)


def _check_items(moments: list[PyTree], view: MatrixView) -> None:
    """Raises for moments in codes whose blocks straddle the matrices of a stack."""
    item = view.low_rank_shape[len(view.batch) :]
    for moment in moments:
        if is_quantized(moment) and moment.item_shape != item:
            raise ValueError(
                f"the moments of {view.path!r} are in codes of items {moment.item_shape}, and one "
                f"matrix has moments of shape {item}, which must be moved by themselves. Give "
                "low_bit a stacked that names the batch axes, or a larger min_size."
            )
