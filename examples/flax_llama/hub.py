"""Documents of the Hugging Face hub, or of a local directory in its layout, by streaming."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

from examples.flax_llama.reading import Document, Reading
from examples.flax_llama.usage import UsageError


@dataclasses.dataclass(frozen=True)
class HubShard:
    """One shard of a streamed data set; a position is the state that `datasets` has after it."""

    name: str
    # A datasets.IterableDataset.
    dataset: Any
    index: int
    reading: Reading = dataclasses.field(default_factory=Reading)

    @property
    def number(self) -> int:
        return self.index

    def documents(self, position: Any = None) -> Iterator[tuple[Document, Any]]:
        # An object of its own for each pass, because it is what keeps the state.
        shard = self.dataset.shard(num_shards=self.dataset.num_shards, index=self.index)
        if position is not None:
            shard.load_state_dict(position)
        count = 0
        try:
            for example in shard:
                where = f"{self.name}: shard {self.index}, document {count + 1}"
                document = self.reading.read(example, where)
                if document is not None:
                    yield document, shard.state_dict()
                count += 1
        except UsageError:
            raise
        # Whatever the network, pyarrow, fsspec or a decompressor raises.
        except Exception as error:
            raise UsageError(
                f"{self.name}: shard {self.index}, {count} documents on, cannot be read: "
                f"{type(error).__name__}: {error}"
            ) from error


def open_shards(data: str, split: str, reading: Reading, setting: str = "data") -> list[HubShard]:
    """The shards of "hf:NAME[:CONFIG[:SPLIT]]"; `split` is used where none is named."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(
            f"{setting}={data} needs the extra huggingface: "
            "pip install 'galore-optax[huggingface]'."
        ) from error
    name, config, named_split, *_ = [*data.removeprefix("hf:").split(":"), "", ""]
    try:
        dataset = datasets.load_dataset(
            name, config or None, split=named_split or split, streaming=True
        )
    # Of a name, a configuration or a split that is not there, or a hub out of reach.
    except (OSError, ValueError) as error:
        raise UsageError(f"{setting}={data}, split {named_split or split!r}: {error}") from error
    return [HubShard(data, dataset, index, reading) for index in range(dataset.num_shards)]
