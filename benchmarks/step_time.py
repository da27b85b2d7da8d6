"""Time of one ordinary optimizer step, beside optax.adamw and optax.contrib.galore, in one run.

    python -m benchmarks.step_time --model 60m --steps 30

Ordinary means that no projector is refreshed; the refresh of all matrices on the first step is
reported on its own. The optimizers take turns, step by step, so that a drift of the machine's
speed hits all alike, and ratios are medians over pairs of neighbouring steps. Galore projects the
same leaves at the same rank on the same side in both implementations: `optax.contrib.galore`
takes the long side, and the rows of a square matrix, so "same sides" is `side="long"` with
`side="left"` for square leaves, by `optax.partition`. The published side, `"short"`, is listed
beside. Weight decay is on everywhere.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.machine import machine
from examples.flax_llama.config import PRESETS

RANKS = {"9m": 32, "20m": 64, "35m": 96, "60m": 128, "130m": 256, "350m": 256, "1b": 512}
NEVER = 2**30


def unstacked_llama(name: str, key: jax.Array) -> dict[str, Any]:
    """Random arrays with the shapes of a LLaMA whose layers are not stacked, kernels (in, out)."""
    config = PRESETS[name]
    d, f = config.hidden, config.intermediate
    layer = {"q": (d, d), "k": (d, d), "v": (d, d), "o": (d, d)}
    layer |= {"gate": (d, f), "up": (d, f), "down": (f, d), "norm_1": (d,), "norm_2": (d,)}
    shapes = {
        "embed": (config.vocab_size, d),
        "layers": [layer] * config.layers,
        "norm": (d,),
        "head": (d, config.vocab_size),
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    normal = zip(keys, leaves, strict=True)
    return treedef.unflatten([0.02 * jax.random.normal(k, shape) for k, shape in normal])


def optimizers(params: Any, rank: int) -> dict[str, optax.GradientTransformation]:
    """The optimizers to compare, all with weight decay, by name."""
    rate, decay = 1e-3, 0.1
    matrix = {
        path: "layers" in jax.tree_util.keystr(path) and leaf.ndim == 2
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def tree(kind):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: kind() if matrix[path] else None, params
        )

    ours = functools.partial(
        galore_optax.galore_adamw, rate, weight_decay=decay, rank=rank, update_proj_gap=NEVER
    )
    squares = jax.tree.map(lambda leaf: leaf.shape[0] == leaf.shape[-1], params)
    return {
        "optax.adamw": optax.adamw(rate, weight_decay=decay),
        "optax.contrib.galore": optax.contrib.galore(
            rate,
            rank=rank,
            update_proj_gap=NEVER,
            scale=0.25,
            weight_decay=decay,
            weight_dimension_numbers=tree(optax.contrib.GaLoreDimensionNumbers),
        ),
        "galore_optax same sides": optax.partition(
            {True: ours(side="left"), False: ours(side="long")}, squares
        ),
        "galore_optax short": ours(),
    }


def measure(model: str, steps: int, seed: int) -> dict[str, Any]:
    """Runs the comparison and returns what is written as JSON; times in milliseconds."""
    keys = jax.random.split(jax.random.key(seed))
    params, gradients = (unstacked_llama(model, key) for key in keys)
    rank = RANKS[model]
    runs = {}
    for name, tx in optimizers(params, rank).items():

        def step(params, state, gradients, tx=tx):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))
        carry = (jax.tree.map(jnp.copy, params), tx.init(params))
        start = time.perf_counter()
        compiled = compiled.lower(*carry, gradients).compile()
        compile_ms = 1e3 * (time.perf_counter() - start)
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(carry[1]))
        carry, first_ms = _timed(compiled, carry, gradients)
        runs[name] = {
            "compile_ms": compile_ms,
            "first_step_ms": first_ms,
            "state_bytes": state_bytes,
            "compiled": compiled,
            "carry": carry,
            "times": [],
        }
        print(f"{name}: first step {first_ms:.0f} ms, compiled in {compile_ms:.0f} ms", flush=True)
    for i in range(steps + 2):
        for run in runs.values():
            run["carry"], elapsed = _timed(run["compiled"], run["carry"], gradients)
            if i >= 2:
                run["times"].append(elapsed)

    def ratio(a, b):
        pairs = zip(runs[a]["times"], runs[b]["times"], strict=True)
        return statistics.median(x / y for x, y in pairs)

    return {
        "benchmark": "step_time",
        "machine": machine(),
        "model": model,
        "rank": rank,
        "steps": steps,
        "optimizers": {
            name: {
                "median_ms": statistics.median(run["times"]),
                "min_ms": min(run["times"]),
                "max_ms": max(run["times"]),
                **{k: run[k] for k in ("first_step_ms", "compile_ms", "state_bytes")},
                "ratio_to_contrib": ratio(name, "optax.contrib.galore"),
                "ratio_to_adamw": ratio(name, "optax.adamw"),
            }
            for name, run in runs.items()
        },
    }


def _timed(compiled, carry, gradients):
    start = time.perf_counter()
    carry = jax.block_until_ready(compiled(*carry, gradients))
    return carry, 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RANKS), default="60m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    result = measure(args.model, args.steps, args.seed)
    print(f"\n{'':25}{'median ms':>10}{'/ contrib':>11}{'/ adamw':>9}{'state MB':>10}")
    for name, row in result["optimizers"].items():
        print(
            f"{name:25}{row['median_ms']:10.1f}{row['ratio_to_contrib']:11.3f}"
            f"{row['ratio_to_adamw']:9.2f}{row['state_bytes'] / 1e6:10.1f}"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
