"""What comes of the runs: means, errors, paired differences."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import scipy.stats

from benchmarks.quality.contenders import ADAMW, BUILDERS, GALORE
from benchmarks.quality.ranks import UNIFORM, rules
from benchmarks.quality.record import loss_of
from benchmarks.quality.stages import Bench, Results, best, seeds_of, transfers

Row = dict[str, Any]


def estimate(values: Sequence[float]) -> Row:
    """Mean, its standard error, and what to add and subtract for 95 % by Student's t.

    The latter two are None where there is one value.
    """
    result: Row = {
        "mean": statistics.mean(values),
        "error": None,
        "interval": None,
        "n": len(values),
    }
    if len(values) > 1 and all(map(math.isfinite, values)):
        result["error"] = statistics.stdev(values) / len(values) ** 0.5
        result["interval"] = result["error"] * float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return result


def paired_percent(losses: dict[int, float], others: dict[int, float]) -> Row | None:
    """By how many percent losses are higher than others, over the seeds that both have."""
    both = sorted(losses.keys() & others.keys())
    return estimate([100 * (losses[s] / others[s] - 1) for s in both]) if both else None


def gap_closed(
    losses: dict[int, float], galore: dict[int, float], adamw: dict[int, float]
) -> Row | None:
    """How many percent of the way from GaLore's loss to AdamW's these are, by seed."""
    all_three = sorted(losses.keys() & galore.keys() & adamw.keys())
    if not all_three or any(galore[s] == adamw[s] for s in all_three):
        return None
    return estimate([100 * (galore[s] - losses[s]) / (galore[s] - adamw[s]) for s in all_three])


def losses_of(results: Results, run: Any) -> dict[int, float]:
    """The losses by seed."""
    return {} if run is None else {s: loss_of(x) for s, x in seeds_of(results, run).items()}


def summary(bench: Bench, results: Results) -> dict[str, Any]:
    """Everything that is reported, of what there is."""
    cells = []
    for hidden in (bench.hidden, bench.wide):
        names = bench.names if hidden == bench.hidden else bench.chosen(results)
        for rank in bench.ranks(hidden):
            rows = contenders(results, names, hidden, rank)
            cells += [{"hidden": hidden, "rank": rank, "rows": rows}] if rows else []
    return {
        "cells": cells,
        "ranks": [
            row for rank in bench.ranks(bench.hidden) for row in with_rules(bench, results, rank)
        ],
        "rules": [rule_row(results, transfer) for transfer in transfers(bench, results)],
        "finalists": list(bench.chosen(results)),
    }


def contenders(results: Results, names: Sequence[str], hidden: int, rank: int) -> list[Row]:
    """A row for each contender at a width and a rank, at the best of its learning rates."""
    runs = {n: best(results, n, hidden, rank if BUILDERS[n].ranked else None) for n in names}
    losses = {name: losses_of(results, run) for name, run in runs.items()}
    rows = []
    for name, run in runs.items():
        if run is None:
            continue
        measured = list(seeds_of(results, run).values())
        speeds = [
            x["tokens_per_second"]
            for like, x in results.items()
            if (like.contender, like.hidden, like.rank) == (name, hidden, run.rank)
            and x["tokens_per_second"]
        ]
        rows.append(
            {
                "contender": name,
                "lr": run.lr,
                "ratio": run.ratio,
                "losses": losses[name],
                "loss": estimate(list(losses[name].values())),
                "over_adamw": paired_percent(losses[name], losses.get(ADAMW, {})),
                "over_galore": paired_percent(losses[name], losses.get(GALORE, {})),
                "gap_closed": gap_closed(
                    losses[name], losses.get(GALORE, {}), losses.get(ADAMW, {})
                ),
                # Those of the fastest run: others may have shared the machine.
                "tokens_per_second": max(speeds, default=None),
                "state_bytes": measured[0]["state_bytes"],
                "matrix_state_bytes": measured[0]["matrix_state_bytes"],
            }
        )
    return rows


def with_rules(bench: Bench, results: Results, rank: int) -> list[Row]:
    """A row for each rule of ranks by role, compared with one rank for all."""
    uniform = best(results, bench.ranked, bench.hidden, rank)
    if uniform is None:
        return []
    runs = {UNIFORM: uniform}
    for rule, factors in rules().items():
        runs[rule] = dataclasses.replace(uniform, rule=rule, factors=tuple(factors.items()))
    rows, reference = [], losses_of(results, uniform)
    for rule, run in runs.items():
        if losses := losses_of(results, run):
            rows.append(
                {
                    "contender": bench.ranked,
                    "rank": rank,
                    "rule": rule,
                    "loss": estimate(list(losses.values())),
                    "over_uniform": paired_percent(losses, reference),
                    "matrix_state_bytes": seeds_of(results, run)[min(losses)]["matrix_state_bytes"],
                }
            )
    return rows if len(rows) > 1 else []


def rule_row(results: Results, transfer: Any) -> Row:
    """By how many percent the losses at the rule's rates are over those of the swept ones."""
    places = []
    for swept, ruled in transfer.pairs:
        loss = loss_of(results[ruled]) if ruled in results else math.inf
        # None where training diverged, too.
        percent = 100 * (loss / loss_of(results[swept]) - 1) if math.isfinite(loss) else None
        places.append({"hidden": swept.hidden, "rank": swept.rank, "swept": swept.lr})
        places[-1] |= {"by_rule": ruled.lr, "over_swept": percent}
    return {"contender": transfer.contender, "of": transfer.of, "places": places}
