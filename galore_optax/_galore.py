"""galore() says what its arguments mean, and checks that they are right."""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from galore_optax import projectors
from galore_optax._accumulate import check_accumulation_steps
from galore_optax._arguments import check_bool, is_number, known
from galore_optax._core import Method
from galore_optax._errors import CombinationError
from galore_optax._ranks import RankSpec
from galore_optax._refresh import Gap, Refresh, check_gap
from galore_optax._refresh import resolve as resolve_refresh
from galore_optax._residual import Residual
from galore_optax._residuals import RESIDUALS
from galore_optax._select import (
    DEFAULT_EXCLUDE,
    DimensionNumbersSpec,
    ExcludeSpec,
    Selection,
)
from galore_optax._storage import resolve_storage
from galore_optax._tables import resolve
from galore_optax._transport import Transport
from galore_optax._transports import TRANSPORTS
from galore_optax._types import Scalar
from galore_optax._update import Settings, transformation


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
    update_proj_gap: Gap = 200,
    scale: Scalar = 0.25,
    projector: str | Callable[..., Array] | projectors.Projector = "svd",
    projector_options: Mapping[str, object] | None = None,
    projector_dtype: str | None = None,
    refresh: str | Refresh = "periodic",
    stagger: bool = False,
    transport: str | Transport = "keep",
    residual: str | Residual = "discard",
    side: str = "short",
    exclude: ExcludeSpec = DEFAULT_EXCLUDE,
    weight_dimension_numbers: DimensionNumbersSpec = None,
    accumulation_steps: int | None = None,
    seed: int | Array = 0,
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

    What lies outside of the subspace is left out, unless ``residual`` says otherwise. For one
    matrix the state holds r min(m, n) elements of projector (``rows`` and ``dct``: r; random ones:
    none), and of each moment r max(m, n) instead of m n. They are float32 (float64
    for float64 leaves) unless ``projector_dtype`` and `galore_optax.low_bit` around the inner
    transformation say otherwise.
    Parameters may be quantized, by `galore_optax.quantize_params`.

    Args:
      inner: any Optax transformation, unmodified: ``optax.adamw(3e-4)``,
        ``optax.scale_by_adam()``, ``optax.adafactor(1e-3)``, a chain. Without it, put
        ``galore()`` in :func:`galore_optax.chain`, which makes what follows the inner
        transformation. It may not keep what it makes from the parameters in its state, as
        weight decay ahead of a momentum (``optax.add_decayed_weights`` then ``optax.trace``),
        ``optax.novograd``, ``optax.lars``, ``optax.lbfgs``, ``optax.apply_every`` after a decay,
        ``optax.scale_by_distance_over_gradients``, and of ``optax.contrib`` ``schedule_free``,
        ``mechanize``, ``prodigy``, ``dog``, ``dowg``, ``cocob`` and ``madgrad`` do: decay after
        ``galore`` then, and put schedule-free and ``mechanize`` around it. The others remember
        where the weights began, of which a subspace shows them nothing; ``dadapt_adamw`` finds its
        rate without. What mixes the entries of an update after its
        decay (``optax.centralize``) mixes the decay too, which cannot be seen from outside:
        decay after ``galore`` there.
        Masks and labels inside are best callables: R has another shape, and no Flax box.
      rank: the rank r: an int, a fraction of the matrix' short side in (0, 1), or a callable of
        path and shape that returns either. Matrices whose short side does not exceed it stay full
        size. Or `galore_optax.RankByRole` of one of these: attention's q and k get half of the
        others' rank, the down projection twice the others', in as many bytes.
      update_proj_gap: the gap T in steps: an int, a schedule of the step, or an array (traced under
        ``optax.inject_hyperparams``). It is read when a matrix is refreshed, and says when
        that is due again. Values below 1 that are known only at run time count as 1.
      scale: alpha, the factor of the whole update of a projected matrix, what the residual adds
        included. Weight decay and unprojected leaves are not scaled.
      projector: which directions. ``"svd"`` (exact, as published) or ``"eigh"`` (of the Gram
        matrix); ``"randomized_svd"`` or ``"power_iteration"`` (from the old basis), nearly as good
        for a fraction of the time, or ``"momentum_iteration"`` (LDAdam's, for every step);
        ``"rows"``, the r rows of the gradient of largest norm, ``"random_rows"`` or
        ``"sampled_rows"``, with which nothing is multiplied, or ``"dct"``, cosines, and of these
        only the numbers are kept; ``"gaussian"`` or ``"orthonormal"``, random ones, which cost no
        memory. Or a function
        ``(matrix, rank) -> basis``, (m, n) to (m, r), that may also ask for ``key``, ``old``,
        ``first``, ``moments`` and ``step`` by name, as `galore_optax.projectors` says; or a
        row of `galore_optax.projectors.PROJECTORS`.
      projector_options: keyword arguments of the projector, such as ``{"iterations": 2}``.
      projector_dtype: the form in which projectors are kept: ``"float32"``, ``"bfloat16"``, or
        codes in blocks of 256, rounded to the nearest: ``"int8"``, ``"int4"``, ``"float8_e4m3"``,
        ``"float8_e5m2"`` or ``"signed"``, of which `galore_optax.quantize` says what they are. By
        default float32, float64 for float64 leaves. Without effect where no basis is kept.
      refresh: when subspaces are chosen again: ``"periodic"``, every T steps; or ``"lazy"``, where
        a matrix whose subspace stands still is refreshed after T, 2 T, 4 T, ...: see
        `galore_optax.Lazy`, which may also be given.
      stagger: whether to spread the refreshes over the T steps by matrix, so that of N matrices at
        most ceil(N / T) are refreshed on one step. On the first step all are.
      transport: what happens to the moments when a subspace is chosen again: ``"keep"``, as
        published, takes their coordinates for new ones; ``"project"`` projects first moments on the
        new subspace; ``"rotate"`` takes both of Adam's there (`Rotate`); ``"reset"`` forgets them
        (`Reset`). ``"rotate"`` must know Adam's decay rates, and so must ``"reset"`` of what
        corrects biases: presets tell them, else give ``Rotate(b1, b2)`` or ``Reset(b1, b2)``.
      residual: what happens to the part of the gradient outside of the subspace: ``"discard"``, as
        published, leaves it out; ``"norm_scaled"`` (`NormScaled`, Fira) scales it as what lies
        inside is scaled; ``"scale_gradient"`` (`ScaleGradient`, APOLLO) scales the gradient itself
        so; ``"sign"`` (`Sign`, FRUGAL) takes its signs; ``"error_feedback"`` (`ErrorFeedback`,
        LDAdam) adds it to the next gradient, and keeps it until then. All but the first and the
        last need an ``inner`` that only scales, such as ``optax.scale_by_adam()``: the learning
        rate and decay come after galore, as in presets.
      side: the axis to project: ``"short"`` (the shorter, as published; the input axis of a
        square matrix), ``"long"``, ``"left"`` (the rows m, the reduction axis), ``"right"``
        (the columns n, the output axis), ``"both"`` (R = P^T G Q is (r, r)).
      exclude: the leaves not to project: a regular expression searched in the path (``"/"``
        between components), a callable of path and shape, a tree of bools with the structure
        of the parameters or a prefix of it, or None to exclude nothing. Unlike in
        ``optax.masked``, True means excluded. By default embeddings, output heads, routers
        and vectors: `galore_optax.DEFAULT_EXCLUDE`. These leaves may be complex.
      weight_dimension_numbers: which axes form the matrix, as in ``optax.contrib.muon``:
        `DimensionNumbers` for all leaves, a tree of them with the structure of the parameters
        or a prefix of it (None: not projected), or a callable from parameters (or gradients)
        to such a tree, or from path and shape to the numbers of a leaf. Numbers given for several
        leaves at once leave alone those with too few axes, and vectors stacked like the matrices
        beside them. Axes not named are batch axes, and each matrix of a batch has its own
        projector. By default 2-D leaves are (reduction, output), as Flax has them, but for stacked
        vectors, and leaves of more axes are not projected.
      accumulation_steps: the number k of calls of ``update`` that make one step: their gradients
        are projected and averaged at rank r, where ``optax.MultiSteps`` keeps a full-size average.
        None is 1. The first k - 1 return updates of zeros. A step whose refresh is due takes the
        subspace from its first gradient; else it is exactly that of the mean gradient. A saved
        state may go on with another k above 1: a step that was begun is the mean of what it got.
      seed: the seed of the random numbers of projectors, which depend on it, on a leaf's path, on
        the matrix' place in a stack, and on how often it has been refreshed.
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
      CombinationError: a ValueError; arguments that cannot go together, or an inner transformation
        that cannot go with the transport or the residual (now, or at ``init`` where that depends on
        names).
      ValueError: arguments out of range; an inner transformation that keeps parameters in its state
        (at ``init``); dimension numbers that do not fit, a state of another configuration,
        gradients of another structure, missing parameters.

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
    if not is_number(seed) or not jnp.issubdtype(jnp.result_type(seed), jnp.integer):
        raise TypeError(f"seed must be an int; got {seed!r}")
    check_scale(scale)
    check_accumulation_steps(accumulation_steps)
    check_gap(update_proj_gap)
    check_bool("stagger", stagger)
    check_bool("diagnostics", diagnostics)
    method = Method(
        projectors.resolve(projector, {} if projector_options is None else projector_options),
        resolve_refresh(refresh),
        resolve("transport", transport, TRANSPORTS, Transport),
        resolve("residual", residual, RESIDUALS, Residual),
        resolve_storage("projector_dtype", projector_dtype),
        bool(diagnostics),
    )
    _check_together(
        method, {"transport": transport, "residual": residual}, side, accumulation_steps
    )
    settings = Settings(
        Selection(rank, side, exclude, weight_dimension_numbers),
        method,
        update_proj_gap,
        bool(stagger),
        # One of NumPy would have a dtype, and make updates of it.
        scale if isinstance(scale, jax.Array) else float(scale),
        1 if accumulation_steps is None else int(accumulation_steps),
        seed if isinstance(seed, jax.Array) else int(seed),
    )
    if inner is not None:
        return transformation(inner, settings)
    bare = BareGalore(*transformation(optax.identity(), settings, caution=_BARE))
    bare.with_inner = functools.partial(transformation, settings=settings)
    return bare


def _check_together(
    method: Method,
    given: Mapping[str, object],
    side: str,
    accumulation_steps: int | None,
) -> None:
    """Raises an error where arguments exclude each other, each of them right by itself.

    Args:
      method: the answers to the five questions.
      given: what the user gave for ``transport`` and ``residual``, for messages.
      side: the axis to project.
      accumulation_steps: the number of gradients that make one step.
    """
    if method.projector.required:
        option = method.projector.required[0]
        raise ValueError(
            f"the projector {method.projector.name} needs projector_options={{{option!r}: ...}}, "
            "which presets give it"
        )
    for argument, value in given.items():
        rule: Transport | Residual = getattr(method, argument)
        if rule.asks is not None:
            shown = f'"{value}"' if isinstance(value, str) else repr(value)
            raise CombinationError(
                f"{argument}={shown} needs the decay rates of the moments, which it cannot see in "
                "the inner transformation",
                f"Give {argument}={rule.asks}, or take a preset such as galore_adamw, which knows "
                "them.",
            )
    residual = f"residual={given['residual']!r}"
    if method.residual.uses_gradient and (accumulation_steps or 1) > 1:
        raise CombinationError(
            f"accumulation_steps must be 1 with {residual}, which needs each gradient at full "
            f"size; got {accumulation_steps}",
            "Put optax.MultiSteps around galore instead.",
        )
    sides = 2 if side == "both" else 1
    if sides > method.projector.sides:
        raise CombinationError(
            f'side="both" cannot go with the projector {method.projector.name}, which is for one '
            "side",
            'Use side="short", or the projector power_iteration.',
        )
    if sides > method.residual.sides:
        raise CombinationError(
            f'side="both" cannot go with {residual}, which scales the gradient by columns or rows '
            "of the side that is not projected",
            'Use side="short", or galore_optax.ScaleGradient(per="tensor").',
        )


_BARE = (
    "galore() has no inner transformation here, so what follows it in optax.chain keeps moments "
    "of full size: it trains on the low-rank gradient but saves no memory, and Adam cancels its "
    "scale. Write galore_optax.chain instead of optax.chain, with galore(...) itself as one of "
    "its arguments, or galore(optax.adamw(...), ...), which other wrappers may go around."
)


def check_scale(scale: object) -> None:
    """Raises an error where galore's argument ``scale`` cannot be right."""
    if not is_number(scale):
        raise TypeError(f"scale must be a finite number or an array that is one; got {scale!r}")
    if not math.isfinite(known(scale, at_runtime=0.0)):
        raise ValueError(f"scale must be finite; got {scale!r}")
