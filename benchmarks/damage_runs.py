"""Runs of which files are damaged, and what going on with one, or loading it, comes to.

A run has checkpoints after 4 and 8 of 12 updates. What it would make next is known: the parameters,
the optimizer's state, the next batch and the settings after each of the two.
"""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from benchmarks.fuzz_search import Wrong
from examples.flax_llama import tokenize, train
from examples.flax_llama.changes import settings_of
from examples.flax_llama.checkpoint import CheckpointError
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.loading import load_run
from examples.flax_llama.usage import UsageError

STEPS, SAVED = 12, (4, 8)
# Words that the runs have beside `RUN`; the vocabulary makes moments large enough for codes.
VARIANTS = {
    "ordinary": "--tokenizer bpe:300 --stagger",
    "8-bit": "--optimizer galore_adamw_8bit --accumulate 2 --vocab-size 512",
    "Q-GaLore": "--tokenizer bpe:300 --optimizer q_galore_adamw --layerwise",
}
RUN = (
    "--hidden 16 --intermediate 40 --layers 1 --heads 2 --rank 4 --batch 4 --seq 20 "
    f"--update-proj-gap 3 --eval-tokens 100 --steps {STEPS} --save-every 4 --eval-every 4 --keep 3"
)


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a run that goes on has before its first update."""

    step: int
    # Of parameters and optimizer, as bytes of each array.
    arrays: list[bytes]
    batch: list[bytes]
    settings: dict[str, Any]
    tokenizer: bytes


@dataclasses.dataclass(frozen=True)
class Made:
    """A run that is whole, and what is right of it."""

    variant: str
    out: Path
    # What of `out` and of the data can be damaged, as paths below `out.parent`.
    files: list[Path]
    # By the number of updates of a checkpoint.
    right: dict[int, Seen]
    # Parameters of each checkpoint, as they are loaded.
    params: dict[int, list[bytes]]
    tokenizer: bytes


def bytes_of(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def write_text(path: Path) -> None:
    """Documents of a few words, as JSON lines."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(20)]
    texts = (" ".join(rng.choices(words, k=rng.randrange(1, 40))) for _ in range(200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make(variant: str, directory: Path) -> Made:
    """The run of a variant in a directory, where it is made if it is not there yet."""
    home = directory / variant
    out, text = home / "run", home / "text.jsonl"
    if (kept := kept_beside(home)).exists():
        # A search was stopped in the middle of a case.
        make_readable(home)
        shutil.rmtree(home, ignore_errors=True)
        kept.rename(home)
    if not (home / "whole").is_file():
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        write_text(text)
        data = text
        if variant == "8-bit":
            data = home / "tokens"
            with quiet():
                tokenize.tokenize(str(text), "bytes", data, quiet=True)
        words = [*RUN.split(), *VARIANTS[variant].split(), "--data", str(data), "--out", str(out)]
        with quiet():
            train.train(train.from_command_line(words))
        shutil.rmtree(out / "checkpoints" / str(STEPS))
        (home / "whole").touch()
    paths = sorted(path for path in home.rglob("*") if path.is_file() and path.name != "whole")
    return Made(variant, out, [path.relative_to(home) for path in paths], *expected(out))


def expected(out: Path) -> tuple[dict[int, Seen], dict[int, list[bytes]], bytes]:
    """What is right of a run: after each checkpoint, of each checkpoint, and its tokenizer."""
    right, params = {}, {}
    loaded = {step: load_run(out, step) for step in SAVED}
    for step, (model, _) in loaded.items():
        params[step] = bytes_of(nnx.state(model))
    for step in SAVED:
        with copied(out.parent) as home:
            for other in SAVED:
                if other > step:
                    shutil.rmtree(home / "run" / "checkpoints" / str(other))
            right[step], _ = resumed(home / "run")
    return right, params, loaded[SAVED[-1]][1].to_bytes()


def kept_beside(home: Path) -> Path:
    return home.with_name(f"{home.name}.kept")


@contextlib.contextmanager
def copied(home: Path) -> Iterator[Path]:
    """A copy in the place of the original, whose paths settings name; that is back in the end."""
    kept = home.rename(kept_beside(home))
    shutil.copytree(kept, home)
    try:
        yield home
    finally:
        make_readable(home)
        shutil.rmtree(home)
        kept.rename(home)


def make_readable(home: Path) -> None:
    """Gives back permissions that were taken, so that what is there can be deleted."""
    for path in [home, *home.rglob("*")]:
        path.chmod(0o700)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Takes what is printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield said


class Stopped(Exception):
    """The run got to its first update."""


def resumed(out: Path, *words: str) -> tuple[Seen, str]:
    """What the train command has before the first update that it makes, and what it said.

    Nothing is compiled: all up to there is the command's own.

    Raises:
      UsageError: the command ended with this line.
    """
    seen: list[Seen] = []

    def look(run: train.Parts, update: None, state: Any) -> None:
        batch = bytes_of(next(run.dataset.train))
        settings = settings_of(run.config)
        tokenizer = run.dataset.tokenizer.to_bytes()
        seen.append(Seen(run.beginning.step, bytes_of(state), batch, settings, tokenizer))
        raise Stopped

    with (
        mock.patch.object(train, "compile_update", return_value=(None, None)),
        mock.patch.object(train, "make_updates", look),
        quiet() as said,
    ):
        try:
            with program(Config, errors=(CheckpointError, FloatingPointError)):
                train.train(train.from_command_line(["--out", str(out), "--resume", *words]))
        except Stopped:
            pass
        except SystemExit as error:
            raise UsageError(str(error.code)) from error
    return seen[0], said.getvalue()


def check_seen(seen: Seen, right: dict[int, Seen]) -> None:
    """Raises Wrong where a run goes on with something that is not right."""
    if seen.step not in right:
        raise Wrong(f"it goes on from update {seen.step}")
    for field in dataclasses.fields(Seen):
        found, wanted = getattr(seen, field.name), getattr(right[seen.step], field.name)
        if found != wanted:
            if field.name == "settings":
                found = {k: v for k, v in found.items() if v != wanted.get(k)}
                raise Wrong(f"it goes on with other settings: {found}")
            raise Wrong(f"it goes on with another {field.name}")


def check_loaded(made: Made, which: int | str) -> None:
    """Loads the model of a checkpoint, which must be right.

    Raises:
      Wrong: it is not.
      UsageError: it is refused.
    """
    step = SAVED[-1] if isinstance(which, str) else which
    model, tokenizer = load_run(made.out, which)
    if bytes_of(nnx.state(model)) != made.params[step]:
        raise Wrong(f"{which}: other parameters are loaded")
    if tokenizer.to_bytes() != made.tokenizer:
        raise Wrong(f"{which}: another tokenizer is loaded")


def contents(out: Path, but: Sequence[str] = ("lock",)) -> dict[Path, bytes | None]:
    """The contents of all files below a directory; None of those that cannot be read."""

    def content(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except OSError:
            return None

    files = (path for path in out.rglob("*") if not path.is_dir() and path.name not in but)
    return {path: content(path) for path in files}
