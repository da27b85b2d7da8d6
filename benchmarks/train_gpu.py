"""Training speed, memory and losses of several sizes, with AdamW and with GaLore, in minutes.

    python -m benchmarks.train_gpu --out benchmarks/results/train_gpu.json

Every size is trained with every optimizer for a few hundred updates, in a process of its own, so
that the peak of device memory is that of one run. What is timed is all of an update: the batch
from the input pipeline, gradients, clipping, optimizer, metrics. Updates on which GaLore chooses
its subspaces are timed apart from the others; their extra time is spread over the 200 updates from
one to the next of the recipe, though here they are nearer to each other, so that there are a few.

A batch that does not fit is halved until it does. All together stop after --minutes: each run has
an equal part of the time that is left, and takes as many updates as fit into it.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
from flax import nnx

from benchmarks.machine import machine
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.run_log import peak_flops
from examples.flax_llama.step import (
    State,
    data_mesh,
    initial_params,
    make_update,
    put_batch,
    replicated,
)
from examples.flax_llama.train import open_dataset, planned_bytes

# Sequences of an update that an 80 GB device has room for, and the time.
BATCH = {"60m": 64, "130m": 64, "350m": 64, "1b": 32}
# Peak learning rates; the others have the recipe's, which is GaLore's.
LR = {"adamw": 0.001}
REFRESHES = 4
# Updates of a run, however little time there is: the first two are not timed.
LEAST = 3
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def train(settings: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Trains in this process until all updates are done, or until `deadline` of `time.time`."""
    recipe = Config(**settings).resolve()
    config = dataclasses.replace(recipe, update_proj_gap=max(1, recipe.steps // REFRESHES))
    dataset, mesh, optimizer = open_dataset(config), data_mesh(), make_optimizer(config)
    shape = config.shape(dataset.tokenizer.vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def initial_state() -> State:
        params = initial_params(config, shape)
        return State(params, optimizer.init(params))

    start = time.perf_counter()
    state = jax.jit(initial_state, out_shardings=replicated(mesh))()
    example = put_batch(next(dataset.train), config.accumulate, mesh)
    update = make_update(config, graphdef, optimizer, mesh).lower(state, example).compile()
    compile_s = time.perf_counter() - start

    losses: list[float] = []
    seconds: list[float] = []
    pending = None
    clock = time.perf_counter()
    for step in range(config.steps + 1):
        metrics = None
        if step < config.steps and (step < LEAST or time.time() < deadline):
            state, metrics = update(state, put_batch(next(dataset.train), 1, mesh))
        if pending is not None:
            # One update late, so that the device is never idle.
            losses.append(float(pending["loss"]))
            seconds.append(time.perf_counter() - clock)
            clock += seconds[-1]
        pending = metrics
        if metrics is None:
            break

    refreshing = seconds[:: config.update_proj_gap] if "galore" in config.optimizer else seconds[:1]
    ordinary = [s for i, s in enumerate(seconds) if i % config.update_proj_gap and i > 1]
    ordinary_s = statistics.median(ordinary or seconds)
    # The first one starts from nothing, and pays for what is done once.
    refresh_s = statistics.median(refreshing[1:]) if len(refreshing) > 1 else math.nan
    extra = (refresh_s - ordinary_s) / recipe.update_proj_gap if len(refreshing) > 1 else 0.0
    tokens_per_second = config.batch * config.seq / (ordinary_s + extra)
    device = jax.devices()[0]
    peak, stats = peak_flops(device.device_kind), device.memory_stats()
    return {
        "parameters": shape.num_params,
        "rank": config.rank if "galore" in config.optimizer else None,
        "updates": len(losses),
        "compile_s": compile_s,
        "step_ms": 1e3 * ordinary_s,
        "refresh_step_ms": None if math.isnan(refresh_s) else 1e3 * refresh_s,
        "first_step_ms": 1e3 * seconds[0],
        "tokens_per_second": tokens_per_second,
        "mfu": peak and tokens_per_second * shape.flops_per_token / (peak * jax.device_count()),
        "peak_bytes": stats["peak_bytes_in_use"] if stats else planned_bytes(update),
        "peak_bytes_from": "memory_stats" if stats else "memory_analysis",
        "losses": losses,
        "machine": machine(),
    }


def train_apart(settings: dict[str, Any], seconds: float, limit: float) -> dict[str, Any]:
    """Trains in another process, with smaller batches until one fits into the device's memory.

    Args:
      settings: of the run.
      seconds: after which it is to stop by itself.
      limit: seconds after which it is stopped.
    """
    end, deadline = time.time() + limit, time.time() + seconds
    while True:
        command = [sys.executable, "-m", "benchmarks.train_gpu"]
        command += ["--one", json.dumps({"settings": settings, "deadline": deadline})]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1, end - time.time())
            )
        except subprocess.TimeoutExpired:
            return settings | {"error": f"not done after {limit:.0f} seconds"}
        if done.returncode == 0:
            return settings | json.loads(done.stdout.splitlines()[-1])
        if OUT_OF_MEMORY not in done.stderr or settings["batch"] == 1:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return settings | {"error": lines[-1]}
        settings = settings | {"batch": settings["batch"] // 2}


def common_loss(run: dict[str, Any], runs: list[dict[str, Any]]) -> float:
    """Mean loss of ten updates, the last ones that all runs of this size have done."""
    done = min(len(r["losses"]) for r in runs if r["preset"] == run["preset"] and "losses" in r)
    return statistics.mean(run["losses"][max(0, done - 10) : done])


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':6}{'':16}{'batch':>6}{'updates':>9}{'tokens/s':>11}{'MFU':>7}{'peak GB':>9}"
        f"{'step ms':>9}{'refresh ms':>12}{'loss':>8}"
    ]
    for run in runs:
        line = f"{run['preset']:6}{run['optimizer']:16}{run['batch']:6}"
        if "error" in run:
            lines.append(f"{line}  {run['error']}")
            continue
        mfu = "" if run["mfu"] is None else f"{run['mfu']:.1%}"
        refresh = "" if run["refresh_step_ms"] is None else f"{run['refresh_step_ms']:,.1f}"
        lines.append(
            f"{line}{run['updates']:9}{run['tokens_per_second']:11,.0f}{mfu:>7}"
            f"{run['peak_bytes'] / 1e9:9.2f}{run['step_ms']:9,.1f}{refresh:>12}"
            f"{common_loss(run, runs):8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=list(BATCH))
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "galore_adamw"])
    parser.add_argument("--steps", type=int, default=300, help="updates of each run at most")
    parser.add_argument("--batch", type=int, help="sequences of an update; 32 or 64 by default")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the model")
    parser.add_argument("--data", default="austen", help="as of examples.flax_llama.train")
    parser.add_argument("--tokenizer", help="as of examples.flax_llama.train")
    parser.add_argument("--projector", default="power_iteration", help="of GaLore")
    parser.add_argument("--dtype", default="bfloat16", help="of activations")
    parser.add_argument("--remat", action="store_true", help="compute activations again")
    parser.add_argument("--minutes", type=float, default=7.5, help="for all runs together")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(train(**json.loads(args.one))))
        return
    names = ("steps", "seq", "vocab_size", "data", "tokenizer", "projector", "dtype", "remat")
    shared: dict[str, Any] = {name: getattr(args, name) for name in names}
    todo: list[dict[str, Any]] = [
        {
            "preset": preset,
            "optimizer": optimizer,
            "batch": args.batch or BATCH.get(preset, 16),
            "lr": LR.get(optimizer),
            "clip": 1.0,
        }
        for preset in args.presets
        for optimizer in args.optimizers
    ]
    try:
        for settings in todo:
            make_optimizer(Config(**shared | settings).resolve())
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None
    end = time.time() + 60 * args.minutes
    record: dict[str, Any] = {"benchmark": "train_gpu", "machine": None, "runs": []}
    runs = record["runs"]
    for i, settings in enumerate(todo):
        left = end - time.time()
        run = train_apart(shared | settings, seconds=left / (len(todo) - i), limit=left)
        # Asked for in the other process: this one must not hold the device.
        record["machine"] = run.pop("machine", record["machine"])
        runs.append(run)
        print(table(runs) if i == 0 else table(runs).splitlines()[-1], flush=True)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    if any("error" in run for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
