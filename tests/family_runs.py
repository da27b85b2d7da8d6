"""Makes galores of the rules of `reference_family`, and runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from galore_optax import ErrorFeedback, NormScaled, Reset, Rotate, ScaleGradient, Sign
from galore_optax._adam import Betas


def transport_of(rule):
    if rule.transport in ("rotate", "reset"):
        return {"rotate": Rotate, "reset": Reset}[rule.transport](rule.b1, rule.b2)
    return rule.transport


def residual_of(rule):
    if rule.residual == "norm_scaled":
        betas = Betas(rule.b1, rule.b2) if rule.subtract == "scaled" else None
        return NormScaled(rule.beta, rule.subtract, betas, gamma=rule.gamma)
    if rule.residual == "scale_gradient":
        return ScaleGradient(rule.per, gamma=rule.gamma)
    if rule.residual == "sign":
        return Sign(rule.beta)
    return ErrorFeedback(rule.b1) if rule.residual == "error_feedback" else rule.residual


def galore(rule, projector="svd", inner=None, **options):
    return galore_optax.galore(
        optax.scale_by_adam(rule.b1, rule.b2) if inner is None else inner,
        rank=rule.rank,
        update_proj_gap=rule.gap,
        scale=rule.scale,
        projector=projector,
        transport=transport_of(rule),
        residual=residual_of(rule),
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda x: galore_optax.DimensionNumbers(x.ndim - 2, x.ndim - 1), tree
        ),
        **options,
    )


def run(tx, gradients):
    """Updates of all steps, of one compiled loop, and the state at the end."""
    gradients = jax.tree.map(jnp.asarray, gradients)
    params = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradients)

    def step(state, gradient):
        updates, state = tx.update(gradient, state, params)
        return state, updates

    state, updates = jax.jit(lambda g: jax.lax.scan(step, tx.init(params), g))(gradients)
    return jax.tree.map(np.asarray, updates), state
