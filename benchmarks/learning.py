"""Validation loss of GaLore and of AdamW at equal tokens, each at the best of a sweep.

    python -m benchmarks.learning --out benchmarks/results/learning

Trains the demo's LLaMA once for each setting, all with the same seed and the same tokens. AdamW's
learning rate is swept together with the ratio of the matrices' learning rate to the rest's,
since GaLore's `scale` is such a ratio; GaLore's together with `scale`. The best of each are then
run again from two more seeds. Settings that are in the JSON file already are not run again.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from typing import Any

from benchmarks.machine import machine
from examples.flax_llama.demo import GALORE
from examples.flax_llama.train import train

SWEEPS = {
    "adamw": {"lr": (0.005, 0.01, 0.02, 0.04), "matrix_lr_ratio": (0.125, 0.25, 0.5)},
    "galore_adamw": {"lr": (0.01, 0.02, 0.04, 0.08), "scale": (0.125, 0.25, 0.5)},
}
MORE_SEEDS = (1, 2)
DEMO = dataclasses.replace(GALORE, eval_every=GALORE.steps, quiet=True)

Run = dict[str, Any]


def settings() -> list[Run]:
    """Every setting of the sweeps."""
    return [
        {"optimizer": optimizer, "seed": 0, **dict(zip(grid, values, strict=True))}
        for optimizer, grid in SWEEPS.items()
        for values in itertools.product(*grid.values())
    ]


def run(setting: Run) -> Run:
    """Trains with one setting."""
    start = time.perf_counter()
    try:
        result = train(dataclasses.replace(DEMO, **setting))
        scores = {k: result.valid[-1][k] for k in ("valid_loss", "perplexity", "bits_per_byte")}
    except FloatingPointError:
        scores = {"valid_loss": float("inf")}
    return {**setting, **scores, "seconds": round(time.perf_counter() - start, 1)}


def best(runs: list[Run], optimizer: str) -> Run:
    """The setting of lowest validation loss, seed 0."""
    candidates = [r for r in runs if r["optimizer"] == optimizer and r["seed"] == 0]
    return min(candidates, key=lambda r: r["valid_loss"])


def at_edge(chosen: Run) -> list[str]:
    """The swept arguments whose best value is the first or last of the grid."""
    grid = SWEEPS[chosen["optimizer"]]
    return [name for name, values in grid.items() if chosen[name] in (values[0], values[-1])]


def summary(runs: list[Run]) -> Run:
    """The best settings, their losses over seeds, and the ratio of these."""
    result: Run = {}
    for optimizer, grid in SWEEPS.items():
        chosen = best(runs, optimizer)
        same = [
            r
            for r in runs
            if r["optimizer"] == optimizer and all(r[name] == chosen[name] for name in grid)
        ]
        losses = [r["valid_loss"] for r in sorted(same, key=lambda r: r["seed"])]
        result[optimizer] = {
            **{name: chosen[name] for name in grid},
            "losses_by_seed": losses,
            "mean_loss": statistics.mean(losses),
            "standard_error": statistics.stdev(losses) / len(losses) ** 0.5,
            "at_edge_of_sweep": at_edge(chosen),
        }
    result["ratio"] = result["galore_adamw"]["mean_loss"] / result["adamw"]["mean_loss"]
    return result


def plot(runs: list[Run], path: pathlib.Path) -> None:
    """Validation loss over learning rate, a panel per optimizer, a line per ratio or scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (optimizer, grid) in zip(panels, SWEEPS.items(), strict=True):
        (other,) = set(grid) - {"lr"}
        for value in grid[other]:
            line = sorted(
                (r["lr"], r["valid_loss"])
                for r in runs
                if r["optimizer"] == optimizer and r["seed"] == 0 and r[other] == value
            )
            panel.plot(*zip(*line, strict=True), marker="o", label=f"{other} {value:g}")
        chosen = best(runs, optimizer)
        panel.plot(chosen["lr"], chosen["valid_loss"], "k*", markersize=14, label="best")
        panel.set(xscale="log", xlabel="peak learning rate", title=optimizer)
        panel.set_xticks(grid["lr"], [f"{x:g}" for x in grid["lr"]])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("validation loss, nats per token")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="path without suffix")
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {"runs": []}
    runs: list[Run] = known["runs"]
    shared = ("preset", "tokenizer", "steps", "batch", "seq", "update_proj_gap", "weight_decay")
    demo = {name: getattr(DEMO, name) for name in shared}

    def ensure(todo: list[Run]) -> None:
        for i, setting in enumerate(todo):
            if any(setting.items() <= r.items() for r in runs):
                continue
            runs.append(run(setting))
            print(f"{i + 1}/{len(todo)}", runs[-1], flush=True)
            record = {"benchmark": "learning", "machine": machine(), "demo": demo, "runs": runs}
            path.write_text(json.dumps(record, indent=1) + "\n")

    ensure(settings())
    for optimizer, grid in SWEEPS.items():
        chosen = {k: best(runs, optimizer)[k] for k in ("optimizer", *grid)}
        ensure([{**chosen, "seed": seed} for seed in MORE_SEEDS])
    record = json.loads(path.read_text()) | {"summary": summary(runs)}
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(runs, args.out.with_suffix(".png"))
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
