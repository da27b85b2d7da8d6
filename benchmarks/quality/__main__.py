"""Validation loss of optimizers in a subspace beside AdamW's, each at the best of its rates.

    python -m benchmarks.quality --out benchmarks/results/quality
    python -m benchmarks.quality --plan
    python -m benchmarks.quality --model 60m --only adamw galore --stages sweep seeds --out FILE

Learning rates are swept by factors of two, of AdamW also the ratio of the layers' matrices, until
all neighbours of the best are worse; the best is then taken from more seeds. Differences are those
of runs with the same seed, which has the same weights and the same text in the same order. The
seed of the sweep is one of them, which flatters all contenders alike.

The stages are `sweep`; `seeds`, three; `ranks`, by role, beside random rules of as many bytes;
`wide`, four finalists with six seeds at this width and at twice this width, and AdamW with one
learning rate for all parameters; and `rule`, the finalists at rates made of AdamW's. Runs that are
in the JSON file already are not made again, so that it can be stopped at any time.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.gpu.record import sources
from benchmarks.machine import machine
from benchmarks.quality.contenders import CONTENDERS, GALORE
from benchmarks.quality.corpus import default_directory
from benchmarks.quality.record import Record
from benchmarks.quality.report import plot_bytes, plot_rates, tables
from benchmarks.quality.sizes import SIZES, STEPS, base_of
from benchmarks.quality.stages import FRACTIONS, STAGES, Bench
from benchmarks.quality.statistics import summary
from benchmarks.quality.workers import Work, executors


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    names = list(CONTENDERS)
    parser.add_argument("--out", type=Path, help="path without suffix, of JSON and pictures")
    parser.add_argument("--model", choices=SIZES, default="9m", help="preset of the application")
    parser.add_argument("--data", type=Path, help="directory of the large corpus, or tokenized")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of each run")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CONTENDER")
    parser.add_argument(
        "--fractions", nargs="+", type=int, default=FRACTIONS, help="hidden size over the ranks"
    )
    parser.add_argument("--ranked", choices=names, default=GALORE, help="that has ranks by role")
    parser.add_argument("--finalists", nargs="+", choices=names, default=[], metavar="CONTENDER")
    parser.add_argument("--minutes", type=float, help="after which no run begins")
    parser.add_argument("--workers", type=int, help="processes that train at a time")
    parser.add_argument("--cache", type=Path, help="directory for text and programs")
    parser.add_argument("--plan", action="store_true", help="say what is left and stop")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cache = args.cache or Path(tempfile.gettempdir()) / "quality-cache"
    size = SIZES[args.model]
    workers = args.workers or size.workers
    directory = args.data or default_directory()
    base, about = base_of(args.model, args.steps, directory, cache)
    names, fractions, finalists = map(tuple, (args.only, args.fractions, args.finalists))
    bench = Bench(base, names, fractions, args.ranked, finalists, size.rate)
    path = args.out and args.out.with_suffix(".json")
    record = Record(path, about, machine() | {"workers": workers} | sources())
    work = Work(bench, record, args.stages, size.seconds, args.minutes)
    if args.plan:
        plan = work.plan()
        for stage, (runs, seconds) in plan.items():
            print(f"{stage:9} {runs:4} runs left, {seconds / 60 / workers:4.0f} min")
        total = sum(seconds for _, seconds in plan.values()) / workers
        print(f"about {total / 3600:.1f} hours with {workers} at a time")
        return
    with executors(bench.base, workers, cache / "programs") as execute:
        ended = work.do(execute)
    if not record.results:
        return
    found = summary(bench, record.results)
    print(f"\n{tables(found)}")
    if args.out:
        record.summarize(found)
        plot_bytes(found, args.out.with_suffix(".png"))
        plot_rates(bench, record.results, args.out.with_name(args.out.name + "_rates.png"))
    if not ended:
        print("The time is up; the same command goes on.")


if __name__ == "__main__":
    main()
