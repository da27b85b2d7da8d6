"""Limits how fast the norm of a matrix' update may grow from one step to the next."""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from galore_optax._ownership import Stacked, check_stacked, stacked_axes
from galore_optax._trees import leaves_with_paths, logical
from galore_optax._types import Params, State, Updates
from galore_optax._view import moment_dtype, unit_of

GAMMA = 1.01
"""The growth per step that Fira and APOLLO allow."""

_EPSILON = 1e-8


class LimitNormGrowthState(NamedTuple):
    """State of :func:`limit_norm_growth`."""

    norms: PyTree  # the norm that each leaf's matrices were let through with, (*batch,); 0 before.


def limit(
    norm: Float[Array, ""], previous: Float[Array, ""], gamma: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns by what to multiply an update, and the norm to remember.

    Args:
      norm: the norm |S| of the update.
      previous: the norm that the last one was let through with; 0 where there was none yet.
      gamma: by what factor the norm may grow.

    Returns:
      1 / rho with rho = max(|S| / (previous + 1e-8), gamma) / gamma, and |S| / rho. An update that
      is zero or not finite is not limited, and leaves what is remembered.

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, equation (7)
    """
    # This is |S| / rho without rho, which could overflow.
    most = jnp.where(previous > 0, gamma * (previous + _EPSILON), jnp.inf)
    allowed = jnp.minimum(norm, most)
    sound = (norm > 0) & (norm < jnp.inf)
    remembered = jnp.where(sound, allowed, previous).astype(previous.dtype)
    return jnp.where(sound, allowed / jnp.where(sound, norm, 1), 1), remembered


def limit_norm_growth(
    gamma: float = GAMMA, *, stacked: Stacked | None = None
) -> optax.GradientTransformation:
    """Limits the growth of each matrix' norm to a factor of ``gamma`` per step.

    It is the norm-growth limiter of Fira, as a transformation of its own; the residuals
    ``"norm_scaled"`` and ``"scale_gradient"`` of `galore_optax.galore` have it in them. A sudden
    large update is scaled down, and may grow from step to step. The state is one number per matrix.

    Args:
      gamma: by what factor the norm may grow from one step to the next, at least 1.
      stacked: returns how many leading axes of a leaf are stacks of layers, from its path and
        shape, as for `galore_optax.low_bit`. By default none are: each leaf is one matrix.

    Returns:
      The transformation. Updates keep their dtype.

    Raises:
      TypeError: an argument has a wrong type, or ``stacked`` returns no int.
      ValueError: ``gamma`` is below 1 or not finite, or ``stacked`` returns a number of axes that a
        leaf does not have.

    Examples:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.limit_norm_growth()
      >>> state = tx.init(jnp.ones(4))
      >>> _, state = tx.update(jnp.ones(4), state)
      >>> updates, state = tx.update(100 * jnp.ones(4), state)
      >>> round(float(updates[0]), 3)
      1.01

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, equation (7)
    """
    check_gamma("gamma", gamma)
    check_stacked(stacked)

    def axes(path: str, leaf: PyTree) -> int:
        return 0 if stacked is None else stacked_axes(stacked, path, np.shape(leaf))

    def init(params: Params) -> LimitNormGrowthState:
        params = logical(params)
        paths = [path for path, _ in leaves_with_paths(params)]
        leaves, treedef = jax.tree.flatten(params)
        norms = [
            jnp.zeros(np.shape(x)[: axes(path, x)], moment_dtype(x.dtype))
            for path, x in zip(paths, leaves, strict=True)
        ]
        return LimitNormGrowthState(treedef.unflatten(norms))

    def update(
        updates: Updates, state: State, params: Params | None = None
    ) -> tuple[Updates, LimitNormGrowthState]:
        del params

        def of_leaf(update: Array, previous: Array) -> tuple[Array, Array]:
            one = functools.partial(_limited, gamma=gamma)
            for _ in previous.shape:
                one = jax.vmap(one)
            return one(update, previous)

        leaves, treedef = jax.tree.flatten(updates)
        norms = jax.tree.leaves(state.norms)
        both = [of_leaf(*pair) for pair in zip(leaves, norms, strict=True)]
        new = jax.tree.unflatten(jax.tree.structure(state.norms), [norm for _, norm in both])
        return treedef.unflatten([update for update, _ in both]), LimitNormGrowthState(new)

    return optax.GradientTransformation(init, update)


def safe_norm(x: Float[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    """Returns the Euclidean norm, whose squares do not overflow, along an axis or of all."""
    unit = unit_of(x, axis, keepdims=True)
    return jnp.squeeze(unit, axis) * jnp.sqrt(jnp.sum((x / unit) ** 2, axis))


def check_gamma(name: str, gamma: object) -> None:
    """Raises an error where a factor of growth cannot be right.

    Raises:
      TypeError: it is no number.
      ValueError: it is below 1 or not finite.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
        raise TypeError(f"{name} must be a number of at least 1; got {gamma!r}")
    if not (float(gamma) >= 1 and math.isfinite(gamma)):
        raise ValueError(f"{name} must be a finite number of at least 1; got {gamma!r}")


def _limited(update: Array, previous: Array, gamma: float) -> tuple[Array, Array]:
    wide = update.astype(previous.dtype)
    factor, norm = limit(safe_norm(wide), previous, gamma)
    return (wide * factor).astype(update.dtype), norm
