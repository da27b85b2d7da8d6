"""Presets put Optax's optimizers inside galore, with Optax's argument names and order."""

from collections.abc import Callable
from typing import TypeAlias, Unpack

import jax
import optax
from jaxtyping import PyTree

from galore_optax._galore import galore
from galore_optax._options import GaloreOptions, shows_galore_options
from galore_optax._types import DType, Params

Numeric: TypeAlias = jax.typing.ArrayLike
Mask: TypeAlias = PyTree | Callable[[Params], PyTree]


@shows_galore_options()
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DType | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW in the gradient's subspace: ``galore(optax.adamw(...), rank=rank, ...)``.

    It is Optax's AdamW, not the reference's: decay acts on the weight before the step and epsilon
    is added after bias correction, both second-order differences.

    Args:
      learning_rate: the learning rate; see ``optax.adamw``, as for all arguments up to
        ``nesterov``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(3e-4, weight_decay=0.1, rank=8)
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    return galore(
        optax.adamw(
            learning_rate,
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            weight_decay,
            mask,
            nesterov=nesterov,
        ),
        **options,
    )


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
            weight_decay_mask,
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
    return galore(
        optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask),
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
    return galore(
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
        **options,
    )
