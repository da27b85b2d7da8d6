"""The report of a comparison with its pictures: losses, what a sweep found, bytes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory, offset_copy

from examples.flax_llama.plot import STYLE, Curves, draw_losses, loss_panels, read_metrics
from examples.flax_llama.report import Comparison, Run, at_edge, markdown
from examples.flax_llama.writing import write_whole

# From one line of a sweep to the next, of the 72 to an inch.
POINTS_APART = 11


def draw_curves(comparison: Comparison, out: Path) -> None:
    """Losses of the best run of each optimizer, from the first seed."""
    best = {name: runs[0].name for name, runs in comparison.best.items()}
    curves = [Curves(name, *read_metrics(out / run)) for name, run in best.items()]
    parts = loss_panels(curves)
    figure, panels = plt.subplots(
        1, len(parts), figsize=(5.5 * len(parts), 4.5), squeeze=False, layout="constrained"
    )
    for panel, after in zip(panels[0], parts, strict=True):
        draw_losses(panel, curves, width=None, after=after, unit="nats per token")
    panels[0, 0].legend()
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


def draw_sweep(comparison: Comparison, out: Path) -> None:
    """Validation loss over the first setting of each sweep, a line per values of the others."""
    grids = {
        name: [setting for setting, values in grid.items() if len(values) > 1]
        for name, grid in comparison.grids.items()
    }
    grids = {name: settings for name, settings in grids.items() if settings}
    figure, panels = plt.subplots(
        *(1, len(grids)),
        figsize=(4.5 * len(grids), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    losses = [run.loss for run in comparison.runs if math.isfinite(run.loss)]
    chosen = [best[0].loss for best in comparison.best.values() if math.isfinite(best[0].loss)]
    # What went wrong altogether would press all else together.
    top = 1.25 * max(chosen) if chosen and max(losses) > 1.25 * max(chosen) else math.inf
    for panel, (name, settings) in zip(panels[0], grids.items(), strict=True):
        draw_grid(figure, panel, comparison, name, settings, top)
    if top < math.inf:
        panels[0, 0].set_ylim(min(losses) - 0.1 * (top - min(losses)), top)
    panels[0, 0].set_ylabel("validation loss, nats per token")
    figure.savefig(out / "sweep.png", dpi=150)
    plt.close(figure)


def draw_grid(
    figure: Figure,
    panel: Axes,
    comparison: Comparison,
    name: str,
    settings: Sequence[str],
    top: float,
) -> None:
    """The runs of one optimizer, and which of them is the best.

    Lines lie a few points apart, since runs with the same value of the first setting would else
    hide each other; what is not below `top` is told at the upper edge.
    """
    x, *others = settings
    best = comparison.best[name][0]
    lines: dict[str, list[Run]] = {}
    for run in comparison.runs:
        if run.optimizer == name and run.seed == best.seed:
            label = ", ".join(f"{setting} {run.settings[setting]}" for setting in others)
            lines.setdefault(label, []).append(run)
    values = sorted({run.settings[x] for runs in lines.values() for run in runs})
    numeric = not isinstance(values[0], str)
    place = dict(zip(values, values if numeric else range(len(values)), strict=True))
    panel.set(title=name, xlabel=x, xscale="log" if numeric and values[0] > 0 else "linear")
    for i, label in enumerate(sorted(lines)):
        runs = sorted(lines[label], key=lambda run: place[run.settings[x]])
        shift = POINTS_APART * (i - (len(lines) - 1) / 2)
        shifted = offset_copy(panel.transData, figure, x=shift, units="points")
        points = np.array(
            [
                (place[run.settings[x]], run.loss, run.scores["standard_error"])
                for run in runs
                if run.loss < top
            ]
        ).reshape(-1, 3)
        style = {"fmt": "o-", "color": f"C{i % 10}", "transform": shifted}
        panel.errorbar(*points.T, label=label, **style)
        # Which Matplotlib does not do for what is shifted.
        for sign in (-1, 1):
            panel.update_datalim(points[:, :2] + np.array([0, sign]) * np.nan_to_num(points[:, 2:]))
        for run in runs:
            if run.loss >= top:
                above = f"{run.loss:.2f}" if math.isfinite(run.loss) else "diverged"
                at = blended_transform_factory(shifted, panel.transAxes)
                style = {"ha": "center", "va": "top", "color": f"C{i % 10}", "transform": at}
                panel.text(place[run.settings[x]], 1, f"\N{UPWARDS ARROW}\n{above}", **style)
        if best in runs and best.loss < top:
            edges = at_edge(comparison, name)
            label = ", ".join(["best", *(f"{edge} {x} tried" for x, edge in edges.items())])
            style = {"color": "red" if edges else "black", "transform": shifted, "linestyle": ""}
            # Its point is seen through it.
            star = {"marker": "*", "markersize": 16, "fillstyle": "none", "zorder": 4}
            panel.plot(place[best.settings[x]], best.loss, label=label, **star, **style)
    panel.update_datalim([(position, 0) for position in place.values()], updatey=False)
    panel.autoscale_view()
    panel.set_xticks(list(place.values()), [f"{x:g}" if numeric else x for x in place])
    panel.minorticks_off()
    panel.legend(fontsize="small")


def draw_bytes(comparison: Comparison, out: Path) -> None:
    """Bytes of parameters and optimizer state, and of all that an update needs."""
    best = {name: runs[0].scores for name, runs in comparison.best.items() if runs[0].scores}
    names = list(best)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 1.6 + 0.5 * len(names)), sharey=True, layout="constrained"
    )
    start = np.zeros(len(names))
    for part, color in {"parameter": "C7", "moment": "C0", "projector": "C1"}.items():
        width = np.array([scores[f"{part}_bytes"] / 1e6 for scores in best.values()])
        left.barh(names, width, left=start, label=f"{part}s", color=color)
        start += width
    update = np.array([scores.get("update_bytes", 0) / 1e6 for scores in best.values()])
    right.barh(names, update, color="C2")
    left.set_title("parameters and optimizer state")
    right.set_title("memory of an update, as XLA plans it")
    left.invert_yaxis()
    for panel, totals in ((left, start), (right, update)):
        panel.grid(visible=False)
        panel.set(xlabel="MB", xlim=(0, 1.15 * totals.max()))
        for name, total in zip(names, totals, strict=True):
            panel.annotate(
                *(f"{total:,.1f}" if total >= 10 else f"{total:.2f}", (total, name)),
                **{"xytext": (4, 0), "textcoords": "offset points", "va": "center"},
            )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(out / "bytes.png", dpi=150)
    plt.close(figure)


def write_report(comparison: Comparison, machine: Mapping[str, Any], out: Path) -> None:
    """Writes report.md and its pictures."""
    pictures = {"losses.png": draw_curves}
    if any(len(values) > 1 for grid in comparison.grids.values() for values in grid.values()):
        pictures["sweep.png"] = draw_sweep
    if any(runs[0].scores for runs in comparison.best.values()):
        pictures["bytes.png"] = draw_bytes
    with plt.rc_context(STYLE):
        for draw in pictures.values():
            draw(comparison, out)
    write_whole(out / "report.md", markdown(comparison, machine, list(pictures)))
