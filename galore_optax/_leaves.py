"""Gathers the leaves of what init or update was given: how each is seen, and where it lies."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, PyTreeDef

from galore_optax._ownership import ownership
from galore_optax._placement import Placement, following, placement
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import dequantize_params
from galore_optax._state import leaves_like
from galore_optax._subspace import Subspace
from galore_optax._types import Params, State, Updates
from galore_optax._view import LeafView, MatrixView, moment_dtype, wide


@dataclasses.dataclass(frozen=True)
class Leaves:
    """The leaves of parameters, or of gradients and parameters; each list has one entry per leaf.

    Attributes:
      views: how each leaf is seen.
      gradients: the gradients; at ``init`` the parameters.
      weights: the parameters, or None where there are none.
      placements: where each projected leaf lies on a mesh with Explicit axes; None elsewhere.
      structure: the structure of the tree, which those of subspaces and of what the inner
        transformation sees have too.
    """

    views: list[LeafView]
    gradients: list[PyTree]
    weights: list[PyTree] | None
    placements: list[Placement | None]
    structure: PyTreeDef

    @classmethod
    def of_params(cls, views: Sequence[LeafView], params: Params) -> "Leaves":
        """Returns the leaves that ``init`` is given, and that are seen so."""
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
        return cls._of(views, leaves, None, treedef)

    @classmethod
    def of_update(
        cls, views: Sequence[LeafView], updates: Updates, params: Params | None
    ) -> "Leaves":
        """Returns the leaves that ``update`` is given, and that are seen so.

        Raises:
          ValueError: gradients and parameters have other structures or shapes.
        """
        gradients, treedef = jax.tree.flatten(updates)
        weights = None if params is None else leaves_like(treedef, params, "params")
        leaves = cls._of(views, [jnp.asarray(g) for g in gradients], weights, treedef)
        for view, weight in zip(leaves.views, weights or (), strict=False):
            if np.shape(weight) != view.shape:
                raise ValueError(
                    f"params and gradients must have the same shapes; {view.path!r} has shape "
                    f"{np.shape(weight)} in params and {view.shape} in the gradients"
                )
        return leaves

    @classmethod
    def _of(
        cls,
        views: Sequence[LeafView],
        gradients: list[PyTree],
        weights: list[PyTree] | None,
        treedef: PyTreeDef,
    ) -> "Leaves":
        placements = [placement(v, x) for v, x in zip(views, weights or gradients, strict=True)]
        return cls(list(views), gradients, weights, placements, treedef)

    def following(self, subspaces: Sequence[Subspace], state: State) -> "Leaves":
        """Returns the leaves with placements by which the state stays where it is.

        Args:
          subspaces: the subspaces of all leaves.
          state: the state of the inner transformation.
        """
        if not any(self.placements):
            return self
        arrays = jax.tree.leaves(state, is_leaf=is_quantized)
        own: list[list[PyTree]] = [[] for _ in self.views]
        tree = self.structure.unflatten(self.gradients)
        for array, owned in zip(arrays, ownership(state, tree, self.views), strict=True):
            if owned.owner is not None:
                own[owned.owner].append(array)
        placements = [
            place and following(place, subspace, moments)
            for place, subspace, moments in zip(self.placements, subspaces, own, strict=True)
        ]
        return dataclasses.replace(self, placements=placements)

    @property
    def projected(self) -> list[tuple[int, MatrixView]]:
        """The positions of the leaves that are projected, and their views."""
        return [(i, v) for i, v in enumerate(self.views) if isinstance(v, MatrixView)]

    @property
    def likes(self) -> list[PyTree]:
        """The leaves whose dtype and sharding updates have: parameters, or else gradients."""
        return self.gradients if self.weights is None else self.weights


def stand_in(view: LeafView, leaf: PyTree) -> PyTree:
    """Returns what the inner ``init`` sees of a leaf.

    It sees zeros of the shape of R, or the leaf at full size in the dtype of the moments.
    """
    dtype = moment_dtype(view.dtype)
    if isinstance(view, MatrixView):
        return jnp.zeros(view.low_rank_shape, dtype)
    leaf = dequantize_params(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return wide(leaf)
