"""Rows of seq + 1 tokens, a sequence and its targets, out of tokenized documents.

Packed, all documents are one text, and a row's last token is the next one's first, so that every
token is a target once. Else each document is a row of its own, cut or padded.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from examples.flax_llama.tokens import Tokens

# "tokens": int32 (seq + 1,), and "mask": the targets that count, bool (seq,). Of several
# conversations "segments" too, which `packing` explains.
Row = dict[str, np.ndarray]


def packed_rows(tokens: np.ndarray, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """All full rows (N, seq + 1) of some tokens, and the tokens after them, the last one with."""
    count = max(0, len(tokens) - 1) // seq
    if count == 0:
        return np.empty((0, seq + 1), tokens.dtype), tokens
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq + 1)
    return windows[: count * seq : seq], tokens[count * seq :]


def padded_rows(documents: Sequence[np.ndarray], seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, seq + 1), one for each document with a target, and their masks (N, seq)."""
    documents = [document[: seq + 1] for document in documents if len(document) > 1]
    lengths = np.array([len(document) for document in documents], np.int64)[:, None]
    rows = np.zeros((len(documents), seq + 1), np.int32)
    rows[np.arange(seq + 1) < lengths] = np.concatenate([np.empty(0, np.int32), *documents])
    return rows, np.arange(1, seq + 1) < lengths


class TokenRows:
    """All rows of an array of tokens, to be read in any order."""

    def __init__(self, tokens: Tokens, *, seq: int, packing: bool):
        self._ids, self._seq, self._packing = tokens.ids, seq, packing
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
        return {"tokens": tokens, "mask": mask}


class Rows(grain.IterDataset[Row]):
    """Rows of a stream of groups of tokenized documents."""

    def __init__(
        self,
        parent: grain.IterDataset[list[np.ndarray]],
        *,
        seq: int,
        packing: bool,
        context: Sequence[int] = (),
    ):
        """`context` is what stands before the first document when packed."""
        super().__init__(parent)
        self.seq, self.packing, self.context = seq, packing, context

    def __iter__(self) -> grain.DatasetIterator[Row]:
        return _RowIterator(iter(self._parent), self)


class _RowIterator(grain.DatasetIterator[Row]):
    """The state is where the current group begins, and how many of its rows are gone."""

    def __init__(self, parent: grain.DatasetIterator[list[np.ndarray]], dataset: Rows):
        super().__init__(parent)
        self._groups, self._dataset = parent, dataset
        self._group_state = parent.get_state()
        # Tokens left over from earlier groups: before the current group, and after it.
        self._before = self._after = np.array(dataset.context, np.int32)
        self._tokens = self._mask = np.empty((0, 0))
        self._row = 0

    def __next__(self) -> Row:
        while self._row == len(self._tokens):
            self._group_state, self._before = self._groups.get_state(), self._after
            self._next_group()
            self._row = 0
        self._row += 1
        return {"tokens": self._tokens[self._row - 1], "mask": self._mask[self._row - 1]}

    def _next_group(self) -> None:
        documents, seq = next(self._groups), self._dataset.seq
        if self._dataset.packing:
            tokens = np.concatenate([self._before, *documents])
            self._tokens, self._after = packed_rows(tokens, seq)
            self._mask = np.broadcast_to(True, (len(self._tokens), seq))
        else:
            self._tokens, self._mask = padded_rows(documents, seq)

    def get_state(self) -> dict[str, Any]:
        return {"group": self._group_state, "before": self._before.tolist(), "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._group_state = state["group"]
        self._groups.set_state(state["group"])
        self._before = np.array(state["before"], np.int32)
        self._row = state["row"]
        self._next_group()
