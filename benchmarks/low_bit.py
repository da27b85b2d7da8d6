"""Time of one Adam update with moments in 8 and 16 bits, and of the codes themselves, in one run.

    python -m benchmarks.low_bit --rows 4096 --columns 4096 --steps 30

The contestants take turns, update by update, so that a drift of the machine's speed hits all
alike, and ratios are medians over pairs of neighbouring updates. An array is coded by the
library's arithmetic and, for comparison, by `jnp.searchsorted` on the 255 midpoints of the same
values; decoded by that arithmetic and by a look-up. What XLA makes of an update is counted in the
compiled program: kernels are its fusions and whatever else is not free.
"""

import argparse
import functools
import json
import pathlib
import re
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from benchmarks.machine import machine

BLOCK = 256


def updates(shape: tuple[int, int]) -> dict[str, tuple[Any, tuple[Any, ...], Any]]:
    """By name: a compiled update, its further arguments, and its state, which is donated."""
    gradient = jax.random.normal(jax.random.key(0), shape)
    contestants = {
        "optax.scale_by_adam": optax.scale_by_adam(),
        "low_bit, 8 bits": galore_optax.low_bit(optax.scale_by_adam()),
        "low_bit, 16 bits": galore_optax.low_bit(optax.scale_by_adam(), bits=16),
    }
    made = {}
    for name, tx in contestants.items():
        state = tx.init(gradient)

        def update(state, gradient, tx=tx):
            return tx.update(gradient, state)[::-1]

        compiled = jax.jit(update, donate_argnums=0).lower(state, gradient).compile()
        made[name] = (compiled, (gradient,), state)
    return made


def codings(shape: tuple[int, int]) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """By name: a compiled function of one array, or of its codes, and its arguments."""
    quantize = functools.partial(galore_optax.quantize, scheme="signed", block_size=BLOCK)
    array = jax.random.normal(jax.random.key(1), shape)
    quantized = quantize(array)
    every_code = jnp.arange(256, dtype=jnp.uint8)
    values = galore_optax.QuantizedArray(
        every_code, jnp.ones(1), optax.MaskedNode(), (256,), jnp.dtype("float32"), "signed", 256
    ).dequantize()
    midpoints = (values[1:] + values[:-1]) / 2

    def blocks(x):
        return x.reshape(-1, BLOCK)

    def search(array, method):
        scales = jnp.max(jnp.abs(blocks(array)), axis=-1, keepdims=True)
        numbers = blocks(array) / scales
        return jnp.searchsorted(midpoints, numbers, method=method).astype(jnp.uint8), scales

    def look_up(quantized):
        return values[blocks(quantized.codes)] * quantized.scales.reshape(-1, 1)

    found = jax.jit(functools.partial(search, method="scan"))(array)[0]
    np.testing.assert_allclose(blocks(quantized.codes), found, atol=1, err_msg="other codes")
    functions = {
        "encode": (quantize, array),
        "encode, searchsorted scan": (functools.partial(search, method="scan"), array),
        "encode, searchsorted scan_unrolled": (
            functools.partial(search, method="scan_unrolled"),
            array,
        ),
        "decode": (lambda quantized: quantized.dequantize(), quantized),
        "decode, table": (look_up, quantized),
    }
    return {
        name: (jax.jit(function).lower(argument).compile(), (argument,))
        for name, (function, argument) in functions.items()
    }


def kernels(compiled: Any) -> int:
    """How many instructions of the compiled program's entry do work."""
    entry = compiled.as_text().split("ENTRY", 1)[1].split("\n}", 1)[0]
    operations = re.findall(r"^\s+(?:ROOT )?\S+ = .*? ([a-z][a-z0-9-]*)\(", entry, re.MULTILINE)
    free = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    return sum(operation not in free for operation in operations)


def measure(rows: int, columns: int, steps: int) -> dict[str, Any]:
    """Runs the comparison and returns what is written as JSON; times in milliseconds."""
    shape = (rows, columns)
    made, coded = updates(shape), codings(shape)
    times: dict[str, list[float]] = {name: [] for name in (*made, *coded)}
    states = {name: state for name, (_, _, state) in made.items()}
    state_bytes = {k: sum(x.nbytes for x in jax.tree.leaves(s)) for k, s in states.items()}
    for step in range(steps + 2):
        for name, (compiled, arguments, _) in made.items():
            start = time.perf_counter()
            states[name], _ = jax.block_until_ready(compiled(states[name], *arguments))
            times[name].append(1e3 * (time.perf_counter() - start))
        for name, (compiled, arguments) in coded.items():
            if "search" in name and step >= 5:  # slow, and steady
                continue
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times[name].append(1e3 * (time.perf_counter() - start))
    times = {name: values[2:] for name, values in times.items()}

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=False))

    def row(name: str, against: str, compiled: Any) -> dict[str, Any]:
        median = statistics.median(times[name])
        return {
            "median_ms": median,
            "min_ms": min(times[name]),
            "ns_per_element": 1e6 * median / (rows * columns),
            "ratio": ratio(name, against),
            "ratio_to": against,
            "kernels": kernels(compiled),
        }

    return {
        "benchmark": "low_bit",
        "machine": machine(),
        "shape": shape,
        "block_size": BLOCK,
        "steps": steps,
        "updates": {
            name: row(name, "optax.scale_by_adam", compiled)
            | {"state_bytes_per_element": state_bytes[name] / (rows * columns)}
            for name, (compiled, _, _) in made.items()
        },
        "codes": {
            name: row(name, name.split(",")[0], compiled) for name, (compiled, _) in coded.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    result = measure(args.rows, args.columns, args.steps)
    print(f"{'':36}{'median ms':>10}{'ns/element':>12}{'ratio':>8}{'kernels':>9}{'state B/el':>12}")
    for name, row in (result["updates"] | result["codes"]).items():
        state = row.get("state_bytes_per_element")
        print(
            f"{name:36}{row['median_ms']:10.1f}{row['ns_per_element']:12.2f}{row['ratio']:8.2f}"
            f"{row['kernels']:9d}{'' if state is None else f'{state:.3f}':>12}"
        )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
