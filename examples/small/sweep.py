"""Trains a small model with AdamW and with GaLore, each at the best of the same number of rates."""

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import optax
from matplotlib.ticker import LogLocator, NullLocator

import galore_optax
from benchmarks.machine import machine
from examples.flax_llama.writing import write_whole

SEEDS = (0, 1, 2)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
Make = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and by what it is judged.

    Attributes:
      name: of the files that are written.
      init: the parameters, of a seed.
      loss: of parameters and a batch.
      batches: all batches of a training, of a seed, stacked in the leading axis.
      scores: of trained parameters; `valid_loss` chooses the learning rate.
      optimizers: what makes each of a learning rate or schedule, and the rates to try.
    """

    name: str
    init: Callable[[int], Any]
    loss: Callable[[Any, Any], jax.Array]
    batches: Callable[[int], Any]
    scores: Callable[[Any], dict[str, float]]
    optimizers: Mapping[str, tuple[Make, Sequence[float]]]


def adamw_and_galore(
    rank: int, dimension_numbers: Any, weight_decay: float
) -> dict[str, tuple[Make, Sequence[float]]]:
    """The two optimizers, which differ in the subspace alone, and the same rates for both."""
    decay = {"weight_decay": weight_decay}
    galore = functools.partial(
        galore_optax.galore_adamw,
        **{"rank": rank, "update_proj_gap": 50, "scale": 1.0},
        weight_dimension_numbers=dimension_numbers,
        **decay,
    )
    return {"AdamW": (functools.partial(optax.adamw, **decay), RATES), "GaLore": (galore, RATES)}


def train(task: Task, make: Make, rate: float, seed: int) -> dict[str, float]:
    """The scores of a model that has seen all batches once, by a rate that falls to nothing."""
    params, batches = task.init(seed), task.batches(seed)
    steps = len(jax.tree.leaves(batches)[0])
    tx = make(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        gradients = jax.grad(task.loss)(params, batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    leaves, structure = jax.tree.flatten(batches)
    for batch in zip(*leaves, strict=True):
        params, state = step(params, state, jax.tree.unflatten(structure, batch))
    return task.scores(params) | {"state_bytes": galore_optax.memory_report(tx, params).state}


def runs(task: Task, name: str) -> Iterator[tuple[float, int, dict[str, float]]]:
    """Learning rate, seed and scores: each rate with the first seed, then the best with others."""
    make, rates = task.optimizers[name]
    found = {rate: train(task, make, rate, SEEDS[0]) for rate in rates}
    yield from ((rate, SEEDS[0], scores) for rate, scores in found.items())
    best = min(found, key=lambda rate: found[rate]["valid_loss"])
    yield from ((best, seed, train(task, make, best, seed)) for seed in SEEDS[1:])


def summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Means over seeds, and their standard errors, at the best rate of an optimizer."""
    own = [row for row in rows if row["optimizer"] == name]
    rate = own[-1]["lr"]
    best = [row for row in own if row["lr"] == rate]
    found: dict[str, Any] = {"lr": rate, "state_bytes": best[0]["state_bytes"]}
    for key in best[0].keys() - {"optimizer", "lr", "seed", "state_bytes"}:
        values = [row[key] for row in best]
        error = statistics.stdev(values) / len(values) ** 0.5
        found[key] = {"mean": statistics.mean(values), "error": error}
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss over the learning rates that were tried, and the other seeds of the best."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["optimizer"] for row in rows)):
        own = [row for row in rows if row["optimizer"] == name]
        swept = sorted((row["lr"], row["valid_loss"]) for row in own if row["seed"] == SEEDS[0])
        axes.plot(*zip(*swept, strict=True), "o-", color=f"C{i}", label=name)
        others = [(row["lr"], row["valid_loss"]) for row in own if row["seed"] != SEEDS[0]]
        axes.plot(*zip(*others, strict=True), "x", color=f"C{i}")
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss, nats")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(title="crosses: other seeds")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(task: Task) -> None:
    """Trains, prints, and writes `--out` with a picture beside it."""
    parser = argparse.ArgumentParser(description=f"AdamW and GaLore on {task.name}.")
    parser.add_argument("--out", type=Path, help="JSON file to write, and a picture beside it")
    args = parser.parse_args()
    rows = []
    for name in task.optimizers:
        for rate, seed, scores in runs(task, name):
            rows.append({"optimizer": name, "lr": rate, "seed": seed, **scores})
            shown = ", ".join(f"{key} {value:.4g}" for key, value in scores.items())
            print(f"{name}, lr {rate:g}, seed {seed}: {shown}", flush=True)
    best = {name: summary(rows, name) for name in task.optimizers}
    for name, row in best.items():
        print(f"{name} at {row['lr']:g}: {row['valid_loss']['mean']:.4f}")
    if args.out is not None:
        record = {"benchmark": task.name, "machine": machine(), "best": best, "runs": rows}
        write_whole(args.out, json.dumps(record, indent=1) + "\n")
        draw(rows, args.out.with_suffix(".png"))
