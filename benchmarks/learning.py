"""Validation loss of GaLore and of AdamW at equal tokens, each at the best of a sweep.

    python -m benchmarks.learning --out benchmarks/results/learning

Trains the demo's LLaMA once for each setting, all with the same seed and the same tokens. Two
settings of each optimizer are swept by factors of two: AdamW's learning rate and the ratio of the
matrices' learning rate to the rest's, since GaLore's `scale` is such a ratio; GaLore's learning
rate and `scale`. The sweep goes to the best neighbour until none is better, so that the best
setting is better than all four around it. It is then run again from two more seeds. Settings
that are in the JSON file already are not run again.
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

# Where each sweep starts, and what it varies.
STARTS = {
    "adamw": {"lr": 0.02, "matrix_lr_ratio": 0.0625},
    "galore_adamw": {"lr": 0.02, "scale": 0.25},
}
MORE_SEEDS = (1, 2)
DEMO = dataclasses.replace(GALORE, eval_every=GALORE.steps, quiet=True)

Run = dict[str, Any]


def neighbourhood(setting: Run) -> list[Run]:
    """The setting, and those with one value halved or doubled."""
    changes = itertools.product(STARTS[setting["optimizer"]], (0.5, 2.0))
    return [setting, *({**setting, name: setting[name] * factor} for name, factor in changes)]


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
    """The swept setting of lowest validation loss."""
    candidates = [r for r in runs if r["optimizer"] == optimizer and r["seed"] == 0]
    chosen = min(candidates, key=lambda r: r["valid_loss"])
    return {name: chosen[name] for name in ("optimizer", "seed", *STARTS[optimizer])}


def summary(runs: list[Run]) -> Run:
    """The best settings, their losses over seeds, and the ratio of these."""
    result: Run = {}
    for optimizer in STARTS:
        chosen = best(runs, optimizer)
        seeds = [{**chosen, "seed": seed} for seed in (0, *MORE_SEEDS)]
        losses = [r["valid_loss"] for s in seeds for r in runs if s.items() <= r.items()]
        result[optimizer] = {
            **{name: chosen[name] for name in STARTS[optimizer]},
            "losses_by_seed": losses,
            "mean_loss": statistics.mean(losses),
            "standard_error": statistics.stdev(losses) / len(losses) ** 0.5,
        }
    result["ratio"] = result["galore_adamw"]["mean_loss"] / result["adamw"]["mean_loss"]
    return result


def plot(runs: list[Run], path: pathlib.Path) -> None:
    """Validation loss over learning rate, a panel per optimizer, a line per ratio or scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(STARTS), figsize=(9, 4), sharey=True, layout="constrained")
    for panel, (optimizer, swept) in zip(panels, STARTS.items(), strict=True):
        (other,) = set(swept) - {"lr"}
        mine = [r for r in runs if r["optimizer"] == optimizer and r["seed"] == 0]
        for value in sorted({r[other] for r in mine}):
            line = sorted((r["lr"], r["valid_loss"]) for r in mine if r[other] == value)
            panel.plot(*zip(*line, strict=True), marker="o", label=f"{other} {value:g}")
        chosen = min(mine, key=lambda r: r["valid_loss"])
        panel.plot(chosen["lr"], chosen["valid_loss"], "k*", markersize=14, label="best")
        rates = sorted({r["lr"] for r in mine})
        panel.set(xscale="log", xlabel="peak learning rate", title=optimizer)
        panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
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
    swept = {name for start in STARTS.values() for name in start}
    ours = {"optimizer", "seed", "out", "quiet", *swept}
    demo = {k: v for k, v in dataclasses.asdict(DEMO.resolve()).items() if k not in ours}
    # An older file lacks later settings, which had the values they have now, or has None for them.
    if any(
        demo[name] != value for name, value in known.get("demo", {}).items() if value is not None
    ):
        raise SystemExit(f"{path} is of another demo, {known['demo']}: name another file.")

    def ensure(todo: list[Run]) -> None:
        for setting in todo:
            if not any(setting.items() <= r.items() for r in runs):
                runs.append(run(setting))
                print(runs[-1], flush=True)
                record = {"benchmark": "learning", "machine": machine(), "demo": demo, "runs": runs}
                path.write_text(json.dumps(record, indent=1) + "\n")

    for optimizer, start in STARTS.items():
        here: Run = {}
        there = {"optimizer": optimizer, "seed": 0, **start}
        while here != there:
            here = there
            ensure(neighbourhood(here))
            there = best(runs, optimizer)
        ensure([{**here, "seed": seed} for seed in MORE_SEEDS])
    record = json.loads(path.read_text()) | {"summary": summary(runs)}
    path.write_text(json.dumps(record, indent=1) + "\n")
    plot(runs, args.out.with_suffix(".png"))
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
