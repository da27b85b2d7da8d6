"""Fine-tunes a model by several methods, each at the best of its learning rates, and reports on it.

python -m examples.flax_glue.compare --model MiniLM-L6 --data SST-2 --epochs 1 \
    --methods adamw galore_adamw:4 galore_adamw:8 lora:4 lora:8 q_galore_adamw:8 \
    --sweep adamw=3e-5,1e-4 galore_adamw=1e-4,3e-4 lora=5e-4,2e-3 q_galore_adamw=1e-4,3e-4 \
    --seeds 3 --out runs/compare

Writes report.md with its picture, results.json, and the directory of every run. The same command
again goes on where it was interrupted; with more rates or seeds, it trains what is new.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.machine import machine
from examples.flax_glue.config import IN_GALORE, LORA, OPTIMIZERS, Config
from examples.flax_glue.finetune import finetune
from examples.flax_glue.optimizers import make_optimizer
from examples.flax_glue.report import Comparison, Run, command, write_report
from examples.flax_glue.run_files import check_settings, read_settings
from examples.flax_llama.checkpoint import DIRECTORY, CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.run_directory import EMPTY, SETTINGS, lock
from examples.flax_llama.usage import UsageError, at_least_one
from examples.flax_llama.writing import make_directory, naming, write_whole

RESULTS = "results.json"
# In the directory of a run that has ended.
RESULT = "result.json"
# Settings that a comparison decides itself.
DECIDED = ("optimizer", "rank", "lr", "resume")
# Settings of some optimizers, which the others do without.
OF_SOME = {
    **dict.fromkeys(("scale", "update_proj_gap", "projector"), IN_GALORE),
    **dict.fromkeys(("lora_alpha", "lora_targets"), (LORA,)),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and its rank where that is given."""

    name: str
    optimizer: str
    rank: int | None

    def settings(self, shared: Config, lr: float | None, seed: int) -> Config:
        """The settings of a run with it."""
        others: dict[str, Any] = {
            name: None for name, some in OF_SOME.items() if self.optimizer not in some
        }
        config = dataclasses.replace(
            shared, optimizer=self.optimizer, rank=self.rank, lr=lr, seed=seed, **others
        )
        return config.resolve()


def parse_methods(words: Sequence[str]) -> list[Method]:
    """Methods by OPTIMIZER or OPTIMIZER:RANK.

    Raises:
      UsageError: something else.
    """
    methods = []
    for word in dict.fromkeys(words):
        optimizer, colon, rank = word.partition(":")
        if optimizer not in OPTIMIZERS or (colon and not rank.isdecimal()):
            raise UsageError(
                f"methods={word!r}: expected OPTIMIZER or OPTIMIZER:RANK with an optimizer of "
                f"{', '.join(OPTIMIZERS)}."
            )
        methods.append(Method(word, optimizer, int(rank) if colon else None))
    return methods


def parse_sweep(words: Sequence[str], methods: Sequence[Method]) -> dict[str, list[float | None]]:
    """The learning rates of each method, from METHOD=RATE,RATE,... or OPTIMIZER=RATE,RATE,...

    That of a method counts before that of its optimizer; without either there is the default.

    Raises:
      UsageError: something else, or of a method that is not compared.
    """
    found: dict[str, list[float | None]] = {}
    known = {name for method in methods for name in (method.name, method.optimizer)}
    for word in words:
        name, _, values = word.partition("=")
        try:
            found[name] = list(dict.fromkeys(float(value) for value in values.split(",")))
        except ValueError:
            found[name] = []
        if name not in known or not found[name]:
            raise UsageError(
                f"sweep={word!r}: expected METHOD=RATE,RATE,... with a method of "
                f"{', '.join(sorted(known))}."
            )
    return {m.name: found.get(m.name) or found.get(m.optimizer) or [None] for m in methods}


def run(method: str, config: Config, out: Path, how_to_go_on: str) -> Run:
    """Trains in a directory, or goes on with that, or reads what came out of it before.

    Raises:
      UsageError: the directory has a run with other settings.
    """
    config = dataclasses.replace(config, out=out)
    if (out / SETTINGS).is_file():
        check_settings(read_settings(out), config)
        if (out / RESULT).is_file():
            return Run(**json.loads((out / RESULT).read_text()))
        config = dataclasses.replace(config, resume=True)
    found = Run(out.name, method, config.lr, config.seed)
    try:
        result = finetune(config, how_to_go_on)
    except FloatingPointError as error:
        found = dataclasses.replace(found, diverged=str(error))
    else:
        found = dataclasses.replace(
            found,
            best=result.best,
            epochs=result.valid,
            memory=result.memory,
            seconds=sum(record["seconds"] for record in result.train),
        )
    write_json(out / RESULT, dataclasses.asdict(found))
    # All that is wanted of them is known.
    shutil.rmtree(out / DIRECTORY, ignore_errors=True)
    return found


def write_json(path: Path, value: object) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def compare(
    shared: Annotated[Config, tyro.conf.arg(name="")],
    methods: tuple[str, ...] = ("adamw", "galore_adamw:4", "galore_adamw:8", "lora:4", "lora:8"),
    sweep: tuple[str, ...] = (),
    seeds: int = 3,
) -> Comparison:
    """Fine-tunes by several methods, each at the best of its learning rates, and reports on it.

    Args:
      shared: settings of all runs; its out is the directory of all.
      methods: what to compare, as OPTIMIZER or OPTIMIZER:RANK; the first one is what the others
        are compared with.
      sweep: the learning rates to try, as METHOD=RATE,RATE,... or as OPTIMIZER=RATE,RATE,... for
        all ranks. The one with the best score of dev, from one seed, is compared.
      seeds: runs of each method at its best rate: from the seed given, and from those after it.

    Raises:
      UsageError: a setting cannot work, or the directory has something else in it.
    """
    at_least_one("seeds", seeds)
    out = shared.out
    if out is None:
        raise UsageError("A comparison needs a directory: out=DIRECTORY.")
    compared = parse_methods(methods)
    rates = parse_sweep(sweep, compared)
    first = shared.seed
    for method in compared:
        # Before the first of them is trained.
        for rate in rates[method.name]:
            config = method.settings(shared, rate, first)
            make_optimizer(config, config.encoder(outputs=1), updates=1)
    empty = not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= EMPTY)
    if not (empty or (out / RESULTS).is_file()):
        raise UsageError(f"out={out} is neither empty nor of a comparison: name another one.")
    make_directory(out)
    how_to_go_on = command(shared, methods, sweep, seeds)
    runs: dict[str, Run] = {}

    def ensure(method: Method, rate: float | None, seed: int) -> Run:
        config = method.settings(shared, rate, seed)
        name = f"{method.name.replace(':', '-r')}-lr{config.lr:g}-seed{seed}"
        if name not in runs:
            print(f"Run {len(runs) + 1}: {name}", flush=True)
            runs[name] = run(method.name, config, out / name, how_to_go_on)
            print(runs[name].outcome, flush=True)
        return runs[name]

    with lock(out):
        if not (out / RESULTS).is_file():
            write_json(out / RESULTS, {})
        best = {}
        for method in compared:
            found = [ensure(method, rate, first) for rate in rates[method.name]]
            chosen = max(found, key=lambda each: each.dev)
            best[method.name] = [ensure(method, chosen.lr, first + i) for i in range(seeds)]
        comparison = Comparison(shared, tuple(sweep), list(runs.values()), best)
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
