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
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.machine import machine
from examples.flax_glue.config import OF_SOME, OPTIMIZERS, Config, check_effects
from examples.flax_glue.finetune import finetune
from examples.flax_glue.optimizers import make_optimizer
from examples.flax_glue.readers import open_task
from examples.flax_glue.report import Comparison, Run, command, write_report
from examples.flax_glue.run_files import check_files, check_settings, digests, read_settings
from examples.flax_glue.tokens import open_tokenizer
from examples.flax_glue.weights import find
from examples.flax_llama.checkpoint import DIRECTORY, CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.run_directory import EMPTY, SETTINGS, lock
from examples.flax_llama.usage import UsageError, at_least_one, read_object
from examples.flax_llama.writing import make_directory, naming, write_whole

RESULTS = "results.json"
# In the directory of a run that has ended.
RESULT = "result.json"
# Settings that a comparison decides itself.
DECIDED = ("optimizer", "rank", "lr", "resume")


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer, and its rank where that is given."""

    name: str
    optimizer: str
    rank: int | None

    def settings(self, shared: Config, lr: float | None, seed: int) -> Config:
        """The settings of a run with it."""
        others: dict[str, Any] = {
            name: None for name, (some, _) in OF_SOME.items() if self.optimizer not in some
        }
        own: dict[str, Any] = {"optimizer": self.optimizer, "rank": self.rank}
        return dataclasses.replace(shared, **others | own, lr=lr, seed=seed).resolve()

    def run_name(self, config: Config) -> str:
        """What the directory of a run with it is called."""
        rate = str(config.lr).removesuffix(".0")
        return f"{self.name.replace(':', '-r')}-lr{rate}-seed{config.seed}"


def parse_methods(words: Sequence[str]) -> list[Method]:
    """Methods by OPTIMIZER or OPTIMIZER:RANK.

    Raises:
      UsageError: something else.
    """
    if not words:
        raise UsageError("methods is empty: expected at least one OPTIMIZER or OPTIMIZER:RANK.")
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
      UsageError: something else, or what would have no effect: rates of a method that is not
        compared, or of an optimizer whose methods have rates of their own, or a second time.
    """
    found: dict[str, list[float | None]] = {}
    known = {name for method in methods for name in (method.name, method.optimizer)}
    for word in words:
        name, _, values = word.partition("=")
        try:
            rates = list(dict.fromkeys(float(value) for value in values.split(",")))
        except ValueError:
            rates = []
        if name not in known or not rates or not all(0 < rate < math.inf for rate in rates):
            raise UsageError(
                f"sweep={word!r}: expected METHOD=RATE,RATE,... with a method of "
                f"{', '.join(sorted(known))} and positive numbers."
            )
        if name in found:
            raise UsageError(f"sweep={word!r}: expected the rates of {name} once.")
        found[name] = list(rates)
    used = {m.name if m.name in found else m.optimizer for m in methods}
    if unused := [name for name in found if name not in used]:
        raise UsageError(
            f"sweep has rates of {unused[0]} that have no effect: each of its methods has rates of "
            "its own. Leave them out."
        )
    return {m.name: found.get(m.name) or found.get(m.optimizer) or [None] for m in methods}


def run(method: str, config: Config, out: Path, how_to_go_on: str) -> Run:
    """Trains in a directory, or goes on with that, or reads what came out of it before.

    Whatever is there was made with these settings and files; see `check_runs`.
    """
    config = dataclasses.replace(config, out=out)
    if (out / SETTINGS).is_file():
        if (out / RESULT).is_file():
            return read_result(out / RESULT)
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


def read_result(path: Path) -> Run:
    """What came out of a run.

    Raises:
      UsageError: the file is damaged.
    """
    try:
        return Run(**read_object(path))
    except TypeError as error:
        raise UsageError(
            f"{path} is not what a comparison writes: delete {path.parent} to train it again."
        ) from error


def check(configs: Sequence[Config]) -> list[list[Any]]:
    """Refuses what could not be trained, before anything is written.

    Args:
      configs: of all runs, resolved; model and data of all are the same.

    Returns:
      What the files of the model and of the data are known by.

    Raises:
      UsageError: the model or the data cannot be read, or does not go with a setting.
    """
    first = configs[0]
    dataset = open_task(first.task, first.data, first.test, first.limit)
    encoder = first.encoder(dataset.outputs)
    open_tokenizer(first.model, encoder, first.max_length)
    find(first.model, encoder)
    for config in configs:
        make_optimizer(config, config.encoder(dataset.outputs), updates=1)
    return digests(first, dataset.files)


def check_runs(out: Path, configs: Mapping[str, Config], files: list[list[Any]]) -> None:
    """Refuses a directory that has runs on other files, or with other settings.

    Args:
      out: of the comparison.
      configs: of all runs that it may have, by the names of their directories.
      files: what the files of the model and of the data are known by.

    Raises:
      UsageError: names the first file or setting that differs.
    """
    for path in sorted(out.glob(f"*-seed*/{SETTINGS}")):
        directory, stored = path.parent, read_settings(path.parent)
        check_files(stored, directory, files)
        if config := configs.get(directory.name):
            check_settings(stored, dataclasses.replace(config, out=directory), resolved=True)


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
    check_effects(shared, [each.optimizer for each in compared], f"methods {', '.join(methods)}")
    rates = parse_sweep(sweep, compared)
    first = shared.seed
    configs = {
        method.run_name(config): config
        for method in compared
        for rate in rates[method.name]
        for config in (method.settings(shared, rate, first + i) for i in range(seeds))
    }
    empty = not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= EMPTY)
    if not (empty or (out / RESULTS).is_file()):
        raise UsageError(f"out={out} is neither empty nor of a comparison: name another one.")
    files = check(list(configs.values()))
    make_directory(out)
    how_to_go_on = command(shared, methods, sweep, seeds)
    runs: dict[str, Run] = {}

    def ensure(method: Method, rate: float | None, seed: int) -> Run:
        config = method.settings(shared, rate, seed)
        name = method.run_name(config)
        if name not in runs:
            print(f"Run {len(runs) + 1}: {name}", flush=True)
            runs[name] = run(method.name, config, out / name, how_to_go_on)
            print(runs[name].outcome, flush=True)
        return runs[name]

    with lock(out):
        check_runs(out, configs, files)
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
