"""Peak memory of LLaMA-7B and 13B training steps on consumer GPUs and TPUs, by XLA's analysis.

    python -m benchmarks.memory_7b --out benchmarks/results/memory_7b.json

Every row compiles the application's real update, refreshes of the projectors included, for a device
that need not be here (`pip install 'jax[cuda13]' libtpu`), in a process of its own. Rows that the
file has already, of the same settings, are kept: the same command goes on where it was interrupted.

    python -m benchmarks.memory_7b --run --out benchmarks/results/memory_7b_run.json

takes ten steps on the GPU that is here, with random tokens, under a cap of what the smaller card
has (XLA_PYTHON_CLIENT_MEM_FRACTION), and reports the allocator's peak.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.machine import machine
from examples.flax_llama.compile_step import TooLarge, compile_step
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import device_named
from examples.flax_llama.memory import estimate
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.step import (
    State,
    data_mesh,
    initial_params,
    make_update,
    put_batch,
    replicated,
)
from examples.flax_llama.topology import check_needs_driver

VOCAB_SIZE = 32_000
SHARED: dict[str, Any] = {"batch": 16, "seq": 256, "dtype": "bfloat16", "param_dtype": "bfloat16"}
# The layer-wise update of the papers does not clip; a row shows what clipping as published takes.
SHARED |= {"update_proj_gap": 500, "attention": "xla", "clip": 0.0}
GALORE = {"optimizer": "galore_adamw_8bit", "projector_dtype": "bfloat16", "layerwise": True}
Q_GALORE = {"optimizer": "q_galore_adamw", "layerwise": True}
ADAMW = {"optimizer": "adamw", "remat": True}
PROJECTORS = ("power_iteration", "svd")


def table() -> dict[str, dict[str, Any]]:
    """The rows by name: a device, and the settings of a run."""
    rows: dict[str, dict[str, Any]] = {}
    for preset, method, settings, device in (
        ("7b", "8-bit GaLore", GALORE, "rtx4090_24gb"),
        ("7b", "Q-GaLore", Q_GALORE, "rtx4060ti_16gb"),
        ("7b", "Q-GaLore", Q_GALORE, "tpu_v5e"),
        ("13b", "Q-GaLore", Q_GALORE, "rtx4090_24gb"),
    ):
        for projector in PROJECTORS:
            rows[f"{preset} {method} {projector} {device}"] = {
                "device": device,
                "method": method,
                "settings": SHARED | settings | {"preset": preset, "projector": projector},
            }
    for preset, method, settings, device in (
        ("7b", "8-bit GaLore", GALORE, "rtx4090_24gb"),
        ("7b", "Q-GaLore", Q_GALORE, "rtx4060ti_16gb"),
        ("7b", "Q-GaLore", Q_GALORE, "tpu_v5e"),
        ("13b", "Q-GaLore", Q_GALORE, "rtx4090_24gb"),
    ):
        rows[f"{preset} {method} rows {device}"] = {
            "device": device,
            "method": f"{method}, projector `rows`",
            "settings": SHARED | settings | {"preset": preset, "projector": "rows"},
        }
    rows["7b Q-GaLore clipped rtx4060ti_16gb"] = {
        "device": "rtx4060ti_16gb",
        "method": "Q-GaLore, clipped by the global norm",
        "settings": SHARED
        | Q_GALORE
        | {"preset": "7b", "projector": "power_iteration", "clip": 1.0},
    }
    rows["7b AdamW h100_80gb"] = {
        "device": "h100_80gb",
        "method": "AdamW, ordinary step",
        "settings": SHARED | ADAMW | {"preset": "7b"},
    }
    return rows


def analyse(device: str, settings: dict[str, Any], vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """The estimate and XLA's figures of one row, in bytes; `error` where the compiler refused."""
    config, target = Config(**settings).resolve(), device_named(device)
    with check_needs_driver():
        estimated = estimate(config, vocab_size)
    row: dict[str, Any] = {
        "parameters": config.shape(vocab_size).num_params,
        "usable": target.usable,
        "estimate": estimated.parts | {"total": estimated.total, "moment": estimated.moment},
        "jax": jax.__version__,
        "compiler": versions(target.is_tpu),
    }
    try:
        return row | {"xla": dataclasses.asdict(compile_step(config, vocab_size, target))}
    except TooLarge as error:
        return row | {"error": str(error)}


def versions(is_tpu: bool) -> dict[str, str]:
    """Of the packages that XLA's compiler for a kind of device is in."""
    names = ("libtpu",) if is_tpu else ("jax-cuda13-pjrt", "jax-cuda12-pjrt")
    found = {"jaxlib": importlib.metadata.version("jaxlib")}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def train(settings: dict[str, Any], steps: int, vocab_size: int = VOCAB_SIZE) -> dict[str, Any]:
    """Takes some steps on this machine's first device, with random tokens."""
    config = Config(**settings).resolve()
    shape, optimizer = config.shape(vocab_size), make_optimizer(config)
    mesh = data_mesh()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def initial_state() -> State:
        params = initial_params(config, shape)
        return State(params, optimizer.init(params))

    def peak() -> int | None:
        stats = jax.devices()[0].memory_stats()
        return stats and stats["peak_bytes_in_use"]

    numbers = np.random.default_rng(0)
    rows = {
        "tokens": numbers.integers(vocab_size, size=(config.batch, config.seq + 1), dtype=np.int32),
        "mask": np.ones((config.batch, config.seq), bool),
    }
    state = jax.block_until_ready(jax.jit(initial_state, out_shardings=replicated(mesh))())
    initial_peak = peak()
    batch = put_batch(rows, config.accumulate, mesh)
    update = make_update(config, graphdef, optimizer, mesh).lower(state, batch).compile()
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats()
    return {
        "losses": losses,
        "seconds": seconds,
        # None where the device does not count, as a CPU.
        "peak_bytes": peak(),
        "peak_bytes_of_initialization": initial_peak,
        "bytes_limit": stats and stats["bytes_limit"],
        "machine": machine(),
    }


def apart(
    task: str, arguments: dict[str, Any], limit: float, cap: float | None = None
) -> dict[str, Any]:
    """What a function of this module returns, called in a process of its own.

    Args:
      task: its name.
      arguments: of it.
      limit: seconds after which it is stopped.
      cap: the part of the device's memory that it may have.
    """
    command = [sys.executable, "-m", "benchmarks.memory_7b"]
    command += ["--one", json.dumps({"task": task, "arguments": arguments})]
    environment = dict(os.environ)
    if cap is not None:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{cap:.4f}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} seconds"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def memory() -> dict[str, Any]:
    """Bytes that the first device's allocator may have; None where it does not say."""
    stats = jax.devices()[0].memory_stats()
    return {"bytes_limit": stats and stats["bytes_limit"]}


def run_capped(row: dict[str, Any], steps: int, limit: float) -> dict[str, Any]:
    """Takes steps of a row under a cap of what its device has, if this one can be capped."""
    whole = apart("memory", {}, limit, cap=1.0)
    if "error" in whole:
        return whole
    usable, here = device_named(row["device"]).usable, whole["bytes_limit"]
    cap = None if here is None else min(1.0, usable / here)
    result = apart("train", {"settings": row["settings"], "steps": steps}, limit, cap)
    return {"cap": cap, "cap_bytes": usable, **result}


TASKS = {"analyse": analyse, "train": train, "memory": memory}


def is_of(row: dict[str, Any] | None, done: dict[str, Any]) -> bool:
    """Whether figures are those of a row of the table as it is now."""
    return row is not None and all(done[key] == value for key, value in row.items())


def described(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name:44} {row['error']}"
    if "xla" in row:
        sizes = row["estimate"]["total"], row["xla"]["peak"], row["usable"]
        figures = "".join(f"{size / 2**30:10.2f}" for size in sizes)
        return f"{name:44}{figures}{'  rematerializes' * bool(row['xla']['rematerializes'])}"
    peak = "not counted" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
    return f"{name:44} loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}, peak {peak}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", help="to do, again if they are done; else all missing")
    parser.add_argument("--run", action="store_true", help="take steps on the device that is here")
    parser.add_argument("--steps", type=int, default=10, help="to take")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a row")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write, and to go on with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one = json.loads(args.one)
        print(json.dumps(TASKS[one["task"]](**one["arguments"])))
        return
    rows = table()
    unknown = set(args.rows or ()) - rows.keys()
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: expected some of {', '.join(rows)}")
    record: dict[str, Any] = {"benchmark": "memory_7b", "rows": {}}
    if args.out and args.out.exists():
        record = json.loads(args.out.read_text())
        record["rows"] = {k: row for k, row in record["rows"].items() if is_of(rows.get(k), row)}
    wanted = args.rows or [name for name in rows if name not in record["rows"]]
    if args.run and not args.rows:
        wanted = [name for name in wanted if name.startswith("7b Q-GaLore power_iteration rtx")]
    if not args.run:
        try:
            for name in wanted:
                device_named(rows[name]["device"]).mesh()
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        print(f"{'GiB':44}{'estimate':>10}{'XLA peak':>10}{'usable':>10}")
    for name in wanted:
        row = rows[name]
        if args.run:
            result = run_capped(row, args.steps, args.limit)
        else:
            arguments = {"device": row["device"], "settings": row["settings"]}
            result = apart("analyse", arguments, args.limit)
        done = record["rows"] | {name: row | result}
        record["rows"] = {name: done[name] for name in rows if name in done}
        print(described(name, done[name]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("error" in record["rows"][name] for name in wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
