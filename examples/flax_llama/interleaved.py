"""The rows of several streams in turns, of which each process takes its part.

A run reads as many streams as it had processes when it began. The rows of all of them, one of each
in turns, have an order that does not depend on how many processes there are now: a process reads
the streams that rows of its part are from, and leaves out what is of others.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import grain

from examples.flax_llama.rows import Row

# Makes the stream of a number, out of so many.
Open = Callable[[int, int], grain.IterDataset[Row]]


class InterleavedRows(grain.IterDataset[Row]):
    """Every `parts`-th row, from that of number `part` on.

    Args:
      open_stream: makes one of the streams.
      part: of this process.
      parts: of all processes; by default there are as many streams.
    """

    def __init__(self, open_stream: Open, part: int, parts: int):
        super().__init__()
        self.open_stream, self.part, self.parts = open_stream, part, parts

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _Iterator(self)


class _Iterator(grain.DatasetIterator[Row]):
    """The state has the first row that no process has taken, and those of streams that are read.

    Of each stream there is the number of its rows that are gone, and its own state.
    """

    def __init__(self, dataset: InterleavedRows):
        super().__init__()
        self._dataset = dataset
        self._begin({"streams": dataset.parts, "row": 0, "states": {}})

    def _begin(self, state: dict[str, Any]) -> None:
        dataset, self._count = self._dataset, state["streams"]
        self._row = state["row"] + dataset.part
        # Those that rows of this part are from.
        step = math.gcd(self._count, dataset.parts)
        self._streams, self._gone = {}, {}
        for stream in range(self._row % step, self._count, step):
            self._streams[stream] = iter(dataset.open_stream(stream, self._count))
            self._gone[stream] = 0
            if saved := state["states"].get(str(stream)):
                self._gone[stream] = saved["rows"]
                self._streams[stream].set_state(saved["state"])

    def __next__(self) -> Row:
        number, stream = divmod(self._row, self._count)
        while True:
            row = next(self._streams[stream])
            self._gone[stream] += 1
            if self._gone[stream] > number:
                break
        self._row += self._dataset.parts
        return row

    def get_state(self) -> dict[str, Any]:
        states = {
            str(number): {"rows": self._gone[number], "state": stream.get_state()}
            for number, stream in self._streams.items()
        }
        row = self._row - self._dataset.part
        return {"streams": self._count, "row": row, "states": states}

    def set_state(self, state: dict[str, Any]) -> None:
        if "streams" not in state:
            # An earlier version read one stream only, of which it kept no more than this.
            state = {"streams": 1, "row": 0, "states": {"0": {"rows": 0, "state": state}}}
        self._begin(state)


def merged(positions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of a run out of those that its processes have saved.

    Of data that is read in any order they are all the same.
    """
    first = positions[0]
    if "streams" not in first:
        return first
    states: dict[str, Any] = {}
    for position in positions:
        # Two processes that share a stream are at other places in it, both before the next row.
        states |= position["states"]
    return first | {"states": states}
