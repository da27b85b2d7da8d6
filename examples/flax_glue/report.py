"""What a comparison of methods found: a table of it in Markdown, and a picture."""

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality.statistics import estimate
from examples.flax_glue.config import Config
from examples.flax_llama.plot import STYLE
from examples.flax_llama.units import size
from examples.flax_llama.writing import write_whole

PICTURE = "report.png"
# Of learning rates that are labelled, the least quotient of neighbours.
APART = 1.4


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended."""

    # Of its directory.
    name: str
    method: str
    lr: float
    seed: int
    # The record of the epoch that dev chooses, and those of all.
    best: Mapping[str, float] = dataclasses.field(default_factory=dict)
    epochs: Sequence[Mapping[str, float]] = ()
    # Of parameters, of those that are trained, of the optimizer's state, and of an update as XLA
    # plans it.
    memory: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # Of all updates, without evaluations and compilation.
    seconds: float = math.nan
    # Why it could not go on.
    diverged: str | None = None

    @property
    def dev(self) -> float:
        """The score of dev, below all others where the run diverged."""
        return self.best.get("score", -math.inf)

    @property
    def test(self) -> float | None:
        """That of the test, where there is one."""
        return self.best.get("test_score")

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.diverged:
            return f"diverged: {self.diverged}"
        test = "" if self.test is None else f", test {self.test:.4f}"
        return f"dev {self.dev:.4f}{test}, {self.seconds:.0f} s"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of several methods on the same texts."""

    # The settings of all runs, but for what a method decides.
    given: Config
    # As it was given.
    sweep: Sequence[str]
    # In the order of training.
    runs: Sequence[Run]
    # At the best rate of each method, from every seed.
    best: Mapping[str, Sequence[Run]]

    @property
    def seeds(self) -> int:
        return max(len(runs) for runs in self.best.values())

    @property
    def command(self) -> str:
        """What makes the same comparison."""
        return command(self.given, list(self.best), self.sweep, self.seeds)

    def as_json(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "methods": rows(self),
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


def command(given: Config, methods: Sequence[str], sweep: Sequence[str], seeds: int) -> str:
    """What makes a comparison, and goes on with it."""
    words = ["python -m examples.flax_glue.compare --methods", *methods]
    words += ["--sweep", *sweep] if sweep else []
    words += ["--seeds", str(seeds)]
    for field in dataclasses.fields(given):
        value = getattr(given, field.name)
        if value != field.default:
            option = field.name.replace("_", "-")
            words += [f"--{option}"] if value is True else [f"--{option}", shlex.quote(str(value))]
    return " ".join(words)


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """For each method its rate, its scores over the seeds, and how it differs from the first one.

    Scores and differences are percent, with a standard error and what to add and subtract for 95 %;
    a difference is of runs of the same seed. Those of the test, where there is one, else of dev.
    """
    (_, reference), *_ = comparison.best.items()
    found = []
    for method, runs in comparison.best.items():
        whole = [run for run in runs if not run.diverged]
        row: dict[str, Any] = {"method": method, "lr": runs[0].lr, "runs": len(whole)}
        if whole:
            row["dev"] = estimate([100 * run.dev for run in whole])
            tests = [100 * run.test for run in whole if run.test is not None]
            row["test"] = estimate(tests) if tests else None
            pairs = [
                100 * (reported(run) - reported(other))
                for run, other in zip(runs, reference, strict=True)
                if not (run.diverged or other.diverged)
            ]
            row["difference"] = estimate(pairs) if pairs and runs is not reference else None
            row["seconds"] = estimate([run.seconds for run in whole])["mean"]
            row |= whole[0].memory
        found.append(row)
    return found


def reported(run: Run) -> float:
    """The score that is reported."""
    return run.dev if run.test is None else run.test


def plus_minus(value: dict[str, Any] | None, spread: str) -> str:
    """A mean with its error or its interval, where there is one."""
    if value is None:
        return ""
    beside = "" if value[spread] is None else f" ± {value[spread]:.2f}"
    return f"{value['mean']:.2f}{beside}"


def table(comparison: Comparison) -> list[str]:
    """A line for each method, in Markdown."""
    first, *_ = comparison.best
    header = [
        *("method", "learning rate", "dev, %", "test, %", f"- {first}, points"),
        *("trained", "optimizer state", "memory of an update", "seconds"),
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in rows(comparison):
        start = [row["method"], f"{row['lr']:g}"]
        if not row["runs"]:
            lines.append([*start, "diverged", *[""] * 6])
            continue
        update = row.get("update_bytes")
        lines.append(
            [
                *start,
                plus_minus(row["dev"], "error"),
                plus_minus(row["test"], "error"),
                plus_minus(row["difference"], "interval"),
                size(row["trained_bytes"]),
                size(row["state_bytes"]),
                "" if update is None else size(update),
                f"{row['seconds']:,.0f}",
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def edges(comparison: Comparison) -> list[str]:
    """Says where the best rate is the last one that was tried in some direction."""
    found = []
    for method, runs in comparison.best.items():
        tried = sorted({run.lr for run in comparison.runs if run.method == method})
        if len(tried) > 1 and runs[0].lr in (tried[0], tried[-1]):
            edge = "smallest" if runs[0].lr == tried[0] else "largest"
            found.append(
                f"The best learning rate of {method}, {runs[0].lr:g}, is the {edge} that was "
                "tried: a better one may lie beyond."
            )
    return found


def draw_rates(panel: Axes, comparison: Comparison) -> None:
    """The score of dev over the learning rates, of the first seed."""
    chosen = [100 * best[0].dev for best in comparison.best.values() if not best[0].diverged]
    for i, (method, best) in enumerate(comparison.best.items()):
        some = [run for run in comparison.runs if run.method == method and not run.diverged]
        some = sorted((r for r in some if r.seed == best[0].seed), key=lambda run: run.lr)
        style = {"color": f"C{i}", "marker": "o", "markersize": 4}
        panel.plot([r.lr for r in some], [100 * r.dev for r in some], label=method, **style)
        if not best[0].diverged:
            star = {"marker": "*", "markersize": 15, "fillstyle": "none", "color": f"C{i}"}
            panel.plot(best[0].lr, 100 * best[0].dev, **star)
    panel.set(xscale="log", xlabel="learning rate", ylabel="dev, %, one seed (star: chosen)")
    shown: list[float] = []
    for rate in sorted({run.lr for run in comparison.runs}):
        if not shown or rate > APART * shown[-1]:
            shown.append(rate)
    panel.set_xticks(shown, [f"{rate:g}" for rate in shown], rotation=45, ha="right")
    panel.minorticks_off()
    if chosen:
        # What went wrong altogether would press all else together.
        bottom = min(chosen) - max(5, max(chosen) - min(chosen))
        panel.set_ylim(max(bottom, panel.get_ylim()[0]), max(chosen) + 1)
    panel.set_title("the rates that were tried")
    panel.legend(fontsize="small")


def draw_scores(panel: Axes, comparison: Comparison) -> None:
    """The score of each seed, their mean and its standard error, a line for each method."""
    labels = []
    for i, row in enumerate(rows(comparison)):
        state = f", {size(row['state_bytes'])}" if row["runs"] else ", diverged"
        labels.append(f"{row['method']}{state}")
        if row["runs"]:
            points = [100 * reported(r) for r in comparison.best[row["method"]] if not r.diverged]
            style = {"color": f"C{i}", "linestyle": ""}
            panel.plot(points, [i] * len(points), marker="|", markersize=12, alpha=0.5, **style)
            value = row["test"] or row["dev"]
            panel.errorbar(value["mean"], i, xerr=value["error"], marker="o", capsize=4, **style)
    panel.set_yticks(range(len(labels)), labels)
    panel.set_ylim(len(labels) - 0.5, -0.5)
    has_test = any(run.test is not None for run in comparison.runs)
    what = "test" if has_test else "dev"
    panel.set(
        xlabel=f"{what}, %: seeds, mean, standard error",
        title="at the best rate; bytes of the optimizer's state",
    )


def write_report(comparison: Comparison, machine: Mapping[str, Any], out: Path) -> None:
    """Writes report.md and its picture."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        draw_rates(left, comparison)
        draw_scores(right, comparison)
        figure.savefig(out / PICTURE, dpi=150)
        plt.close(figure)
    write_whole(out / "report.md", markdown(comparison, machine))


def markdown(comparison: Comparison, machine: Mapping[str, Any]) -> str:
    """The report."""
    given = comparison.given
    lines = [
        f"# {', '.join(comparison.best)}",
        "",
        f"`{given.model}` fine-tuned on `{given.task}`: of each method the learning rate with the "
        f"best score of dev, from one seed; then {comparison.seeds} seeds.",
        "",
        *table(comparison),
        "",
        "Scores: of the epoch that dev chooses, mean over the seeds ± its standard error; the "
        "difference is of runs of the same seed, ± for 95 % by Student's t. Trained: bytes of the "
        "parameters that the optimizer updates. Optimizer state: by `galore_optax.memory_report`. "
        "Memory of an update: parameters, state, gradients and temporary arrays for the longest "
        "texts, as XLA planned it. Seconds: all updates, GaLore's refreshes included.",
        "",
        *(line for edge in edges(comparison) for line in (edge, "")),
        f"![scores over learning rates, and at the best of them]({PICTURE})",
        "",
        "## All runs",
        "",
        "| run | outcome |",
        "| --- | --- |",
        *(f"| {run.name} | {run.outcome} |" for run in comparison.runs),
    ]
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines += ["", "Made by", "", "```", comparison.command, "```", "", f"on {where}."]
    return "\n".join(lines) + "\n"
