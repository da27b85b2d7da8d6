"""Command lines: what is wrong with one is told in a line, and help is whole and in groups."""

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
import types
from pathlib import Path

import pytest

from examples.flax_llama import train
from examples.flax_llama.compare import compare
from examples.flax_llama.config import PRESETS, Config
from examples.flax_llama.flags import command_line
from examples.flax_llama.plan import Plan
from examples.flax_llama.plot import plot
from examples.flax_llama.sample import sample
from examples.flax_llama.usage import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """The program is run as a module."""
    spec = types.SimpleNamespace(name="examples.flax_llama.x")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)


class Terminal(io.StringIO):
    """Where tyro writes in colours, and draws its boxes with lines."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("what", "words", "message"),
    [
        (Config, "--lrr 3", "--lrr is not a flag: did you mean --lr?"),
        (Config, "--update_proj_gapp=3", "--update-proj-gapp is not a flag: did you mean --u"),
        (Config, "--no-pakking", "--no-pakking is not a flag: did you mean --no-packing?"),
        (Config, "--bogus", "--bogus is not a flag: python -m examples.flax_llama.x --help."),
        (Config, "--lr abc", "--lr abc: expected a number."),
        (Config, "--lr=2x", "--lr 2x: expected a number."),
        (Config, "--batch 2.5", "--batch 2.5: expected a whole number."),
        (Config, "--rank x", "--rank x: expected a number."),
        (Config, "--int8-weights x", "--int8-weights x: expected True or False."),
        (Config, "--lr", "--lr: expected a value."),
        (Config, "--lr --batch 8", "--lr: expected a value."),
        (Config, "stray --lr 0.1", "stray belongs to no flag."),
        (Plan, "--batchh 8", "--batchh is not a flag: did you mean --batch?"),
        (Plan, "--memory x", "--memory x: expected a number."),
        (compare, "--optimizer sgd", "--optimizer is not a flag: did you mean --optimizers?"),
        (compare, "--seeds x", "--seeds x: expected a whole number."),
        (sample, "--runn x", "--runn is not a flag: did you mean --run?"),
        (sample, "--tokens 3", "--run must be given."),
        (plot, "", "--runs and --out must be given."),
    ],
)
@pytest.mark.parametrize(("out", "columns"), [(Terminal, 40), (io.StringIO, 160)])
def test_what_is_wrong_is_told_in_a_line(monkeypatch, capsys, out, columns, what, words, message):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(out()) as printed, pytest.raises(UsageError) as error:
        command_line(what, words.split(), hidden=["optimizer"] * (what is compare))
    assert str(error.value).startswith(message)
    assert not re.search(r"[\n\x1b]", str(error.value))
    assert printed.getvalue() == capsys.readouterr().err == ""


def test_values_are_of_their_types_and_none_takes_one_back():
    words = "--rank 5 --lr 0.5 --no-packing --int8-weights True --out runs/x --wandb None"
    words += " --vocab_size=300 --seq=8"
    default = Config(wandb="project", steps=7)
    asked = command_line(Config, words.split(), default=default)
    changed = {"rank": 5, "lr": 0.5, "packing": False, "int8_weights": True, "seq": 8}
    changed |= {"out": Path("runs/x"), "vocab_size": 300}
    assert asked == dataclasses.replace(default, **changed, wandb=None)
    assert isinstance(asked.rank, int)
    assert command_line(Config, ["--rank", "0.5"]).rank == 0.5
    assert command_line(Config, []) == command_line(Plan, []).run == Config()


def test_a_function_is_called_later():
    called = []

    def add(one: int, other: int = 2) -> int:
        called.append(one)
        return one + other

    asked = command_line(add, ["--one", "3"])
    assert called == []
    assert asked() == 5


def shown(monkeypatch, what, columns, **settings):
    """The lines of the help."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as out, pytest.raises(SystemExit) as stopped:
        command_line(what, ["--help"], **settings)
    assert stopped.value.code == 0
    return out.getvalue().splitlines()


def comments(source):
    """The comment above each field of a class, by the line that Python's parser finds it on."""
    lines = source.splitlines()
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            above = []
            for line in reversed(lines[: node.lineno - 1]):
                if not line.strip().startswith("#"):
                    break
                above.insert(0, line.strip(" #"))
            yield node.target.id, " ".join(above)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_has_every_text_whole_within_the_terminal(monkeypatch, columns):
    lines = shown(monkeypatch, Config, columns, description=train.__doc__)
    boxed = [line for line in lines if line.startswith(("│", "╭", "╰"))]
    assert max(map(len, boxed)) <= columns
    text = " ".join(" ".join(line.strip("│ ") for line in boxed).split())
    for name, comment in comments(inspect.getsource(Config)):
        if name not in ("GROUPS", "HIDDEN", *Config.HIDDEN):
            default = getattr(Config, name)
            said = re.sub(r"`(\w+)`", lambda m: "--" + m[1].replace("_", "-"), comment)
            hint = "" if default in (None, ()) else f" (default: {default})"
            assert f"{said}{hint}" in text, name
    assert all(preset in text for preset in PRESETS)
    assert "None|" not in text
    assert "(default: None)" not in text
    # A line goes on as long as there is room for the next word.
    rows = [line[2:-2] for line in lines if line.startswith("│")]
    for one, other in itertools.pairwise(rows):
        by_itself = re.fullmatch(r"--[\w-]+(, --[\w-]+| \S+| \[STR .*\])?", one.strip())
        if other.startswith("  ") and other.strip() and not by_itself:
            assert len(one.rstrip()) + 1 + len(other.split()[0]) > len(one), one


def test_help_is_in_groups_that_have_all_settings_once(monkeypatch):
    lines = shown(monkeypatch, Config, 100)
    found = {}
    for line in lines:
        if match := re.match(r"╭─ (.*?) options? ─", line):
            group = found.setdefault(match[1], [])
        elif match := re.match(r"│ (--[\w-]+)", line):
            group.append(match[1][2:].replace("-", "_"))
    assert list(found) == list(Config.GROUPS)
    assert {group: names[0] for group, names in found.items()} == Config.GROUPS
    names = [name for group in found.values() for name in group]
    assert [*names, *Config.HIDDEN] == [field.name for field in dataclasses.fields(Config)]


def test_help_begins_with_what_the_program_does(monkeypatch):
    lines = shown(monkeypatch, Config, 60, description=train.__doc__)
    commands = re.findall(r"^python -m .*", train.__doc__, re.MULTILINE)
    assert len(commands) == 2
    usage = "usage: python -m examples.flax_llama.x [-h] [OPTIONS]"
    assert lines[:6] == ["Trains a LLaMA.", "", *commands, "", usage]
    lines = shown(monkeypatch, plot, 60)
    said, _, _ = inspect.getdoc(plot).partition("\n\nArgs:")
    end = next(i for i, line in enumerate(lines) if line.startswith("usage:"))
    assert " ".join(lines[:end]).split() == said.split()
    assert max(map(len, lines[:end])) <= 60


def test_what_nobody_gave_has_no_flag():
    with pytest.raises(UsageError, match=r"^--by-default is not a flag"):
        command_line(Config, ["--by-default", "rank"])
