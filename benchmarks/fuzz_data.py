"""Tries random and damaged data on the example's readers: each is read right, or refused in a line.

python -m benchmarks.fuzz_data --seed 0 --count 100000 --out fuzz.json

What is right is found by another reading of the same bytes, or is the input that was damaged. An
error is one line that names the file, and the line in it where there is one. The same command again
goes on where it was; a case of some number is always the same.
"""

import random
import tempfile
import traceback
from pathlib import Path

from benchmarks import fuzz_search
from benchmarks.fuzz_cases import KINDS
from benchmarks.fuzz_search import Wrong


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


def main() -> None:
    given = fuzz_search.parser(__doc__).parse_args()
    fuzz_search.report(fuzz_search.search(try_case, given.seed, given.count, given.out))


if __name__ == "__main__":
    main()
