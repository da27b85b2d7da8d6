"""Runs init and update over all leaves: down into the subspaces, one step there, and up again."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree, PyTreeDef

from galore_optax._accumulate import accumulate, init_accumulator, is_first
from galore_optax._adam import Betas
from galore_optax._boxes import boxed_like, boxed_state
from galore_optax._core import Bases, Method
from galore_optax._errors import CombinationError
from galore_optax._excerpt import Excerpt, Ranks, ordinals
from galore_optax._inner import Call, Inner
from galore_optax._leaf import Lift
from galore_optax._leaves import Leaves, stand_in
from galore_optax._moments import InnerMoments
from galore_optax._placement import placement_at_init
from galore_optax._quantized_params import check_gradients, dequantize_params
from galore_optax._ranks import RankByRole
from galore_optax._refresh import ONLY, Gap, gap_at
from galore_optax._residual import Projected
from galore_optax._select import Selection
from galore_optax._sharding import check_mesh, put, reshard, zeros_like
from galore_optax._specs import placed_state
from galore_optax._state import (
    VERSION,
    GaloreState,
    inspection_in_progress,
    subspaces_of_tree,
    tree_of_subspaces,
)
from galore_optax._subspace import ABSENT, Subspace
from galore_optax._trees import bare, beside
from galore_optax._types import DType, Scalar, State, Step, Updates
from galore_optax._view import LeafView, MatrixView, moment_dtype, wide


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `galore_optax.galore`, checked."""

    selection: Selection
    method: Method
    update_proj_gap: Gap
    stagger: bool
    scale: Scalar
    accumulation_steps: int
    seed: int | Array


class Below(NamedTuple):
    """What there is once all gradients are down in their subspaces; lists have entries by leaf."""

    subspaces: list[Subspace]  # the subspaces, refreshed where they were due.
    inner: State  # the inner state, with its moments in these subspaces.
    step: Step  # the step of the state, which depends on the refreshes of all leaves.
    bases: list[Bases]  # the bases; both are None for a leaf that is not projected.
    low_rank: list[Array]  # R, or the gradient of a leaf that is not projected.


class Accumulating(optax.GradientTransformationExtraArgs):
    """A transformation whose steps take several gradients: before the last, updates are zeros."""


def transformation(
    inner: optax.GradientTransformation, settings: Settings, caution: str | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation that `galore_optax.galore` returns.

    Args:
      inner: any Optax transformation.
      settings: the arguments of galore.
      caution: the text of a warning that the first ``init`` gives, or None for no warning.
    """
    galore = _Galore(Inner(inner), settings, caution)
    kind = optax.GradientTransformationExtraArgs
    if settings.accumulation_steps > 1:
        kind = Accumulating
    return kind(galore.init, galore.update)


class _Galore:
    """Has the ``init`` and the ``update`` of what `transformation` returns."""

    def __init__(self, inner: Inner, settings: Settings, caution: str | None):
        self._inner, self._caution = inner, caution
        self._tried = False
        some = {"kernel": jnp.zeros([2, 3])}
        if caution is None and not inner.must_wait_for_init(some):
            betas = self._check(some, [True], settings.method, final=False)
            settings = dataclasses.replace(settings, method=settings.method.with_betas(betas))
        self._settings = settings
        self._lift = Lift(settings.method, settings.stagger)
        self._made_with = settings.method.made_with(settings.seed)
        self._shapes: dict[LeafView, Subspace] = {}
        self._ranks: dict[tuple[object, ...], dict[str, int]] = {}
        self._warned = False

    def init(self, params: optax.Params) -> GaloreState:
        """Returns the state before the first step."""
        given, params = params, bare(params)
        check_mesh(params)
        inspection = inspection_in_progress()
        views = self._views(params, None if inspection is None else inspection.ranks)
        leaves = Leaves.of_params(views, params)
        if inspection is not None:
            inspection.trees.append(leaves.views)
            if inspection.without_galore:
                # A GaloreState all the same, so that the inner state is found where it always is.
                return GaloreState(ABSENT, Subspace(), self._inner.init(dequantize_params(params)))
        subspaces = [self._subspace(view) for view in leaves.views]
        values = [stand_in(v, x) for v, x in zip(leaves.views, leaves.gradients, strict=True)]
        for i, place in enumerate(leaves.placements):
            if place is not None:
                values[i] = reshard(values[i], place.low_rank)
                subspaces[i] = reshard(subspaces[i], place.subspace(subspaces[i]))
            elif at_init := placement_at_init(leaves.views[i], leaves.gradients[i]):
                # Each is put in its place before the next one is made.
                place, mesh = at_init
                values[i] = put(values[i], place.low_rank, mesh)
                subspaces[i] = put(subspaces[i], place.subspace(subspaces[i]), mesh)
        low_rank = leaves.structure.unflatten(values)
        projected = [isinstance(v, MatrixView) for v in leaves.views]
        if self._caution is None:
            self._check(low_rank, projected, self._settings.method, final=True)
        state = GaloreState(
            step=jnp.zeros([], jnp.int32),
            subspace=tree_of_subspaces(leaves.structure, subspaces),
            inner=self._inner.init(low_rank, projected),
            accumulator=init_accumulator(low_rank, self._settings.accumulation_steps),
            version=jnp.asarray(VERSION, jnp.int32),
            made_with=self._made_with,
        )
        # This is for its errors, about moments that could not be moved.
        InnerMoments.of(state.inner, leaves, self._settings.method.sees)
        if inspection is None and not self._warned and leaves.views:
            self._warned = True
            self._settings.selection.warn(leaves.views, stacklevel=2)
            self._inner.warn(low_rank, state.inner, leaves.views, stacklevel=2)
            if self._caution is not None:
                warnings.warn(self._caution, UserWarning, stacklevel=2)
        return boxed_state(placed_state(state, params, leaves.views), given, leaves.views)

    def update(
        self,
        updates: optax.Updates,
        state: State,
        params: optax.Params | None = None,
        *,
        refresh: object = None,
        excerpt: Excerpt | None = None,
        unrounded: bool = False,
        **extra_args: PyTree,
    ) -> tuple[Updates, GaloreState]:
        """Returns the updates and the next state; see `galore_optax.galore`.

        With ``unrounded``, updates are in at least float32, for a preset that rounds them itself.
        """
        boxes = updates, state
        updates, state = bare(updates), bare(state)
        params = beside(updates, bare(params))
        check_gradients(updates)
        check_mesh((updates, state, params))
        views = self._views(updates, None if excerpt is None else excerpt.ranks)
        leaves = Leaves.of_update(views, updates, params)
        subspaces = subspaces_of_tree(
            leaves.structure, leaves.views, state, self._shape_of, self._made_with
        )
        leaves = leaves.following(subspaces, state.inner)
        dtypes = [jnp.result_type(like) for like in leaves.likes]
        if unrounded:
            dtypes = list(map(moment_dtype, dtypes))
        only = isinstance(refresh, str)
        below = self._down(leaves, subspaces, state, _checked(refresh), only, excerpt)
        if only:
            subspace = tree_of_subspaces(leaves.structure, below.subspaces)
            zeros = leaves.structure.unflatten(map(zeros_like, leaves.likes, dtypes))
            new_state = state._replace(subspace=subspace, inner=below.inner)
            return boxed_like(zeros, boxes[0]), boxed_like(new_state, boxes[1])
        extra_args |= {} if excerpt is None else {"excerpt": excerpt}

        def finish(low_rank: list[Array]) -> tuple[list[Array], list[PyTree], State, Step]:
            updates, residuals, inner = self._step(
                leaves, below, low_rank, state, extra_args, dtypes
            )
            return updates, residuals, inner, jnp.asarray(optax.safe_increment(below.step))

        def wait() -> tuple[list[Array], list[PyTree], State, Step]:
            zeros = list(map(zeros_like, leaves.likes, dtypes))
            return zeros, [s.residual for s in below.subspaces], below.inner, below.step

        (new, residuals, inner, step), accumulator = accumulate(
            state.accumulator,
            below.low_rank,
            leaves.structure,
            self._settings.accumulation_steps,
            excerpt,
            finish,
            wait,
        )
        subspaces = [
            s._replace(residual=r) for s, r in zip(below.subspaces, residuals, strict=True)
        ]
        subspace = tree_of_subspaces(leaves.structure, subspaces)
        new_state = state._replace(
            step=step, subspace=subspace, inner=inner, accumulator=accumulator
        )
        return boxed_like(leaves.structure.unflatten(new), boxes[0]), boxed_like(
            new_state, boxes[1]
        )

    def _down(
        self,
        leaves: Leaves,
        subspaces: list[Subspace],
        state: GaloreState,
        refresh: bool | None,
        only: bool,
        excerpt: Excerpt | None,
    ) -> Below:
        """Takes all gradients down into their subspaces, one leaf after the other."""
        settings, lift = self._settings, self._lift
        gap = gap_at(settings.update_proj_gap, jnp.asarray(state.step))
        complete = excerpt is not None and excerpt.complete
        allowed = complete or is_first(state.accumulator)
        step = jnp.asarray(state.step)
        step = step if excerpt is None else excerpt.acknowledge(step)
        moments = InnerMoments.of(state.inner, leaves, settings.method.sees)
        subspaces, bases = list(subspaces), [Bases(None, None)] * len(subspaces)
        low_rank = [
            g if isinstance(view, MatrixView) else wide(g)
            for g, view in zip(leaves.gradients, leaves.views, strict=True)
        ]
        own = dict(ordinals(leaves.views)) if excerpt is None else {}
        for i, view in leaves.projected:
            ordinal = own[view.path] if excerpt is None else excerpt.ordinal(view.path, view.count)
            went = lift.down(
                view,
                leaves.placements[i],
                leaves.gradients[i],
                subspaces[i],
                moments.of_leaf(i),
                (step, gap),
                lift.identity(view, ordinal, settings.seed, excerpt),
                total=ordinal.total,
                refresh=refresh,
                only=only,
                allowed=allowed,
            )
            subspaces[i], of_leaf, step, bases[i], low_rank[i] = went
            moments.replace(i, of_leaf)
        return Below(subspaces, moments.state, step, bases, low_rank)

    def _step(
        self,
        leaves: Leaves,
        below: Below,
        low_rank: list[Array],
        state: GaloreState,
        extra_args: Mapping[str, PyTree],
        dtypes: Sequence[DType],
    ) -> tuple[list[Array], list[PyTree], State]:
        """Takes a step in the subspaces, and takes all updates up again, in these dtypes.

        Returns:
          The updates, the states of the residuals, and the state of the inner transformation.
        """
        lift, weights, method = self._lift, leaves.weights, self._settings.method

        def projected_weights(i: int, view: MatrixView) -> Array:
            return lift.project(view, leaves.placements[i], leaves.likes[i], below.bases[i])

        call = Call(low_rank, below.inner, weights, leaves.structure, leaves.views, extra_args)
        inner = self._inner.update(call, projected_weights)
        updates, residuals = list(inner.updates), [s.residual for s in below.subspaces]
        for i, (view, dtype) in enumerate(zip(leaves.views, dtypes, strict=True)):
            if not isinstance(view, MatrixView):
                updates[i] = updates[i].astype(dtype)
                continue
            decay, gradient, uses = (
                inner.decay[i],
                leaves.gradients[i],
                method.residual.uses_gradient,
            )
            updates[i], residuals[i] = lift.up(
                view,
                leaves.placements[i],
                Projected(updates[i], *((low_rank[i], gradient) if uses else (None, None))),
                below.bases[i],
                Subspace(residual=residuals[i], transport=below.subspaces[i].transport),
                self._settings.scale,
                jnp.asarray(state.step),
                None if decay is None or weights is None else (decay, weights[i]),
                dtypes=(gradient.dtype, dtype),
            )
        return updates, residuals, inner.state

    def _check(
        self, low_rank: PyTree, projected: list[bool], method: Method, *, final: bool
    ) -> Betas | None:
        """Raises where the inner transformation cannot go with one of the answers.

        Args:
          low_rank: what the inner transformation gets for gradients, or some tree.
          projected: for each leaf whether it is projected.
          method: the answers to the five questions.
          final: whether it is the former.

        Returns:
          The decay rates of its moments, where the residual wants them and they could be found.
        """
        if final and method.residual.wants_betas:
            raise CombinationError(
                'subtract="scaled" of NormScaled needs the decay rates of the moments, which '
                "could not be found out",
                "Give betas=(b1, b2), or take the preset fira_adamw.",
            )
        asks = method.transport.moves or method.residual.uses_gradient
        if not (asks or method.projector.reads or self._inner.limits(low_rank)):
            return None
        betas, tried = self._inner.check(
            method, low_rank, projected, tries=not self._tried, final=final
        )
        self._tried |= tried
        return betas

    def _views(self, tree: PyTree, known: Ranks | None) -> list[LeafView]:
        """Returns how each leaf is seen.

        Args:
          tree: the parameters or gradients.
          known: the ranks of all leaves, where this may be only a part of them.
        """
        selection = self._settings.selection
        whole = None if known is None else dict(known)
        if not isinstance(selection.rank, RankByRole):
            return selection.views(tree, projected=whole)
        views = selection.views(tree, whole, whole)
        if not views or whole is not None:
            return views
        paths = tuple(view.path for view in views)
        if (key := (paths, tuple(views))) not in self._ranks:
            nbytes = functools.partial(self._nbytes, jax.tree.structure(tree), paths)
            self._ranks[key] = selection.rank.share(views, nbytes)
        return selection.views(tree, self._ranks[key])

    def _nbytes(self, treedef: PyTreeDef, paths: Sequence[str], view: MatrixView) -> int:
        """Returns the bytes of the state of one leaf by itself.

        Args:
          treedef: the structure of the tree.
          paths: the paths of all leaves of the tree.
          view: the view of the leaf, of any rank.
        """

        def of_leaf() -> PyTree:
            low_rank = jnp.zeros(view.low_rank_shape, moment_dtype(view.dtype))
            alone = treedef.unflatten([low_rank if p == view.path else None for p in paths])
            steps = self._settings.accumulation_steps
            return self._inner.init(alone), init_accumulator(alone, steps)

        def two_moments() -> list[Array]:
            return 2 * [jnp.zeros(view.low_rank_shape, moment_dtype(view.dtype))]

        try:
            state = jax.eval_shape(of_leaf)
        except Exception:  # such as where a mask has the structure of all leaves
            state = jax.eval_shape(two_moments)
        arrays = jax.tree.leaves((self._shape_of(view), state))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)

    def _shape_of(self, view: LeafView) -> Subspace:
        """Returns the shapes of the subspace of a leaf."""
        # A plain dict, unlike what functools has, lets cloudpickle copy the transformation.
        if view not in self._shapes:
            self._shapes[view] = jax.eval_shape(lambda: self._subspace(view))
        return self._shapes[view]

    def _subspace(self, view: LeafView) -> Subspace:
        """Returns the subspace of a leaf before the first step."""
        return self._lift.initial(view) if isinstance(view, MatrixView) else Subspace()


def _checked(refresh: object) -> bool | None:
    """Returns ``refresh`` as it is, and raises where it is neither None nor a Python bool."""
    if refresh is None or isinstance(refresh, bool):
        return refresh
    if isinstance(refresh, str) and refresh == ONLY:
        return True
    raise TypeError(
        f"refresh must be None or a Python bool, since it decides what is compiled; got {refresh!r}"
    )
