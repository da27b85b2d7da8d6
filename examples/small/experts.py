"""A mixture of experts reads bytes: kernels (experts, in, out), each with a basis of its own.

    python -m examples.small.experts --out benchmarks/results/experts.json

Of each byte of a text it knows the sixteen before it. The text is the built-in one.
"""

import lzma
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.flax_llama.documents import TEXT
from examples.small.sweep import Task, adamw_and_galore, main
from galore_optax import DimensionNumbers

STEPS, BATCH, RANK = 400, 256, 32
CONTEXT, EMBEDDED, HIDDEN, WIDE, EXPERTS, CHOSEN = 16, 32, 128, 256, 8, 2
HELD_OUT = 20_000
# Of a kernel (experts, in, out): the first axis has many matrices.
OF_EXPERTS = DimensionNumbers(reduction_axis=1, output_axis=2)


class Experts(nnx.Module):
    """Of each token, the sum of what its two likeliest experts make of it."""

    def __init__(self, rngs: nnx.Rngs):
        draw = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(HIDDEN, EXPERTS, use_bias=False, rngs=rngs)
        self.up = nnx.Param(draw(rngs.params(), (EXPERTS, HIDDEN, WIDE)))
        self.down = nnx.Param(draw(rngs.params(), (EXPERTS, WIDE, HIDDEN)))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is added to `x`, and how unevenly the experts are used, 1 at best."""
        chances = nnx.softmax(self.router(x))
        best, chosen = jax.lax.top_k(chances, CHOSEN)
        best /= best.sum(-1, keepdims=True)
        parts = jnp.einsum("bk,bke->be", best, nnx.one_hot(chosen, EXPERTS))
        inside = nnx.gelu(jnp.einsum("bi,eio->beo", x, self.up[...]))
        out = jnp.einsum("beo,eoi,be->bi", inside, self.down[...], parts)
        used = nnx.one_hot(chosen, EXPERTS).sum(1).mean(0) / CHOSEN
        return out, EXPERTS * (used * chances.mean(0)).sum()


class Reader(nnx.Module):
    """The next byte of those before it."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, EMBEDDED, rngs=rngs)
        self.inside = nnx.Linear(CONTEXT * EMBEDDED, HIDDEN, rngs=rngs)
        self.experts = Experts(rngs)
        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, 256, rngs=rngs)

    def __call__(self, before: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nnx.gelu(self.inside(self.embed(before).reshape(len(before), -1)))
        more, uneven = self.experts(self.norm(x))
        return self.head(x + more), uneven


def dimension_numbers(path: str, shape: tuple[int, ...]) -> DimensionNumbers | None:
    """Which axes of a leaf make its matrices."""
    if len(shape) == 3:
        return OF_EXPERTS
    return DimensionNumbers(0, 1) if path == "inside/kernel" else None


def task() -> Task:
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Reader(nnx.Rngs(0))))
    with lzma.open(TEXT) as file:
        text = np.frombuffer(file.read(), np.uint8)
    train, held_out = text[:-HELD_OUT], text[-HELD_OUT:]

    def windows(text: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = text[starts[..., None] + np.arange(CONTEXT + 1)].astype(np.int32)
        return rows[..., :-1], rows[..., -1]

    def init(seed: int) -> Any:
        return nnx.to_pure_dict(nnx.state(Reader(nnx.Rngs(seed)), nnx.Param))

    def losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        before, after = batch
        logits, uneven = nnx.merge(graphdef, params)(before)
        return optax.softmax_cross_entropy_with_integer_labels(logits, after).mean(), uneven

    def loss(params: Any, batch: Any) -> jax.Array:
        own, uneven = losses(params, batch)
        return own + 0.01 * uneven

    def batches(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return windows(train, rng.integers(len(train) - CONTEXT, size=(STEPS, BATCH)))

    def scores(params: Any) -> dict[str, float]:
        found, uneven = jax.jit(losses)(
            params, windows(held_out, np.arange(0, HELD_OUT - CONTEXT, 4))
        )
        return {"valid_loss": float(found), "uneven": float(uneven)}

    optimizers = adamw_and_galore(RANK, dimension_numbers, weight_decay=1e-4)
    return Task("experts", init, loss, batches, scores, optimizers)


if __name__ == "__main__":
    main(task())
