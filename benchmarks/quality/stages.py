"""Which runs there are: stages, each a list of jobs that ask for one run after the other.

A job begins with the sweep that it builds on, which costs nothing where it has been made. Therefore
a stage needs no other one, and goes on where it was.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.quality.contenders import ADAMW, BUILDERS, GALORE, ONE_RATE
from benchmarks.quality.ranks import rules
from benchmarks.quality.record import loss_of
from benchmarks.quality.training import Result, Run
from examples.flax_llama.config import Config

Loss = Callable[[Run], float]
Job = Callable[[Loss], Any]
Results = Mapping[Run, Result]

# Seeds of the contenders, and of the finalists.
SEEDS, FINAL_SEEDS = range(3), range(6)
# Of the hidden size, the ranks.
FRACTIONS = (4, 16)
FINALISTS = 4
# Factors of learning rate and ratio from one of a sweep to its neighbours. With a ratio there are
# two learning rates, that of the matrices and that of the rest, and each may be the one that stays.
RATE = ((2.0, 1.0), (0.5, 1.0))
RATE_AND_RATIO = (*RATE, (1.0, 2.0), (1.0, 0.5), (2.0, 0.5), (0.5, 2.0))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is compared.

    Attributes:
      base: resolved settings of the application, with the width of most runs.
      names: the contenders.
      fractions: the ranks are the hidden size over these.
      ranked: the one whose ranks are given by rules.
      finalists: those at twice the width; by default they are found from the results.
      rate: factor of the learning rates that the sweeps begin with.
    """

    base: Config
    names: tuple[str, ...]
    fractions: tuple[int, ...] = FRACTIONS
    ranked: str = GALORE
    finalists: tuple[str, ...] = ()
    rate: float = 1.0

    @property
    def hidden(self) -> int:
        return self.base.hidden

    @property
    def wide(self) -> int:
        return 2 * self.base.hidden

    def ranks(self, hidden: int) -> tuple[int, ...]:
        return tuple(hidden // fraction for fraction in self.fractions)

    def cells(self, hidden: int, names: Sequence[str]) -> list[tuple[str, int, int | None]]:
        """Contender, width and rank of all sweeps at a width."""
        return [
            (name, hidden, rank)
            for name in names
            for rank in (self.ranks(hidden) if BUILDERS[name].ranked else (None,))
        ]

    def beginning(self, results: Results, name: str, hidden: int, rank: int | None) -> Run:
        """Where a sweep begins: at twice the width, with the best of the width itself."""
        contender = BUILDERS[name]
        if hidden != self.hidden:
            known = best(results, name, self.hidden, rank and rank // (hidden // self.hidden))
            if known is not None:
                return dataclasses.replace(known, hidden=hidden, rank=rank)
        return Run(name, hidden, rank, self.rate * contender.lr, contender.ratio or 1.0)

    def chosen(self, results: Results) -> tuple[str, ...]:
        """AdamW, GaLore, and the contenders of the lowest losses over both ranks."""
        if self.finalists:
            return self.finalists
        scores = {}
        for name in set(self.names) - {ADAMW, GALORE}:
            cells = [best(results, *cell) for cell in self.cells(self.hidden, [name])]
            found = [mean_loss(results, run) if run else math.inf for run in cells]
            scores[name] = statistics.mean(found)
        others = sorted(scores, key=lambda name: (scores[name], name))
        first = [name for name in (ADAMW, GALORE) if name in self.names]
        return tuple([*first, *others][:FINALISTS])


def best(results: Results, contender: str, hidden: int, rank: int | None) -> Run | None:
    """The best of a sweep, as far as that has got."""
    of_sweep = (contender, hidden, rank, 0, None)
    found = [r for r in results if (r.contender, r.hidden, r.rank, r.seed, r.rule) == of_sweep]
    return min(found, key=lambda run: loss_of(results[run]), default=None)


def seeds_of(results: Results, run: Run) -> dict[int, Result]:
    """The results of a run and of its like with other seeds, by seed."""
    seeds = {seed: dataclasses.replace(run, seed=seed) for seed in FINAL_SEEDS}
    return {seed: results[like] for seed, like in seeds.items() if like in results}


def mean_loss(results: Results, run: Run) -> float:
    return statistics.mean(map(loss_of, seeds_of(results, run).values()))


def sweep(loss: Loss, start: Run) -> Run:
    """The best of at least five learning rates, whose neighbours on all sides are worse."""
    directions = RATE if BUILDERS[start.contender].ratio is None else RATE_AND_RATIO
    losses: dict[Run, float] = {}
    lowest, wanted = start, [moved(start, 2.0**k) for k in (0, 1, -1, 2, -2)]
    while wanted:
        for run in wanted:
            losses[run] = loss(run)
        lowest = min(losses, key=lambda run: losses[run])
        neighbours = [moved(lowest, *factors) for factors in directions]
        wanted = [run for run in neighbours if run not in losses]
    return lowest


def moved(run: Run, lr: float, ratio: float = 1.0) -> Run:
    return dataclasses.replace(run, lr=run.lr * lr, ratio=run.ratio * ratio)


def repeated(loss: Loss, start: Run, seeds: Sequence[int]) -> None:
    """Sweeps, and takes the best from more seeds."""
    lowest = sweep(loss, start)
    for seed in seeds:
        loss(dataclasses.replace(lowest, seed=seed))


def sweeps(bench: Bench, results: Results, seeds: Sequence[int] = (0,)) -> list[Job]:
    """Sweeps of all contenders at the width itself."""
    return [
        functools.partial(repeated, start=bench.beginning(results, *cell), seeds=seeds)
        for cell in bench.cells(bench.hidden, bench.names)
    ]


def with_rules(bench: Bench, results: Results) -> list[Job]:
    """One contender with ranks by role, at the learning rate that is best with one rank."""

    def job(loss: Loss, start: Run, rule: str, factors: Mapping[str, float]) -> None:
        lowest = sweep(loss, start)
        for seed in SEEDS:
            like = dataclasses.replace(lowest, seed=seed)
            loss(dataclasses.replace(like, rule=rule, factors=tuple(factors.items())))

    jobs: list[Job] = []
    for cell in bench.cells(bench.hidden, [bench.ranked]):
        start = bench.beginning(results, *cell)
        jobs.append(functools.partial(repeated, start=start, seeds=SEEDS))
        for rule, factors in rules().items():
            jobs.append(functools.partial(job, start=start, rule=rule, factors=factors))
    return jobs


def wide(bench: Bench, results: Results) -> list[Job]:
    """The finalists with more seeds at both widths; and AdamW with one rate for all parameters."""
    jobs: list[Job] = [
        functools.partial(repeated, start=bench.beginning(results, *cell), seeds=FINAL_SEEDS)
        for hidden in (bench.hidden, bench.wide)
        for cell in bench.cells(hidden, bench.chosen(results))
    ]
    for hidden in (bench.hidden, bench.wide):
        # Not from the best of the width itself, which is found at the same time.
        start = bench.beginning(results, ONE_RATE, bench.hidden, None)
        jobs.append(functools.partial(sweep, start=dataclasses.replace(start, hidden=hidden)))
    return jobs


def by_rule(bench: Bench, results: Results) -> list[Job]:
    """The finalists at the learning rates that the rules make of AdamW's."""
    wanted = {run for transfer in transfers(bench, results) for _, run in transfer.pairs}
    return [lambda loss, run=run: loss(run) for run in sorted(wanted, key=str)]


class Transfer(NamedTuple):
    """A contender at the learning rates that are made of those of a tuned AdamW.

    Attributes:
      contender: the name of the contender.
      of: which rate of AdamW, in words.
      pairs: of each width and rank the best of the sweep, and the run at the rate by the rule.
    """

    contender: str
    of: str
    pairs: list[tuple[Run, Run]]


def transfers(bench: Bench, results: Results) -> list[Transfer]:
    """The finalists at the rates by the rule, from the sweeps that have been made."""
    found = []
    for name in bench.chosen(results):
        cells = [cell for h in (bench.hidden, bench.wide) for cell in bench.cells(h, [name])]
        for of, reference in {
            "AdamW's rate of the matrices": ADAMW,
            "the rate of an AdamW with one for all": ONE_RATE,
        }.items():
            runs = [(best(results, reference, c[1], None), best(results, *c)) for c in cells]
            known = [(a.lr * a.ratio, x) for a, x in runs if a and x]
            if name == ADAMW or not known:
                continue
            by_rule = BUILDERS[name].lr_from_adamw
            pairs = [
                (x, dataclasses.replace(x, lr=by_rule(rate, x.rank, x.hidden))) for rate, x in known
            ]
            found.append(Transfer(name, of, pairs))
    return found


STAGES: dict[str, Callable[[Bench, Results], list[Job]]] = {
    "sweep": sweeps,
    "seeds": functools.partial(sweeps, seeds=SEEDS),
    "ranks": with_rules,
    "wide": wide,
    "rule": by_rule,
}
