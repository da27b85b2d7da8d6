"""Gives transformations of Optax that follow galore what they can reckon with.

They know nothing of codes, and square numbers in the dtype that these have.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from galore_optax._promotion import standard_promotion
from galore_optax._quantized import is_quantized
from galore_optax._quantized_params import dequantize_params
from galore_optax._trees import bare, beside, logical
from galore_optax._types import Params, State, Updates
from galore_optax._view import moment_dtype, wide


def rounded_once(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns a chain of galore and others whose updates are in at least float32 until its end.

    Else galore would round to the dtype of the parameters, and what follows it again.
    """
    tx = optax.with_extra_args_support(transformation)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        new, state = tx.update(updates, state, params, unrounded=True, **extra_args)
        like = updates if params is None else beside(bare(updates), bare(params))
        leaves, treedef = jax.tree.flatten(new)
        likes = jax.tree.leaves(like, is_leaf=is_quantized)
        rounded = [leaf.astype(jnp.result_type(of)) for leaf, of in zip(leaves, likes, strict=True)]
        return treedef.unflatten(rounded), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def decoded(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, run in at least float32, for quantized parameters too.

    Its updates are in at least float32 too; `rounded_once` goes around.
    """
    tx = standard_promotion(transformation)

    def widened(params: Params) -> Params:
        return jax.tree.map(wide, dequantize_params(params))

    def init(params: Params) -> State:
        # From shapes, so that nothing is decoded, and shapes of quantized parameters will do.
        leaves = jax.tree.leaves(params, is_leaf=is_quantized)
        changes = any(is_quantized(x) or moment_dtype(x.dtype) != x.dtype for x in leaves)
        return tx.init(jax.eval_shape(widened, params) if changes else params)

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        arrays = None if params is None else widened(beside(updates, params))
        return tx.update(jax.tree.map(wide, updates), state, arrays, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def sees_dtypes(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, which sees of each parameter a zero in at least float32.

    It is for ``optax.inject_hyperparams``, which holds numbers in the dtype of the parameters: a
    learning rate in bfloat16 would be wrong by up to 0.4 %.
    """
    tx = optax.with_extra_args_support(transformation)

    def zeros(params: Params) -> Params:
        return jax.tree.map(
            lambda x: jnp.zeros([], moment_dtype(jnp.result_type(x))), logical(bare(params))
        )

    def init(params: Params) -> State:
        return tx.init(zeros(params))

    def update(
        updates: Updates, state: State, params: Params | None = None, **extra_args: PyTree
    ) -> tuple[Updates, State]:
        del params
        return tx.update(updates, state, zeros(updates), **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)
