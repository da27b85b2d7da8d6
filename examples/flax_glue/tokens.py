"""The tokens of texts, by the tokenizer.json of a model directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from examples.flax_glue.readers import Texts
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_llama.usage import UsageError, cannot_be_read, first_line

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a text, with those that begin, divide and end it, int32 (S,)."""

    ids: np.ndarray
    # 0, or 1 in the second of two texts.
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def open_tokenizer(directory: Path, config: EncoderConfig, max_length: int) -> Tokenizer:
    """The tokenizer of a model, which cuts texts to a length and fills none up.

    Raises:
      UsageError: there is none, it has more tokens than the model, or the model has no positions
        for so long a text.
    """
    path = directory / FILE
    if not path.is_file():
        raise UsageError(f"{directory} has no {FILE}.")
    try:
        contents = path.read_text(encoding="utf-8")
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    try:
        tokenizer = Tokenizer.from_str(contents)
    except Exception as error:  # of no type of their own
        raise UsageError(f"{path} is no tokenizer: {first_line(error)}.") from error
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > config.vocab_size:
        raise UsageError(f"{path} has {size:,} tokens, more than the model: {config.vocab_size:,}.")
    if max_length > config.longest:
        raise UsageError(
            f"max_length={max_length}: the model has positions for {config.longest} tokens."
        )
    least = tokenizer.num_special_tokens_to_add(is_pair=True) + 2
    if max_length < least:
        raise UsageError(f"max_length={max_length}: expected at least {least}.")
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)  # of two texts the longer one
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[Texts], config: EncoderConfig) -> list[Tokens]:
    """The tokens of each text, or of each two texts."""
    inputs = [text[0] if len(text) == 1 else text for text in texts]
    found = []
    for encoding in tokenizer.encode_batch(inputs):
        types = np.array(encoding.type_ids, np.int32)
        # RoBERTa has one type for both.
        found.append(Tokens(np.array(encoding.ids, np.int32), types % config.token_types))
    return found
