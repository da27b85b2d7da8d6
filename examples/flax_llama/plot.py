"""Draws what runs have logged so far: losses, learning rate, speed, gradients, subspaces.

python -m examples.flax_llama.plot --runs runs/galore runs/adamw --out runs/curves.png
"""

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from examples.flax_llama.command import program
from examples.flax_llama.config import UsageError
from examples.flax_llama.flags import command_line
from examples.flax_llama.history import marks
from examples.flax_llama.records import METRICS, Record, read_records

# Beneath the losses, where any run has them.
PANELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
    "captured_energy": "share of the gradient's energy in the subspace",
}
# Part of a panel's width, within which two numbers of changes would touch.
TOO_NEAR = 0.05
# Of text beside each other, about as many as there is room for; and the height of a line of it.
CHARACTERS = 120
INCHES_OF_LINE = 0.2
# Updates of the longest run, of which the second half has a panel of its own.
FEWEST_TO_HALVE = 20
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
    # What makes its tokens; None where the run does not tell.
    tokenizer: bytes | None = None
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


def smoothed(values: np.ndarray, width: int | None) -> np.ndarray:
    """Moving means; over a fiftieth of all values where no width is given."""
    return moving_mean(values, width or max(1, len(values) // 50))


def points(records: Sequence[Record], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Updates of the records that have a field, and its values."""
    pairs = [(record["step"], record[field]) for record in records if field in record]
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps, values


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """The records of each run, named by the last parts of its path, as few as are its own.

    Raises:
      UsageError: a directory has no metrics, or none yet.
    """
    paths = [run.absolute().parts for run in runs]

    def name(path: tuple[str, ...]) -> str:
        counts = range(1, len(path))
        own = (n for n in counts if sum(other[-n:] == path[-n:] for other in paths) == 1)
        return str(Path(*path[-next(own, len(path)) :]))

    return [
        Curves(name(path), *read_metrics(run), read_tokenizer(run), marks(run))
        for run, path in zip(runs, paths, strict=True)
    ]


def read_tokenizer(run: Path) -> bytes | None:
    """The contents of the file that the run's tokenizer is in, None where there is none."""
    paths = (run / f"tokenizer.{suffix}" for suffix in ("json", "model"))
    return next((path.read_bytes() for path in paths if path.is_file()), None)


def comparable(runs: Sequence[Curves]) -> tuple[list[Curves], str]:
    """The runs in a unit in which their losses can be compared, and the name of that.

    A nat per token of one tokenizer is not one of another, whose tokens may be longer. The bytes of
    the text are the same: what a run logged says how many of them a token has in the text that it
    was validated on, and losses of training are converted by that, too.

    Raises:
      UsageError: the tokenizers differ, and a run has not been evaluated yet.
    """
    if len({run.tokenizer for run in runs if run.tokenizer is not None}) < 2:
        return list(runs), "nats per token"
    return [in_bits_per_byte(run) for run in runs], "bits per byte"


def in_bits_per_byte(run: Curves) -> Curves:
    """The same with losses and standard errors in bits per byte."""
    evaluated = [record for record in run.valid if math.isfinite(record["valid_loss"])]
    if not evaluated:
        raise UsageError(
            f"runs={run.name} has another tokenizer than the others and no evaluation yet: its "
            "nats per token cannot be compared with theirs."
        )
    unit = evaluated[-1]["bits_per_byte"] / evaluated[-1]["valid_loss"]
    losses = ("loss", "valid_loss", "standard_error")

    def convert(record: Record) -> Record:
        return record | {name: unit * record[name] for name in losses if name in record}

    train, valid = ([convert(record) for record in records] for records in (run.train, run.valid))
    return dataclasses.replace(run, train=train, valid=valid)


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


def whole_updates(panel: Axes) -> None:
    """Numbers updates on the horizontal axis, of which there is no half."""
    panel.set_xlabel("update")
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def loss_panels(runs: Sequence[Curves]) -> list[int]:
    """The updates after which the panels of the losses begin: none are left out, then a half.

    The fall of the first updates presses the differences between the last ones together.
    """
    last = max(run.train[-1]["step"] for run in runs)
    return [0, int(last) // 2] if last >= FEWEST_TO_HALVE else [0]


def draw_losses(
    panel: Axes, runs: Sequence[Curves], *, width: int | None, after: int = 0, unit: str
) -> None:
    """Training losses as lines and held-out ones as points with bars of one standard error.

    Args:
      panel: to draw in, which shows all that is drawn.
      runs: to draw.
      width: number of updates to average over; a fiftieth of each run's if None.
      after: number of updates that are left out.
      unit: of the losses.
    """
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        steps, losses = run.of("loss")
        shown = steps > after
        panel.plot(steps[shown], losses[shown], color=color, alpha=0.2, linewidth=0.7)
        losses = smoothed(losses, width)
        panel.plot(steps[shown], losses[shown], color=color, label=run.name)
        steps, held_out = points(run.valid, "valid_loss")
        errors = np.array([record.get("standard_error", math.nan) for record in run.valid])
        shown = steps > after
        style = {"fmt": "o", "markersize": 4, "capsize": 3, "zorder": 3}
        panel.errorbar(steps[shown], held_out[shown], errors[shown], color=color, **style)
    draw_changes(panel, runs, after)
    # Of no data, for the legend.
    panel.errorbar([], [], [], fmt="o", color="gray", markersize=4, capsize=3, label="held out")
    panel.set_title(f"after update {after:,}" if after else "")
    panel.set_ylabel(f"cross entropy, {unit}")
    whole_updates(panel)


def draw_changes(panel: Axes, runs: Sequence[Curves], after: int = 0) -> None:
    """Lines between the updates where runs changed, and above them the numbers of the changes.

    Those of the first `after` updates are left out; numbers that would touch are written as one.
    """
    room = TOO_NEAR * (max(run.train[-1]["step"] for run in runs) - after)
    groups: list[list[Change]] = []
    for change in sorted(changes_of(runs), key=lambda change: change.step):
        if change.step >= after:
            panel.axvline(change.step + 0.5, color=change.color, linestyle="--", linewidth=0.8)
            near = groups and change.step - groups[-1][-1].step < room
            groups[-1:] = [[*groups[-1], change]] if near else [*groups[-1:], [change]]
    for group in groups:
        middle = (group[0].step + group[-1].step + 1) / 2
        place = {"xycoords": panel.get_xaxis_transform(), "textcoords": "offset points"}
        style = {"ha": "center", "va": "bottom", "size": "small"}
        numbers = ", ".join(f"{number}" for number in sorted(each.number for each in group))
        panel.annotate(numbers, (middle, 1), xytext=(0, 1), **place, **style)


@dataclasses.dataclass(frozen=True)
class Change:
    """Where a run went on with other settings."""

    number: int
    step: int
    color: str
    text: str


def changes_of(runs: Sequence[Curves]) -> list[Change]:
    """The changes of all runs, numbered."""
    found = [
        (step, f"C{index % 10}", f"{run.name} after update {step:,}: {what}")
        for index, run in enumerate(runs)
        for step, what in run.changes
    ]
    return [Change(number, *each) for number, each in enumerate(found, 1)]


def draw_legends(figure: Figure, runs: Sequence[Curves]) -> None:
    """Names above the panels, line by line; beneath them what changed. The figure grows by both."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = max(1, min(4, len(names), CHARACTERS // (max(map(len, names)) + 8)))
    # Matplotlib fills columns.
    order = [*itertools.chain(*(range(len(names))[i::columns] for i in range(columns)))]
    lines, texts = [handles[i] for i in order], [names[i] for i in order]
    figure.legend(lines, texts, loc="outside upper center", ncols=columns)
    rows = math.ceil(len(names) / columns)
    if changes := changes_of(runs):
        told = [textwrap.fill(f"{each.number}: {each.text}", CHARACTERS) for each in changes]
        dashes = [Line2D([], [], color=change.color, linestyle="--") for change in changes]
        style = {"fontsize": "small", "handlelength": 1.5, "borderpad": 1.0}
        figure.legend(dashes, told, loc="outside lower left", **style)
        rows += sum(text.count("\n") + 1 for text in told)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + INCHES_OF_LINE * rows)


def draw_metric(panel: Axes, runs: Sequence[Curves], field: str, width: int | None) -> None:
    """One training metric of all runs that have it."""
    for index, run in enumerate(runs):
        color = f"C{index % 10}"
        steps, values = run.of(field)
        if field == "tokens_per_second":
            # All tokens over all time: one is fetched late and the next one early.
            values = 1 / smoothed(1 / values, width)
        elif field != "lr":
            panel.plot(steps, values, color=color, alpha=0.2, linewidth=0.7)
            values = smoothed(values, width)
        panel.plot(steps, values, color=color)
    draw_changes(panel, runs)
    panel.set_title(PANELS[field])
    whole_updates(panel)
    if field == "grad_norm":
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        # A random sketch may have more than all.
        top = max(1, panel.dataLim.y1) * 1.05 if field == "captured_energy" else None
        panel.set_ylim(bottom=0, top=top)
        panel.yaxis.set_major_formatter(EngFormatter(sep="") if "tokens" in field else "{x:g}")


def plot(runs: tuple[Path, ...], out: Path, smooth: int | None = None) -> str:
    """Draws what one or several runs have logged so far, finished or not.

    Lines are training metrics, points the held-out loss with bars of one standard error. A dashed
    line is where a run went on with other settings, which are told beneath. Runs with different
    tokenizers are drawn in bits per byte, others in nats per token.

    Args:
      runs: the --out directories of training runs.
      out: picture to write; its suffix gives the format, such as .png, .svg or .pdf.
      smooth: number of updates that all but learning rates are averaged over; a fiftieth of each
        run by default.

    Returns:
      What was written, and where.
    """
    if not runs:
        raise UsageError("runs=DIRECTORY ...: name at least one.")
    if smooth is not None and smooth < 1:
        raise UsageError(f"smooth={smooth}: expected at least 1.")
    curves, unit = comparable(read_curves(runs))
    fields = [field for field in PANELS if any(len(run.of(field)[0]) for run in curves)]
    rows = (len(fields) + 1) // 2
    with plt.rc_context(STYLE | {"axes.titlepad": 12}):  # with numbers of changes between
        figure = plt.figure(figsize=(9, 4.2 + 2.2 * rows), layout="constrained")
        grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2] + [1] * rows)
        parts = loss_panels(curves)
        for column, after in enumerate(parts):
            place = grid[0, column if len(parts) > 1 else slice(None)]
            panel = figure.add_subplot(place)
            draw_losses(panel, curves, width=smooth, after=after, unit=unit)
        for i, field in enumerate(fields):
            row, column = divmod(i, 2)
            alone = column == 0 and i == len(fields) - 1
            panel = figure.add_subplot(grid[1 + row, slice(None) if alone else column])
            draw_metric(panel, curves, field, smooth)
        draw_legends(figure, curves)
        try:
            figure.savefig(out, dpi=150)
        except (ValueError, OSError) as error:
            raise UsageError(f"out={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)
    return f"Wrote {out}: losses in {unit} of {', '.join(run.name for run in curves)}"


def main() -> None:
    with program(plot):
        print(command_line(plot)())


if __name__ == "__main__":
    main()
