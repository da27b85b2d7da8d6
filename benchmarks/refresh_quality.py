"""Validation loss of the demo's LLaMA per projector, refresh and T, at equal tokens.

    python -m benchmarks.refresh_quality --out benchmarks/results/refresh_quality

Each setting is trained from three seeds, which are those of the weights and of the order of the
data. Learning rates are swept by factors of two with the first seed: that of AdamW, at the ratio
of the matrices' learning rate found in benchmarks/results/compare, and that of GaLore with exact
SVD every 50 updates. All settings of GaLore then take the latter, so that they differ in nothing
but the subspaces. A difference from exact SVD is that of runs with the same seed.

The learning rates are swept on until a neighbour on each side is worse. Settings that are in the
JSON file already are not run again, so that it can be stopped at any time.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from benchmarks.machine import machine
from benchmarks.shapes import PROJECTORS
from examples.flax_llama import demo
from examples.flax_llama.train import train

Setting = dict[str, Any]

SEEDS = (0, 1, 2)
GAP, SHORT_GAP = 50, 10
ADAMW, SVD = "adamw", f"svd, T={GAP}"
# By name, what is swept and compared; what is not said is the default.
SWEPT: dict[str, Setting] = {
    ADAMW: {"optimizer": "adamw", "matrix_lr_ratio": demo.ADAMW.matrix_lr_ratio},
    SVD: {"optimizer": "galore_adamw", "update_proj_gap": GAP},
}
STARTS = {ADAMW: demo.ADAMW.lr, SVD: demo.GALORE.lr}


def settings(steps: int) -> dict[str, Setting]:
    """By name, what GaLore is compared at; exact SVD every GAP updates is in SWEPT."""
    result = {
        f"{name}, T={GAP}": {"update_proj_gap": GAP, "projector": name}
        for name in PROJECTORS
        if name != "svd"
    }
    for name in ("svd", "power_iteration", "rows"):
        # Only what differs from the default, which needs no setting of the application.
        projector = {} if name == "svd" else {"projector": name}
        ways = {
            f"T={SHORT_GAP}": {"update_proj_gap": SHORT_GAP},
            f"T={SHORT_GAP}, lazy": {"update_proj_gap": SHORT_GAP, "refresh": "lazy"},
            f"T={GAP}, staggered": {"update_proj_gap": GAP, "stagger": True},
            "first step only": {"update_proj_gap": steps},
        }
        result |= {f"{name}, {way}": {**projector, **setting} for way, setting in ways.items()}
    return {name: {"optimizer": "galore_adamw", **setting} for name, setting in result.items()}


class Record:
    """The runs in a JSON file, added to as they finish."""

    def __init__(self, path: pathlib.Path | None, steps: int):
        base = dataclasses.replace(demo.GALORE, steps=steps, eval_every=steps, quiet=True)
        names = ("preset", "tokenizer", "steps", "batch", "seq", "scale")
        self.path = path
        self.config = base
        self.demo = {name: getattr(base, name) for name in names}
        known = json.loads(path.read_text()) if path and path.exists() else {}
        if known.get("demo", self.demo) != self.demo:
            raise SystemExit(f"{path} is of another demo, {known['demo']}: name another file.")
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        self.remaining = 0

    def loss(self, setting: Setting, seed: int) -> float:
        """The validation loss, from the file or by training; infinite where that diverges."""
        setting = {**setting, "seed": seed}
        for run in self.runs:
            if run["setting"] == setting:
                self.remaining -= 1
                return run["valid_loss"]
        start = time.perf_counter()
        try:
            loss = train(dataclasses.replace(self.config, **setting)).valid[-1]["valid_loss"]
        except FloatingPointError:
            loss = float("inf")
        seconds = time.perf_counter() - start
        self.runs.append({"setting": setting, "valid_loss": loss, "seconds": round(seconds, 1)})
        self.remaining -= 1
        mean = statistics.mean(run["seconds"] for run in self.runs)
        left = max(self.remaining, 0) * mean / 60
        text = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in setting.items()
        )
        print(f"{loss:.4f}  {text}  ({seconds:.0f} s, about {left:.0f} min left)", flush=True)
        self.write()
        return loss

    def write(self, **more: Any) -> None:
        if self.path:
            record = {"benchmark": "refresh_quality", "machine": machine(), "demo": self.demo}
            record |= {"runs": self.runs, **more}
            self.path.write_text(json.dumps(record, indent=1) + "\n")


def best_learning_rate(record: Record, setting: Setting, start: float) -> float:
    """Of a sweep by factors of two with the first seed, until both neighbours are worse."""
    losses: dict[float, float] = {}
    best = start
    while not {best / 2, best, best * 2} <= losses.keys():
        for rate in (best / 2, best, best * 2):
            if rate not in losses:
                losses[rate] = record.loss({**setting, "lr": rate}, SEEDS[0])
        best = min(losses, key=lambda rate: losses[rate])
    return best


def measure(
    record: Record, compared: dict[str, Setting], seeds: tuple[int, ...] = SEEDS
) -> dict[str, dict[str, Any]]:
    """By name: losses by seed, their mean and standard error, also relative to exact SVD."""
    record.remaining = 3 * len(SWEPT) + (len(seeds) - 1) * len(SWEPT) + len(seeds) * len(compared)
    rates = {
        name: best_learning_rate(record, setting, STARTS[name]) for name, setting in SWEPT.items()
    }
    everything = {name: {**setting, "lr": rates[name]} for name, setting in SWEPT.items()}
    everything |= {name: {**setting, "lr": rates[SVD]} for name, setting in compared.items()}
    losses: dict[str, list[float]] = {name: [] for name in everything}
    # Seed by seed, so that a run that is stopped has compared all settings.
    record.remaining = len(seeds) * len(everything)
    for seed in seeds:
        for name, setting in everything.items():
            losses[name].append(record.loss(setting, seed))
    rows: dict[str, dict[str, Any]] = {}
    for name, setting in everything.items():
        relative = [100 * (a / b - 1) for a, b in zip(losses[name], losses[SVD], strict=True)]
        rows[name] = {"setting": setting, "losses": losses[name]}
        for key, values in {"loss": losses[name], "percent_over_svd": relative}.items():
            rows[name] |= {key: statistics.mean(values), f"{key}_error": standard_error(values)}
    record.write(summary=rows)
    return rows


def standard_error(values: list[float]) -> float:
    """Of the mean; not a number where there is one value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows for reading."""
    lines = [f"{'':32}{'lr':>7}{'validation loss':>19}{'over svd, %':>18}"]
    for name, row in rows.items():
        lines.append(
            f"{name:32}{row['setting']['lr']:7g}{row['loss']:11.4f} +-{row['loss_error']:.4f}"
            f"{row['percent_over_svd']:11.2f} +-{row['percent_over_svd_error']:.2f}"
        )
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Bars of the loss relative to exact SVD, with standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted(rows, key=lambda name: -rows[name]["percent_over_svd"])
    figure, axes = plt.subplots(figsize=(8, 0.33 * len(names) + 1.2), layout="constrained")
    axes.axvspan(-0.5, 0.5, color="gray", alpha=0.2, label="within 0.5 %")
    axes.barh(
        names,
        [rows[name]["percent_over_svd"] for name in names],
        xerr=[rows[name]["percent_over_svd_error"] for name in names],
        color=["C1" if name == ADAMW else "C0" for name in names],
        capsize=3,
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"validation loss over that of {SVD}, %; bars: standard error of the mean")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="updates of each run")
    parser.add_argument("--only", nargs="*", help="of GaLore's settings, those with these names")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    parser.add_argument("--out", type=pathlib.Path, help="path without suffix, of JSON and picture")
    args = parser.parse_args()
    compared = settings(args.steps)
    if args.list:
        print("\n".join((*SWEPT, *compared)))
        return
    if args.only is not None:
        if unknown := set(args.only) - set(compared):
            raise SystemExit(f"--only has {sorted(unknown)}; expected some of {list(compared)}")
        compared = {name: compared[name] for name in args.only}
    path = args.out.with_suffix(".json") if args.out else None
    with tempfile.TemporaryDirectory() as cache:
        # The seeds of a setting have one program.
        jax.config.update("jax_compilation_cache_dir", cache)
        rows = measure(Record(path, args.steps), compared)
    print(f"\n{table(rows)}")
    if args.out:
        plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
