"""Which tokenizer is asked for, and whether it is that of tokenized data."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from examples.flax_llama.document_end import NO_END
from examples.flax_llama.documents import BUILT_IN, Shard
from examples.flax_llama.tokenizer import (
    Tokenizer,
    is_trained_here,
    load_tokenizer,
    shard_tokenizer,
)
from examples.flax_llama.usage import UsageError

DEFAULT_TOKENIZER = "bpe:2048"


@dataclasses.dataclass(frozen=True)
class Spec:
    """Which tokenizer is asked for; `open_data` says what each of it is."""

    given: str | None
    eos_token: str | None

    @property
    def of_text(self) -> str:
        """That of text that is in no tokens yet."""
        return self.given or DEFAULT_TOKENIZER

    def open(self, shards: Sequence[Shard], *, skip_held_out: bool) -> Tokenizer:
        """The tokenizer of files or of the hub."""
        end = {"eos_token": self.eos_token}
        return shard_tokenizer(self.of_text, shards, skip_held_out=skip_held_out, **end)


def check_same(tokenizer: str | None, encoder: Tokenizer, data: str) -> None:
    """Refuses a tokenizer other than that of tokenized data."""
    if tokenizer is None:
        return
    if is_trained_here(tokenizer) or load_tokenizer(tokenizer).to_bytes() != encoder.to_bytes():
        raise UsageError(f"data={data} was made by another tokenizer than {tokenizer}.")


def check_end(eos_token: str, encoder: Tokenizer, data: str | Sequence[Path]) -> None:
    """Refuses a token that the documents of tokens do not end in."""
    if data == BUILT_IN:
        raise UsageError(
            f"eos_token={eos_token!r} has no effect: nothing stands between the books of "
            f"data={data}. Leave it out."
        )
    end = NO_END if encoder.eos_id is None else encoder.name_of(encoder.eos_id)
    if eos_token != end:
        raise UsageError(
            f"eos_token={eos_token!r}: the documents of data={data} are tokenized, and end in "
            f"{end}. Leave it out."
        )
