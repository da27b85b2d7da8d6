"""An endless stream of shuffled documents whose position can be saved."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from examples.flax_llama.documents import Shard, is_held_out
from examples.flax_llama.usage import UsageError

# Documents that are shuffled and tokenized together: at most so many, of about so many characters.
GROUP_DOCUMENTS = 1024
GROUP_CHARACTERS = 1 << 22

Place = dict[str, Any]


class DocumentGroups(grain.IterDataset[list[str]]):
    """Groups of documents for ever: in each epoch, each document of this host's part is in one.

    The shards come in another order each epoch, and the documents of a group are shuffled; no
    group mixes two epochs. A host reads shards of its own where their number allows it, and else
    every `process_count`-th document of all.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        seed: int,
        skip_held_out: bool = False,
        process_index: int = 0,
        process_count: int = 1,
    ):
        super().__init__()
        self.shards = shards
        self._seed = seed
        self._skip_held_out = skip_held_out
        self._process_index, self._process_count = process_index, process_count

    def __iter__(self) -> grain.DatasetIterator[list[str]]:
        return _GroupIterator(self)

    def documents(
        self, epoch: int, shard: int = 0, document: int = 0, position: Any = None
    ) -> Iterator[tuple[str, Place]]:
        """The documents of an epoch from a place on, each with the place after it."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self.shards)).tolist()
        own_shards = len(order) % self._process_count == 0
        if own_shards:
            order = order[self._process_index :: self._process_count]
        for index in range(shard, len(order)):
            source = self.shards[order[index]]
            for text, after in source.documents(position):
                held_out = self._skip_held_out and is_held_out(source.number, document)
                mine = own_shards or document % self._process_count == self._process_index
                document += 1
                if mine and not held_out:
                    yield text, {"shard": index, "document": document, "position": after}
            document, position = 0, None

    def groups(self, epoch: int, group: int, place: Place) -> Iterator[tuple[list[str], Place]]:
        """The groups from some place on, each with the arguments that go on after it."""
        while True:
            for texts, after in grouped(self.documents(epoch, **place)):
                rng = np.random.default_rng([self._seed, epoch, group, self._process_index])
                group += 1
                shuffled = [texts[i] for i in rng.permutation(len(texts))]
                yield shuffled, {"epoch": epoch, "group": group, "place": after}
            if group == 0:
                raise UsageError("There are no documents to train on.")
            epoch, group, place = epoch + 1, 0, {}


def grouped(documents: Iterable[tuple[str, Place]]) -> Iterator[tuple[list[str], Place]]:
    """Lists of documents, each with the place after its last."""
    texts: list[str] = []
    characters, place = 0, {}
    for text, place in documents:
        texts.append(text)
        characters += len(text)
        if len(texts) == GROUP_DOCUMENTS or characters >= GROUP_CHARACTERS:
            yield texts, place
            texts, characters = [], 0
    if texts:
        yield texts, place


class _GroupIterator(grain.DatasetIterator[list[str]]):
    def __init__(self, dataset: DocumentGroups):
        super().__init__()
        self._dataset = dataset
        self._next: Place = {"epoch": 0, "group": 0, "place": {}}
        self._groups = dataset.groups(**self._next)

    def __next__(self) -> list[str]:
        texts, self._next = next(self._groups)
        return texts

    def get_state(self) -> dict[str, Any]:
        return {"shards": len(self._dataset.shards), "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        shards = len(self._dataset.shards)
        if state["shards"] != shards:
            raise UsageError(
                f"The data has {shards} files, and had {state['shards']} when the position was "
                "saved: resume with the same files."
            )
        self._next = state["next"]
        self._groups = self._dataset.groups(**self._next)
