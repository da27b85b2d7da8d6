"""Parameters and optimizer state in parts: one layer of the blocks, and what is around them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._dependence import dependence
from galore_optax._matrix import leaves_with_paths, logical
from galore_optax._part import Layer, Part, Turn, updating
from galore_optax._quantized import is_quantized
from galore_optax._rows import Use, use_of_rows
from galore_optax._sharding import is_explicit
from galore_optax._state import Inspection, inspecting, is_galore_state
from galore_optax._transformation import turns


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some leaves of the parameters and the leaves of the state that belong to them.

    Attributes:
      chosen: which leaves of the parameters.
      positions: of its leaves among those of the whole state; shared ones are in several pieces.
      stacked: which of its state's leaves have what is updated at a time, a layer or some rows,
        on their leading axis.
      treedef: of the state of what is updated at a time.
      slices: in how many slices of its rows a leaf is updated.
    """

    chosen: tuple[bool, ...]
    positions: tuple[int, ...]
    stacked: tuple[bool, ...]
    treedef: Any
    slices: int = 1


class Parts:
    """How a transformation's parameters and state divide.

    All of this is known from shapes. Every leaf of the state of a part must be found in the whole
    state under the same path; that it has an axis of layers is found by changing their number.

    Args:
      tx: the transformation.
      params: a mapping, of arrays, quantized ones, or their ``jax.ShapeDtypeStruct``.
      blocks: the key of the stacked layers.

    Raises:
      TypeError: the parameters are not a mapping with that key.
      ValueError: the layers are not stacked alike, the transformation cannot be divided, or the
        parameters are on a mesh of Explicit axes.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, blocks: str):
        if not isinstance(params, Mapping) or blocks not in params:
            found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise TypeError(
                f"params must be a mapping with the stacked layers under {blocks!r}; got {found}"
            )
        if is_explicit(params):
            raise ValueError(
                "layerwise needs parameters on a mesh of Auto axes; these are on one of Explicit "
                "axes. Make it with axis_types=(jax.sharding.AxisType.Auto,) * number_of_axes"
            )
        self._tx = optax.with_extra_args_support(tx)
        self._blocks = blocks
        self.layers = _layers(params[blocks])
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), params)
        self._params = params
        found, self.treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
        self.shapes = [leaf for _, leaf in found]
        self.in_blocks = [path[0] == jax.tree_util.DictKey(blocks) for path, _ in found]

        inspection = Inspection()
        state = self._init(params, inspection)
        # By path, the places of all matrices among those of their galore.
        self.turns: dict[str, Turn] = {}
        for views in inspection.trees:
            self.turns |= turns(views)
        found, self.state_treedef = jax.tree_util.tree_flatten_with_path(state)
        self._seen_by_galore = {view.path for views in inspection.trees for view in views}
        self._paths = {path: i for i, (path, _) in enumerate(found)}
        self._state_shapes = [leaf.shape for _, leaf in found]
        count = 1 if self.layers > 1 else 2
        others = jax.tree.leaves(self._init(self._with_layers(count)))
        self.layered = [
            self._is_layered(path, leaf.shape, other.shape, count)
            for (path, leaf), other in zip(found, others, strict=True)
        ]
        self._check_independent(self._with_layers(1))
        self.layer = self._piece(self.in_blocks, self._with_layers(1))

    def pieces(self, chosen: Sequence[bool], slice_size: int | None) -> list[Piece]:
        """A part for each of some leaves.

        Args:
          chosen: the leaves, outside of the blocks.
          slice_size: elements of a leaf to update at a time, where the transformation treats each
            row of it by itself; None for all of them.
        """
        pieces = []
        for i, shape in enumerate(self.shapes):
            if chosen[i]:
                only = [j == i for j in range(len(self.shapes))]
                whole = self._piece(only, self._params)
                slices = _slices(shape, slice_size)
                pieces.append(self._in_slices(whole, i, slices) or whole)
        return pieces

    def _piece(self, chosen: Sequence[bool], params: Any) -> Piece:
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        state = self._init(self.tree(chosen, leaves))
        found, treedef = jax.tree_util.tree_flatten_with_path(state)
        missing = [_name(path) for path, _ in found if path not in self._paths]
        if missing:
            raise ValueError(
                f"the state of a part of the parameters has {missing[0]}, which the whole state "
                "has not: layerwise needs a transformation whose state follows the parameters' tree"
            )
        positions = tuple(self._paths[path] for path, _ in found)
        stacked = tuple(self.layered[i] for i in positions)
        return Piece(tuple(chosen), positions, stacked, treedef)

    def _in_slices(self, piece: Piece, i: int, slices: int) -> Piece | None:
        """The part of one leaf in slices of its rows, or None where that is not the same."""
        if slices == 1:
            return None
        rows = self.shapes[i].shape[0] // slices
        leaf = jax.ShapeDtypeStruct((rows, *self.shapes[i].shape[1:]), self.shapes[i].dtype)
        params = self.tree(piece.chosen, [leaf] * len(self.shapes))
        state = self._init(params)
        leaves, treedef = jax.tree.flatten(state)
        if len(leaves) != len(piece.positions):
            return None
        stacked = []
        for position, part in zip(piece.positions, leaves, strict=True):
            whole = self._state_shapes[position]
            stacked.append(whole != part.shape)
            if stacked[-1] and whole != (rows * slices, *part.shape[1:]):
                return None
        is_row = [True, *stacked, True]
        try:
            uses = use_of_rows(self._tx.update, params, state, params, rows=is_row)
        except (TypeError, ValueError):  # such as for an array of the leaf's size inside of it
            return None
        wanted = [Use.ROWS, *(Use.ROWS if x else Use.SAME for x in stacked)]
        if jax.tree.leaves(uses) != wanted:
            return None
        return Piece(piece.chosen, piece.positions, tuple(stacked), treedef, slices)

    def tree(self, chosen: Sequence[bool], leaves: Sequence[Any]) -> Any:
        """Parameters with None in the place of those that are not chosen."""
        pairs = zip(chosen, leaves, strict=True)
        return self.treedef.unflatten([leaf if own else None for own, leaf in pairs])

    def divide(self, leaves: Sequence[Any]) -> tuple[dict[str, Any], Any]:
        """The parameters without the blocks, and the blocks."""
        params = dict(self.treedef.unflatten(leaves))
        blocks = params.pop(self._blocks)
        return params, blocks

    def update(
        self,
        piece: Piece,
        gradients: Sequence[Any],
        state: Sequence[jax.Array],
        params: Sequence[Any],
        *,
        layer: jax.Array | None,
        turn: jax.Array | int,
        micro_batches: int,
        complete: bool,
    ) -> tuple[list[Any], list[jax.Array]]:
        """The transformation's update of a part.

        Args:
          piece: the part.
          gradients: one for each leaf of the parameters, None for those that are not chosen.
          state: the leaves of the part's state, of one layer where they are layered.
          params: like the gradients.
          layer: the layer's index, or None of other parts.
          turn: see `Part`.
          micro_batches: see `Part`.
          complete: see `Part`.

        Returns:
          The updates and the leaves of the next state.
        """
        place = None if layer is None else Layer(layer, self.layers)
        with updating(Part(self.turns, place, turn, micro_batches, complete)):
            updates, new_state = self._tx.update(
                self.treedef.unflatten(gradients),
                piece.treedef.unflatten(state),
                self.treedef.unflatten(params),
            )
        return self.treedef.flatten_up_to(updates), piece.treedef.flatten_up_to(new_state)

    def state_leaves(self, state: Any) -> list[jax.Array]:
        """The leaves of the whole state.

        Raises:
          ValueError: it is not one of this transformation for these parameters.
        """
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.state_treedef or [x.shape for x in leaves] != self._state_shapes:
            raise ValueError(
                "the state is not one that tx.init makes for these parameters: make a new one with "
                "init, or use the transformation it was made with"
            )
        return leaves

    def check_accumulates(self, state: Any) -> None:
        """Raises where not all of a transformation averages gradients before it makes an update."""
        names = [path for path, _ in leaves_with_paths(logical(self._params))]
        outside = [f"the parameter {name}" for name in names if name not in self._seen_by_galore]
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_galore_state)
        outside += [f"the state's {_name(path)}" for path, x in found if not is_galore_state(x)]
        if outside:
            raise ValueError(
                "with accumulation_steps, galore must be all of the transformation that layerwise "
                f"gets, or else what is beside it counts each micro-batch for a step; {outside[0]} "
                "is not in it. Put the rest inside galore, or leave out accumulation_steps."
            )

    def _init(self, params: Any, inspection: Inspection | None = None) -> Any:
        with inspecting(inspection or Inspection()):
            # A function of its own, so that no earlier trace of tx.init is reused.
            return jax.eval_shape(lambda p: self._tx.init(p), params)

    def _with_layers(self, count: int) -> Any:
        def resized(array: Any) -> Any:
            return jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)

        pairs = zip(self.shapes, self.in_blocks, strict=True)
        return self.treedef.unflatten(
            [jax.tree.map(resized, leaf) if inside else leaf for leaf, inside in pairs]
        )

    def _is_layered(
        self, path: Any, shape: tuple[int, ...], other: tuple[int, ...], count: int
    ) -> bool:
        if shape == other:
            return False
        if shape[:1] != (self.layers,) or other != (count, *shape[1:]):
            in_codes = _name(path[-1:]) in ("codes", "scales", "zeros")
            raise ValueError(
                f"the state's {_name(path)} has the shape {shape} for {self.layers} layers and "
                f"{other} for {count}: layerwise needs the layers on its leading axis. "
                + (
                    "low_bit takes a stack of vectors for one matrix: raise its min_size above the "
                    "elements of that stack, or its block_size so that it divides the vectors."
                    if in_codes
                    else "Name them batch axes of the matrices, by galore's "
                    "weight_dimension_numbers."
                )
            )
        return True

    def _check_independent(self, params: Any) -> None:
        """Raises where the update of a leaf, or its state, depends on the gradient of another."""
        gradients, state = logical(params), self._init(params)
        updates, new_state = dependence(self._tx.update, gradients, state, logical(params))
        names = [path for path, _ in leaves_with_paths(gradients)]
        is_set = {"is_leaf": lambda x: isinstance(x, frozenset)}

        def check(what: str, depends: frozenset[int], allowed: int) -> None:
            of = [names[i] for i in sorted(depends) if i < len(names)]
            if len(of) == 1 and not allowed:
                raise ValueError(
                    f"{what} depends on the gradients of {of[0]} and has no axis of layers: "
                    "layerwise needs a state of its own for each layer"
                )
            if len(of) > allowed:
                raise ValueError(
                    f"the transformation needs all gradients at once: {what} depends on the "
                    f"gradient of {' and '.join(of[:2])}. Clip by layerwise(clip_norm=...) "
                    "instead of optax.clip_by_global_norm; leave out optax.apply_if_finite and "
                    "whatever else measures the whole gradient."
                )

        for name, depends in zip(names, jax.tree.leaves(updates, **is_set), strict=True):
            check(f"the update of {name}", depends, 1)
        for (path, depends), layered in zip(
            jax.tree_util.tree_leaves_with_path(new_state, **is_set), self.layered, strict=True
        ):
            in_blocks = any(i < len(names) and self.in_blocks[i] for i in depends)
            check(f"the state's {_name(path)}", depends, 0 if in_blocks and not layered else 1)


def _slices(leaf: Any, size: int | None) -> int:
    """In how many slices of equal numbers of rows to update a leaf, each of about that size."""
    elements, shape = math.prod(leaf.shape), leaf.shape
    if size is None or elements <= 2 * size or is_quantized(leaf):
        return 1
    # The fewest slices that are small enough, of those that divide the rows.
    least = -(-elements // size)
    return next((n for n in range(least, min(shape[0], 2 * least) + 1) if shape[0] % n == 0), 1)


def _layers(stacked: Any) -> int:
    found = jax.tree_util.tree_leaves_with_path(stacked, is_leaf=is_quantized)
    sizes: dict[int | None, str] = {}
    for path, leaf in found:
        for array in jax.tree.leaves(leaf):
            shape = jnp.shape(array)
            sizes.setdefault(shape[0] if shape else None, f"{_name(path)} of shape {shape}")
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            "the blocks must be stacked alike, with the same number of layers on the leading axis "
            f"of each leaf; got {' and '.join(sizes.values()) or 'no leaves'}"
        )
    return next(size for size in sizes if size is not None)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
