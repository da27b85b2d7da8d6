"""Time of a whole training step beside that of forward and backward alone, in one run.

    python -m benchmarks.train_step --preset 9m --steps 30

The whole step is what training does for each update: it takes a batch from the input pipeline, puts
it on the device, computes the gradients, clips them, updates the parameters, and fetches the
metrics. Forward and backward alone is the same compiled gradient on one batch that stays. The
two take turns, so that a drift of the machine's speed hits both alike, and ratios are medians
over neighbours. Steps on which GaLore chooses its subspaces again are timed apart, and their
extra time is spread over the steps from one to the next of the recipe.

The last line is the input pipeline alone, in tokens per second of its own.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import jax
from flax import nnx

from benchmarks.machine import machine
from examples.flax_llama.config import Config
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import make_mesh
from examples.flax_llama.step import (
    State,
    initial_params,
    make_gradients,
    make_update,
    put_batch,
)
from examples.flax_llama.train import open_dataset

REFRESHES = 3
PIPELINE_SECONDS = 2


def timed(function, *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, 1e3 * (time.perf_counter() - start)


def measure(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Times in milliseconds of one optimizer."""
    recipe = Config(**settings).resolve()
    config = Config(**settings, update_proj_gap=max(1, steps // REFRESHES)).resolve()
    dataset, mesh, optimizer = open_dataset(config), make_mesh(), make_optimizer(config)
    shape = config.shape(dataset.tokenizer.vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    params = initial_params(config, shape)
    fixed = put_batch(next(dataset.train), config.accumulate, mesh)
    state = State(jax.tree.map(lambda p: p.copy(), params), jax.jit(optimizer.init)(params))
    gradients_of = jax.jit(make_gradients(graphdef, mesh)).lower(params, fixed).compile()
    update = make_update(config, graphdef, optimizer, mesh)
    compiled = update.lower(state, fixed).compile()

    def step(state: State) -> tuple[State, dict[str, Any]]:
        batch = put_batch(next(dataset.train), config.accumulate, mesh)
        state, metrics = compiled(state, batch)
        return state, jax.device_get(metrics)

    alone, ordinary, refreshing = [], [], []
    for i in range(steps + 1):
        _, gradient_ms = timed(gradients_of, params, fixed)
        (state, _), step_ms = timed(step, state)
        if i % config.update_proj_gap == 0:
            refreshing.append(step_ms)
        else:
            alone.append(gradient_ms)
            ordinary.append(step_ms)
    start, batches = time.perf_counter(), 0
    while time.perf_counter() - start < PIPELINE_SECONDS:
        next(dataset.train)
        batches += 1
    tokens = config.batch * config.seq
    pipeline = batches * tokens / (time.perf_counter() - start)

    whole, gradient = statistics.median(ordinary), statistics.median(alone)
    ratio = statistics.median(a / b for a, b in zip(ordinary, alone, strict=True))
    extra = 0.0
    if "galore" in config.optimizer:
        extra = (statistics.median(refreshing[1:]) - whole) / recipe.update_proj_gap
    return {
        "parameters": shape.num_params,
        "gradient_ms": gradient,
        "step_ms": whole,
        "refreshing_step_ms": refreshing,
        "refresh_ms_per_step": extra,
        "ratio": ratio,
        "ratio_with_refresh": ratio + extra / gradient,
        "tokens_per_second": 1e3 * tokens / (whole + extra),
        "pipeline_tokens_per_second": pipeline,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="9m")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the model")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "galore_adamw"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    common = {"preset": args.preset, "vocab_size": args.vocab_size}
    results = {}
    print(f"{'':20}{'gradient ms':>12}{'step ms':>10}{'ratio':>8}{'tokens/s':>11}{'pipeline':>13}")
    for name in args.optimizers:
        row = results[name] = measure(common | {"optimizer": name}, args.steps)
        print(
            f"{name:20}{row['gradient_ms']:12.1f}{row['step_ms']:10.1f}"
            f"{row['ratio_with_refresh']:8.3f}{row['tokens_per_second']:11,.0f}"
            f"{row['pipeline_tokens_per_second']:13,.0f}",
            flush=True,
        )
    if args.out:
        record = {"benchmark": "train_step", "machine": machine(), **common, "steps": args.steps}
        args.out.write_text(json.dumps(record | {"optimizers": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
