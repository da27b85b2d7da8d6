"""Rows of seq + 1 tokens, a sequence and its targets, out of tokenized documents.

Packed, all documents are one text, and a row's last token is the next one's first, so that every
token is a target once; where documents are not to attend to each other, every one but the first of
its document. Else each document is a row of its own, cut or padded.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from examples.flax_llama.tokens import Tokens

# "tokens": int32 (seq + 1,), and "mask": the targets that count, bool (seq,). Of several
# conversations, or documents apart, "segments" too, which `packing` explains.
Row = dict[str, np.ndarray]


def packed_rows(tokens: np.ndarray, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """All full rows (N, seq + 1) of some tokens, and the tokens after them, the last one with.

    What else there is of each token goes along in leading axes.
    """
    count = max(0, tokens.shape[-1] - 1) // seq
    if count == 0:
        return np.empty((*tokens.shape[:-1], 0, seq + 1), tokens.dtype), tokens
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq + 1, axis=-1)
    return windows[..., : count * seq : seq, :], tokens[..., count * seq :]


def apart(numbers: np.ndarray) -> Row:
    """What keeps each token of rows (..., seq + 1) to its document, of which there is the number.

    The first token of a document is no target: nothing of it comes before.
    """
    segments = (numbers - numbers[..., :1] + 1).astype(np.int32)
    return {"segments": segments, "mask": numbers[..., 1:] == numbers[..., :-1]}


def padded_rows(documents: Sequence[np.ndarray], seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, seq + 1), one for each document with a target, and their masks (N, seq)."""
    documents = [document[: seq + 1] for document in documents if len(document) > 1]
    lengths = np.array([len(document) for document in documents], np.int64)[:, None]
    rows = np.zeros((len(documents), seq + 1), np.int32)
    rows[np.arange(seq + 1) < lengths] = np.concatenate([np.empty(0, np.int32), *documents])
    return rows, np.arange(1, seq + 1) < lengths


class TokenRows:
    """All rows of an array of tokens, to be read in any order."""

    def __init__(self, tokens: Tokens, *, seq: int, packing: bool, attend_across: bool = True):
        self._ids, self._ends, self._seq = tokens.ids, tokens.ends, seq
        self._packing, self._apart = packing, packing and not attend_across
        self._starts = np.concatenate([[0], tokens.ends[:-1]])
        self._lengths = tokens.ends - self._starts
        self._documents = np.flatnonzero(self._lengths > 1)

    def __len__(self) -> int:
        if self._packing:
            return max(0, len(self._ids) - 1) // self._seq
        return len(self._documents)

    def __getitem__(self, index: int) -> Row:
        start, length = index * self._seq, self._seq + 1
        if not self._packing:
            document = self._documents[index]
            start, length = self._starts[document], min(length, self._lengths[document])
        (tokens,), (mask,) = padded_rows([self._ids[start : start + length]], self._seq)
        row = {"tokens": tokens, "mask": mask}
        if self._apart:
            row |= apart(np.searchsorted(self._ends, start + np.arange(length), side="right"))
        return row


def with_numbers(ids: Any, numbers: Any) -> np.ndarray:
    """Tokens over the numbers of their documents, int32 (2, T)."""
    return np.stack([np.array(ids, np.int32), np.array(numbers, np.int32)])


class Rows(grain.IterDataset[Row]):
    """Rows of a stream of groups of tokenized documents."""

    def __init__(
        self,
        parent: grain.IterDataset[list[np.ndarray]],
        *,
        seq: int,
        packing: bool,
        attend_across: bool = True,
        context: Sequence[int] = (),
    ):
        """`context` is what stands before the first document when packed."""
        super().__init__(parent)
        self.seq, self.packing, self.context = seq, packing, context
        self.apart = packing and not attend_across

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _RowIterator(iter(self._parent), self)


class _RowIterator(grain.DatasetIterator[Row]):
    """The state is where the current group begins, and how many of its rows are gone."""

    def __init__(self, parent: grain.DatasetIterator[list[np.ndarray]], dataset: Rows):
        super().__init__(parent)
        self._groups, self._dataset = parent, dataset
        self._group_state = parent.get_state()
        # Tokens left over from earlier groups, before the current group and after it, over the
        # numbers of their documents, the last of which is 0.
        self._before = self._after = with_numbers(dataset.context, [0] * len(dataset.context))
        self._rows: Row = {"tokens": np.empty((0, 0))}
        self._row = 0

    def __next__(self) -> Row:
        while self._row == len(self._rows["tokens"]):
            self._group_state, self._before = self._groups.get_state(), self._after
            self._next_group()
            self._row = 0
        self._row += 1
        return {name: array[self._row - 1] for name, array in self._rows.items()}

    def _next_group(self) -> None:
        documents, seq = next(self._groups), self._dataset.seq
        if not self._dataset.packing:
            tokens, mask = padded_rows(documents, seq)
            self._rows = {"tokens": tokens, "mask": mask}
            return
        numbers = np.repeat(np.arange(1, len(documents) + 1), [len(ids) for ids in documents])
        new = with_numbers(np.concatenate([[], *documents]), numbers)
        both = np.concatenate([self._before, new], axis=1)
        (tokens, numbers), after = packed_rows(both, seq)
        self._after = with_numbers(after[0], after[1] - after[1, -1:])
        self._rows = {"tokens": tokens, "mask": np.broadcast_to(True, (len(tokens), seq))}
        if self._dataset.apart:
            self._rows |= apart(numbers)

    def get_state(self) -> dict[str, Any]:
        before, numbers = self._before.tolist()
        state = {"group": self._group_state, "before": before, "row": self._row}
        return state | {"documents": numbers} if self._dataset.apart else state

    def set_state(self, state: dict[str, Any]) -> None:
        self._group_state = state["group"]
        self._groups.set_state(state["group"])
        before = state["before"]
        self._before = with_numbers(before, state.get("documents", [0] * len(before)))
        self._row = state["row"]
        self._next_group()
