"""Gradients to choose bases from: those of the demo's model, trained, and synthetic ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.flax_llama.data import load_corpus
from examples.flax_llama.demo import GALORE
from examples.flax_llama.train import train


def of_trained_model(
    preset: str,
    steps: int,
    batches: int,
    rows: int = 16,
    seq: int = 256,
    seed: int = 0,
    **changes: Any,
) -> list[dict[str, np.ndarray]]:
    """Gradients of several batches at the weights that the demo's training ends with.

    Args:
      preset: shape of the model.
      steps: updates of the training, which is the demo's but for this.
      batches: number of gradients.
      rows: sequences of each batch.
      seq: tokens of a sequence.
      seed: of the training, and of the batches.
      **changes: other settings of the training.

    Returns:
      Of each batch the gradients (layers, m, n) of the stacked matrices by path, m <= n.
    """
    settings: dict[str, Any] = {"preset": preset, "steps": steps, "eval_every": steps, "seed": seed}
    config = dataclasses.replace(GALORE, **settings | changes, quiet=True)
    model = train(config).model
    graphdef, state = nnx.split(model, nnx.Param)
    ids = np.asarray(load_corpus(config.tokenizer or "").train.ids)

    @jax.jit
    def gradient(params, tokens_BxS1):
        def loss(params):
            logits = nnx.merge(graphdef, params)(tokens_BxS1[:, :-1]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxS1[:, 1:])
            return losses.mean()

        return jax.grad(loss)(params)

    rng = np.random.default_rng(seed)
    found = []
    for _ in range(batches):
        starts = rng.integers(len(ids) - seq, size=rows)
        batch = ids[starts[:, None] + np.arange(seq + 1)]
        leaves = jax.tree_util.tree_leaves_with_path(
            nnx.to_pure_dict(gradient(state, batch))["blocks"]
        )
        found.append(
            {
                "/".join(key.key for key in path): short_side_first(np.asarray(leaf))
                for path, leaf in leaves
                if leaf.ndim == 3
            }
        )
    return found


def short_side_first(matrices: np.ndarray) -> np.ndarray:
    """The matrices, transposed where they have more rows than columns."""
    return matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices


def mean_spectrum(gradient: dict[str, np.ndarray]) -> np.ndarray:
    """Singular values over the largest, root mean square over all matrices of these gradients."""
    (size,) = {matrices.shape[-2] for matrices in gradient.values()}
    spectra = [
        np.linalg.svd(matrices, compute_uv=False).reshape(-1, size)
        for matrices in gradient.values()
    ]
    relative = np.concatenate([s / s[:, :1] for s in spectra])
    return np.sqrt(np.mean(relative**2, axis=0))


def synthetic(m: int, n: int, spectrum: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (m, n), m <= n, with random singular vectors and singular values of that form.

    The i-th of m singular values is that at the fraction i / m of the spectrum.

    Returns:
      The matrix, float32, and its singular values (m,).
    """
    ends = np.linspace(0, 1, len(spectrum))
    values = np.exp(np.interp(np.linspace(0, 1, m), ends, np.log(np.maximum(spectrum, 1e-12))))
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(k, m)).astype(np.float32))[0] for k in (m, n))
    return (left * values.astype(np.float32)) @ right.T, values
