"""Runs transformations of Optax under JAX's standard rules for mixed dtypes."""

import jax
import optax
from jaxtyping import PyTree

from galore_optax._types import Params, State, Updates


def standard_promotion(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, which may mix dtypes whatever ``jax_numpy_dtype_promotion`` says.

    This library mixes none, but Optax does: its Adam raises a number of Python to the power of an
    integer array, which is an error where that setting is ``"strict"``.
    """
    tx = optax.with_extra_args_support(transformation)

    def init(params: Params) -> State:
        with jax.numpy_dtype_promotion("standard"):
            return tx.init(params)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
