"""A case of the loss over a vocabulary, and its losses and gradients from all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

B, S, D, V = 3, 22, 24, 101


def plain_losses(x, head, labels):
    """With all logits at once."""
    logits = jnp.asarray(x, jnp.float32) @ jnp.asarray(head, jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def case(dtype=jnp.float32):
    """Inputs, head, labels and weights, of which some are zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, S, D)).astype(dtype)
    head = rng.standard_normal((D, V)).astype(dtype)
    labels = rng.integers(V, size=(B, S)).astype(np.int32)
    weights = rng.uniform(0.5, 2.0, (B, S)) * (rng.uniform(size=(B, S)) < 0.7)
    return tuple(map(jnp.asarray, (x, head, labels, weights.astype(np.float32))))


def gradients(loss, *arguments):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arguments)


def relative_error(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
