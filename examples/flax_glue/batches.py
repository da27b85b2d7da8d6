"""Batches of texts of about the same length, in an order that depends on the seed alone."""

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from examples.flax_glue.tokens import Tokens

# Texts are filled up to one of these lengths, so that few programs are compiled, and a third of
# what is computed is for nothing at worst, for texts of more than 16 tokens.
LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# So many batches are drawn at random, and then made of texts sorted by length.
TOGETHER = 32

# tokens, types (int32) and mask (bool), (B, S); labels (B,); weights (float32, (B,)), zero where
# there is no text.
Batch = dict[str, np.ndarray]


def padded_length(length: int, max_length: int) -> int:
    """What a text is filled up to."""
    return min(next((n for n in LENGTHS if n >= length), max_length), max_length)


class Texts:
    """Tokens and labels of texts, and batches of them.

    Args:
      tokens: of each text.
      labels: of each text.
      batch: texts in a batch; the last one of all is filled up.
      pad_id: of the tokens behind a text.
      max_length: of a text.
    """

    def __init__(
        self,
        tokens: Sequence[Tokens],
        labels: np.ndarray,
        *,
        batch: int,
        pad_id: int,
        max_length: int,
    ):
        self.tokens, self.labels = tokens, labels
        self.batch, self.pad_id, self.max_length = batch, pad_id, max_length
        self.lengths = np.array([len(each) for each in tokens])

    @property
    def batches(self) -> int:
        """The number of batches of all texts."""
        return -(-len(self.tokens) // self.batch)

    def collate(self, index: np.ndarray) -> Batch:
        """The batch of some texts."""
        shape = self.batch, padded_length(self.lengths[index].max(), self.max_length)
        found: Batch = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "types": np.zeros(shape, np.int32),
            "mask": np.arange(shape[1]) < self.filled(self.lengths[index])[:, None],
            "labels": self.filled(self.labels[index]),
            "weights": self.filled(np.ones(len(index), np.float32)),
        }
        for row, i in enumerate(index):
            each = self.tokens[i]
            found["tokens"][row, : len(each)] = each.ids
            found["types"][row, : len(each)] = each.types
        return found

    def filled(self, values: np.ndarray) -> np.ndarray:
        """With zeros for the texts that a batch lacks."""
        return np.pad(values, (0, self.batch - len(values)))

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Batches of all texts from the shortest on, each with the numbers of its texts."""
        order = np.argsort(self.lengths, kind="stable")
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            yield index, self.collate(index)

    def epoch(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The numbers of the texts of each batch: each text once, in an order of chance."""
        rng = np.random.default_rng([seed, epoch])
        order, size = rng.permutation(len(self.tokens)), self.batch * TOGETHER
        # What is left over for a smaller batch is any of the texts, not the longest ones.
        whole = len(order) - len(order) % self.batch
        found = [order[whole:]] if whole < len(order) else []
        for start in range(0, whole, size):
            some = order[start : min(start + size, whole)]
            some = some[np.argsort(self.lengths[some], kind="stable")]
            found += np.split(some, len(some) // self.batch)
        return [found[i] for i in rng.permutation(len(found))]

    def example(self, length: int) -> Batch:
        """A batch of that length, for its shape."""
        shape = self.batch, length
        return {
            "tokens": np.zeros(shape, np.int32),
            "types": np.zeros(shape, np.int32),
            "mask": np.ones(shape, bool),
            "labels": np.zeros(self.batch, self.labels.dtype),
            "weights": np.ones(self.batch, np.float32),
        }


class Epochs:
    """The batches of all epochs, by number."""

    def __init__(self, texts: Texts, epochs: int, seed: int):
        self.texts, self.epochs = texts, epochs
        self._of_epoch = functools.lru_cache(2)(functools.partial(texts.epoch, seed))

    def __len__(self) -> int:
        return self.epochs * self.texts.batches

    def __getitem__(self, index: int) -> Batch:
        epoch, batch = divmod(int(index), self.texts.batches)
        return self.texts.collate(self._of_epoch(epoch)[batch])

    def lengths(self) -> list[int]:
        """What all batches are filled up to, each once."""
        longest = {
            int(self.texts.lengths[index].max())
            for epoch in range(self.epochs)
            for index in self._of_epoch(epoch)
        }
        return sorted({padded_length(n, self.texts.max_length) for n in longest})

    def iterator(self) -> grain.DatasetIterator:
        """All batches in order, from a position that can be saved."""
        dataset = grain.MapDataset.source(self)
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return iter(dataset.to_iter_dataset(options))
