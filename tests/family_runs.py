"""Makes galores of the rules of `reference_family`, and runs them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from galore_optax import (
    DimensionNumbers,
    ErrorFeedback,
    Lazy,
    NormScaled,
    Reset,
    Rotate,
    ScaleGradient,
    Sign,
)
from galore_optax._adam import Betas

# Whatever has two axes is a matrix, and others are stacks of matrices.
LAST_TWO = DimensionNumbers(-2, -1)


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
        optax.scale_by_adam(rule.b1, rule.b2, rule.eps) if inner is None else inner,
        **{
            "rank": rule.rank,
            "update_proj_gap": rule.gap,
            "scale": rule.scale,
            "projector": projector,
            "transport": transport_of(rule),
            "residual": residual_of(rule),
            "side": rule.side,
            "refresh": Lazy(rule.lazy.threshold, rule.lazy.queue) if rule.lazy else "periodic",
            "accumulation_steps": rule.gradients_per_step,
            "weight_dimension_numbers": LAST_TWO,
        }
        | options,
    )


def run(tx, gradients, params=None):
    """Updates of all steps, of one compiled loop, and the state at the end.

    The parameters are zeros that stay, or those that are given, which are updated.
    """
    gradients = jax.tree.map(jnp.asarray, gradients)
    start = jax.tree.map(lambda x: jnp.zeros_like(x[0]), gradients) if params is None else params
    start = jax.tree.map(jnp.asarray, start)

    def step(carry, gradient):
        state, weights = carry
        updates, state = tx.update(gradient, state, weights)
        return (
            state,
            weights if params is None else optax.apply_updates(weights, updates),
        ), updates

    def loop(gradients, start):
        return jax.lax.scan(step, (tx.init(start), start), gradients)

    (state, _), updates = jax.jit(loop)(gradients, start)
    return jax.tree.map(np.asarray, updates), state


def bases_of(gradients, **options):
    """The bases of a projector after each step, {name: (layers, steps, size, rank)}.

    A galore whose inner transformation remembers what it sees is given the gradients, and after
    each of them identity matrices, which choose nothing.
    """
    gradients = jax.tree.map(jnp.asarray, gradients)
    identities = jax.tree.map(
        lambda g: jnp.broadcast_to(jnp.eye(*g.shape[-2:]), g.shape[1:]), gradients
    )
    remembers = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda seen, state, params=None: (seen, seen),
    )
    tx = galore_optax.galore(remembers, weight_dimension_numbers=LAST_TWO, **options)

    def step(state, gradient):
        _, state = tx.update(gradient, state)
        _, seen = tx.update(identities, state, refresh=False)
        return state, seen.inner

    _, seen = jax.jit(lambda g: jax.lax.scan(step, tx.init(identities), g))(gradients)
    bases = {}
    for name, gradient in gradients.items():
        steps, *_, m, n = gradient.shape
        low_rank = np.asarray(seen[name]).reshape(steps, -1, *seen[name].shape[-2:])
        # P^T I, or I P, where the longer side of I is more than that of P.
        basis = low_rank[..., :n, :] if m > n else np.swapaxes(low_rank, -1, -2)[..., :m, :]
        bases[name] = np.swapaxes(basis, 0, 1)
    return bases
