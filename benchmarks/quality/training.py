"""Trains one model of the application, with the learning rates as arguments of the program.

All learning rates and seeds of an optimizer share what is compiled: the optimizer has a peak
learning rate of 1, and its updates are multiplied by the real one.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import galore_optax
from benchmarks.quality.contenders import ADAM, BUILDERS
from benchmarks.quality.ranks import by_role
from examples.flax_llama.config import Config
from examples.flax_llama.evaluate import make_evaluate
from examples.flax_llama.model import Llama, Params, dimension_numbers, stacked_matrices
from examples.flax_llama.schedules import learning_rate
from examples.flax_llama.sharding import make_mesh
from examples.flax_llama.step import make_gradients, put_batch
from examples.flax_llama.train import any_batch, open_dataset

Result = dict[str, Any]
# Updates between looks at whether the loss is still finite.
LOOK = 50


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: an optimizer, a width, a rank, learning rates and a seed.

    Attributes:
      contender: the name of the optimizer.
      hidden: the hidden size.
      rank: the rank of all matrices; None where it makes no difference.
      lr: the peak learning rate.
      ratio: its factor for the layers' matrices.
      seed: the seed of the weights and of the order of the data.
      rule: the name of the rule of its ranks, where they differ by role.
      factors: the relative ranks of that rule, by role.
    """

    contender: str
    hidden: int
    rank: int | None
    lr: float
    ratio: float = 1.0
    seed: int = 0
    rule: str | None = None
    factors: tuple[tuple[str, float], ...] | None = None

    def __str__(self) -> str:
        words = [self.contender, f"hidden {self.hidden}"]
        words += [] if self.rank is None else [f"rank {self.rank}"]
        words += [] if self.rule is None else [f"{self.rule}"]
        words += [f"lr {self.lr:g}"] + [f"ratio {self.ratio:g}"] * (self.ratio != 1)
        return ", ".join([*words, f"seed {self.seed}"])


class Program(NamedTuple):
    """What all learning rates and seeds share."""

    mesh: jax.sharding.Mesh
    # Function of a seed: parameters and optimizer state.
    init: Callable[..., Any]
    # Function of both, a batch, a learning rate and a ratio: both, and the loss.
    update: Callable[..., Any]
    # Function of parameters and validation batches.
    evaluate: Callable[..., Any]
    state_bytes: int
    matrix_state_bytes: int


def config_of(base: Config, run: Run) -> Config:
    """The application's settings of a run; a multiple of the width has as many heads more."""
    factor = run.hidden // base.hidden
    shape = {name: factor * getattr(base, name) for name in ("hidden", "intermediate", "heads")}
    # The rank goes to the optimizer itself.
    return dataclasses.replace(base, **shape, rank=1, seed=run.seed, lr=1.0).resolve()


def optimizer_of(config: Config, run: Run) -> optax.GradientTransformation:
    """The clipped optimizer of a run, with a peak learning rate of 1."""
    rank = run.rank or 1
    spec = rank if run.factors is None else by_role(rank, dict(run.factors))
    make = BUILDERS[run.contender].make
    options = ADAM | {"rank": spec, "weight_dimension_numbers": dimension_numbers}
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        make(learning_rate(config), **options),
    )


def model_of(config: Config, vocab_size: int) -> tuple[nnx.GraphDef, Callable[[Any], Params]]:
    """The model without its parameters, and the function that draws these from a key."""
    shape = config.shape(vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    return graphdef, lambda key: nnx.to_pure_dict(
        nnx.state(Llama(shape, rngs=nnx.Rngs(key)), nnx.Param)
    )


@functools.lru_cache(maxsize=2)
def program(config: Config, run: Run, vocab_size: int) -> Program:
    """Compiles what a run needs; its learning rates and seed, and those of `config`, are any."""
    mesh, optimizer = make_mesh(), optimizer_of(config, run)
    graphdef, draw = model_of(config, vocab_size)
    gradients_of = make_gradients(graphdef, mesh)

    def init(seed: jax.Array) -> Any:
        params = draw(jax.random.key(seed))
        return params, optimizer.init(params)

    def update(params: Params, state: Any, batch: Any, lr: jax.Array, ratio: jax.Array) -> Any:
        loss, gradients = gradients_of(params, batch)
        updates, state = optimizer.update(gradients, state, params)
        updates = jax.tree.map(
            lambda u, is_matrix: (lr * ratio if is_matrix else lr) * u,
            updates,
            stacked_matrices(params),
        )
        params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return params, state, loss

    init = jax.jit(init)
    arguments = jax.eval_shape(init, jnp.uint32(0))
    batch = put_batch(any_batch(config), config.accumulate, mesh)
    rate = jnp.float32(1)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*arguments, batch, rate, rate).compile()
    report = galore_optax.memory_report(optimizer, arguments[0])
    of_matrices = [g for g in report.groups if g.path.startswith("blocks/") and len(g.shape) == 3]
    return Program(
        mesh,
        init,
        compiled,
        make_evaluate(graphdef, mesh),
        report.state,
        sum(group.projectors + group.moments for group in of_matrices),
    )


def measure(base: Config, run: Run) -> Result:
    """Trains and validates.

    Returns:
      Validation loss and its standard error from the spread of the text, both None where training
      diverged; tokens per second of all updates but the first; bytes of the state, and of that
      part which belongs to the layers' matrices; and seconds, compilation included.
    """
    start = time.perf_counter()
    config = config_of(base, run)
    dataset = open_dataset(config)
    like = dataclasses.replace(run, lr=1.0, ratio=1.0, seed=0)
    shared = program(dataclasses.replace(config, seed=0), like, dataset.tokenizer.vocab_size)
    try:
        params, state = shared.init(jnp.uint32(run.seed))
        rates = jnp.float32(run.lr), jnp.float32(run.ratio)
        clock = elapsed = 0.0
        for step in range(config.steps):
            batch = put_batch(next(dataset.train), config.accumulate, shared.mesh)
            params, state, loss = shared.update(params, state, batch, *rates)
            if step == 0 or step % LOOK == LOOK - 1 or step == config.steps - 1:
                finite = math.isfinite(float(loss))
                if step == 0:
                    clock = time.perf_counter()
                elapsed, done = time.perf_counter() - clock, step
                if not finite:
                    break
    finally:
        dataset.train.close()
    valid_loss = error = None
    if finite:
        evaluation = shared.evaluate(params, *dataset.valid.batches(config.batch))
        if math.isfinite(evaluation.loss):
            valid_loss, error = evaluation.loss, evaluation.standard_error
    return {
        "valid_loss": valid_loss,
        "valid_loss_error": error,
        "tokens_per_second": done * config.batch * config.seq / elapsed if done else None,
        "state_bytes": shared.state_bytes,
        "matrix_state_bytes": shared.matrix_state_bytes,
        "seconds": round(time.perf_counter() - start, 1),
    }
