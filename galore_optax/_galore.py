"""galore(): one update of every leaf, where projector, refresh and inner transformation meet."""

import contextlib
import contextvars
import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import _projectors
from galore_optax._inner import Inner
from galore_optax._matrix import (
    DEFAULT_EXCLUDE,
    ExcludeSpec,
    LeafView,
    MatrixView,
    RankSpec,
    Selection,
    moment_dtype,
    structure,
)
from galore_optax._refresh import refresh
from galore_optax._subspace import (
    ABSENT,
    Subspace,
    basis_shapes,
    init_subspace,
    is_absent,
    project,
    project_back,
)


class GaloreState(NamedTuple):
    """State of :func:`galore`."""

    step: Any  # (), int32: the number of updates done.
    subspace: Subspace  # of trees with the structure of the parameters.
    inner: Any  # the inner state; the moments of projected leaves have the shape of R.


class BareGalore(optax.GradientTransformationExtraArgs):
    """What :func:`galore` returns where it has no inner transformation yet.

    Attributes:
      with_inner: makes the same galore with an inner transformation; `galore_optax.chain` does.
    """

    with_inner: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: RankSpec = 128,
    update_proj_gap: int | jax.Array | optax.Schedule = 200,
    scale: float | jax.Array = 0.25,
    projector: str | _projectors.Projector = "svd",
    side: str = "short",
    exclude: ExcludeSpec = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient low-rank projection: trains all parameters with optimizer state of rank r.

    The gradient G (m, n) of each selected matrix is projected on the subspace of its leading
    singular vectors, chosen again every T steps, and the inner transformation only ever sees
    the result:

    .. math::
      R = P^\top G, \qquad U = \alpha\, P\, \mathrm{inner}(R) + c\, W

    Here P is (m, r) where m <= n; else R = G P with P (n, r). The last term is the weight decay
    of the inner transformation, if any: it is found by differentiating the inner update with
    respect to the parameters, acts on the whole matrix W, and is not scaled by alpha. Other
    leaves go through the same inner transformation at full size.

    Of one matrix the state holds r min(m, n) elements of projector, and of each moment
    r max(m, n) instead of m n. They are float32 (float64 for float64 leaves).

    Args:
      inner: any Optax transformation, unmodified: ``optax.adamw(3e-4)``,
        ``optax.scale_by_adam()``, ``optax.adafactor(1e-3)``, a chain. Without it, put
        ``galore()`` in :func:`galore_optax.chain`, which makes what follows the inner
        transformation. Weight decay ahead of a momentum inside it
        (``optax.add_decayed_weights`` then ``optax.trace``), ``optax.novograd`` and
        ``optax.contrib.schedule_free`` mix the parameters into their state, and what mixes the
        entries of an update after its decay (``optax.centralize``) mixes the decay too: neither
        can be seen from outside. Decay after ``galore`` then, and put schedule-free around it.
        Masks and labels inside are best callables: R has another shape, and no Flax box.
      rank: r; an int, a fraction of the matrix' short side in (0, 1), or a callable of path and
        shape that returns either. Matrices whose short side does not exceed it stay full size.
      update_proj_gap: T, in steps; an int, a schedule of the step, or an array (traced under
        ``optax.inject_hyperparams``). It is read when a matrix is refreshed, and says when
        that is due again. Values below 1 that are known only at run time count as 1.
      scale: alpha, the factor of what the inner transformation makes of the gradient. Weight
        decay and unprojected leaves are not scaled.
      projector: ``"svd"``, or a function of a matrix and a rank; see `galore_optax.svd`.
      side: the axis to project: ``"short"`` (the shorter, as published; the input axis of a
        square matrix), ``"long"``, ``"left"`` (the rows m, the reduction axis), ``"right"``
        (the columns n, the output axis), ``"both"`` (R = P^T G Q is (r, r)).
      exclude: the leaves not to project: a regular expression searched in the path (``"/"``
        between components), a callable of path and shape, a tree of bools with the structure
        of the parameters or a prefix of it, or None to exclude nothing. Unlike in
        ``optax.masked``, True means excluded. By default embeddings, output heads, scales and
        biases: `galore_optax.DEFAULT_EXCLUDE`.
      weight_dimension_numbers: which axes form the matrix, as in ``optax.contrib.muon``:
        `DimensionNumbers` for all leaves, a tree of them with the structure of the parameters
        or a prefix of it (None: not projected), or a callable from parameters (or gradients)
        to such a tree. Numbers given for several leaves at once leave alone those with too few
        axes. Axes not named are batch axes, and each matrix of a batch has its own projector.
        By default 2-D leaves are (reduction, output), as Flax has them, and leaves of more axes
        are not projected.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a `GaloreState`. ``init`` also
      takes ``jax.ShapeDtypeStruct``. Updates have the dtype of the parameters, or of the
      gradients where ``update`` gets no parameters.

    Raises:
      TypeError: arguments, or leaves of the parameters, of a wrong type.
      ValueError: arguments out of range, dimension numbers that do not fit, a state of another
        configuration, gradients of another structure, missing parameters.

    Notes:
      A gradient that is zero or not finite chooses no subspace: the old one stays and the
      refresh stays due. What such a gradient does to the moments is up to the inner
      transformation; ``optax.apply_if_finite`` around ``galore`` recovers in full.

      Under a ``jax.vmap`` of the user's own, ``lax.cond`` runs both branches, a factorization
      every step.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}
      >>> tx = galore_optax.galore(optax.adamw(1e-2, weight_decay=0.1), rank=8)
      >>> state = tx.init(params)
      >>> state.subspace.left["kernel"].shape
      (64, 8)
      >>> optax.tree.get(state, "mu")["kernel"].shape
      (8, 256)
      >>> loss = lambda p: jnp.sum((jnp.ones(64) @ p["kernel"] + p["bias"]) ** 2)
      >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
      >>> params = optax.apply_updates(params, updates)

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection
      <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
    """
    selection = Selection(rank, side, exclude, weight_dimension_numbers)
    choose = _projectors.resolve(projector)
    _check_gap(update_proj_gap)
    _check_scale(scale)

    def make(transformation, caution=None):
        return _transformation(
            Inner(transformation), selection, choose, update_proj_gap, scale, caution
        )

    if inner is not None:
        return make(inner)
    bare = BareGalore(*make(optax.identity(), caution=_BARE))
    bare.with_inner = make
    return bare


def _transformation(
    inner: Inner,
    selection: Selection,
    projector: _projectors.Projector,
    update_proj_gap: int | jax.Array | optax.Schedule,
    scale: float | jax.Array,
    caution: str | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation itself; its first ``init`` warns of ``caution``."""
    warned = False

    def init_fn(params: optax.Params) -> GaloreState:
        nonlocal warned
        views = selection.views(params)
        inspection = _INSPECTION.get()
        if inspection is not None:
            inspection.views.extend(views)
            if inspection.without_galore:
                # A GaloreState all the same, so that the inner state is found where it always is.
                return GaloreState(ABSENT, Subspace(), inner.init(params))
        subspaces = [init_subspace(v) if isinstance(v, MatrixView) else Subspace() for v in views]
        leaves = jax.tree.leaves(params)
        low_rank = [_low_rank_stand_in(v, x) for v, x in zip(views, leaves, strict=True)]
        low_rank = _inner_structure(params, views).unflatten(low_rank)
        state = GaloreState(
            step=jnp.zeros([], jnp.int32),
            subspace=_tree_of_subspaces(_subspace_structure(params, views), subspaces),
            inner=inner.init(low_rank),
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
        **extra_args: Any,
    ) -> tuple[Any, GaloreState]:
        gradients, treedef = jax.tree.flatten(updates)
        gradients = [jnp.asarray(g) for g in gradients]
        views = selection.views(updates)
        subspace_treedef = _subspace_structure(updates, views)
        subspaces = _subspaces_of_tree(subspace_treedef, views, state)
        weights = [] if params is None else _leaves_like(treedef, params, "params")
        weights = [jnp.asarray(w) for w in weights]
        for view, weight in zip(views, weights, strict=False):
            if weight.shape != view.shape:
                raise ValueError(
                    f"params and gradients must have the same shapes; {view.path!r} has shape "
                    f"{weight.shape} in params and {view.shape} in the gradients"
                )
        gap = update_proj_gap(state.step) if callable(update_proj_gap) else update_proj_gap
        gap = min(gap, _NEVER) if isinstance(gap, numbers.Integral) else gap
        gap = jnp.maximum(jnp.asarray(gap).astype(jnp.int32), 1)

        low_rank = [g.astype(moment_dtype(g.dtype)) for g in gradients]
        step = state.step
        for i, view in enumerate(views):
            if isinstance(view, MatrixView):
                matrices = view.to_matrices(gradients[i])
                subspaces[i], step = refresh(
                    matrices,
                    subspaces[i],
                    step=step,
                    gap=gap,
                    projector=projector,
                    rank=view.rank,
                )
                low_rank[i] = project(matrices, subspaces[i])

        def projected_weights(i: int, view: MatrixView) -> jax.Array:
            matrices = view.to_matrices(weights[i])
            return project(matrices.astype(low_rank[i].dtype), subspaces[i])

        result = inner.update(
            low_rank,
            state.inner,
            None if params is None else weights,
            _inner_structure(updates, views),
            views,
            projected_weights,
            extra_args,
        )

        new_updates = []
        for i, view in enumerate(views):
            update, decay = result.updates[i], result.decay[i]
            if isinstance(view, MatrixView):
                update = project_back(scale * update, subspaces[i], gradients[i].dtype)
                if decay is not None:
                    update += decay * view.to_matrices(weights[i])
                update = view.from_matrices(update)
            like = gradients[i] if params is None else weights[i]
            new_updates.append(update.astype(like.dtype))

        return treedef.unflatten(new_updates), GaloreState(
            step=optax.safe_increment(step),
            subspace=_tree_of_subspaces(subspace_treedef, subspaces),
            inner=result.state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@dataclasses.dataclass
class Inspection:
    """A look into every galore ``init`` that runs under :func:`inspecting`.

    Attributes:
      views: how the leaves were seen; filled by ``init``.
      without_galore: set to make the inner state as if there were no galore around it.
    """

    views: list[LeafView] = dataclasses.field(default_factory=list)
    without_galore: bool = False


_INSPECTION: contextvars.ContextVar[Inspection | None]
_INSPECTION = contextvars.ContextVar("galore_inspection", default=None)


@contextlib.contextmanager
def inspecting(inspection: Inspection) -> Iterator[None]:
    """Lets a report look into a galore that any number of wrappers hide; silences warnings."""
    token = _INSPECTION.set(inspection)
    try:
        yield
    finally:
        _INSPECTION.reset(token)


def _low_rank_stand_in(view: LeafView, leaf: Any) -> Any:
    """What the inner ``init`` sees: zeros for R, and leaves at full size in the moments' dtype."""
    dtype = moment_dtype(view.dtype)
    if isinstance(view, MatrixView):
        return jnp.zeros(view.low_rank_shape, dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
    return jnp.asarray(leaf).astype(dtype)


def _subspace_structure(tree: Any, views: Sequence[LeafView]) -> Any:
    return structure(tree, [True] * len(views))


def _inner_structure(tree: Any, views: Sequence[LeafView]) -> Any:
    return structure(tree, [isinstance(view, MatrixView) for view in views])


def _tree_of_subspaces(treedef: Any, subspaces: Sequence[Subspace]) -> Subspace:
    return Subspace(
        *(treedef.unflatten([s[k] for s in subspaces]) for k in range(len(Subspace._fields)))
    )


def _subspaces_of_tree(
    treedef: Any, views: Sequence[LeafView], state: GaloreState
) -> list[Subspace]:
    """The subspace of each leaf, checked against what the leaf needs."""
    if not isinstance(state, GaloreState):
        raise TypeError(
            f"galore's update needs the GaloreState that its init made; got a "
            f"{type(state).__name__}. Was it made by another transformation, or by another chain?"
        )
    fields = [_leaves_like(treedef, tree, "the state's parameters") for tree in state.subspace]
    subspaces = [Subspace(*leaf) for leaf in zip(*fields, strict=True)]
    for view, subspace in zip(views, subspaces, strict=True):
        expected = basis_shapes(view) if isinstance(view, MatrixView) else (None, None)
        found = tuple(None if is_absent(x) else jnp.shape(x) for x in subspace[:2])
        if found != expected:
            raise ValueError(
                f"the state belongs to another configuration: {view.path!r} of shape {view.shape} "
                f"needs left and right projectors of shapes {expected}, the state has {found}. Use "
                "the rank, side, exclude and dimension numbers the state was made with, or make a "
                "new state with init."
            )
    return subspaces


def _leaves_like(treedef: Any, tree: Any, name: str) -> list[Any]:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"the gradients have another structure than {name}: {error}. Pass gradients of the "
            "parameters that the state was made for; optax.masked leaves out some of them."
        ) from error


_NEVER = 2**31 - 1

_BARE = (
    "galore() has no inner transformation here, so what follows it in optax.chain keeps moments "
    "of full size: it trains on the low-rank gradient but saves no memory, and Adam cancels its "
    "scale. Write galore_optax.chain instead of optax.chain, with galore(...) itself as one of "
    "its arguments, or galore(optax.adamw(...), ...), which other wrappers may go around."
)


def _check_gap(gap: Any) -> None:
    if callable(gap):
        return
    if isinstance(gap, jax.Array | np.ndarray):
        gap = _value_if_known(gap, at_runtime=1)
    elif isinstance(gap, bool) or not isinstance(gap, numbers.Integral):
        raise TypeError(
            f"update_proj_gap must be a positive int, a schedule or an array; got {gap!r}"
        )
    if gap < 1:
        raise ValueError(f"update_proj_gap must be at least 1 step; got {gap}")


def _check_scale(scale: Any) -> None:
    if isinstance(scale, jax.Array | np.ndarray):
        scale = _value_if_known(scale, at_runtime=0.0)
    elif isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"scale must be a finite number or an array; got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale!r}")


def _value_if_known(array: Any, at_runtime: float) -> float:
    """The number in an array, or ``at_runtime`` where tracing hides it."""
    try:
        return float(array)
    except jax.errors.ConcretizationTypeError:
        return at_runtime
