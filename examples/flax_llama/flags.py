"""Command lines: the flags of a function or of settings, their help, and errors of one line."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any

import docstring_parser
import tyro
from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from examples.flax_llama.command import defaults
from examples.flax_llama.usage import UsageError

# How help calls what is read from a single word, and what is said of a word that is none.
KINDS = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    str: ("STR", "a text"),
    Path: ("PATH", "a path"),
    bool: ("True|False", "True or False"),
}
# What tyro says of values, and what is said here.
SAID = {
    r"^Error parsing (--\S+):": r"\1",
    r"^Missing value for argument '(--\S+)'.*": r"\1: expected a value.",
    r"^Unrecognized options: (.*)": r"\1 belongs to no flag.",
}
# Above a field of a dataclass, and the name of that.
COMMENT = re.compile(r"((?:^ +#.*\n)+)^ +(\w+):", re.MULTILINE)


def command_line(
    what: Callable[..., Any],
    args: Sequence[str] | None = None,
    *,
    default: Any = MISSING_NONPROP,
    description: str | None = None,
    hidden: Collection[str] = (),
) -> Any:
    """What a command line asks for, by the flags that tyro makes of the parameters.

    A dataclass with `GROUPS`, the first field of each group by its name, has help in groups.

    Args:
      what: a dataclass, or a function.
      args: the words of the command line; those of the program by default.
      default: an instance of the dataclass, which has the values of flags that are not given.
      description: what help begins with; of `what` by default.
      hidden: parameters that have no flag, and the values that they have by default.

    Returns:
      An instance of the dataclass; of a function the call of it, which is not made yet.

    Raises:
      UsageError: a flag or its value is not known.
      SystemExit: what was asked for was help.
    """
    args = sys.argv[1:] if args is None else args
    flags = Flags(hidden)
    if {"-h", "--help"} & set(args):
        # Not by tyro, which breaks no lines.
        print(paragraphs(description or what.__doc__ or ""), end="\n\n")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                what,
                prog=program_name(),
                description="",
                args=args,
                default=default,
                registry=flags.registry,
            )
    except SystemExit as stopped:
        if not stopped.code:
            raise
        raise UsageError(flags.mistake(args) or unboxed(box.getvalue())) from None


def program_name() -> str:
    """The program as it is typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def paragraphs(docstring: str) -> str:
    """What a docstring says before its sections, no wider than the terminal but for commands."""
    width = min(shutil.get_terminal_size().columns, 100)
    blocks = (docstring_parser.parse(docstring).description or "").split("\n\n")
    return "\n\n".join(
        re.sub(" +", " ", block)
        if block.startswith("python ")
        else textwrap.fill(" ".join(block.split()), width)
        for block in blocks
    )


def unboxed(text: str) -> str:
    """What tyro says of an error in a box, in a line: what is above the help of the flag."""
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match("[╭╰─-]{2}", line)]
    above = lines[rules[0] + 1 : rules[1]] if len(rules) > 1 else lines
    line = " ".join(" ".join(above).split())
    for pattern, said in SAID.items():
        line = re.sub(pattern, said, line)
    return line


class Flags:
    """The flags of a command.

    Attributes:
      registry: the rules by which tyro makes them.
    """

    def __init__(self, hidden: Collection[str]) -> None:
        self.registry = ConstructorRegistry()
        self.registry.struct_rule(self._constructor)
        self.registry.primitive_rule(of_one_word)
        self._hidden = hidden
        # tyro asks more than once.
        self._known: set[str] = set()
        self._required: dict[str, None] = {}
        # Types that stand for groups of flags.
        self._groups: dict[type, StructConstructorSpec] = {}

    def mistake(self, args: Sequence[str]) -> str | None:
        """What is wrong with the flags of a command line, whatever their values are."""
        given = [word.partition("=")[0].replace("_", "-") for word in args if word[:2] == "--"]
        for flag in given:
            if flag[2:] not in self._known:
                close = difflib.get_close_matches(flag[2:], self._known, n=1)
                hint = f"did you mean --{close[0]}?" if close else f"{program_name()} --help."
                return f"{flag} is not a flag: {hint}"
        pairs = itertools.pairwise(["", *args])
        # No flags, nor the values of those before them.
        bare = [word for before, word in pairs if "--" not in (before[:2], word[:2])]
        missing = [name for name in self._required if name not in given]
        if bare:
            missing = [name for name in missing if name.startswith("--")]
        return f"{' and '.join(missing)} must be given." if missing else None

    def _constructor(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        """What tyro is told of a function, a dataclass or a group; None of all else."""
        what = info.type
        if what in self._groups:
            return self._groups[what]
        if not (inspect.isfunction(what) or dataclasses.is_dataclass(what)):
            return None
        hints, texts = typing.get_type_hints(what, include_extras=True), documented(what)
        fields = []
        for name, default in defaults(what).items():
            if name in self._hidden:
                continue
            if info.default is not MISSING_NONPROP:
                default = getattr(info.default, name)
            elif default in (inspect.Parameter.empty, dataclasses.MISSING):
                default = MISSING_NONPROP
            self._remember(name, hints[name], required=default is MISSING_NONPROP)
            fields.append(explained(name, hints[name], default, texts.get(name, "")))
        if inspect.isfunction(what):
            # Called later: what it raises and prints is no matter of the command line.
            return StructConstructorSpec(functools.partial(functools.partial, what), tuple(fields))
        if groups := getattr(what, "GROUPS", None):
            return self._in_groups(what, fields, groups)
        return StructConstructorSpec(what, tuple(fields))

    def _remember(self, name: str, hint: Any, *, required: bool) -> None:
        """Notes the flags of a parameter, which has none if it has parameters itself."""
        kind, *said = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        flag = name.replace("_", "-")
        if not dataclasses.is_dataclass(kind) and tyro.conf.Suppress not in said:
            if tyro.conf.Positional in said:
                self._required[flag.upper()] = None
                return
            self._known |= {flag, f"no-{flag}"} if kind is bool else {flag}
            if required:
                self._required[f"--{flag}"] = None

    def _in_groups(
        self, what: Callable[..., Any], fields: Sequence[StructFieldSpec], groups: dict[str, str]
    ) -> StructConstructorSpec:
        """Has a box of help for each group of flags, by its name and its first field."""
        names = [*defaults(what)]
        starts = [names.index(first) for first in groups.values()]
        boxes = []
        for group, start, end in zip(groups, starts, [*starts[1:], None], strict=True):
            members = tuple(field for field in fields if field.name in names[start:end])
            stands_for: Any = type(group, (), {})
            self._groups[stands_for] = StructConstructorSpec(dict, members)
            kind: Any = tyro.conf.OmitArgPrefixes[stands_for]
            boxes.append(StructFieldSpec(group, kind, MISSING_NONPROP))

        def construct(**groups: Mapping[str, Any]) -> Any:
            return what(**dict(itertools.chain(*(each.items() for each in groups.values()))))

        return StructConstructorSpec(construct, tuple(boxes))


def explained(name: str, hint: Any, default: Any, text: str) -> StructFieldSpec:
    """A parameter with its help; of what is nothing by default the text says what happens then."""
    flags = re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), text)
    said = tyro.conf.arg(help=flags, help_behavior_hint="" if default in (None, ()) else None)
    kind: Any = Annotated[hint, said]
    return StructFieldSpec(name, kind, default)


def documented(what: Callable[..., Any]) -> dict[str, str]:
    """What is said of each parameter of a function, or of each field of a dataclass."""
    if inspect.isfunction(what):
        params = docstring_parser.parse(what.__doc__ or "").params
        return {each.arg_name: " ".join((each.description or "").split()) for each in params}
    sources = [inspect.getsource(each) for each in reversed(what.__mro__[:-1])]
    return {
        name: " ".join(re.findall(r"# (.*)", comment))
        for source in sources
        for comment, name in COMMENT.findall(source)
    }


def of_one_word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """How a number, a text or a path is read; None, where that may be, is such a word too."""
    kinds = typing.get_args(info.type) or (info.type,)
    optional, kinds = NoneType in kinds, [kind for kind in kinds if kind is not NoneType]
    if not kinds or not all(kind in KINDS for kind in kinds):
        return None

    def read(words: list[str]) -> Any:
        (word,) = words
        if optional and word == "None":
            return None
        for kind in kinds:
            with contextlib.suppress(ValueError):
                return kind(word) if kind is not bool else ("False", "True").index(word) == 1
        raise ValueError(f"{word}: expected {KINDS[kinds[-1]][1]}.")

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=KINDS[kinds[-1]][0],
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (*kinds, NoneType)),
        str_from_instance=lambda value: [str(value)],
    )
