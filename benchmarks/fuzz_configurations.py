"""Tries random configurations: each is refused in one clear error, or trains as it should.

python -m benchmarks.fuzz_configurations --seed 0 --count 3000 --out compiled.json
python -m benchmarks.fuzz_configurations --uncompiled --count 100000 --out uncompiled.json

A configuration is a tree of parameters and a transformation, drawn as code, which a failure prints.
Hypothesis draws it from random bytes, so that a case of some kind and number is always the same
with the same version of it: --number tries one again, and makes it smaller while it fails. The same
command again goes on where it was.
"""

import dataclasses
import logging
import random
import traceback
import warnings
from collections.abc import Callable, Sequence

import jax
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase

from benchmarks import fuzz_compiled, fuzz_layerwise, fuzz_search, fuzz_uncompiled
from benchmarks.fuzz_search import Wrong

# Random bytes for one configuration; what is drawn ends where they do.
BYTES = 2**13
# Cases after which what was compiled is forgotten, lest it fill the memory.
FORGET = 100


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of cases: what is drawn, and what must be true of it, lest it raise `Wrong`.

    The check returns what became of a case, in a word.
    """

    cases: st.SearchStrategy
    check: Callable[..., str]


KINDS = {
    "steps": Kind(fuzz_compiled.cases(), fuzz_compiled.check),
    "layerwise": Kind(fuzz_layerwise.cases(), fuzz_layerwise.check),
    "arguments": Kind(fuzz_uncompiled.calls(), fuzz_uncompiled.check),
    "wrappers": Kind(fuzz_uncompiled.cases(), fuzz_uncompiled.check),
    "views": Kind(fuzz_uncompiled.views(), fuzz_uncompiled.check_views),
}
# Three of four, since a layer-wise one takes fewer trees and wrappers.
COMPILED = ("steps", "steps", "steps", "layerwise")
UNCOMPILED = ("arguments", "wrappers", "views", "views")


def bytes_of(seed: int, number: int) -> bytes:
    """Returns the bytes that a case is drawn from."""
    return random.Random(f"{seed} {number}").randbytes(BYTES)


def try_case(
    seed: int, number: int, kinds: Sequence[str] = COMPILED, shrink: bool = False
) -> tuple[str, str | None]:
    """Tries one case.

    Args:
      seed: of the search.
      number: of the case.
      kinds: of the cases, in turns.
      shrink: whether to look for a smaller case that fails too, which takes some hundred more.

    Returns:
      Its kind, and what is wrong, if something is.
    """
    kind = kinds[number % len(kinds)]
    database, outcome = InMemoryExampleDatabase(), "nothing drawn"

    @settings(
        database=database,
        deadline=None,
        phases=[Phase.reuse, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(KINDS[kind].cases)
    def case(drawn: object) -> None:
        nonlocal outcome
        outcome = "wrong"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = KINDS[kind].check(drawn)
        except Wrong as error:
            raise Wrong(f"{error}\n{drawn}") from error
        except Exception as error:
            raise Wrong(f"{traceback.format_exc(limit=-4)}\n{drawn}") from error

    try:
        vars(case)["hypothesis"].fuzz_one_input(bytes_of(seed, number))
    except Wrong as error:
        wrong = str(error)
        if shrink:
            try:
                case()
            except Wrong as error:
                wrong = str(error)
        return f"{kind}, wrong", wrong
    return f"{kind}, {outcome}", None


def main() -> None:
    parser = fuzz_search.parser(__doc__)
    parser.add_argument("--uncompiled", action="store_true", help="those that take no compiling")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), help="these alone")
    parser.add_argument("--number", type=int, help="try this case alone, and make it smaller")
    given = parser.parse_args()
    kinds = given.kinds or (UNCOMPILED if given.uncompiled else COMPILED)
    # Orbax says at length what it could not save, which is in the error as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Each program runs a few times.
    jax.config.update("jax_disable_most_optimizations", True)
    if given.number is not None:
        _, wrong = try_case(given.seed, given.number, kinds, shrink=True)
        raise SystemExit(wrong)

    def try_next(seed: int, number: int) -> tuple[str, str | None]:
        if number % FORGET == 0:
            jax.clear_caches()
        return try_case(seed, number, kinds)

    fuzz_search.report(fuzz_search.search(try_next, given.seed, given.count, given.out))


if __name__ == "__main__":
    main()
