"""Presets here keep their state in few bits, with Optax's argument names and order."""

from collections.abc import Callable
from typing import TypeAlias, Unpack

import jax
import optax
from jaxtyping import PyTree

from galore_optax._galore import galore
from galore_optax._low_bit import low_bit
from galore_optax._options import GaloreOptions, shows_galore_options
from galore_optax._ownership import Stacked
from galore_optax._types import DType, Params

Numeric: TypeAlias = jax.typing.ArrayLike
Mask: TypeAlias = PyTree | Callable[[Params], PyTree]


def adamw_8bit(
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
    block_size: int = 256,
    min_size: int = 4096,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns AdamW with moments in 8 bits: ``low_bit(optax.adamw(...))``, without galore.

    Args:
      learning_rate: the learning rate; see ``optax.adamw``, as for all arguments up to
        ``nesterov``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment, before it is rounded to 8 bits.
      weight_decay: the weight decay, times the learning rate.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      block_size: see `galore_optax.low_bit`.
      min_size: the number of elements below which moments are not rounded. All elements of a leaf
        count, or those of one layer where ``stacked`` says how many axes are stacks.
      stacked: see `galore_optax.low_bit`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.adamw_8bit(3e-4, weight_decay=0.1)

    References:
      Dettmers et al., `8-bit Optimizers <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    return low_bit(
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
        block_size=block_size,
        min_size=min_size,
        stacked=stacked,
    )


@shows_galore_options()
def galore_adamw_8bit(
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
    block_size: int = 256,
    min_size: int = 4096,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns 8-bit GaLore: ``galore(adamw_8bit(...), rank=rank, ...)``.

    Args:
      learning_rate: the learning rate; see :func:`adamw_8bit`, as for all arguments up to
        ``min_size``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment, before it is rounded to 8 bits.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      block_size: the number of elements of a block.
      min_size: the number of elements below which moments are not rounded.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax
      >>> tx = galore_optax.galore_adamw_8bit(3e-4, weight_decay=0.1, rank=8)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, section 4.3
    """
    return galore(
        adamw_8bit(
            learning_rate,
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            weight_decay,
            mask,
            nesterov=nesterov,
            block_size=block_size,
            min_size=min_size,
        ),
        **options,
    )


_Q_GALORE: GaloreOptions = {"projector_dtype": "int4", "refresh": "lazy"}


@shows_galore_options(_Q_GALORE)
def q_galore_adamw(
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
    block_size: int = 256,
    min_size: int = 4096,
    **options: Unpack[GaloreOptions],
) -> optax.GradientTransformationExtraArgs:
    """Returns Q-GaLore: 8-bit moments, 4-bit projectors, and lazy refreshes.

    It is ``galore(adamw_8bit(...), projector_dtype="int4", refresh="lazy", ...)``. The weights are
    the caller's: with 8-bit ones from `galore_optax.quantize_params`, gradients come from
    `galore_optax.value_and_grad`, and `galore_optax.apply_updates` adds the updates with
    stochastic rounding.

    Args:
      learning_rate: the learning rate; see :func:`adamw_8bit`, as for all arguments up to
        ``min_size``.
      b1: the decay rate of the first moment.
      b2: the decay rate of the second moment.
      eps: what is added to the denominator, after bias correction.
      eps_root: what is added under the root of the denominator.
      mu_dtype: the dtype of the first moment, before it is rounded to 8 bits.
      weight_decay: the decay of whole matrices, times the learning rate, not scaled by ``scale``.
      mask: the leaves to decay.
      nesterov: whether to use Nesterov momentum.
      block_size: the number of elements of a block.
      min_size: the number of elements below which moments are not rounded.
      **options: ``rank``, ``update_proj_gap``, ``scale`` and all other keyword arguments of
        `galore_optax.galore`; ``projector_dtype`` is ``"int4"`` and ``refresh`` is ``"lazy"``
        where they are not given.

    Returns:
      The transformation.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> tx = galore_optax.q_galore_adamw(1e-3, rank=8)
      >>> params = galore_optax.quantize_params({"kernel": jnp.ones((64, 256))}, rank=8)
      >>> state = tx.init(params)
      >>> loss = lambda params: jnp.sum(params["kernel"].dequantize() ** 2)
      >>> value, grads = galore_optax.value_and_grad(loss)(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = galore_optax.apply_updates(params, updates, jax.random.key(0))

    References:
      Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024
    """
    return galore(
        adamw_8bit(
            learning_rate,
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            weight_decay,
            mask,
            nesterov=nesterov,
            block_size=block_size,
            min_size=min_size,
        ),
        **(_Q_GALORE | options),
    )
