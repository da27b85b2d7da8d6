"""Validation loss with factored tables, and with layers' inputs in 8 bits, beside that without.

    python -m benchmarks.fewest_loss --runs runs/fewest --out benchmarks/results/fewest_loss.json

Trains the demo's LLaMA on the same tokens with 8-bit GaLore and the update in the backward pass:
for each variant a sweep of the learning rate, then its best from two more seeds. Ratios are those
of runs with the same seed. It goes on where it was interrupted.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from benchmarks.machine import machine
from benchmarks.quality.statistics import estimate
from examples.flax_llama.compare import compare
from examples.flax_llama.config import Config
from examples.flax_llama.demo import GALORE
from examples.flax_llama.report import Run
from examples.flax_llama.writing import write_whole

OPTIMIZER = "galore_adamw_8bit"
PLAIN = "plain"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "factored tables": {"tables": "factored"},
    "int8 inputs": {"inputs_dtype": "int8"},
    "both": {"tables": "factored", "inputs_dtype": "int8"},
}


def trained(shared: Config, name: str, rates: str, seeds: int) -> dict[str, Any]:
    """The rates that were tried of a variant, the best, and its losses by seed."""
    assert shared.out is not None
    config = dataclasses.replace(
        shared, layerwise=True, out=shared.out / name.replace(" ", "-"), **VARIANTS[name]
    )
    found = compare(config, (OPTIMIZER,), (f"{OPTIMIZER}={rates}",), seeds)
    best = found.best[OPTIMIZER]
    first = [run for run in found.runs if run.seed == shared.seed]
    return {
        "settings": VARIANTS[name],
        "rates": {run.settings["lr"]: run.loss for run in first},
        "lr": best[0].settings["lr"],
        "losses": {run.seed: run.loss for run in best},
        "state_bytes": state_bytes(best[0]),
    }


def state_bytes(run: Run) -> float:
    return run.scores["projector_bytes"] + run.scores["moment_bytes"]


def with_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows with the ratios of their losses to the plain ones, over the seeds of both."""
    plain = rows[PLAIN]["losses"]
    return {
        name: row | {"ratio": estimate([loss / plain[s] for s, loss in row["losses"].items()])}
        for name, row in rows.items()
    }


def described(name: str, row: dict[str, Any]) -> str:
    ratio, swept = row["ratio"], list(row["rates"])
    inside = min(swept) < row["lr"] < max(swept)
    off = "" if ratio["error"] is None else f" ± {ratio['error']:.4f}"
    at = f"lr {row['lr']:g}{'' if inside else ', an end of what was tried'}"
    return f"{name:16} {ratio['mean']:.4f}{off} of the plain loss; {at}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="directory of the runs")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--rates", default="0.01,0.02,0.04", help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=GALORE.steps)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    shared = dataclasses.replace(
        GALORE, steps=args.steps, eval_every=args.steps, tensorboard=False, out=args.runs
    )
    rows = {name: trained(shared, name, args.rates, args.seeds) for name in VARIANTS}
    rows = with_ratios(rows)
    for name, row in rows.items():
        print(described(name, row))
    if args.out:
        record = {"benchmark": "fewest_loss", "machine": machine(), "steps": args.steps}
        record |= {"optimizer": OPTIMIZER, "rows": rows}
        write_whole(args.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
