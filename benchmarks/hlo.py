"""Reads the text of a compiled program: what devices send each other, and which libraries it calls.

What the kernels of one device read and write is in `kernels.py`.

`compiled.as_text()` is a list of computations of one device, each a list of instructions: a name,
the type of the result, what is done, its operands, and attributes, among them the computations that
it calls. A loop is a `while` that calls a body, and says how often where the compiler knows:

    %body (x: f32[8]) -> f32[8] {
      %x = f32[8]{0} parameter(0)
      ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
    }
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
OPERAND = re.compile(r"%([\w.\-]+)")
OPERATION = re.compile(r"\s*([\w\-]+)\(")
ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,<=]*)\]")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
TARGET = re.compile(r'custom_call_target="([^"]+)"')
NUMBER = re.compile(r"\bparameter\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      operation: such as "all-reduce-start".
      sizes: bytes of each array of the result, on one device.
      elements: numbers in each array of the result.
      operands: names of the instructions whose results it takes.
      called: names of the computations that it runs.
      trips: how often, where the compiler says so.
      number: which parameter of its computation it is, None for what is none.
      target: the function of a library that a custom call calls, None elsewhere.
      is_root: whether its result is that of its computation.
    """

    operation: str
    sizes: tuple[int, ...]
    elements: tuple[int, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int | None
    number: int | None = None
    target: str | None = None
    is_root: bool = False

    @property
    def size(self) -> int:
        """Bytes of the result, on one device."""
        return sum(self.sizes)

    @property
    def collective(self) -> str | None:
        """Its kind, where the result is a collective's: of a start and its end only the end."""
        kind = self.operation.removesuffix("-done")
        return kind if kind in COLLECTIVES else None


@dataclasses.dataclass(frozen=True)
class Moved:
    """All collectives of one kind.

    Attributes:
      count: how many one device takes part in, those of a loop times its trips.
      bytes: of their results on one device.
      operands: bytes of their operands on one device.
    """

    count: int = 0
    bytes: int = 0
    operands: int = 0

    def plus(self, other: "Moved", times: int = 1) -> "Moved":
        return Moved(
            self.count + times * other.count,
            self.bytes + times * other.bytes,
            self.operands + times * other.operands,
        )


Traffic = dict[str, Moved]


def collectives(text: str, unknown: Sequence[int] = ()) -> Traffic:
    """What one device takes part in while a program runs once, by kind.

    Of the branches of a conditional the one with the most bytes counts.

    Args:
      text: of the compiled program.
      unknown: trips of loops of which the compiler does not say it: of an outer one, of those that
        are in it, and so on.

    Raises:
      ValueError: a collective is in a loop whose trips nobody says, or there is no program in the
        text.
    """
    programs, entry = computations(text)

    @functools.cache
    def of(name: str, unknown: tuple[int, ...]) -> Traffic:
        total: dict[str, Moved] = collections.defaultdict(Moved)
        by_name = programs[name]
        for instruction in by_name.values():
            is_unknown = instruction.operation == "while" and instruction.trips is None
            deeper = unknown[1:] if is_unknown else unknown
            inner = [of(called, deeper) for called in instruction.called if called in programs]
            if instruction.collective:
                kind, start = instruction.collective, instruction
                if instruction.operation.endswith("-done"):
                    start = by_name[instruction.operands[0]]
                operands = sum(by_name[x].size for x in start.operands if x in by_name)
                total[kind] = total[kind].plus(Moved(1, instruction.size, operands))
            elif instruction.operation == "conditional":
                inner = sorted(inner, key=lambda found: sum(x.bytes for x in found.values()))[-1:]
            elif is_unknown and any(inner) and not unknown:
                raise ValueError(f"a loop in {name} has collectives, but no known_trip_count")
            times = 1 if instruction.trips is None else instruction.trips
            times = (*unknown, 1)[0] if is_unknown else times
            for found in inner:
                for kind, moved in found.items():
                    total[kind] = total[kind].plus(moved, times)
        return dict(total)

    return of(entry, tuple(unknown))


def custom_calls(text: str) -> dict[str, int]:
    """How often each function of a library, such as cuSOLVER, stands in a program."""
    return dict(sorted(collections.Counter(TARGET.findall(text)).items()))


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The instructions of each computation by name, and the one that the program starts with.

    Raises:
      ValueError: there is none.
    """
    found: dict[str, dict[str, Instruction]] = {}
    entry, into = None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            into = found.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif into is not None and (name := NAME.match(line)):
            into[name[2]] = instruction(line[name.end() :], is_root=bool(name[1]))
    if entry is None:
        raise ValueError(f"no ENTRY computation in {text[:80]!r}")
    return found, entry


def instruction(line: str, is_root: bool = False) -> Instruction:
    """An instruction, from what is right of its name and the equals sign."""
    end = type_end(line)
    operation = OPERATION.match(line, end)
    if operation is None:
        raise ValueError(f"no operation in {line[:80]!r}")
    names = ",".join(CALLED.findall(line)).translate(str.maketrans("", "", "{}% "))
    # What an async-start calls stands at its end again.
    is_end = operation[1] in ("async-update", "async-done")
    trips = TRIPS.search(line)
    operands = line[operation.end() :].split(")")[0]
    found = tuple(arrays(line[:end]))
    number, target = NUMBER.search(line), TARGET.search(line)
    return Instruction(
        operation=operation[1],
        sizes=tuple(size for size, _ in found),
        elements=tuple(elements for _, elements in found),
        operands=tuple(OPERAND.findall(operands)),
        called=() if is_end else tuple(filter(None, names.split(","))),
        trips=int(trips[1]) if trips else None,
        number=int(number[1]) if number else None,
        target=target[1] if target else None,
        is_root=is_root,
    )


def type_end(line: str) -> int:
    """Where the type at the start of a line ends: a word, or a tuple in parentheses."""
    depth = 0
    for i, character in enumerate(line):
        depth += (character == "(") - (character == ")")
        if depth == 0 and (character == " " or (character == ")" and line[0] == "(")):
            return i + (character == ")")
    raise ValueError(f"no type in {line[:80]!r}")


def arrays(kind: str) -> Iterator[tuple[int, int]]:
    """Bytes and elements of each array of a type."""
    for name, bits, shape in ARRAY.findall(kind):
        elements = math.prod(int(n.removeprefix("<=")) for n in shape.split(",") if n)
        width = 8 if name == "pred" else int(bits or 0)  # a token has none
        yield -(-elements * width // 8), elements
