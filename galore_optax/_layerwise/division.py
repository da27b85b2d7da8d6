"""Divides parameters and optimizer state in units, of which one is updated at a time."""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PyTreeDef

from galore_optax._excerpt import Excerpt, Ordinals, Ranks, ordinals, ranks
from galore_optax._jaxpr import Use, dependence, use_of_rows
from galore_optax._layerwise.checks import check_acknowledged, check_independent, check_undivided
from galore_optax._layerwise.settings import Leaf
from galore_optax._quantized import is_quantized
from galore_optax._sharding import shaped
from galore_optax._state import Inspection, inspecting, is_galore_state
from galore_optax._trees import leaves_with_paths, logical, path_name
from galore_optax._types import Params, State, Transformation, Updates


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is updated at a time: one layer of the blocks, or a leaf outside, or some rows of it.

    Attributes:
      chosen: for each leaf of the parameters whether it is in the unit.
      positions: where the leaves of the unit's state are among those of the whole state; those that
        all units share, such as a step counter, are in each of them.
      stacked: for each leaf of the unit's state whether it is cut out of a stack, of layers or of
        rows, along the leading axis.
      treedef: the structure of the unit's state.
      slices: into how many slices of its rows the leaf is cut; 1 for a layer and for a whole leaf.
    """

    chosen: tuple[bool, ...]
    positions: tuple[int, ...]
    stacked: tuple[bool, ...]
    treedef: PyTreeDef
    slices: int = 1

    def leaves(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """Returns the leaves of the parameters that are in the unit, and None for the others."""
        return select(self.chosen, leaves)

    def state(self, state: Sequence[Array]) -> list[Array]:
        """Returns the leaves of the whole state that belong to the unit."""
        return [state[i] for i in self.positions]


class Division:
    """How the parameters and the state of a transformation divide in units.

    All of this is known from shapes. Every leaf of the state of a unit must be found in the whole
    state under the same path; that it has an axis of layers is found by changing their number.

    Attributes:
      layers: the number of layers.
      treedef: the structure of the parameters.
      shapes: the leaves of the parameters as ``jax.ShapeDtypeStruct``, or quantized ones of such.
      placed: the same with their places on a mesh of Explicit axes.
      in_blocks: for each leaf whether it is one of the blocks.
      state_treedef: the structure of the state.
      state_shapes: the shapes of the leaves of the state.
      layered: for each leaf of the state whether it has an axis of layers.
      layer: the unit that is one layer.

    Args:
      tx: the transformation.
      params: the parameters, a mapping of arrays, quantized ones, or their
        ``jax.ShapeDtypeStruct``.
      blocks: the key of the stacked layers.
      micro_batches: how many gradients make one step.

    Raises:
      TypeError: the parameters are not a mapping with that key.
      ValueError: the layers are not stacked alike, or they or the transformation cannot be divided,
        or a wrapper drops what it must pass on.
    """

    def __init__(self, tx: Transformation, params: Params, blocks: str, micro_batches: int):
        if not isinstance(params, Mapping) or blocks not in params:
            found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
            raise TypeError(
                f"params must be a mapping with the stacked layers under {blocks!r}; got {found}"
            )
        self._tx = _with_extra_args(tx)
        self._blocks = blocks
        self._micro_batches = micro_batches
        self.layers = _layers(params[blocks])
        placed = jax.tree.map(shaped, params)
        check_undivided({blocks: placed[blocks]})
        self.placed = jax.tree.leaves(placed, is_leaf=is_quantized)
        # Where they lie says nothing of how the transformation divides.
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), placed)
        self._params = params
        found, self.treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)
        self.shapes = [leaf for _, leaf in found]
        self.in_blocks = [path[0] == jax.tree_util.DictKey(blocks) for path, _ in found]

        inspection = Inspection()
        state = self._init(params, inspection)  # the only one that gets all leaves as they are.
        self._ordinals: Ordinals = tuple(
            item for views in inspection.trees for item in ordinals(views)
        )
        self._ranks: Ranks = tuple(item for views in inspection.trees for item in ranks(views))
        found, self.state_treedef = jax.tree_util.tree_flatten_with_path(state)
        self._seen_by_galore = {view.path for views in inspection.trees for view in views}
        self._paths = {path: i for i, (path, _) in enumerate(found)}
        self.state_shapes = [leaf.shape for _, leaf in found]
        count = 1 if self.layers > 1 else 2
        self.layered = self._find_layered(state, self._init(self._with_layers(count)), count)
        self._check(self._with_layers(1), _of_one_layer(state, self.layered))
        self.layer = self._unit(self.in_blocks)

    def units(self, chosen: Sequence[bool], slice_size: int | None) -> list[Unit]:
        """Returns a unit for each of some leaves.

        Args:
          chosen: for each leaf whether to make a unit of it; only leaves outside of the blocks.
          slice_size: the number of elements of a leaf to update at a time, where the transformation
            treats each row of it by itself; None for all of them.
        """
        units = []
        for i, shape in enumerate(self.shapes):
            if chosen[i]:
                only = [j == i for j in range(len(self.shapes))]
                whole = self._unit(only)
                slices = _slices(shape, slice_size)
                units.append(self._in_slices(whole, i, slices) or whole)
        return units

    def _unit(self, chosen: Sequence[bool]) -> Unit:
        # The state is that of all layers, since whether low_bit keeps a stack in codes depends on
        # the size of all of it.
        state = self._init(self.treedef.unflatten(select(chosen, self.shapes)))
        found, _ = jax.tree_util.tree_flatten_with_path(state)
        missing = [path_name(path) for path, _ in found if path not in self._paths]
        if missing:
            raise ValueError(
                f"the state of some of the parameters has {missing[0]}, which the whole state "
                "has not: layerwise needs a transformation whose state follows the parameters' tree"
            )
        positions = tuple(self._paths[path] for path, _ in found)
        stacked = tuple(self.layered[i] for i in positions)
        one = _of_one_layer(state, stacked)
        return Unit(tuple(chosen), positions, stacked, jax.tree.structure(one))

    def _in_slices(self, unit: Unit, i: int, slices: int) -> Unit | None:
        """Returns the unit of one leaf in slices of its rows, or None where that would differ."""
        if slices == 1:
            return None
        rows = self.shapes[i].shape[0] // slices
        params, state = self._of_rows(unit, i, rows)
        leaves, treedef = jax.tree.flatten(state)
        if len(leaves) != len(unit.positions):
            return None
        stacked = []
        for position, part in zip(unit.positions, leaves, strict=True):
            whole = self.state_shapes[position]
            stacked.append(whole != part.shape)
            # Codes that go on from row to row have no axis of rows, but one that is in slices too.
            if stacked[-1] and whole != (slices * part.shape[0], *part.shape[1:]):
                return None
        twice_params, twice_state = self._of_rows(unit, i, 2 * rows)
        try:
            uses = use_of_rows(
                self._tx.update,
                *(params, state, params),
                rows=[True, *stacked, True],
                twice=(twice_params, twice_state, twice_params),
            )
        except (TypeError, ValueError):  # such as for an array of the leaf's size inside of it
            return None
        wanted = [Use.ROWS, *(Use.ROWS if x else Use.SAME for x in stacked)]
        if jax.tree.leaves(uses) != wanted:
            return None
        return Unit(unit.chosen, unit.positions, tuple(stacked), treedef, slices)

    def _of_rows(self, unit: Unit, i: int, rows: int) -> tuple[Params, State]:
        """Returns what there is of a unit of one leaf that has so many rows: shapes."""
        shape = self.shapes[i]
        leaf = jax.ShapeDtypeStruct((rows, *shape.shape[1:]), shape.dtype)
        params = self.treedef.unflatten(unit.leaves([leaf] * len(self.shapes)))
        return params, self._init(params)

    def divide(self, leaves: Sequence[Leaf]) -> tuple[dict[str, Params], Params]:
        """Returns the parameters without the blocks, and the blocks."""
        params = dict(self.treedef.unflatten(leaves))
        blocks = params.pop(self._blocks)
        return params, blocks

    def update(
        self,
        unit: Unit,
        gradients: Sequence[Array | None],
        state: Sequence[Array],
        params: Sequence[Leaf],
        excerpt: Excerpt,
    ) -> tuple[list[Array | None], list[Array]]:
        """Runs the transformation's update of a unit.

        Args:
          unit: the unit.
          gradients: one for each leaf of the parameters, None for those that are not in the unit.
          state: the leaves of the unit's state, cut out of their stacks.
          params: the parameters, in the same way as the gradients.
          excerpt: says where the unit belongs.

        Returns:
          The updates and the leaves of the next state.
        """
        updates, new_state = self._tx.update(
            self.treedef.unflatten(gradients),
            unit.treedef.unflatten(state),
            self.treedef.unflatten(params),
            excerpt=excerpt,
        )
        return self.treedef.flatten_up_to(updates), unit.treedef.flatten_up_to(new_state)

    def excerpt(
        self, layer: Int[Array, ""] | None, turn: Int[Array, ""] | int, complete: bool
    ) -> Excerpt:
        """Says where a unit belongs among all parameters; see `Excerpt` for the arguments."""
        layer = None if layer is None else jnp.asarray(layer, jnp.int32)
        turn = jnp.asarray(turn, jnp.int32)
        return Excerpt(
            layer,
            turn,
            self.layers,
            self._ordinals,
            self._micro_batches,
            complete,
            self._ranks,
        )

    def state_leaves(self, state: State) -> list[Array]:
        """Returns the leaves of the whole state.

        Raises:
          ValueError: it is not one of this transformation for these parameters.
        """
        leaves, treedef = jax.tree.flatten(state)
        if treedef != self.state_treedef or [x.shape for x in leaves] != self.state_shapes:
            raise ValueError(
                "the state is not one that tx.init makes for these parameters: make a new one with "
                "init, or use the transformation it was made with"
            )
        return leaves

    def check_accumulates(self, state: State) -> None:
        """Raises an error unless all of a transformation averages gradients before an update."""
        names = [path for path, _ in leaves_with_paths(logical(self._params))]
        outside = [f"the parameter {name}" for name in names if name not in self._seen_by_galore]
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_galore_state)
        outside += [f"the state's {path_name(path)}" for path, x in found if not is_galore_state(x)]
        if outside:
            raise ValueError(
                "with accumulation_steps, galore must be all of the transformation that layerwise "
                f"gets, or else what is beside it counts each micro-batch for a step; {outside[0]} "
                "is not in it. Put the rest inside galore, or leave out accumulation_steps."
            )

    def _init(self, params: Params, inspection: Inspection | None = None) -> State:
        # This is a function of its own, so that no earlier trace of tx.init is reused; and it runs
        # without jit, so that none is where the user compiled tx.init.
        with inspecting(inspection or Inspection(ranks=self._ranks)), jax.disable_jit():
            return jax.eval_shape(lambda p: self._tx.init(p), params)

    def _with_layers(self, count: int) -> Params:
        """Returns the shapes of the parameters as if there were ``count`` layers."""

        def resized(array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *array.shape[1:]), array.dtype)

        pairs = zip(self.shapes, self.in_blocks, strict=True)
        return self.treedef.unflatten(
            [jax.tree.map(resized, leaf) if inside else leaf for leaf, inside in pairs]
        )

    def _find_layered(self, state: State, other: State, count: int) -> list[bool]:
        """Returns which leaves of the state have layers: those that another number of them changes.

        Args:
          state: the state for the parameters as they are.
          other: the state for ``count`` layers. It may keep other leaves in codes than ``state``.
          count: another number of layers than there are.
        """
        layered = []
        found = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_quantized)
        others = jax.tree.leaves(other, is_leaf=is_quantized)
        for (path, leaf), smaller in zip(found, others, strict=True):
            arrays, shape = jax.tree.leaves(leaf), leaf.shape
            layered += [shape != smaller.shape] * len(arrays)
            if shape == smaller.shape:
                continue
            leads = shape[:1] == (self.layers,) and smaller.shape == (count, *shape[1:])
            if not leads or any(array.shape[:1] != (self.layers,) for array in arrays):
                raise ValueError(
                    f"the state's {path_name(path)} has the shape {shape} for {self.layers} "
                    f"layers and {smaller.shape} for {count}: layerwise needs the layers on its "
                    "leading axis"
                    + (", also in blocks of codes. " if leads else ". ")
                    + (
                        "low_bit takes a stack of vectors for one matrix: name the layers by its "
                        "stacked, raise its min_size above the elements of that stack, or give it "
                        "a block_size that divides the vectors."
                        if leads
                        else "Name them batch axes of the matrices, by galore's "
                        "weight_dimension_numbers."
                    )
                )
        return layered

    def _check(self, params: Params, state: State) -> None:
        """Raises an error where units cannot be updated one by one, or do not hear which it is."""

        def update(
            gradients: Updates, state: State, params: Params, excerpt: Excerpt
        ) -> tuple[Updates, State]:
            return self._tx.update(gradients, state, params, excerpt=excerpt)

        gradients = logical(params)
        arguments = gradients, state, logical(params), self.excerpt(None, 0, complete=False)
        updates, new_state = dependence(update, *arguments)
        # The only array of this excerpt, the last argument, is its turn.
        check_acknowledged(new_state, len(jax.tree.leaves(arguments)) - 1)
        names = [path for path, _ in leaves_with_paths(gradients)]
        check_independent(updates, new_state, names, self.in_blocks, self.layered)


def select(chosen: Sequence[bool], leaves: Sequence[Leaf]) -> list[Leaf]:
    """Returns the leaves that are chosen, and None for the others."""
    return [leaf if own else None for own, leaf in zip(chosen, leaves, strict=True)]


def _with_extra_args(tx: Transformation) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, made to ignore extra arguments where it cannot take them.

    Optax goes by the type alone, which ``optax.MultiSteps`` does not have though it passes them on.
    """
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values()):
        update = cast(optax.TransformUpdateExtraArgsFn, tx.update)
        return optax.GradientTransformationExtraArgs(tx.init, update)
    return optax.with_extra_args_support(cast(optax.GradientTransformation, tx))


def _slices(leaf: Leaf, size: int | None) -> int:
    """Returns in how many slices of equally many rows to update a leaf, each of about that size."""
    elements, shape = math.prod(leaf.shape), leaf.shape
    if size is None or elements <= 2 * size or is_quantized(leaf):
        return 1
    # Of the numbers of slices that divide the rows, this is the least that makes them small enough.
    least = -(-elements // size)
    return next((n for n in range(least, min(shape[0], 2 * least) + 1) if shape[0] % n == 0), 1)


def _layers(stacked: Params) -> int:
    """Returns the number of layers of the blocks."""
    found = jax.tree_util.tree_leaves_with_path(stacked, is_leaf=is_quantized)
    sizes: dict[int | None, str] = {}
    for path, leaf in found:
        for array in jax.tree.leaves(leaf):
            shape = np.shape(array)
            sizes.setdefault(shape[0] if shape else None, f"{path_name(path)} of shape {shape}")
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            "the blocks must be stacked alike, with the same number of layers on the leading axis "
            f"of each leaf; got {' and '.join(sizes.values()) or 'no leaves'}"
        )
    return next(size for size in sizes if size is not None)


def _of_one_layer(state: State, layered: Sequence[bool]) -> State:
    """Returns the shapes of a state with one layer in the place of all, where it has layers."""
    leaves, treedef = jax.tree.flatten(state)
    one = treedef.unflatten(
        jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) if own else leaf
        for leaf, own in zip(leaves, layered, strict=True)
    )

    def with_item(whole: State, part: State) -> State:
        # Where the layers are no batch axis of what is in codes, they are the first of its item.
        if not is_quantized(whole) or whole.ndim > len(whole.item_shape):
            return part
        is_whole = part.codes.shape == whole.codes.shape
        rows = whole.item_shape[:1] if is_whole else (1,)
        return dataclasses.replace(part, item_shape=(*rows, *whole.item_shape[1:]))

    return jax.tree.map(with_item, state, one, is_leaf=is_quantized)
