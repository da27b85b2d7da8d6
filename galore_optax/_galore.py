"""galore(): one update of every leaf, where projector, refresh and inner transformation meet."""

import dataclasses
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import projectors
from galore_optax._accumulate import (
    accumulate,
    check_accumulation_steps,
    init_accumulator,
    is_first,
)
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
from galore_optax._part import Layer, Part, Turn, current_part
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import check_gradients, dequantize_params
from galore_optax._refresh import Lazy, Timing, refresh_leaf
from galore_optax._sharding import (
    in_auto,
    is_explicit,
    place_low_rank,
    place_subspace,
)
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
    check_projector_dtype,
    init_subspace,
    project,
    project_back,
)


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
    projector: str | Callable[..., jax.Array] = "svd",
    projector_options: Mapping[str, Any] | None = None,
    projector_dtype: str | None = None,
    refresh: str | Lazy = "periodic",
    stagger: bool = False,
    side: str = "short",
    exclude: ExcludeSpec = DEFAULT_EXCLUDE,
    weight_dimension_numbers: Any = None,
    accumulation_steps: int | None = None,
    seed: int | jax.Array = 0,
    diagnostics: bool = False,
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

    Of one matrix the state holds r min(m, n) elements of projector (``rows`` and ``dct``: r;
    random ones: none), and of each moment r max(m, n) instead of m n. They are float32 (float64
    for float64 leaves) unless ``projector_dtype`` and `galore_optax.low_bit` around the inner
    transformation say otherwise.
    Parameters may be quantized, by `galore_optax.quantize_params`.

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
      projector: which directions. ``"svd"`` (exact, as published) or ``"eigh"`` (of the Gram
        matrix); ``"randomized_svd"`` or ``"power_iteration"`` (from the old basis), nearly as good
        for a fraction of the time; ``"rows"``, the r rows of the gradient of largest norm, with
        which nothing is multiplied, or ``"dct"``, cosines, and of both only the numbers are kept;
        ``"gaussian"`` or ``"orthonormal"``, random ones, which cost no memory. Or a function
        ``(matrix, rank) -> basis``, (m, n) to (m, r), that may also ask for ``key``, ``old`` and
        ``first`` by name, as `galore_optax.projectors.power_iteration` does.
      projector_options: keyword arguments of the projector, such as ``{"iterations": 2}``.
      projector_dtype: in what the projectors are kept: ``"float32"``, ``"bfloat16"``, or
        ``"int8"`` or ``"int4"``, asymmetric integers in blocks of 256, rounded to the nearest. By
        default float32, float64 for float64 leaves.
      refresh: ``"periodic"``, every T steps; or ``"lazy"``, where a matrix whose subspace stands
        still is refreshed after T, 2 T, 4 T, ...: see `galore_optax.Lazy`, which may also be given.
      stagger: whether to spread the refreshes over the T steps by matrix, so that of N matrices at
        most ceil(N / T) are refreshed on one step. On the first step all are.
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
      accumulation_steps: k, the calls of ``update`` that make one step: their gradients are
        projected and averaged at rank r, where ``optax.MultiSteps`` keeps a full-size average.
        None is 1. The first k - 1 return updates of zeros. A step whose refresh is due takes
        the subspace from its first gradient; else it is exactly that of the mean gradient.
      seed: of the random numbers of projectors, which depend on it, on a leaf's path, on the
        matrix' place in a stack, and on how often it has been refreshed.
      diagnostics: whether to keep in the state what `galore_optax.metrics` reports, at the price
        of one more pass over the gradient.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is a `GaloreState`. ``init`` also
      takes ``jax.ShapeDtypeStruct``. Updates have the dtype of the parameters, or of the
      gradients where ``update`` gets no parameters. ``update`` takes an extra argument
      ``refresh``: None (when due), or a Python bool: False compiles no factorization at all,
      True refreshes every matrix. `galore_optax.refresh` does nothing else.

    Raises:
      TypeError: arguments, or leaves of the parameters, of a wrong type.
      ValueError: arguments out of range, dimension numbers that do not fit, a state of another
        configuration, gradients of another structure, missing parameters.

    Notes:
      A gradient that is zero or not finite chooses no subspace: the old one stays and the
      refresh stays due. What such a gradient does to the moments is up to the inner
      transformation; ``optax.apply_if_finite`` around ``galore`` recovers in full.

      Under a ``jax.vmap`` of the user's own, ``lax.cond`` runs both branches, a factorization
      every step: pass ``refresh=False``, and call `galore_optax.refresh` when it is time.

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
    if jnp.shape(seed) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"seed must be an int; got {seed!r}")
    _check_scale(scale)
    check_accumulation_steps(accumulation_steps)
    settings = _Settings(
        Selection(rank, side, exclude, weight_dimension_numbers),
        projectors.resolve(projector, projector_options or {}),
        check_projector_dtype(projector_dtype),
        Timing(update_proj_gap, refresh, stagger),
        scale,
        1 if accumulation_steps is None else int(accumulation_steps),
        seed,
        bool(diagnostics),
    )

    def make(transformation, caution=None):
        return _transformation(Inner(transformation), settings, caution)

    if inner is not None:
        return make(inner)
    bare = BareGalore(*make(optax.identity(), caution=_BARE))
    bare.with_inner = make
    return bare


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of :func:`galore`, checked."""

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
        return init_subspace(self.sides(view), lazy.queue if lazy else 0, self.diagnostics)

    def sides(self, view: MatrixView, layer: Layer | None = None) -> Sides:
        return Sides(view, self.projector, self.projector_dtype, self.seed, layer)


def _transformation(
    inner: Inner, settings: _Settings, caution: str | None
) -> optax.GradientTransformationExtraArgs:
    """The transformation itself; its first ``init`` warns of ``caution``."""
    selection = settings.selection
    warned = False

    def init_fn(params: optax.Params) -> GaloreState:
        nonlocal warned
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
            if isinstance(view, MatrixView) and not is_quantized(leaf) and is_explicit(leaf):
                low_rank[i] = place_low_rank(low_rank[i], view, leaf)
                subspaces[i] = place_subspace(subspaces[i], view, leaf)
        low_rank = _inner_structure(params, views).unflatten(low_rank)
        state = GaloreState(
            step=jnp.zeros([], jnp.int32),
            subspace=tree_of_subspaces(_subspace_structure(params, views), subspaces),
            inner=inner.init(low_rank),
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
        for i, view in enumerate(views):
            if not isinstance(view, MatrixView):
                continue
            matrices, sides = view.to_matrices(gradients[i]), settings.sides(view, part.layer)
            if refresh is not False:
                subspaces[i], step = refresh_leaf(
                    matrices,
                    subspaces[i],
                    sides=sides,
                    turn=part.turn_of(view.path, view.count),
                    step=step,
                    gap=gap,
                    timing=settings.timing,
                    force=refresh is True,
                    allowed=part.complete or is_first(state.accumulator),
                )
            bases[i] = sides.load(subspaces[i])
            low_rank[i] = project(matrices, bases[i])
            if settings.diagnostics:
                energy = captured_energy(matrices, low_rank[i])
                subspaces[i] = subspaces[i]._replace(energy=energy)

        def projected_weights(i: int, view: MatrixView) -> jax.Array:
            matrices = view.to_matrices(weights[i])
            return project(matrices.astype(low_rank[i].dtype), bases[i])

        likes = gradients if params is None else weights

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
                    update = project_back(settings.scale * update, bases[i], gradients[i].dtype)
                    if decay is not None:
                        update += decay * view.to_matrices(weights[i])
                    update = view.from_matrices(update)
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

    return optax.GradientTransformationExtraArgs(init_fn, in_auto(update_fn))


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


_BARE = (
    "galore() has no inner transformation here, so what follows it in optax.chain keeps moments "
    "of full size: it trains on the low-rank gradient but saves no memory, and Adam cancels its "
    "scale. Write galore_optax.chain instead of optax.chain, with galore(...) itself as one of "
    "its arguments, or galore(optax.adamw(...), ...), which other wrappers may go around."
)


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
