"""Rows of whole conversations, none of which sees another one in its row.

`segments` numbers the conversations of a row from 1 on, for attention to stay within each; what is
left of a row has 0.
"""

import bisect
import dataclasses

import numpy as np

from examples.flax_llama.rows import Row

# So many conversations, one after the other in a random order, share rows among them.
WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Conversations as one array of tokens."""

    # int32 (T,).
    ids: np.ndarray
    # bool (T,): those to be learnt.
    counts: np.ndarray
    # int64 (D,): the number of tokens up to the end of each conversation.
    ends: np.ndarray
    # Of UTF-8, of what is to be learnt.
    num_bytes: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    @property
    def targets(self) -> np.ndarray:
        """The tokens to be learnt, one after the other."""
        return self.ids[self.counts]


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Which of some lengths share a row: the longest first, each where it leaves least room."""
    rows: list[list[int]] = []
    # (room that is left, row), in ascending order.
    left: list[tuple[int, int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(left, (length, -1))
        if place == len(left):
            rows.append([])
            free, row = room, len(rows) - 1
        else:
            free, row = left.pop(place)
        rows[row].append(index)
        bisect.insort(left, (free - length, row))
    return rows


def pack(lengths: np.ndarray, room: int, order: np.ndarray) -> list[np.ndarray]:
    """Which conversations share a row: each is in one, whole.

    Args:
      lengths: of the conversations in tokens, none of which has more than there is room.
      room: tokens of a row.
      order: of the conversations; each `WINDOW` of them share rows with each other alone.
    """
    windows = np.split(order, range(WINDOW, len(order), WINDOW))
    return [window[row] for window in windows for row in best_fit(lengths[window], room)]


class ConversationRows:
    """All rows of some conversations, to be read in any order."""

    def __init__(self, tokenized: Tokenized, *, seq: int, packing: bool, seed: int | None = None):
        """A row has several conversations, or one without `packing`; a seed mixes their order."""
        self._tokenized, self._seq, self._packing = tokenized, seq, packing
        self._starts = tokenized.ends - tokenized.lengths
        order = np.arange(len(tokenized.ends))
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
        self._rows = pack(tokenized.lengths, seq + 1, order) if packing else list(order[:, None])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        tokens, segments = np.zeros((2, self._seq + 1), np.int32)
        counts, used = np.zeros(self._seq + 1, bool), 0
        for number, conversation in enumerate(self._rows[index], 1):
            start, end = self._starts[conversation], self._tokenized.ends[conversation]
            part = slice(used, used := used + int(end - start))
            tokens[part] = self._tokenized.ids[start:end]
            counts[part] = self._tokenized.counts[start:end]
            segments[part] = number
        row = {"tokens": tokens, "mask": counts[1:]}
        # Of a single conversation none is needed, since nothing attends to what comes later.
        return row | {"segments": segments} if self._packing else row
