"""Measures on a GPU, in stages, whatever this project has to show there.

    python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 25
    python -m benchmarks.gpu --rehearse

A stage writes its file after each of its items, so that a run cut off keeps what it had; the same
command goes on with what is missing or failed. `--resume DIR` takes over what another run left in
another directory. A rehearsal does everything at tiny shapes on the CPU, without a GPU.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.gpu.record import ROOT, Entry, StageFile, is_done, sources
from benchmarks.gpu.report import outcome, report
from benchmarks.gpu.runner import run_items
from benchmarks.gpu.stage import GIB, STAGES, Item, Size, module_of

NO_GPU = (
    "No GPU that JAX can use: {reason}. To try everything at tiny shapes on the CPU, "
    "make gpu REHEARSE=1 (python -m benchmarks.gpu --rehearse)."
)
# In a rehearsal: of the smallest card that the memory stage has a cap for, and a little more.
REHEARSED_MEMORY = 32 * GIB
# Of a card's memory, what an item must find at least: the driver takes some.
ROOM = 1.02
# Where the corpus that was packed for the GPU is unpacked, and what is trained on without it.
PACKED, BUILT_IN = ROOT / ".gpu-unpacked" / "tokens", "austen"

# What the stage of fine-tuning needs, by the flags that name it.
PRETRAINED = {
    "smollm2": "SmolLM2-135M-Instruct, as of Hugging Face",
    "minilm": "MiniLM-L6, as of Hugging Face",
    "sst2": "SST-2: train, dev and test",
}


def machine_here(rehearsal: bool) -> dict[str, Any]:
    """What device there is.

    Raises:
      SystemExit: there is no GPU, and this is no rehearsal; the status is 2.
    """
    environment = dict(os.environ)
    if rehearsal:
        environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.probe"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["JAX did not start"])[-1]
        fail(NO_GPU.format(reason=reason.rstrip(".")))
    found = json.loads(lines[-1])
    if not rehearsal and found["platform"] != "gpu":
        fail(NO_GPU.format(reason=f"it computes on {found['device']} ({found['platform']})"))
    return found


def fail(message: str) -> None:
    print(message, file=sys.stderr)
    raise SystemExit(2)


def prepare(args: argparse.Namespace) -> tuple[pathlib.Path, dict[str, StageFile]]:
    """The directory to write to, and the stages' files with what has been measured already."""
    if args.rehearse and args.out is None:
        out = pathlib.Path(tempfile.mkdtemp(prefix="gpu-rehearsal-"))
    else:
        out = args.out or ROOT / "benchmarks" / "results" / "gpu"
    files = {}
    for stage in STAGES:
        files[stage] = StageFile(out / f"{stage}.json", stage, args.rehearse)
        try:
            for directory in (args.resume, out):
                if directory is not None:
                    files[stage].take(directory / f"{stage}.json")
        except ValueError as error:
            fail(f"error: {error}")
    return out, files


def wanted(items: list[Item], file: StageFile, again: bool) -> list[Item]:
    """The items to measure: those never tried first, then those that failed."""
    left = [item for item in items if again or not is_done(file.items.get(item.name))]
    return sorted(left, key=lambda item: item.name in file.items)


def measure(args: argparse.Namespace, size: Size, found: dict[str, Any], files: Any) -> None:
    """Measures what is missing, in order of value, and says how each item went."""
    start, deadline = time.time(), time.time() + 60 * args.minutes
    about = {"machine": found, **sources()}
    # Programs are compiled once, however often an item is tried on this machine.
    os.environ.setdefault(
        "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "gpu-compiled")
    )
    if size.rehearsal:
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def measure_stage(stage: str) -> None:
        module, file = module_of(stage), files[stage]

        def put(name: str, entry: Entry) -> None:
            file.put(name, entry | about)
            minutes = f"{(time.time() - start) / 60:5.1f} of {args.minutes:g} min"
            print(f"{minutes}  {stage:8} {name:36} {outcome(module, name, entry)}", flush=True)

        small, large = [], []
        for item in wanted(module.items(size), file, stage in args.again):
            (large if item.memory * ROOM > size.device_memory else small).append(item)
        for item in large:
            needs, has = item.memory / GIB, size.device_memory / GIB
            put(item.name, {"skipped": f"needs {needs:.1f} GiB of memory; here are {has:.1f}"})
        run_items(stage, small, size, deadline, put)

    # A rehearsal measures nothing that another stage beside it could disturb.
    with concurrent.futures.ThreadPoolExecutor(2 if size.rehearsal else 1) as pool:
        list(pool.map(measure_stage, args.stages))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=pathlib.Path, help="directory of the results")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all stages together")
    parser.add_argument("--resume", type=pathlib.Path, help="directory of results to go on with")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--again", nargs="+", choices=STAGES, default=[], help="to measure anew")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--data", help="what models are trained on, as in the application")
    for name, what in PRETRAINED.items():
        parser.add_argument(f"--{name}", type=pathlib.Path, help=f"directory of {what}")
    args = parser.parse_args()
    pretrained = {name: path for name in PRETRAINED if (path := getattr(args, name)) is not None}
    for name, path in pretrained.items():
        if not path.is_dir():
            parser.error(f"--{name} must be a directory of {PRETRAINED[name]}; got {path}")
    if args.minutes <= 0:
        parser.error(f"--minutes must be positive; got {args.minutes:g}")
    if args.resume is not None and not args.resume.is_dir():
        parser.error(f"--resume must be a directory of results; got {args.resume}")
    out, files = prepare(args)
    found = machine_here(args.rehearse)
    size = Size(
        rehearsal=args.rehearse,
        data=args.data or (str(PACKED) if PACKED.is_dir() and not args.rehearse else BUILT_IN),
        device_memory=REHEARSED_MEMORY if args.rehearse else found["memory"],
        pretrained={name: str(path.absolute()) for name, path in pretrained.items()},
    )
    measure(args, size, found, files)
    text, failed = report({stage: file.items for stage, file in files.items()}, size)
    (out / "report.md").write_text(text)
    print(f"\n{text}\nWritten to {out}.")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
