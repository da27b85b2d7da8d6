"""One update of every leaf, where projector, refresh and inner transformation meet."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import projectors
from galore_optax._accumulate import accumulate, init_accumulator, is_first
from galore_optax._inner import Inner
from galore_optax._matrix import LeafView, MatrixView, Selection, moment_dtype, structure
from galore_optax._part import Layer, Part, Turn, current_part
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import check_gradients, dequantize_params
from galore_optax._refresh import Timing, refresh_leaf
from galore_optax._sharding import check_mesh, in_auto, placement, reshard
from galore_optax._state import (
    GaloreState,
    inspection_in_progress,
    leaves_like,
    subspaces_of_tree,
    tree_of_subspaces,
)
from galore_optax._subspace import (
    ABSENT,
    Bases,
    Sides,
    Subspace,
    captured_energy,
    init_subspace,
    project,
    project_back,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `galore_optax.galore`, checked."""

    selection: Selection
    projector: projectors.Projector
    projector_dtype: str | None
    timing: Timing
    scale: float | jax.Array
    accumulation_steps: int
    seed: int | jax.Array
    diagnostics: bool

    def __post_init__(self):
        self.timing.check(self.projector)

    def init_subspace(self, view: LeafView) -> Subspace:
        if not isinstance(view, MatrixView):
            return Subspace()
        lazy = self.timing.lazy
        queue = lazy.queue if lazy else 0
        return init_subspace(self.sides(view, self.seed), queue, self.diagnostics)

    def sides(self, view: MatrixView, seed: int | jax.Array, layer: Layer | None = None) -> Sides:
        return Sides(view, self.projector, self.projector_dtype, seed, layer)


def transformation(
    inner: Inner, settings: Settings, caution: str | None
) -> optax.GradientTransformationExtraArgs:
    """The transformation itself; its first ``init`` warns of ``caution``."""
    selection = settings.selection
    warned = False

    def init_fn(params: optax.Params) -> GaloreState:
        nonlocal warned
        check_mesh(params)
        views = selection.views(params)
        inspection = inspection_in_progress()
        if inspection is not None:
            inspection.trees.append(views)
            if inspection.without_galore:
                # A GaloreState all the same, so that the inner state is found where it always is.
                return GaloreState(ABSENT, Subspace(), inner.init(dequantize_params(params)))
        subspaces = [settings.init_subspace(view) for view in views]
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        low_rank = [_low_rank_stand_in(v, x) for v, x in zip(views, leaves, strict=True)]
        for i, (view, leaf) in enumerate(zip(views, leaves, strict=True)):
            if (place := placement(view, leaf)) is not None:
                low_rank[i] = reshard(low_rank[i], place.low_rank)
                subspaces[i] = reshard(subspaces[i], place.subspace(subspaces[i]))
        low_rank = _inner_structure(params, views).unflatten(low_rank)
        state = GaloreState(
            step=jnp.zeros([], jnp.int32),
            subspace=tree_of_subspaces(_subspace_structure(params, views), subspaces),
            inner=inner.init(low_rank, [isinstance(view, MatrixView) for view in views]),
            accumulator=init_accumulator(low_rank, settings.accumulation_steps),
        )
        if inspection is None and not warned and views:
            warned = True
            selection.warn(views, stacklevel=2)
            inner.warn(low_rank, state.inner, views, stacklevel=2)
            if caution is not None:
                warnings.warn(caution, UserWarning, stacklevel=2)
        return state

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, GaloreState]:
        if not (refresh is None or isinstance(refresh, bool)):
            raise TypeError(
                "refresh must be None or a Python bool, since it decides what is compiled; "
                f"got {refresh!r}"
            )
        check_gradients(updates)
        check_mesh((updates, state, params))
        gradients, treedef = jax.tree.flatten(updates)
        gradients = [jnp.asarray(g) for g in gradients]
        views = selection.views(updates)
        subspace_treedef = _subspace_structure(updates, views)
        subspaces = subspaces_of_tree(subspace_treedef, views, state, settings.init_subspace)
        weights = [] if params is None else leaves_like(treedef, params, "params")
        weights = [jnp.asarray(w) for w in weights]
        for view, weight in zip(views, weights, strict=False):
            if weight.shape != view.shape:
                raise ValueError(
                    f"params and gradients must have the same shapes; {view.path!r} has shape "
                    f"{weight.shape} in params and {view.shape} in the gradients"
                )
        inner_treedef = _inner_structure(updates, views)
        gap = settings.timing.gap(state.step)
        part = current_part() or Part(turns(views), None, 0, settings.accumulation_steps, False)

        low_rank = [g.astype(moment_dtype(g.dtype)) for g in gradients]
        bases = [Bases(None, None)] * len(views)
        step = state.step
        likes = gradients if params is None else weights
        places = [placement(view, like) for view, like in zip(views, likes, strict=True)]

        def down(
            view: MatrixView,
            gradient: jax.Array,
            subspace: Subspace,
            step: jax.Array,
            gap: jax.Array,
            seed: int | jax.Array,
            allowed: jax.Array | bool,
        ) -> tuple[Subspace, jax.Array, Bases, jax.Array]:
            """The subspaces of a leaf, refreshed where due, their bases, and R."""
            matrices, sides = view.to_matrices(gradient), settings.sides(view, seed, part.layer)
            if refresh is not False:
                subspace, step = refresh_leaf(
                    matrices,
                    subspace,
                    sides=sides,
                    turn=part.turn_of(view.path, view.count),
                    step=step,
                    gap=gap,
                    timing=settings.timing,
                    force=refresh is True,
                    allowed=allowed,
                )
            bases = sides.load(subspace)
            low_rank = project(matrices, bases)
            if settings.diagnostics:
                subspace = subspace._replace(energy=captured_energy(matrices, low_rank))
            return subspace, step, bases, low_rank

        def back(
            view: MatrixView,
            dtype: jnp.dtype,
            update: jax.Array,
            bases: Bases,
            decay: jax.Array | None,
            weights: jax.Array | None,
        ) -> jax.Array:
            """The update of a leaf, from that of its R and the decay of its weights."""
            update = project_back(update, bases, dtype)
            if decay is not None and weights is not None:
                update += decay[..., :1, :1] * view.to_matrices(weights)
            return view.from_matrices(update)

        for i, view in enumerate(views):
            if not isinstance(view, MatrixView):
                continue
            place = places[i]
            subspaces[i], step, bases[i], low_rank[i] = in_auto(
                functools.partial(down, view),
                place and place.of_projection(subspaces[i], settings.projector.is_dense),
                gradients[i],
                subspaces[i],
                step,
                gap,
                settings.seed,
                part.complete or is_first(state.accumulator),
            )

        def projected_weights(i: int, view: MatrixView) -> jax.Array:
            def project_weights(weights: jax.Array, bases: Bases) -> jax.Array:
                matrices = view.to_matrices(weights).astype(low_rank[i].dtype)
                return project(matrices, bases)

            place = places[i]
            return in_auto(project_weights, place and place.low_rank, weights[i], bases[i])

        def finish(low_rank: list[jax.Array]) -> tuple[list[jax.Array], Any, Any]:
            """The full-size updates, inner state and step count after a step."""
            result = inner.update(
                low_rank,
                state.inner,
                None if params is None else weights,
                inner_treedef,
                views,
                projected_weights,
                extra_args,
            )
            new_updates = []
            for i, view in enumerate(views):
                update, decay = result.updates[i], result.decay[i]
                if isinstance(view, MatrixView):
                    place = places[i]
                    update = in_auto(
                        functools.partial(back, view, gradients[i].dtype),
                        place and place.leaf,
                        settings.scale * update,
                        bases[i],
                        decay,
                        None if decay is None else weights[i],
                    )
                new_updates.append(update.astype(likes[i].dtype))
            return new_updates, result.state, optax.safe_increment(step)

        (new_updates, inner_state, next_step), accumulator = accumulate(
            state.accumulator,
            low_rank,
            inner_treedef,
            settings.accumulation_steps,
            part,
            finish,
            wait=lambda: ([jnp.zeros_like(x) for x in likes], state.inner, step),
        )
        return treedef.unflatten(new_updates), GaloreState(
            step=next_step,
            subspace=tree_of_subspaces(subspace_treedef, subspaces),
            inner=inner_state,
            accumulator=accumulator,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def turns(views: Sequence[LeafView]) -> dict[str, Turn]:
    """By path, the places of the matrices of all leaves that are projected."""
    projected = [view for view in views if isinstance(view, MatrixView)]
    counts = [view.count for view in projected]
    places = itertools.accumulate(counts, initial=0)
    return {v.path: Turn(place, sum(counts)) for v, place in zip(projected, places, strict=False)}


def _low_rank_stand_in(view: LeafView, leaf: Any) -> Any:
    """What the inner ``init`` sees: zeros for R, and leaves at full size in the moments' dtype."""
    dtype = moment_dtype(view.dtype)
    if isinstance(view, MatrixView):
        return jnp.zeros(view.low_rank_shape, dtype)
    leaf = dequantize_params(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return jnp.asarray(leaf).astype(dtype)


def _subspace_structure(tree: Any, views: Sequence[LeafView]) -> Any:
    return structure(tree, [True] * len(views))


def _inner_structure(tree: Any, views: Sequence[LeafView]) -> Any:
    return structure(tree, [isinstance(view, MatrixView) for view in views])
