"""What the kernels of a compiled program read and write, from its text.

Each instruction that is scheduled is a kernel, or a call of a library, that reads its operands and
writes its result, all of them in the device's memory:

- what only gives a part of the memory another name, such as a bitcast, moves nothing;
- a fusion that takes a slice of an operand, or gathers from it, reads only that, and one whose
  result is an operand with a part of it replaced writes only the part;
- what is in a loop counts as often as the loop runs;
- of the branches of a conditional the one that moves least counts. The conditionals of `galore` are
  those of refreshes: another branch does more and moves more, so that what counts is an ordinary
  step.

What two operands of a kernel have in common counts twice, and that a small operand may still be in
a cache counts for nothing.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping

from benchmarks.hlo import Instruction, computations

Program = Mapping[str, Instruction]

# What moves nothing: names for what is there, and the ends of what has started.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("add-dependency", "opt-barrier", "partition-id", "replica-id", "copy-done"),
    *("async-update", "async-done", "all-reduce-done", "all-gather-done"),
}
SLICES = {"slice", "dynamic-slice", "gather"}
# What passes numbers on one by one where sizes agree is anything but these.
MIXES = {"dot", "convolution", "sort", "reduce-window", "custom-call", "fusion", "fft", "call"}
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One scheduled instruction.

    Attributes:
      name: in the program.
      operation: such as "fusion".
      read: bytes of operands each time.
      written: bytes of the result each time.
      times: how often it runs.
    """

    name: str
    operation: str
    read: int
    written: int
    times: float = 1

    @property
    def bytes(self) -> float:
        """Bytes that it moves, all times together."""
        return (self.read + self.written) * self.times


def kernels(text: str) -> list[Kernel]:
    """The kernels of one run of a program, in the order of its schedule.

    Args:
      text: of the compiled program.

    Raises:
      ValueError: a loop that runs whatever the conditionals say has no known number of trips, or
        there is no program in the text.
    """
    programs, entry = computations(text)

    @functools.cache
    def of(name: str) -> list[Kernel]:
        found: list[Kernel] = []
        program = programs[name]
        for own_name, own in program.items():
            inside = [of(called) for called in own.called if called in programs and runs(own)]
            if own.operation == "conditional":
                found += min(inside, key=lambda branch: sum(kernel.bytes for kernel in branch))
            elif own.operation == "while":
                trips = math.inf if own.trips is None else own.trips
                found += [
                    dataclasses.replace(kernel, times=kernel.times * trips)
                    for part in inside
                    for kernel in part
                ]
            elif inside:
                found += [kernel for part in inside for kernel in part]
            elif own.operation not in FREE:
                found.append(kernel_of(own_name, program, programs))
        return found

    found = of(entry)
    for kernel in found:
        if math.isinf(kernel.times):
            raise ValueError(f"{kernel.name} is in a loop without a known_trip_count")
    return found


def runs(own: Instruction) -> bool:
    """Whether what an instruction calls are kernels of their own."""
    return own.operation in ("while", "conditional", "call", "async-start")


def kernel_of(name: str, program: Program, programs: Mapping[str, Program]) -> Kernel:
    """What one scheduled instruction reads and writes."""
    own = program[name]
    if own.operation == "fusion":
        inside = programs[own.called[0]]
    else:  # It is seen as a fusion of one instruction.
        inside = {
            operand: dataclasses.replace(program[operand], operation="parameter", number=number)
            for number, operand in enumerate(own.operands)
        } | {name: dataclasses.replace(own, is_root=True)}
    needed = accesses(inside, programs)
    read = 0.0
    for parameter, of in inside.items():
        if of.operation == "parameter" and of.size:
            count = min(sum(needed[parameter].values()), sum(of.elements))
            read += count * of.size / sum(of.elements)
    return Kernel(name, own.operation, round(read), written(inside))


def accesses(inside: Program, programs: Mapping[str, Program]) -> dict[str, dict[Hashable, float]]:
    """How many elements are needed of each instruction of a fusion.

    Returns:
      For each instruction a dict by the slices that need it, or `ALL` for what needs all of it:
      what is sliced alike for several uses is read once.
    """
    needed: dict[str, dict[Hashable, float]] = collections.defaultdict(dict)
    for name in reversed(list(inside)):
        own = inside[name]
        if own.is_root:
            needed[name][ALL] = sum(own.elements)
        if not needed[name]:
            continue
        for position, operand in enumerate(own.operands):
            if operand in inside:
                wanted = of_operand(position, name, inside, needed[name], programs)
                for key, count in wanted.items():
                    needed[operand][key] = max(count, needed[operand].get(key, 0))
    return needed


def of_operand(
    position: int,
    name: str,
    inside: Program,
    wanted: Mapping[Hashable, float],
    programs: Mapping[str, Program],
) -> Mapping[Hashable, float]:
    """How many elements of an operand an instruction needs, if so many are needed of itself."""
    own, operand = inside[name], inside[inside[name].operands[position]]
    size, of_operand = sum(own.elements), sum(operand.elements)
    everything: dict[Hashable, float] = {ALL: of_operand}
    if own.operation in SLICES:
        where = own.operands[1:] if own.operation != "slice" else (name,)
        count = min(sum(wanted.values()), size)
        return {(own.operation, where, size): count} if position == 0 else everything
    if own.operation in ("dynamic-update-slice", "scatter"):
        if position > 0:
            return everything
        if not is_replaced(name, inside):
            return wanted
        added = own.operation == "scatter" and not is_assignment(own, programs)
        return {name: sum(inside[own.operands[-1]].elements)} if added else {}
    if own.operation == "reduce" and position == 0:
        return {key: count * of_operand / size for key, count in wanted.items()}
    if own.operation in ("broadcast", "pad", "concatenate"):
        return {key: min(count, of_operand) for key, count in wanted.items()}
    if own.operation in MIXES or size != of_operand:
        return everything
    return wanted


def written(inside: Program) -> int:
    """Bytes that a fusion writes."""
    (name,) = (name for name, own in inside.items() if own.is_root)
    root = inside[name]
    if root.operation == "custom-call" and "cublas" in (root.target or ""):
        return root.sizes[0]  # What follows is the library's workspace.
    if root.operation == "copy-start":
        return root.sizes[0]
    total = 0
    for result in root.operands if root.operation == "tuple" else (name,):
        own = inside[through_bitcasts(result, inside)]
        if is_replaced(through_bitcasts(result, inside), inside):
            update = own.operands[1 if own.operation == "dynamic-update-slice" else -1]
            total += inside[update].size
        else:
            total += own.size
    return total


def is_replaced(name: str, inside: Program) -> bool:
    """Whether an instruction replaces a part of a fusion's operand in the operand's memory."""
    own = inside[name]
    if own.operation not in ("dynamic-update-slice", "scatter"):
        return False
    return inside[through_bitcasts(own.operands[0], inside)].operation == "parameter"


def is_assignment(scatter: Instruction, programs: Mapping[str, Program]) -> bool:
    """Whether a scatter replaces what is there, so that it need not be read."""
    combiner = [programs[called] for called in scatter.called if called in programs]
    roots = [own for program in combiner for own in program.values() if own.is_root]
    return bool(roots) and all(own.operation == "parameter" for own in roots)


def through_bitcasts(name: str, inside: Program) -> str:
    """The instruction whose result another one gives another name."""
    while inside[name].operation == "bitcast":
        name = inside[name].operands[0]
    return name
