"""A convolutional network reads digits: kernels of four axes, whose numbers say what is a matrix.

    pip install scikit-learn
    python -m examples.small.digits --out benchmarks/results/digits.json

The data is scikit-learn's: 1,797 images of 8 x 8 pixels.
"""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from examples.small.sweep import Task, adamw_and_galore, main
from galore_optax import DimensionNumbers

STEPS, BATCH, RANK = 300, 64, 16
TRAINED_ON, CHOSEN_BY = 1200, 200
# Of a kernel (height, width, in, out): the matrix has a row for each number that an output sums up.
CONVOLUTION = DimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)


class Network(nnx.Module):
    """Three convolutions, two of which halve the image, and a linear layer of what is left."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.third = nnx.Conv(64, 128, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for layer in (self.first, self.second, self.third):
            x = nnx.relu(layer(x))
        return self.head(x.mean((1, 2)))


def dimension_numbers(path: str, shape: tuple[int, ...]) -> DimensionNumbers | None:
    """Which axes of a leaf make its matrix."""
    return CONVOLUTION if len(shape) == 4 else None


def data() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Images and digits to train on, to choose by, and to report on."""
    from sklearn.datasets import load_digits  # pyrefly: ignore[missing-import]

    images, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    images = (images[order].reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    ends = [TRAINED_ON, TRAINED_ON + CHOSEN_BY]
    return tuple(zip(np.split(images, ends), np.split(digits[order], ends), strict=True))


def task() -> Task:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))
    train, valid, test = data()

    def init(seed: int) -> Any:
        return nnx.to_pure_dict(nnx.state(Network(nnx.Rngs(seed)), nnx.Param))

    def loss(params: Any, batch: Any) -> jax.Array:
        images, digits = batch
        logits = nnx.merge(graphdef, params)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()

    def batches(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        rows = np.concatenate([rng.permutation(TRAINED_ON) for _ in range(STEPS * BATCH // 1000)])
        rows = rows[: STEPS * BATCH].reshape(STEPS, BATCH)
        return train[0][rows], train[1][rows]

    @jax.jit
    def right(params: Any) -> jax.Array:
        return (nnx.merge(graphdef, params)(test[0]).argmax(-1) == test[1]).mean()

    def scores(params: Any) -> dict[str, float]:
        return {
            "valid_loss": float(jax.jit(loss)(params, valid)),
            "test_loss": float(jax.jit(loss)(params, test)),
            "test_accuracy": float(right(params)),
        }

    optimizers = adamw_and_galore(RANK, dimension_numbers, weight_decay=1e-2)
    return Task("digits", init, loss, batches, scores, optimizers)


if __name__ == "__main__":
    main(task())
