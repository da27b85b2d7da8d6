"""Damages each file of a run and of its checkpoints: what is restored is right, or is refused.

python -m benchmarks.damage --seed 0 --count 500 --out benchmarks/results/damage.json

A file is truncated, emptied, deleted, replaced by that of another checkpoint or by a directory,
made unreadable, or a bit of it flips. Then the run goes on, and its checkpoints are loaded: bit for
bit as they were, or there is one line that names what is damaged, nothing has changed, and what
that line says to do about it leads to the checkpoint before. The same command again goes on where
it was.
"""

import os
import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks import fuzz_search
from benchmarks.damage_runs import (
    SAVED,
    VARIANTS,
    Made,
    check_loaded,
    check_seen,
    contents,
    copied,
    make,
    resumed,
)
from benchmarks.fuzz_search import Wrong
from examples.flax_llama.records import METRICS, read_records
from examples.flax_llama.repair import repair
from examples.flax_llama.run_directory import SETTINGS
from examples.flax_llama.usage import UsageError

LAST = SAVED[-1]


def truncate(to: Callable[[int], int]) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: os.truncate(path, max(0, to(path.stat().st_size)))


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def replace(path: Path, rng: random.Random) -> None:
    """Another checkpoint's same file, or the one at the same place where names are random."""
    other = path
    for step in SAVED:
        if f"/checkpoints/{step}/" in str(path):
            another = next(s for s in SAVED if s != step)
            other = Path(str(path).replace(f"/checkpoints/{step}/", f"/checkpoints/{another}/"))
    if not other.exists():
        there = sorted(other.parent.iterdir(), key=lambda each: each.stat().st_size)
        place = sorted(path.parent.iterdir(), key=lambda each: each.stat().st_size).index(path)
        other = there[min(place, len(there) - 1)]
    if other != path:
        shutil.copyfile(other, path)


def directory(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "half": truncate(lambda size: size // 2),
    "a byte less": truncate(lambda size: size - 1),
    "emptied": truncate(lambda size: 0),
    "deleted": lambda path, rng: path.unlink(),
    "a bit": flip,
    "another bit": flip,
    "a third bit": flip,
    "replaced": replace,
    "a directory": directory,
}
# Root reads what nobody may read.
if os.geteuid():
    DAMAGES["no permission"] = lambda path, rng: path.chmod(0)


def place_of(file: Path) -> str:
    """A file's place in a run without what is random in it."""
    parts = ["*" if len(part) == 32 or "tfevents" in part else part for part in file.parts]
    return "/".join(parts)


def check_words(error: UsageError, file: Path, made: Made) -> None:
    """Raises Wrong where an error is not one line that names what is damaged."""
    said = str(error).removeprefix("error: ")
    if "\n" in said or "Traceback" in said:
        raise Wrong(f"more than a line: {said}")
    parts = file.parts
    if parts[:2] == ("run", "checkpoints"):
        if str(made.out / "checkpoints" / parts[2]) not in said:
            raise Wrong(f"does not name the checkpoint: {said}")
        if len(parts) > 4 and parts[3] not in said:
            raise Wrong(f"does not name {parts[3]}: {said}")
    elif not (str((made.out.parent / file).parent) in said and file.name in said):
        raise Wrong(f"does not name {file}: {said}")


def check_resumed(made: Made, file: Path) -> str:
    """Goes on with a run of which a file is damaged.

    Returns:
      What became of it: right, refused, or the checkpoint before.
    """
    before = contents(made.out)
    try:
        seen, said = resumed(made.out)
    except UsageError as error:
        check_words(error, file, made)
        if (now := contents(made.out)) != before:
            raise Wrong(
                f"something has changed: {set(now.items()) ^ set(before.items())}"
            ) from None
        if file.parts[:3] == ("run", "checkpoints", str(LAST)):
            check_advice(made, str(error))
        if file == Path("run", SETTINGS):
            repair(made.out)
            check_seen(resumed(made.out)[0], made.right)
        return "refused"
    check_seen(seen, made.right)
    check_log(made, seen.step, said)
    lost = [
        path for path in before if "checkpoints" in path.parts and path not in contents(made.out)
    ]
    if lost:
        raise Wrong(f"deleted: {', '.join(map(str, lost))}")
    if seen.step != LAST:
        if str(made.out / "checkpoints" / str(LAST)) not in said:
            raise Wrong(f"it goes on from update {seen.step} without a word: {said}")
        return "the checkpoint before"
    return "right"


def check_log(made: Made, step: int, said: str) -> None:
    """Raises Wrong where records of updates are missing in a run's log, without a word."""
    records = read_records(made.out / METRICS)
    logged = [record["step"] for record in records if "loss" in record]
    if logged != list(range(1, step + 1)) and METRICS not in said:
        raise Wrong(f"the log has updates {logged}, and nothing is said of it: {said}")


def check_advice(made: Made, said: str) -> None:
    """Does what an error says about a damaged checkpoint, which must lead to the one before."""
    earlier = SAVED[-2]
    if f"go on from update {earlier}, move" not in said:
        if "Permission denied" in said:
            return
        raise Wrong(f"does not offer the checkpoint before: {said}")
    with tempfile.TemporaryDirectory() as elsewhere:
        shutil.move(made.out / "checkpoints" / str(LAST), elsewhere)
        seen, _ = resumed(made.out)
    if seen.step != earlier:
        raise Wrong(f"the advice leads to update {seen.step}")
    check_seen(seen, made.right)


def check_loads(made: Made, file: Path) -> None:
    """Loads the models of a run of which a file is damaged, by each name."""
    for which in ("last", "best", SAVED[0]):
        try:
            check_loaded(made, which)
        except UsageError as error:
            check_words(error, file, made)


def try_damage(made: Made, file: Path, damage: str, rng: random.Random) -> str:
    """Damages one file of a copy of a run, and raises Wrong where something comes of it."""
    with copied(made.out.parent) as home:
        before = (home / file).read_bytes()
        DAMAGES[damage](home / file, rng)
        same = (home / file).is_file() and os.access(home / file, os.R_OK)
        if same and (home / file).read_bytes() == before:
            return "the same"
        if file.parts[0] == "run":
            check_loads(made, file)
        return check_resumed(made, file)


def cases(seed: int, runs: dict[str, Made]) -> list[tuple[str, Path, str]]:
    """All files of all runs, each damaged in each way, in an order of the seed."""
    found = [
        (variant, file, damage)
        for variant, made in runs.items()
        for file in made.files
        for damage in DAMAGES
    ]
    random.Random(seed).shuffle(found)
    return found


def try_case(seed: int, number: int, runs: dict[str, Made]) -> tuple[str, str | None]:
    """Tries one case; returns its kind, and what is wrong, if something is."""
    all_cases = cases(seed, runs)
    variant, file, damage = all_cases[number % len(all_cases)]
    rng = random.Random(f"{seed} {number}")
    try:
        came_to = try_damage(runs[variant], file, damage, rng)
    except Wrong as error:
        return f"{damage}: wrong", f"{variant} {place_of(file)}: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:
        said = traceback.format_exc(limit=-4)
        return f"{damage}: wrong", f"{variant} {place_of(file)}: {said}"
    return f"{damage}: {came_to}", None


def main() -> None:
    given = fuzz_search.parser(__doc__)
    given.add_argument("--runs", type=Path, default=Path("runs/damage"), help="those damaged")
    args = given.parse_args()
    if not os.geteuid():
        print("Nothing is made unreadable, which root would read.")
    runs = {variant: make(variant, args.runs.absolute()) for variant in VARIANTS}

    def case(seed: int, number: int) -> tuple[str, str | None]:
        return try_case(seed, number, runs)

    fuzz_search.report(fuzz_search.search(case, args.seed, args.count, args.out))


if __name__ == "__main__":
    main()
