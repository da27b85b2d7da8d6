"""Real layer-wise steps of LLaMA-7B and 13B under the memory of smaller cards.

JAX's allocator gets the part of this card's memory that the smaller card would have for it, and
runs out where that would. Beside the allocator's peak stands what XLA planned for the smaller card
without having it (benchmarks/memory_7b.py), and the application's estimate. The projectors are
refreshed on the first step, so that workspaces which only the device knows are in the peak.
"""

import functools
import json
import math
import time
from typing import Any

import jax
import numpy as np

from benchmarks import memory_7b
from benchmarks.gpu.application import begin
from benchmarks.gpu.record import ROOT
from benchmarks.gpu.stage import Item, Size
from examples.flax_llama.config import Config
from examples.flax_llama.devices import device_named
from examples.flax_llama.memory import estimate
from examples.flax_llama.step import put_batch

# Updates, and a peak learning rate by which so few of them on one batch lower the loss of all rows;
# the recipes' warm up for hundreds.
STEPS, RATE = 10, 1e-3
ROWS = (
    "7b 8-bit GaLore power_iteration rtx4090_24gb",
    "7b Q-GaLore power_iteration rtx4060ti_16gb",
    "13b Q-GaLore power_iteration rtx4090_24gb",
)
PLANNED = ROOT / "benchmarks" / "results" / "memory_7b.json"
TINY = {"preset": "9m", "hidden": 32, "intermediate": 88, "layers": 2, "heads": 2}
TINY |= {"batch": 2, "seq": 32}


def items(size: Size) -> list[Item]:
    """A row of the table of planned peaks each, by its name there."""
    found = []
    for name in ROWS:
        row = memory_7b.table()[name]
        usable = device_named(row["device"]).usable
        settings = row["settings"] | size.of({}, TINY)
        found.append(
            Item(
                name,
                functools.partial(_measured, name, settings, usable, size),
                300,
                memory=usable,
                alone=not size.rehearsal,
                environment={
                    "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{usable / size.device_memory:.4f}"
                },
            )
        )
    return found


def describe(name: str, result: dict[str, Any]) -> str:
    losses = result["losses"]
    text = f"{'passed' if result['passed'] else 'NOT PASSED'}: "
    text += f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
    for label, key in {"peak": "peak_bytes", "XLA": "planned_peak", "estimate": "estimate"}.items():
        if result[key] is not None:
            text += f", {label} {result[key] / 2**30:.2f}"
    return text + f" GiB of {result['usable'] / 2**30:.2f}"


def _measured(
    name: str, settings: dict[str, Any], usable: int, size: Size, deadline: float
) -> dict[str, Any]:
    # The schedule is that of so many updates, so that the learning rate has risen after the first.
    config = Config(**settings, steps=STEPS, lr=RATE).resolve()
    vocab_size = size.of(memory_7b.VOCAB_SIZE, 300)
    result = take_steps(config, vocab_size)
    losses = result["losses"]
    planned = json.loads(PLANNED.read_text())["rows"].get(name, {}).get("xla", {}).get("peak")
    return result | {
        "usable": usable,
        "planned_peak": None if size.rehearsal else planned,
        "estimate": estimate(config, vocab_size).total,
        # Out of memory is an error, which has no result.
        "passed": all(map(math.isfinite, losses)) and losses[-1] < losses[0],
    }


def take_steps(config: Config, vocab_size: int) -> dict[str, Any]:
    """Takes the updates of a resolved configuration on this machine's first device, on one batch.

    Returns:
      Losses; seconds; the allocator's peak so far, and that before the first update, in bytes, None
      where the device does not count, as a CPU; and the bytes that it may have.
    """

    def stats() -> dict[str, int]:
        return jax.devices()[0].memory_stats() or {}

    numbers = np.random.default_rng(0)
    rows = {
        "tokens": numbers.integers(vocab_size, size=(config.batch, config.seq + 1), dtype=np.int32),
        "mask": np.ones((config.batch, config.seq), bool),
    }
    _, mesh, update, state = begin(config, vocab_size)
    initial_peak = stats().get("peak_bytes_in_use")
    batch = put_batch(rows, config.accumulate, mesh)
    start = time.perf_counter()
    compiled = update.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    losses, seconds = [], []
    for _ in range(config.steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    return {
        "losses": losses,
        "seconds": seconds,
        "compile_s": compile_s,
        "peak_bytes": stats().get("peak_bytes_in_use"),
        "peak_bytes_of_initialization": initial_peak,
        "bytes_limit": stats().get("bytes_limit"),
    }
