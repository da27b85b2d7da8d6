"""Training runs whose disk becomes full, at every number of pages that it might have.

    python -m benchmarks.disk_full --out benchmarks/results/disk_full.json

A short run trains in a file system in memory of so many pages and no more (tmpfs; as root, or where
users may have namespaces of their own), from none to as many as it needs. It must end by itself or
say in one line that the disk is full. Then the file system is made larger, and what that line
advises is done: the run must end bit for bit as one whose disk was never full. Cases that are in
the JSON file are not tried again.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.kill_resume import RUN, records, same_parameters, start
from benchmarks.machine import machine

STEPS, SAVE_EVERY = 4, 2
WORDS = shlex.split(f"--tokenizer bytes --eval-every 2 --save-every {SAVE_EVERY}")
PAGE, ENOUGH = 4096, "1g"


def mount(directory: pathlib.Path, size: str, *options: str) -> None:
    words = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"])]
    subprocess.run([*words, "tmpfs", str(directory)], check=True)


def train(out: pathlib.Path, cache: pathlib.Path) -> tuple[int, str]:
    """How a run ends, and what it says."""
    process = start(out, cache, STEPS, WORDS)
    output, _ = process.communicate()
    return process.returncode, output


def tried(pages: int, alone: pathlib.Path, cache: pathlib.Path) -> dict[str, Any]:
    """What becomes of a run in so many pages; in a namespace in which it may be mounted."""
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        mount(place, str(pages * PAGE))
        try:
            out = place / "run"
            code, said = train(out, cache)
            result = {"pages": pages, "code": code, "said": said.strip()[-300:]}
            in_a_line = "Traceback" not in said and said.strip().count("\n") < 3
            result["right"] = code == 0 or ("error:" in said and in_a_line)
            mount(place, ENOUGH, "remount")
            if code:
                code, said = train(out, cache)
                result |= {"again": said.strip()[-300:]} if code else {}
            same = code == 0 and records(out) == records(alone) and same_parameters(out, alone)
            return result | {"right": result["right"] and same}
        finally:
            subprocess.run(["umount", str(place)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--every", type=int, default=1, help="pages from one case to the next")
    parser.add_argument("--inside", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is None:
        with tempfile.TemporaryDirectory() as directory:
            again = [sys.executable, "-m", "benchmarks.disk_full", *sys.argv[1:]]
            own = ["unshare", "--mount", "--map-root-user", *again, "--inside", directory]
            sys.exit(subprocess.run(own).returncode)
    alone, cache = args.inside / "alone", args.inside / "cache"
    if train(alone, cache)[0]:
        raise RuntimeError("The run fails with all the disk there is.")
    record: dict[str, Any] = {"benchmark": "disk_full", "machine": machine(), "cases": []}
    record |= {"run": shlex.join([*RUN, *WORDS]), "steps": STEPS}
    if args.out.exists():
        record["cases"] = json.loads(args.out.read_text())["cases"]
    known = {case["pages"] for case in record["cases"]}
    pages, in_a_row = args.every, 0
    # Three in a row that never had a full disk are enough.
    while in_a_row < 3:
        if pages not in known:
            record["cases"].append(tried(pages, alone, cache))
            print(record["cases"][-1], flush=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
        code = next(case["code"] for case in record["cases"] if case["pages"] == pages)
        in_a_row = in_a_row + 1 if code == 0 else 0
        pages += args.every
    wrong = [case["pages"] for case in record["cases"] if not case["right"]]
    print(f"{len(record['cases'])} tried, {len(wrong)} wrong: {wrong}")


if __name__ == "__main__":
    main()
