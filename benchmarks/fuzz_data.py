"""Tries random and damaged data on the example's readers: each is read right, or refused in a line.

python -m benchmarks.fuzz_data --seed 0 --count 100000 --out fuzz.json

What is right is found by another reading of the same bytes, or is the input that was damaged. An
error is one line that names the file, and the line in it where there is one. The same command again
goes on where it was; a case of some number is always the same.
"""

import argparse
import dataclasses
import json
import random
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.fuzz_cases import KINDS, Wrong

# Cases between two writes of what was found.
EVERY = 500


@dataclasses.dataclass
class Found:
    """What a search has come to."""

    seed: int
    tried: int
    kinds: dict[str, int]
    # Number, kind, and what was wrong.
    failed: list[dict[str, Any]]
    seconds: float = 0.0


def try_case(seed: int, number: int, kind: str | None = None) -> tuple[str, str | None]:
    """Tries one case.

    Args:
      seed: of the search.
      number: of the case.
      kind: of the case; by default each in turns.

    Returns:
      Its kind, and what is wrong, if something is.
    """
    kind = kind or list(KINDS)[number % len(KINDS)]
    rng = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory() as directory:
        try:
            KINDS[kind](rng, Path(directory))
        except Wrong as error:
            return kind, str(error)
        except KeyboardInterrupt:
            raise
        # Whatever it is, nobody said it in a line; of Rust it is none of Exception.
        except BaseException:
            return kind, traceback.format_exc(limit=-4)
    return kind, None


def search(seed: int, count: int, out: Path) -> Found:
    """Tries cases up to a number, from where the file of an earlier search ends."""
    found = Found(seed, 0, {}, [])
    if out.is_file():
        found = Found(**json.loads(out.read_text()))
        if found.seed != seed:
            raise SystemExit(f"--out {out} is of seed {found.seed}: name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic() - found.seconds
    for number in range(found.tried, count):
        kind, wrong = try_case(seed, number)
        found.kinds = dict(Counter(found.kinds) + Counter([kind]))
        if wrong:
            found.failed.append({"number": number, "kind": kind, "wrong": wrong})
            print(f"{number} {kind}: {wrong}", flush=True)
        found.tried, found.seconds = number + 1, round(time.monotonic() - began, 1)
        if found.tried % EVERY == 0 or found.tried == count:
            out.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found = search(given.seed, given.count, given.out)
    print(f"{found.tried:,} cases tried, {len(found.failed)} failed")
    raise SystemExit(bool(found.failed))


if __name__ == "__main__":
    main()
