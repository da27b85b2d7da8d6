"""Trains several optimizers on the same tokens, each at the best of a sweep, and reports on them.

python -m examples.flax_llama.compare --optimizers adamw galore_adamw --preset 9m --steps 300 \
    --sweep adamw=0.001,0.002,0.004 galore_adamw=0.01,0.02,0.04 --seeds 3 --out runs/compare

Writes report.md with its pictures, results.json, and the directory of every run. The same command
again goes on where it was interrupted; with more values to sweep, it trains what is new.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import galore_optax
from benchmarks.machine import machine
from examples.flax_llama.changes import check_same
from examples.flax_llama.checkpoint import CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.config import DISTRIBUTED, Config, UsageError
from examples.flax_llama.effects import check_effects
from examples.flax_llama.flags import command_line
from examples.flax_llama.optimizers import OPTIMIZERS, make_optimizer
from examples.flax_llama.report import Comparison, Run, command
from examples.flax_llama.report_pictures import write_report
from examples.flax_llama.run_directory import (
    EMPTY,
    SETTINGS,
    lock,
    read_settings,
)
from examples.flax_llama.step import check_divides, initial_params
from examples.flax_llama.train import train
from examples.flax_llama.usage import at_least_one
from examples.flax_llama.writing import make_directory, naming, write_whole

RESULTS = "results.json"
# In the directory of a run that has ended.
RESULT = "result.json"
# Settings that a comparison decides itself.
DECIDED = ("optimizer", "resume", "new_data", *DISTRIBUTED)


def rank(word: str) -> int | float:
    """A rank, or a fraction of the hidden size, as the --rank of a training run."""
    try:
        return int(word)
    except ValueError:
        return float(word)


# What may differ between the optimizers: nothing that changes the tokens, or how many there are.
SWEPT: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(
        ("lr", "matrix_lr_ratio", "weight_decay", "b1", "b2", "eps", "momentum"), float
    ),
    **dict.fromkeys(("warmup", "cooldown", "final_lr", "clip", "scale"), float),
    **{"rank": rank, "update_proj_gap": int},
    **dict.fromkeys(("schedule", "projector", "transport", "residual", "refresh"), str),
}

Settings = dict[str, Any]


def parse_sweep(words: Sequence[str], optimizers: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """The values to try of each optimizer's settings, from OPTIMIZER[.SETTING]=VALUE,VALUE,...

    Raises:
      UsageError: something else, or of an optimizer that is not compared, or a second time.
    """
    grids: dict[str, dict[str, list[Any]]] = {name: {} for name in optimizers}
    for word in words:
        key, _, values = word.partition("=")
        optimizer, _, setting = key.partition(".")
        setting = setting.replace("-", "_") or "lr"
        try:
            found = [SWEPT[setting](value) for value in values.split(",")]
            again = setting in grids[optimizer]
            grids[optimizer][setting] = list(dict.fromkeys(found))
        except (KeyError, ValueError):
            raise UsageError(
                f"sweep={word!r}: expected OPTIMIZER=RATE,RATE,... or OPTIMIZER.SETTING=VALUE,... "
                f"with an optimizer of {', '.join(optimizers)} and a setting of "
                f"{', '.join(SWEPT).replace('_', '-')}."
            ) from None
        if again:
            raise UsageError(f"sweep={word!r}: expected the values of {key} once.")
    return grids


def search(grid: Mapping[str, Sequence[Any]], loss: Callable[[Settings], float]) -> Settings:
    """The best values of some settings, which are tried in turn until none of them changes.

    All values of the first are tried with the middle ones of the others, all of the second with
    the best of the first, and so on. In the end no other value of any single one is better.
    """
    best = {name: values[len(values) // 2] for name, values in grid.items()}
    previous = None
    while best != previous:
        previous = best
        for name, values in grid.items():
            best = min(({**best, name: value} for value in values), key=loss)
    return best


def run_name(config: Config, shared: Config, swept: Sequence[str]) -> str:
    """The name of a run's directory: what sets it apart from all other runs of a comparison."""
    differ = [name for name in swept if getattr(config, name) != getattr(shared, name)]
    shown = ["lr", *(name for name in differ if name != "lr"), "seed"]
    return "-".join([config.optimizer, *(f"{name}{getattr(config, name)}" for name in shown)])


def run(config: Config, out: Path, how_to_go_on: str) -> Run:
    """Trains in a directory, or goes on with that, or reads what came out of it before.

    Args:
      config: its settings, but for `out`.
      out: the directory.
      how_to_go_on: the command that goes on with all runs.

    Raises:
      UsageError: the directory has a run with other settings.
    """
    config = dataclasses.replace(config, out=out).resolve()
    if (out / SETTINGS).is_file():
        check_same(read_settings(out)["train"], config)
        if (out / RESULT).is_file():
            return Run(**json.loads((out / RESULT).read_text()))
        config = dataclasses.replace(config, resume=True)
    settings = {name: getattr(config, name) for name in SWEPT}
    scores, diverged = {}, None
    try:
        result = train(config, how_to_go_on)
    except FloatingPointError as error:
        diverged = str(error)
    else:
        shape = result.model.config
        params = jax.eval_shape(lambda: initial_params(config, shape))
        memory = galore_optax.memory_report(make_optimizer(config), params)
        last = result.valid[-1]
        scores = {k: last[k] for k in ("valid_loss", "standard_error", "bits_per_byte")}
        tokens = sum(record["tokens"] for record in result.train)
        seconds = sum(record["seconds"] for record in result.train)
        scores |= {
            "tokens_per_second": tokens / seconds,
            "parameter_bytes": memory.parameters,
            "projector_bytes": memory.projectors,
            "moment_bytes": memory.moments + memory.counters,
        }
        if result.update_bytes is not None:
            scores["update_bytes"] = result.update_bytes
    run = Run(out.name, config.optimizer, config.seed, settings, scores, diverged)
    write_json(out / RESULT, dataclasses.asdict(run))
    return run


def write_json(path: Path, value: Any) -> None:
    """Writes a file, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def check_shared(shared: Config, optimizers: Sequence[str]) -> Path:
    """The directory of a comparison.

    Raises:
      UsageError: there is none, there is no such optimizer, or a setting has no effect on any.
    """
    if shared.out is None:
        raise UsageError("A comparison needs a directory: out=DIRECTORY.")
    if shared.resume or shared.new_data:
        raise UsageError("resume=True: leave it out; a comparison always goes on where it was.")
    if not optimizers:
        raise UsageError(f"optimizers is empty: expected some of {', '.join(OPTIMIZERS)}.")
    for name in optimizers:
        if name not in OPTIMIZERS:
            raise UsageError(f"optimizers={name!r}: expected some of {', '.join(OPTIMIZERS)}.")
    check_effects([dataclasses.replace(shared, optimizer=name) for name in optimizers], Config())
    return shared.out


def compare(
    shared: Annotated[Config, tyro.conf.arg(name="")],
    optimizers: tuple[str, ...] = ("adamw", "galore_adamw"),
    sweep: tuple[str, ...] = (),
    seeds: int = 1,
) -> Comparison:
    """Trains several optimizers on the same tokens, each at the best of a sweep, and reports it.

    Args:
      shared: settings of all runs; its out is the directory of all.
      optimizers: to compare, by name.
      sweep: what to try, as OPTIMIZER=RATE,RATE,... for learning rates and as
        OPTIMIZER.SETTING=VALUE,VALUE,... for other settings, such as adamw.matrix_lr_ratio=0.1,0.2
        or galore_adamw.scale=0.25,0.5; a single value sets it for that optimizer alone. Several
        settings are tried in turn, each with the best of the others so far, from the middle values
        on and until none changes. What has the lowest validation loss is compared.
      seeds: runs of each optimizer's best settings: from the seed given, and from those after it.

    Raises:
      UsageError: a setting cannot work, or the directory has something else in it.
    """
    at_least_one("seeds", seeds)
    out = check_shared(shared, optimizers)
    grids = parse_sweep(sweep, optimizers)
    resolved = shared.resolve()

    def configure(optimizer: str, seed: int, settings: Settings) -> Config:
        # Resolved with the optimizer, which has defaults of its own.
        changed: Settings = {"optimizer": optimizer, "seed": seed, **settings}
        return dataclasses.replace(shared, **changed).resolve()

    for optimizer, grid in grids.items():
        if "rank" in grid:
            # A fraction is the rank that it comes to, which the report knows; two may be one.
            ranks = [configure(optimizer, shared.seed, {"rank": r}).rank for r in grid["rank"]]
            grid["rank"] = list(dict.fromkeys(ranks))
        plain = dataclasses.replace(shared, optimizer=optimizer)
        for values in itertools.product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            check_effects([dataclasses.replace(plain, **settings)], plain)
            config = configure(optimizer, shared.seed, settings)
            make_optimizer(config)
            check_divides(config)
    empty = not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= EMPTY)
    if not (empty or (out / RESULTS).is_file()):
        raise UsageError(f"out={out} is neither empty nor of a comparison: name another one.")
    make_directory(out)
    how_to_go_on = command(shared, optimizers, sweep, seeds)
    runs: dict[str, Run] = {}

    def ensure(optimizer: str, seed: int, settings: Settings) -> Run:
        config = configure(optimizer, seed, settings)
        name = run_name(config, resolved, list(grids[optimizer]))
        if name not in runs:
            print(f"Run {len(runs) + 1}: {name}", flush=True)
            runs[name] = run(config, out / name, how_to_go_on)
            print(runs[name].outcome, flush=True)
        return runs[name]

    seed = shared.seed
    with lock(out):
        if not (out / RESULTS).is_file():
            write_json(out / RESULTS, {})
        best = {}
        for optimizer, grid in grids.items():
            chosen = search(grid, lambda values, name=optimizer: ensure(name, seed, values).loss)
            best[optimizer] = [ensure(optimizer, seed + i, chosen) for i in range(seeds)]
        comparison = Comparison(shared, sweep, grids, list(runs.values()), best)
        write_json(out / RESULTS, {"machine": machine()} | comparison.as_json())
        with naming(out):
            write_report(comparison, machine(), out)
    return comparison


def main() -> None:
    with program(compare, Config, errors=(CheckpointError,)):
        comparison = command_line(compare, hidden=DECIDED)()
        print(f"Wrote {comparison.given.out}/report.md")


if __name__ == "__main__":
    main()
