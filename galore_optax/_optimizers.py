"""Presets of other optimizers than AdamW in galore, with Optax's argument names and order."""

from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from galore_optax._arguments import mask_of
from galore_optax._decoded import decoded, rounded_once
from galore_optax._factored import clip_rms
from galore_optax._galore import check_scale, galore
from galore_optax._options import (
    GaloreOptions,
    check_accumulation,
    selection_of,
    shows_galore_options,
    warn_of_calls,
)
from galore_optax._ownership import Stacked, check_stacked, stacked_axes
from galore_optax._select import Selection
from galore_optax._sharding import under_auto
from galore_optax._state import inspection_in_progress
from galore_optax._trees import beside, logical
from galore_optax._types import DType, Mask, Numeric, Params, State, Updates
from galore_optax._view import MatrixView


@shows_galore_options()
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: Numeric = 0.8,
    decay_offset: Numeric = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Numeric | None = 1.0,
    momentum: Numeric | None = None,
    dtype_momentum: DType = jax.numpy.float32,
    weight_decay_rate: optax.ScalarOrSchedule | None = None,
    eps: Numeric = 1e-30,
    factored: bool = True,
    weight_decay_mask: Mask | None = None,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns Adafactor in the gradient's subspace: ``galore(optax.adafactor(...), ...)``.

    With ``multiply_by_parameter_scale``, Optax's default, the scale is the root mean square of
    the projected matrix, and ``weight_decay_rate`` acts in the subspace; a warning says so once.

    Args:
      learning_rate: the learning rate; see ``optax.adafactor``, as for all arguments up to
        ``weight_decay_mask``.
      min_dim_size_to_factor: the least size of both axes of R at which its second moment is
        factored.
      decay_rate: the exponent of the second moment's decay schedule.
      decay_offset: the step at which that schedule starts.
      multiply_by_parameter_scale: whether to scale updates by the parameters' root mean square.
      clipping_threshold: the threshold of the update's root mean square.
      momentum: the decay rate of the first moment, or None for none.
      dtype_momentum: the dtype of the first moment.
      weight_decay_rate: the weight decay, not multiplied by the learning rate, as in Optax.
      eps: what is added to the squared gradient.
      factored: whether to factor the second moment.
      weight_decay_mask: the leaves to decay.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.galore_adafactor(1e-3, multiply_by_parameter_scale=False, rank=8)
    """
    warn_of_calls("galore_adafactor", learning_rate, options)
    return galore(
        optax.adafactor(
            learning_rate,
            min_dim_size_to_factor,
            decay_rate,
            decay_offset,
            multiply_by_parameter_scale,
            clipping_threshold,
            momentum,
            dtype_momentum,
            weight_decay_rate,
            eps,
            factored,
            mask_of("weight_decay_mask", weight_decay_mask),
        ),
        **options,
    )


@shows_galore_options()
def galore_lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.99,
    mu_dtype: DType | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Mask | None = None,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns Lion in the gradient's subspace: ``galore(optax.lion(...), rank=rank, ...)``.

    Args:
      learning_rate: the learning rate; see ``optax.lion``, as for all arguments up to ``mask``.
      b1: the rate of the interpolation whose sign is the update.
      b2: the decay rate of the moment.
      mu_dtype: the dtype of the moment.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.galore_lion(1e-4, rank=8)
    """
    warn_of_calls("galore_lion", learning_rate, options)
    return galore(
        optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask_of("mask", mask)),
        **options,
    )


@shows_galore_options()
def galore_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    accumulator_dtype: DType | None = None,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns SGD in the gradient's subspace: ``galore(optax.sgd(...), rank=rank, ...)``.

    Args:
      learning_rate: the learning rate; see ``optax.sgd``, as for all arguments up to
        ``accumulator_dtype``.
      momentum: the decay rate of the momentum, or None for none.
      nesterov: whether to use Nesterov momentum.
      accumulator_dtype: the dtype of the momentum.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.galore_sgd(0.1, momentum=0.9, rank=8)
    """
    warn_of_calls("galore_sgd", learning_rate, options)
    return galore(
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
        **options,
    )


_FLORA: GaloreOptions = {
    "update_proj_gap": 1000,
    "scale": 1.0,
    "projector": "gaussian",
    "transport": "project",
}


@shows_galore_options(_FLORA)
def flora(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    min_dim_size_to_factor: int = 128,
    decay_rate: Numeric = 0.8,
    clipping_threshold: Numeric | None = 1.0,
    eps: Numeric = 1e-30,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    stacked: Stacked | None = None,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns Flora: momentum kept in a random sketch, under Adafactor's second moment.

    The momentum is decompressed before Adafactor sees it, whose factors are those of whole
    matrices. When the random numbers are drawn anew, the momentum is projected on them.

    Args:
      learning_rate: the learning rate.
      b1: the decay rate of the momentum.
      min_dim_size_to_factor: the least size of both axes of a leaf at which its second moment is
        factored; see ``optax.scale_by_factored_rms``. Axes that are stacks should be shorter.
      decay_rate: the exponent of the second moment's decay schedule.
      clipping_threshold: the threshold of the update's root mean square; None for no clipping.
      eps: what is added to the squared momentum.
      weight_decay: the weight decay, times the learning rate.
      mask: the leaves to decay.
      stacked: returns how many leading axes of a leaf that is not projected are stacks of layers,
        from its path and shape. Updates of layers, as of matrices, are clipped by themselves.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`, with the defaults that the signature shows.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.flora(1e-3, rank=8)

    References:
      Hao et al., `Flora <https://arxiv.org/abs/2402.03293>`_, 2024
    """
    given: GaloreOptions = _FLORA | options
    check_accumulation("flora", given)
    check_stacked(stacked)
    selection, clip, scale = selection_of(given), clipping_threshold, given.get("scale", 1.0)
    check_scale(scale)

    def clipped(updates: Updates, params: Params | None = None) -> Updates:
        """Clips the root mean square, of each item of a stack by itself, and scales matrices."""
        del params
        leaves, treedef = jax.tree.flatten(updates)
        new = []
        for leaf, view in zip(leaves, selection.views(updates), strict=True):
            batch: Sequence[int] = ()
            if isinstance(view, MatrixView):
                batch = view.batch_axes
            elif stacked is not None:
                batch = range(stacked_axes(stacked, view.path, view.shape))
            new.append(leaf if clip is None else clip_rms(leaf, batch, clip))
            if isinstance(view, MatrixView):
                new[-1] *= jnp.asarray(scale, leaf.dtype)
        return treedef.unflatten(new)

    line = optax.chain(
        # What follows divides by the size of the momentum, and with it by any scale.
        galore(optax.ema(b1, debias=False), **(given | {"scale": 1.0})),
        decoded(
            optax.scale_by_factored_rms(
                decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps
            )
        ),
        optax.stateless(clipped),
        decoded(optax.add_decayed_weights(weight_decay, mask_of("mask", mask))),
        optax.scale_by_learning_rate(learning_rate),
    )
    return rounded_once(line)


_MUON: GaloreOptions = {"scale": 1.0, "transport": "project"}


@shows_galore_options(_MUON)
def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: Numeric = 0.95,
    ns_steps: int = 5,
    eps: Numeric = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
    *,
    nesterov: bool = True,
    adam_b1: Numeric = 0.9,
    adam_b2: Numeric = 0.999,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon in the gradient's subspace, and AdamW for the leaves that are not projected.

    The momentum of the low-rank gradient is made orthogonal by Newton and Schulz' iteration, which
    costs about (r / m)^2 of what it costs at full size. The momentum is projected on the new
    subspace at a refresh.

    Args:
      learning_rate: the learning rate of all leaves.
      beta: the decay rate of Muon's momentum.
      ns_steps: the number of steps of the iteration; see ``optax.contrib.muon``.
      eps: what is added to denominators, Muon's and Adam's.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      adam_b1: the decay rate of AdamW's first moment.
      adam_b2: the decay rate of AdamW's second moment.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`, with the defaults that the signature shows.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.galore_muon(1e-2, rank=8)

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024
    """
    given: GaloreOptions = _MUON | options
    check_accumulation("galore_muon", given)

    def numbers(low_rank: Params) -> PyTree:
        # Behind the axes that matrices are stacked over.
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), low_rank)

    muon = optax.contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        nesterov=nesterov,
        weight_dimension_numbers=numbers,
    )
    adam = decoded(optax.scale_by_adam(adam_b1, adam_b2, eps))
    selection = selection_of(given)

    def labels(params: Params) -> PyTree:
        names = ["muon" if isinstance(v, MatrixView) else "adam" for v in selection.views(params)]
        return jax.tree.unflatten(jax.tree.structure(logical(params)), names)

    def widened(updates: Updates, params: Params | None = None) -> Updates:
        """Multiplies updates by sqrt(max(1, n / m)), as Muon does at full size."""
        del params
        leaves, treedef = jax.tree.flatten(updates)
        factors = [
            max(1, view.n / view.m) ** 0.5 if isinstance(view, MatrixView) else 1.0
            for view in selection.views(updates)
        ]
        return treedef.unflatten([x * f for x, f in zip(leaves, factors, strict=True)])

    # Leaves that are excluded are not there for this galore, which would say that none is.
    in_galore = galore(under_auto(muon), **(given | {"exclude": None}))
    matrices = optax.chain(in_galore, optax.stateless(widened))
    tx = optax.chain(
        optax.partition({"muon": matrices, "adam": adam}, labels),
        decoded(optax.add_decayed_weights(weight_decay, mask_of("mask", mask))),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _as_of_all(rounded_once(tx), selection)


def _as_of_all(
    tx: optax.GradientTransformationExtraArgs, selection: Selection
) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that warns and takes parameters as a galore of all leaves does.

    It is for one that shows galore some leaves only.
    """
    warned = False

    def init(params: Params) -> State:
        nonlocal warned
        views = selection.views(params)
        if views and not warned and inspection_in_progress() is None:
            warned = True
            selection.warn(views, stacklevel=2)
        return tx.init(params)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: object
    ) -> tuple[Updates, State]:
        return tx.update(updates, state, beside(updates, params), **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
