"""Time to compile an update, and the size of its program, over the number of layers.

    python -m benchmarks.compile_time --model 60m --layers 4 16 64 --unstacked 7b

Layers stacked on a leading axis are one leaf, and the program should not grow with them. Without
stacking every matrix has a part of the program of its own. Nothing is computed or allocated: only
shapes are given, of the published models.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import jax
import optax

import galore_optax
from benchmarks.machine import machine
from benchmarks.shapes import RANKS, stacked_llama, unstacked_llama


def compile_update(tx: optax.GradientTransformation, params: Any) -> dict[str, float]:
    """Seconds of tracing and of compiling, CPU seconds of both, and sizes of the programs."""
    state = jax.eval_shape(tx.init, params)
    start, cpu_start = time.perf_counter(), time.process_time()
    lowered = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return {
        "trace_s": traced - start,
        "compile_s": time.perf_counter() - traced,
        "cpu_s": time.process_time() - cpu_start,
        "stablehlo_characters": len(lowered.as_text()),
        "hlo_characters": len(compiled.as_text() or ""),
    }


def measure(
    projectors: list[str], model: str, layers: list[int], unstacked: list[str], stagger: bool
) -> list[dict[str, Any]]:
    """One row per projector and size, printed as it comes."""
    rows: list[dict[str, Any]] = []
    axes = galore_optax.DimensionNumbers(-2, -1)
    print(f"{'':40}{'trace, s':>10}{'compile, s':>12}{'CPU, s':>10}{'HLO, kB':>10}", flush=True)

    def add(projector: str, name: str, tree: Any, rank: int, numbers: Any) -> None:
        tx = galore_optax.galore(
            optax.adamw(1e-3, weight_decay=0.1),
            rank=rank,
            projector=projector,
            stagger=stagger,
            weight_dimension_numbers=numbers,
        )
        row = compile_update(tx, tree)
        rows.append({"projector": projector, "model": name, **row})
        print(
            f"{f'{projector}, {name}':40}{row['trace_s']:10.1f}{row['compile_s']:12.1f}"
            f"{row['cpu_s']:10.1f}"
            f"{row['hlo_characters'] / 1e3:10.0f}",
            flush=True,
        )

    for projector in projectors:
        for count in layers:
            tree = stacked_llama(model, count)
            numbers = jax.tree.map(lambda leaf: axes if leaf.ndim == 3 else None, tree)
            add(projector, f"{model}, {count} stacked layers", tree, RANKS[model], numbers)
        for name in unstacked:
            add(projector, f"{name} unstacked", unstacked_llama(name), RANKS[name], None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--projectors", nargs="+", default=["svd", "power_iteration"])
    parser.add_argument("--model", choices=RANKS, default="60m", help="whose layers are stacked")
    parser.add_argument("--layers", nargs="*", type=int, default=[4, 16, 64])
    parser.add_argument("--unstacked", nargs="*", choices=RANKS, default=["7b"])
    parser.add_argument("--stagger", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    rows = measure(args.projectors, args.model, args.layers, args.unstacked, args.stagger)
    if args.out:
        record = {"benchmark": "compile_time", "machine": machine(), "stagger": args.stagger}
        args.out.write_text(json.dumps(record | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
