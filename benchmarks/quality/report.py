"""The summary as tables to read, and as two pictures."""

from pathlib import Path
from typing import Any

from benchmarks.quality.contenders import ADAMW, BUILDERS
from benchmarks.quality.record import loss_of
from benchmarks.quality.stages import Bench, Results

Summary = dict[str, Any]


def plus_minus(value: dict[str, Any] | None, digits: int, signed: bool = False) -> str:
    """A mean with its standard error, where there are several values."""
    if value is None:
        return "-"
    text = f"{value['mean']:{'+' if signed else ''}.{digits}f}"
    return text if value["error"] is None else f"{text} ± {value['error']:.{digits}f}"


def tables(summary: Summary) -> str:
    """All tables, in Markdown."""
    lines: list[str] = []
    for cell in summary["cells"]:
        lines += [f"Hidden size {cell['hidden']}, rank {cell['rank']}:", ""]
        lines += [
            "| | lr | loss | over AdamW, % | over GaLore, % | gap closed, % | state, MB "
            "| tokens/s |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in cell["rows"]:
            ratio = "" if row["ratio"] == 1 else f" x {row['ratio']:g}"
            speed = row["tokens_per_second"]
            words = [
                row["contender"],
                f"{row['lr']:g}{ratio}",
                plus_minus(row["loss"], 4),
                *(plus_minus(row[key], 2, signed=True) for key in ("over_adamw", "over_galore")),
                plus_minus(row["gap_closed"], 0),
                f"{row['state_bytes'] / 1e6:.2f}",
                "-" if speed is None else f"{speed:,.0f}",
            ]
            lines.append(f"| {' | '.join(words)} |")
        lines.append("")
    if summary["ranks"]:
        lines += ["| ranks | of | loss | over uniform, % | state of the matrices, MB |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for row in summary["ranks"]:
            words = [row["rule"], f"{row['contender']}, rank {row['rank']}"]
            words += [plus_minus(row["loss"], 4), plus_minus(row["over_uniform"], 2, signed=True)]
            words.append(f"{row['matrix_state_bytes'] / 1e6:.3f}")
            lines.append(f"| {' | '.join(words)} |")
        lines.append("")
    if summary["rules"]:
        lines += ["| learning rate by rule | hidden, rank: loss over that of the swept rate, % |"]
        lines += ["| --- | --- |"]
    for row in summary["rules"]:
        places = [
            f"{place['hidden']}, {place['rank'] or 'any'}: "
            + ("-" if place["over_swept"] is None else f"{place['over_swept']:+.2f}")
            for place in row["places"]
        ]
        lines.append(f"| {row['contender']}, from {row['of']} | {'; '.join(places)} |")
    return "\n".join(lines)


def _figure(columns: int, rows: int = 1, **options: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, *plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)


def to_the_left(place: tuple[float, float], places: list[tuple[float, float]], i: int) -> bool:
    """Whether a point's name goes to its left: away from points beside it, else by turns.

    Args:
      place: the point.
      places: all points, from the lowest to the highest.
      i: its number among them.
    """
    across = [x for x, _ in places]
    near = 0.1 * (max(across) - min(across)), 0.03 * (places[-1][1] - places[0][1])
    beside = [x for x, y in places if abs(y - place[1]) <= near[1]]
    as_high = [x for x in beside if abs(x - place[0]) <= near[0]]
    if place[0] in (min(as_high), max(as_high)) and min(as_high) < max(as_high):
        return place[0] == min(as_high)
    return i % 2 == 1


def plot_bytes(summary: Summary, path: Path) -> None:
    """Loss against bytes of state: a point for each contender, a panel for each width."""
    widths = sorted({cell["hidden"] for cell in summary["cells"]})
    plt, figure, axes = _figure(len(widths), figsize=(7 * len(widths), 5.5))
    for axis, hidden in zip(axes[0], widths, strict=True):
        cells = [cell for cell in summary["cells"] if cell["hidden"] == hidden]
        points = [
            (row, "*" if not BUILDERS[row["contender"]].ranked else marker)
            for cell, marker in zip(cells, "os", strict=False)
            for row in cell["rows"]
            if BUILDERS[row["contender"]].ranked or cell is cells[0]
        ]
        points.sort(key=lambda point: point[0]["loss"]["mean"])
        places = [(row["state_bytes"] / 1e6, row["loss"]["mean"]) for row, _ in points]
        for i, ((row, marker), place) in enumerate(zip(points, places, strict=True)):
            left = to_the_left(place, places, i)
            axis.errorbar(
                *place,
                row["loss"]["error"],
                marker=marker,
                color=f"C{list(BUILDERS).index(row['contender']) % 10}",
                capsize=3,
                linestyle="none",
            )
            axis.annotate(
                row["contender"],
                place,
                xytext=(-7 if left else 7, 0),
                ha="right" if left else "left",
                textcoords="offset points",
                va="center",
                fontsize=7,
            )
        for cell, marker in zip(cells, "os", strict=False):
            axis.plot([], [], f"k{marker}", label=f"rank {cell['rank']}")
        axis.plot([], [], "k*", label="no rank, or 1")
        adamw = [r for c in cells for r in c["rows"] if r["contender"] == ADAMW]
        if adamw:
            axis.axhline(adamw[0]["loss"]["mean"], color="gray", linewidth=0.8, linestyle="--")
        axis.margins(x=0.25)
        axis.set_xlabel("optimizer state, MB")
        axis.set_ylabel("validation loss; bars: standard error of the mean")
        axis.set_title(f"hidden size {hidden}")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_rates(bench: Bench, results: Results, path: Path) -> None:
    """Loss against learning rate of each contender, with the best ratio at each rate."""
    runs = [run for run in results if run.seed == 0 and run.rule is None]
    cells = sorted({(run.hidden, run.rank) for run in runs if run.rank is not None})
    plt, figure, axes = _figure(max(len(cells), 1), figsize=(1 + 4.5 * max(len(cells), 1), 4.5))
    for axis, (hidden, rank) in zip(axes[0], cells, strict=False):
        lowest: list[float] = []
        for i, name in enumerate(bench.names):
            curve: dict[float, float] = {}
            for run in runs:
                if (run.contender, run.hidden) == (name, hidden) and run.rank in (rank, None):
                    # A diverged run is left out of the curve.
                    loss = loss_of(results[run])
                    curve[run.lr] = min(loss, curve.get(run.lr, loss))
            finite = {rate: loss for rate, loss in sorted(curve.items()) if loss < float("inf")}
            if finite:
                axis.plot([*finite], [*finite.values()], ".-", color=f"C{i % 10}", label=name)
                lowest.append(min(finite.values()))
        if lowest:
            # A rate that is much too high would hide what the others differ in.
            axis.set_ylim(min(lowest) * 0.995, max(lowest) * 1.08)
        axis.set_xscale("log", base=2)
        ticks = sorted({run.lr for run in runs if run.hidden == hidden})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45)
        axis.set_xlabel("peak learning rate")
        axis.set_ylabel("validation loss")
        axis.set_title(f"hidden size {hidden}, rank {rank}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
