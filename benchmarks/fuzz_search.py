"""The loop that searches for faults: numbered cases, always the same, from where it was.

A command gives it what tries one case; what was found is in a JSON file, which the same command
reads again and goes on with.
"""

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Cases between two writes of what was found, and seconds after which it is written in any case.
EVERY, SECONDS = 500, 60.0

# Tries the case of a seed and a number; returns its kind, and what is wrong, if something is.
Try = Callable[[int, int], tuple[str, str | None]]


class Wrong(AssertionError):
    """Something that is not right in a case, or words of an error that do not fit."""


@dataclasses.dataclass
class Found:
    """What a search has come to."""

    seed: int
    tried: int
    kinds: dict[str, int]
    # Number, kind, and what was wrong.
    failed: list[dict[str, Any]]
    seconds: float = 0.0

    def write(self, out: Path) -> None:
        out.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def search(try_case: Try, seed: int, count: int, out: Path) -> Found:
    """Tries cases up to a number, from where the file of an earlier search ends.

    Args:
      try_case: tries one case.
      seed: of the search.
      count: of the cases, those of an earlier search included.
      out: the file with what was found.

    Returns:
      What was found, as in the file.
    """
    found = Found(seed, 0, {}, [])
    if out.is_file():
        found = Found(**json.loads(out.read_text()))
        if found.seed != seed:
            raise SystemExit(f"--out {out} is of seed {found.seed}: name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic() - found.seconds
    written = found.seconds
    for number in range(found.tried, count):
        kind, wrong = try_case(seed, number)
        found.kinds = dict(Counter(found.kinds) + Counter([kind]))
        if wrong:
            found.failed.append({"number": number, "kind": kind, "wrong": wrong})
            print(f"{number} {kind}: {wrong}", flush=True)
        found.tried, found.seconds = number + 1, round(time.monotonic() - began, 1)
        is_due = found.tried % EVERY == 0 or found.seconds - written > SECONDS
        if is_due or found.tried == count:
            found.write(out)
            written = found.seconds
    return found


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser of the arguments that all searches have."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--count", type=int, default=1000)
    made.add_argument("--out", type=Path, default=Path("runs/fuzz.json"), help="what was found")
    return made


def report(found: Found) -> None:
    """Says what a search has come to, and ends the program accordingly."""
    print(f"{found.tried:,} cases tried, {len(found.failed)} failed")
    raise SystemExit(bool(found.failed))
