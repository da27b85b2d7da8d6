"""Time to trace and lower an update of many matrices of one shape, and the size of its program.

    python -m benchmarks.trace_time --leaves 200

Every matrix is a leaf by itself, as in models whose layers are not stacked. Beside galore are
`optax.contrib.galore` and `optax.adamw`, in the same process, one after the other; each time is the
least of some runs. Nothing is compiled or allocated: only shapes are given.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.machine import machine

SHAPE, RANK = (128, 256), 16
MAKERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "galore": lambda: galore_optax.galore(optax.adamw(1e-3), rank=RANK),
    "optax.contrib.galore": lambda: optax.contrib.galore(1e-3, rank=RANK),
    "optax.adamw": lambda: optax.adamw(1e-3),
}


def trace(tx: optax.GradientTransformation, leaves: int) -> tuple[float, int]:
    """CPU seconds of tracing and lowering an update, and lines of its StableHLO."""
    params = {f"w{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(leaves)}
    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    lowered = jax.jit(tx.update).lower(params, state, params)
    seconds = time.process_time() - start
    return seconds, len(lowered.as_text().splitlines())


def measure(leaves: int, runs: int) -> dict[str, dict[str, float]]:
    """Of each transformation the seconds, and the lines that a further leaf adds."""
    rows = {}
    for name, make in MAKERS.items():
        trace(make(), 3)  # whatever is done once in a process
        times, lines = zip(*(trace(make(), leaves) for _ in range(runs)), strict=True)
        fewer = trace(make(), leaves // 2)[1]
        per_leaf = (lines[0] - fewer) / (leaves - leaves // 2)
        rows[name] = {"seconds": min(times), "lines_of_a_leaf": per_leaf, "lines": lines[0]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--leaves", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    rows = measure(args.leaves, args.runs)
    base = rows["optax.contrib.galore"]["seconds"]
    print(f"{args.leaves} leaves{'':14}{'CPU s':>8}{'/ contrib':>11}{'lines of a leaf':>17}")
    for name, row in rows.items():
        ratio = row["seconds"] / base
        print(f"{name:24}{row['seconds']:8.2f}{ratio:11.2f}{row['lines_of_a_leaf']:17.0f}")
    if args.out:
        record = {"benchmark": "trace_time", "machine": machine(), "leaves": args.leaves}
        args.out.write_text(json.dumps(record | {"shape": SHAPE, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
