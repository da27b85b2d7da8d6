"""What a comparison of optimizers found, and a table of it in Markdown."""

import dataclasses
import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from examples.flax_llama.changes import settings_of
from examples.flax_llama.command import as_flags
from examples.flax_llama.config import Config
from examples.flax_llama.validation import perplexity


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended."""

    # Of its directory.
    name: str
    optimizer: str
    seed: int
    # The settings that a sweep can change.
    settings: dict[str, Any]
    # valid_loss, nats per token after the last update; its standard_error; bits_per_byte;
    # tokens_per_second, of all updates together; parameter_bytes, projector_bytes, moment_bytes
    # (of all other state of the optimizer), and update_bytes, of an update as XLA planned it, where
    # it tells. Empty where the run diverged.
    scores: dict[str, float]
    # Why it could not go on.
    diverged: str | None

    @property
    def loss(self) -> float:
        """Nats per held-out token, infinite where the run diverged."""
        return self.scores.get("valid_loss", math.inf)

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.diverged:
            return f"diverged: {self.diverged}"
        return f"validation loss {self.loss:.4f} ± {self.scores['standard_error']:.4f}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of several optimizers on the same tokens."""

    # The settings of all runs as they were given, where a sweep does not change them.
    given: Config
    # As it was given.
    sweep: Sequence[str]
    # Optimizer: setting: values to try.
    grids: Mapping[str, Mapping[str, Sequence[Any]]]
    # In the order of training.
    runs: Sequence[Run]
    # The best of each optimizer, from every seed.
    best: Mapping[str, Sequence[Run]]

    @property
    def seeds(self) -> int:
        return max(len(runs) for runs in self.best.values())

    @property
    def swept(self) -> list[str]:
        """The learning rate, and the other settings that the optimizers were given values of."""
        return list(dict.fromkeys(["lr", *(name for grid in self.grids.values() for name in grid)]))

    @property
    def command(self) -> str:
        """What makes the same comparison."""
        return command(self.given, list(self.best), self.sweep, self.seeds)

    def as_json(self) -> dict[str, Any]:
        """All but the curves."""
        return {
            "command": self.command,
            "settings": settings_of(self.given.resolve()),
            "best": {
                name: {
                    "runs": [run.name for run in runs],
                    **dict(zip(("loss", "standard_error"), mean_loss(runs), strict=True)),
                }
                for name, runs in self.best.items()
            },
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


def command(given: Config, optimizers: Sequence[str], sweep: Sequence[str], seeds: int) -> str:
    """What makes a comparison, and goes on with it."""
    words = ["python -m examples.flax_llama.compare --optimizers", *optimizers]
    words += ["--sweep", *sweep] if sweep else []
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    return " ".join([*words, *map(shlex.quote, as_flags(given, type(given)()))])


def mean_loss(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean validation loss over seeds and its standard error; that over the text for one seed."""
    losses = [run.loss for run in runs]
    if math.inf in losses:
        return math.inf, math.nan
    if len(losses) == 1:
        return losses[0], runs[0].scores["standard_error"]
    return statistics.mean(losses), statistics.stdev(losses) / math.sqrt(len(losses))


def size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def table(comparison: Comparison) -> list[str]:
    """The best runs, a line for each optimizer, in Markdown."""
    first, *_ = comparison.best
    reference, _ = mean_loss(comparison.best[first])
    header = [
        *("optimizer", *comparison.swept, "validation loss", f"/ {first}", "perplexity"),
        *("optimizer state", "memory of an update", "tokens/s"),
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, runs in comparison.best.items():
        run, (loss, error) = runs[0], mean_loss(runs)
        settings = [
            str(run.settings[k]) if k == "lr" or k in comparison.grids[name] else ""
            for k in comparison.swept
        ]
        if not math.isfinite(loss):
            lines.append([name, *settings, "diverged", *[""] * 5])
            continue
        state = run.scores["projector_bytes"] + run.scores["moment_bytes"]
        speed = statistics.median(run.scores["tokens_per_second"] for run in runs)
        lines.append(
            [
                *(name, *settings, f"{loss:.4f} ± {error:.4f}", f"{loss / reference:.4f}"),
                f"{perplexity(loss):.2f} ± {perplexity(loss) * error:.2f}",
                *(size(state), size(run.scores.get("update_bytes", math.nan)), f"{speed:,.0f}"),
            ]
        )
    return [f"| {' | '.join(line)} |" for line in lines]


def at_edge(comparison: Comparison, optimizer: str) -> dict[str, str]:
    """The settings whose best value is the "smallest" or the "largest" that was tried."""
    best = comparison.best[optimizer][0].settings
    return {
        setting: "smallest" if best[setting] == min(values) else "largest"
        for setting, values in comparison.grids[optimizer].items()
        if len(values) > 1 and not isinstance(values[0], str)
        if best[setting] in (min(values), max(values))
    }


def edges(comparison: Comparison) -> list[str]:
    """Says where the best value is the last one that was tried in some direction."""
    return [
        f"The best {setting} of {name}, {runs[0].settings[setting]:g}, is the {edge} that was "
        "tried: a better one may lie beyond."
        for name, runs in comparison.best.items()
        for setting, edge in at_edge(comparison, name).items()
    ]


def markdown(comparison: Comparison, machine: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report."""
    config = comparison.given.resolve()
    tokens = config.steps * config.batch * config.seq
    spread = (
        f"mean over {comparison.seeds} seeds ± standard error of that mean"
        if comparison.seeds > 1
        else "± standard error over the rows of the held-out text"
    )
    chosen = (
        " Of each optimizer it shows the settings of lowest validation loss among those tried."
        if len(comparison.runs) > len(comparison.best) * comparison.seeds
        else ""
    )
    held = max(run.scores.get("parameter_bytes", 0) for run in comparison.runs)
    parameters = held // jnp.dtype(config.param_dtype).itemsize
    lines = [
        f"# {', '.join(comparison.best)}",
        "",
        f"LLaMA of {parameters:,} parameters ({config.param_dtype}), {config.steps:,} updates "
        f"of {config.batch} x {config.seq} tokens ({tokens:,} in all) of `{config.data}`: for "
        f"every optimizer the same tokens in the same order.{chosen}",
        "",
        *table(comparison),
        "",
        f"Loss: nats per token, {spread}. Optimizer state: by `galore_optax.memory_report`. Memory "
        "of an update: arguments, results and temporary arrays, as XLA planned the compiled update "
        "(`memory_analysis`). Tokens/s: all of training, GaLore's refreshes included.",
        "",
        *(line for edge in edges(comparison) for line in (edge, "")),
        *(line for picture in pictures for line in (f"![{picture}]({picture})", "")),
        "## All runs",
        "",
        "| run | validation loss | perplexity | tokens/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for run in comparison.runs:
        if run.diverged:
            lines.append(f"| {run.name} | {run.outcome} | | |")
        else:
            lines.append(
                f"| {run.name} | {run.loss:.4f} ± {run.scores['standard_error']:.4f} "
                f"| {perplexity(run.loss):.2f} | {run.scores['tokens_per_second']:,.0f} |"
            )
    where = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines += ["", "Made by", "", "```", comparison.command, "```", "", f"on {where}."]
    return "\n".join(lines) + "\n"
