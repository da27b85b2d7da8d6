"""Draws what runs have logged so far: losses, learning rate, speed, gradients, subspaces.

python -m examples.flax_llama.plot --runs runs/galore runs/adamw --out runs/curves.png
"""

import dataclasses
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from examples.flax_llama.config import UsageError
from examples.flax_llama.history import marks
from examples.flax_llama.run_log import METRICS, Record, read_records

# Beneath the losses, where any run has them.
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "captured_energy": "share of the gradient's energy in the subspace",
}
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True)
class Curves:
    """The records of a run."""

    name: str
    # By number of updates, ascending.
    train: list[Record]
    valid: list[Record]
    # After how many updates the run went on with other settings, and which.
    changes: Sequence[tuple[int, str]] = ()

    def of(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Updates that have a training metric, and its values; nan where it was not finite."""
        return points(self.train, field)


def moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Means of each value and the `width - 1` before it, of those that are finite."""
    finite = np.isfinite(values)
    sums, counts = (
        np.cumsum(np.concatenate([np.zeros(width), x]))
        for x in (np.where(finite, values, 0), finite)
    )
    total, count = (x[width:] - x[:-width] for x in (sums, counts))
    return np.divide(total, count, out=np.full(len(values), math.nan), where=count > 0)


def points(records: Sequence[Record], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates of the records that have a field, and its values."""
    pairs = [(record["step"], record[field]) for record in records if field in record]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """The records of each run, named by what its directory has not in common with the others.

    Raises:
      UsageError: a directory has no metrics, or none yet.
    """
    common = Path(os.path.commonpath([run.absolute().parent for run in runs]))
    names = [str(run.absolute().relative_to(common)) for run in runs]
    return [
        Curves(name, *read_metrics(run), marks(run)) for name, run in zip(names, runs, strict=True)
    ]


def read_metrics(run: Path) -> tuple[list[Record], list[Record]]:
    """Records of updates and of evaluations that a run has written so far.

    Raises:
      UsageError: there are none, or something else in their place.
    """
    path = run / METRICS
    if not path.is_file():
        raise UsageError(f"runs={run} is not the directory of a run: it has no {METRICS}.")
    train: dict[float, Record] = {}
    valid: dict[float, Record] = {}
    for record in read_records(path):
        (valid if "valid_loss" in record else train)[record["step"]] = record
    if not train:
        raise UsageError(f"runs={run} has no update yet: {path} is empty.")
    return [train[step] for step in sorted(train)], [valid[step] for step in sorted(valid)]


def draw_losses(panel: Axes, runs: Sequence[Curves], width: int) -> None:
    """Training losses as lines and held-out ones as points with bars of one standard error."""
    shown = []
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        steps, losses = run.of("loss")
        panel.plot(steps, losses, color=color, alpha=0.2, linewidth=0.7)
        losses = moving_mean(losses, width)
        panel.plot(steps, losses, color=color, label=run.name)
        steps, held_out = points(run.valid, "valid_loss")
        errors = [record.get("standard_error", math.nan) for record in run.valid]
        style = {"fmt": "o", "markersize": 4, "capsize": 3, "zorder": 3}
        panel.errorbar(steps, held_out, errors, color=color, **style)
        shown += [losses[len(losses) // 20 :], held_out]
        for step, what in draw_changes(panel, run, color):
            panel.text(
                *(step, 0.98, f"{textwrap.shorten(what, 60, placeholder=' ...')} "),
                transform=panel.get_xaxis_transform(),
                **{"rotation": 90, "ha": "right", "va": "top", "size": "x-small", "color": color},
            )
    finite = np.concatenate(shown)
    finite = finite[np.isfinite(finite)]
    if len(finite):
        # The fall of the first updates would press all else together.
        margin = 0.05 * np.ptp(finite) or 0.1
        panel.set_ylim(finite.min() - margin, finite.max() + margin)
    # Of no data, for the legend.
    panel.errorbar([], [], [], fmt="o", color="gray", markersize=4, capsize=3, label="held out")
    panel.set(xlabel="update", ylabel="cross entropy, nats per token")


def draw_changes(panel: Axes, run: Curves, color: str) -> list[tuple[float, str]]:
    """Lines between the updates where a run changed, and what is to be said of each."""
    places = [(step + 0.5, what) for step, what in run.changes]
    for step, _ in places:
        panel.axvline(step, color=color, linestyle="--", linewidth=0.8)
    return places


def draw_metric(panel: Axes, runs: Sequence[Curves], field: str, width: int) -> None:
    """One training metric of all runs that have it."""
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        steps, values = run.of(field)
        if field == "tokens_per_second":
            # All tokens over all time: one is fetched late and the next one early.
            values = 1 / moving_mean(1 / values, width)
        elif field == "grad_norm":
            panel.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            values = moving_mean(values, width)
        panel.plot(steps, values, color=color)
        draw_changes(panel, run, color)
    panel.set(xlabel="update", title=PANELS[field])
    if field == "grad_norm":
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_ylim(bottom=0, top=1 if field == "captured_energy" else None)
        panel.yaxis.set_major_formatter(EngFormatter(sep="") if "tokens" in field else "{x:g}")


def plot(runs: tuple[Path, ...], out: Path, smooth: int | None = None) -> None:
    """Draws what one or several runs have logged so far, finished or not.

    Lines are training metrics, points the held-out loss with bars of one standard error. A dashed
    line is where a run went on with other settings, which its history.json has.

    Args:
      runs: the --out directories of training runs.
      out: picture to write; its suffix gives the format, such as .png, .svg or .pdf.
      smooth: number of updates that losses, gradient norms and speeds are averaged over; a
        fiftieth of the longest run by default.
    """
    if not runs:
        raise UsageError("runs: name at least one directory.")
    if smooth is not None and smooth < 1:
        raise UsageError(f"smooth={smooth}: expected at least 1.")
    curves = read_curves(runs)
    width = smooth or max(1, max(len(run.train) for run in curves) // 50)
    fields = [field for field in PANELS if any(len(run.of(field)[0]) for run in curves)]
    rows = (len(fields) + 1) // 2
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(9, 4.5 + 2.2 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2] + [1] * rows)
        draw_losses(figure.add_subplot(grid[0, :]), curves, width)
        for i, field in enumerate(fields):
            row, column = divmod(i, 2)
            alone = column == 0 and i == len(fields) - 1
            panel = figure.add_subplot(grid[1 + row, slice(None) if alone else column])
            draw_metric(panel, curves, field, width)
        longest = max(len(run.name) for run in curves)
        columns = max(1, min(4, len(curves) + 1, 110 // (longest + 8)))
        figure.legend(loc="outside upper center", ncols=columns)
        try:
            figure.savefig(out, dpi=150)
        except (ValueError, OSError) as error:
            raise UsageError(f"out={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)


def main() -> None:
    try:
        tyro.cli(plot)
    except UsageError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
