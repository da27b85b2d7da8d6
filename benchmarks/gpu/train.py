"""Speed, memory and losses of the application: what of the card its updates use.

Timed is all of an update: the batch from the input pipeline, gradients, optimizer, metrics. Updates
on which GaLore chooses its subspaces are timed apart; their extra time is spread over the 200 from
one to the next of the recipe, though here they are nearer to each other, so that there are a few.
The last item is the published recipe of 60m, for as many updates as there is time.
"""

import dataclasses
import functools
import gc
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.gpu.application import begin
from benchmarks.gpu.record import ROOT
from benchmarks.gpu.stage import SHARED_DEVICE, Item, Size, Unavailable
from examples.flax_llama.config import Config
from examples.flax_llama.records import METRICS, read_records
from examples.flax_llama.run_log import peak_flops
from examples.flax_llama.step import State, put_batch
from examples.flax_llama.train import open_dataset, planned_bytes

# Sequences of an update that an 80 GB device has room for, if the blocks' activations are kept.
BATCH = {"1b": 32, "350m": 64, "60m": 128}
# Peak learning rates; GaLore has the recipe's.
LR = {"adamw": 0.001}
OPTIMIZERS = ("adamw", "galore_adamw")
# Updates of a run; the first two are not timed. REFRESHES of them choose subspaces.
UPDATES, REFRESHES, LEAST = 60, 3, 3
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
TINY: dict[str, Any] = {"hidden": 32, "intermediate": 88, "layers": 1, "heads": 2, "batch": 2}
TINY |= {"seq": 32, "tokenizer": "bytes", "vocab_size": 300}
RECIPE = "60m recipe"


def items(size: Size) -> list[Item]:
    """Ordinary and layer-wise training with AdamW and with GaLore, and the recipe."""
    found = []
    for preset in size.of(list(BATCH), ["9m"]):
        for layerwise in (False, True):
            for optimizer in OPTIMIZERS:
                name = f"{preset} {optimizer}{', layer-wise' if layerwise else ''}"
                settings = settings_of(preset, optimizer, layerwise, size)
                measure = functools.partial(speed, settings)
                found.append(Item(name, measure, 90, alone=not size.rehearsal))
    recipe = functools.partial(published_recipe, size)
    found.append(Item(RECIPE, recipe, size.of(3600, 60), environment=SHARED_DEVICE))
    return found


def settings_of(preset: str, optimizer: str, layerwise: bool, size: Size) -> dict[str, Any]:
    """Settings of a run of the application."""
    settings = {
        "preset": preset,
        "optimizer": optimizer,
        "layerwise": layerwise,
        "lr": LR.get(optimizer),
        "projector": "power_iteration",
        "batch": BATCH.get(preset),
        "steps": size.of(UPDATES, 4),
        "vocab_size": 32_000,
        "dtype": "bfloat16",
        # Not clipped, as the recipe, which layer-wise costs another backward pass.
        "clip": 0.0,
        "data": size.data,
    }
    return settings | size.of({}, TINY)


def describe(name: str, result: dict[str, Any]) -> str:
    losses = result["losses"]
    text = f"{result['tokens_per_second']:11,.0f} tokens/s"
    if result.get("mfu") is not None:
        text += f", {result['mfu']:.1%} of the peak"
    if result.get("peak_bytes") is not None:
        text += f", {result['peak_bytes'] / 1e9:.2f} GB at most"
    return f"{text}, {len(losses)} updates, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def speed(settings: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Trains with smaller batches until one fits into the device's memory."""
    while True:
        try:
            return {"batch": settings["batch"]} | train(settings, deadline)
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error) or settings["batch"] == 1:
                raise
        gc.collect()
        settings = settings | {"batch": settings["batch"] // 2}


def train(settings: dict[str, Any], deadline: float) -> dict[str, Any]:
    """Takes the updates of a run, fewer if the time is over before, and times them."""
    recipe = Config(**settings).resolve()
    config = dataclasses.replace(recipe, update_proj_gap=max(1, recipe.steps // REFRESHES))
    dataset = open_dataset(config)
    shape, mesh, update, state = begin(config, dataset.tokenizer.vocab_size)
    example = put_batch(next(dataset.train), config.accumulate, mesh)
    start = time.perf_counter()
    compiled = update.lower(state, example).compile()
    compile_s = time.perf_counter() - start
    losses, seconds = [], []
    for loss, elapsed in updates(compiled, state, dataset.train, config.steps, mesh, deadline):
        losses.append(loss)
        seconds.append(elapsed)
    galore = "galore" in config.optimizer
    times = split_times(seconds, config.update_proj_gap if galore else None)
    extra = 0.0
    if times.refresh_s is not None:
        extra = (times.refresh_s - times.ordinary_s) / recipe.update_proj_gap
    tokens_per_second = config.batch * config.seq / (times.ordinary_s + extra)
    peak, stats = peak_flops(jax.devices()[0].device_kind), jax.devices()[0].memory_stats()
    return times._asdict() | {
        "parameters": shape.num_params,
        "rank": config.rank if galore else None,
        "seq": config.seq,
        "compile_s": compile_s,
        "tokens_per_second": tokens_per_second,
        "mfu": peak and tokens_per_second * shape.flops_per_token / peak,
        "peak_bytes": stats["peak_bytes_in_use"] if stats else planned_bytes(compiled),
        "peak_bytes_from": "memory_stats" if stats else "memory_analysis",
        "losses": losses,
    }


def updates(
    update: Any, state: State, batches: Iterator[Any], steps: int, mesh: Any, deadline: float
) -> Iterator[tuple[float, float]]:
    """Loss and seconds of each update, fetched one update late, so that the device is never idle.

    There are at least LEAST, however little time there is.
    """
    pending = None
    clock = time.perf_counter()
    for step in range(steps + 1):
        metrics = None
        if step < steps and (step < LEAST or time.time() < deadline):
            state, metrics = update(state, put_batch(next(batches), 1, mesh))
        if pending is not None:
            loss, now = float(pending["loss"]), time.perf_counter()
            yield loss, now - clock
            clock = now
        pending = metrics
        if metrics is None:
            return


class Times(NamedTuple):
    """Seconds of the first update, and medians of those without and with a later refresh."""

    first_s: float
    ordinary_s: float
    refresh_s: float | None


def split_times(seconds: list[float], gap: int | None) -> Times:
    """Medians of updates with a refresh, of which there is one in `gap`, and without.

    The first refresh starts from nothing, and pays for what is done once: it is left out.
    """
    refreshing = seconds[::gap][1:] if gap else []
    ordinary = [s for i, s in enumerate(seconds) if i > 1 and not (gap and i % gap == 0)]
    refresh_s = statistics.median(refreshing) if refreshing else None
    return Times(seconds[0], statistics.median(ordinary or seconds), refresh_s)


def published_recipe(size: Size, deadline: float) -> dict[str, Any]:
    """Trains 60m by the published recipe with the application itself, until the time is over.

    It is told to stop as a cluster does, and has time to save and evaluate.
    """
    config = settings_of(size.of("60m", "9m"), "galore_adamw", layerwise=False, size=size)
    config |= size.of({"batch": None, "accumulate": 2, "steps": None}, {"steps": 8})
    # The time of the last evaluation and checkpoint.
    end = deadline - size.of(25, 5)
    if end - time.time() < size.of(90, 5):
        raise Unavailable(f"{end - time.time():.0f} seconds are too few to compile and train")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = [sys.executable, "-m", "examples.flax_llama.train", "--out", str(out)]
        command += ["--quiet", "--no-tensorboard", "--eval-tokens", str(size.of(1_000_000, 500))]
        for key, value in config.items():
            option = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                command += [option] if value else []
            elif value is not None:
                command += [option, str(value)]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"The application failed: {output[-4000:]}")
        records = read_records(out / METRICS)
        settings = json.loads((out / "config.json").read_text())
    training = [record for record in records if "loss" in record]
    speeds = [record["tokens_per_second"] for record in training[2:]]
    mfus = [record["mfu"] for record in training[2:] if record.get("mfu") is not None]
    losses = [round(record["loss"], 4) for record in training]
    if not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f"The losses are not finite: {losses}")
    return {
        "settings": settings,
        "losses": losses,
        "tokens_per_second": statistics.median(speeds or [math.nan]),
        "mfu": statistics.median(mfus) if mfus else None,
        "validation": [record for record in records if "valid_loss" in record],
    }
