"""The tokens that a model is validated on: always the same, and each of them counts once."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from examples.flax_llama import documents
from examples.flax_llama.reading import Reading
from examples.flax_llama.responses import Prompt
from examples.flax_llama.rows import apart, padded_rows
from examples.flax_llama.tokenizer import Tokenizer
from examples.flax_llama.tokens import Tokens, load_tokens
from examples.flax_llama.usage import UsageError

# Documents tokenized at a time: no more than a few too many are read.
GROUP = 64
# Of files and of the hub, so many tokens are taken by default: not all need fit into memory.
DEFAULT_TOKENS = 1_000_000

# Tokenized documents, with the bytes of UTF-8 that they have together.
Group = tuple[list[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Valid:
    """Rows of tokens to validate on."""

    # int32 (R, seq + 1).
    rows: np.ndarray
    # bool (R, seq): the targets that count.
    mask: np.ndarray
    # Bytes of UTF-8 per token that counts.
    bytes_per_token: float
    # int32 (R, seq + 1): which conversation or document of its row a token is of, where it attends
    # to that alone; else None.
    segments: np.ndarray | None = None
    # What samples can be made for, of conversations.
    prompts: tuple[Prompt, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of targets that count."""
        return int(self.mask.sum())

    def batches(self, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """All rows in order, as int32 (N, batch, seq + 1), and masks, bool (N, batch, seq).

        Third come their segments, like the rows, if there are some. What it takes to fill the last
        batch is padding, and masked.
        """
        missing = -len(self.rows) % batch

        def filled(array: np.ndarray) -> np.ndarray:
            return np.pad(array, ((0, missing), (0, 0))).reshape(-1, batch, array.shape[1])

        segments = None if self.segments is None else filled(self.segments)
        return filled(self.rows), filled(self.mask), segments

    def scores(self, loss: float) -> dict[str, float]:
        """What a loss in nats per token is in other units."""
        bits_per_byte = loss / math.log(2) / self.bytes_per_token
        return {"perplexity": perplexity(loss), "bits_per_byte": bits_per_byte}


def perplexity(loss: float) -> float:
    """The exponential of a loss, infinite where that is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def open_valid(
    data: str | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    seq: int,
    packing: bool = True,
    attend_across: bool = True,
    num_tokens: int | None,
    reading: Reading | None = None,
    name: str = "valid_data",
) -> Valid:
    """Rows of other text than the training data; arguments as of `open_data` and `read_valid`.

    From the hub it is the split "validation", where `data` does not name one.
    """
    context = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    groups = open_groups(data, tokenizer, num_tokens, reading, name)
    rows = {"seq": seq, "packing": packing, "attend_across": attend_across}
    return read_valid(groups, context, num_tokens=num_tokens, **rows)


def open_groups(
    data: str | Sequence[Path],
    tokenizer: Tokenizer,
    num_tokens: int | None,
    reading: Reading | None = None,
    name: str = "valid_data",
) -> Iterator[Group]:
    """The documents of some data, tokenized, for `num_tokens` targets."""
    if data == documents.BUILT_IN:
        return encode_groups(documents.read_split()[1], tokenizer, num_tokens)
    if not (isinstance(data, str) and documents.is_tokenized(data)):
        shards = documents.open_shards(data, split="validation", reading=reading, name=name)
        return encode_groups(documents.texts(shards), tokenizer, num_tokens)
    tokens, own = load_tokens(Path(data))
    if not own.is_same(tokenizer):
        raise UsageError(
            f"{name}={data} was made by another tokenizer, or with another end of documents."
        )
    return token_groups(tokens)


def encode_groups(
    texts: Iterable[str], tokenizer: Tokenizer, num_tokens: int | None
) -> Iterator[Group]:
    """Tokenizes documents as they are asked for; stops by itself where no number is given."""
    tokens = 0
    for group in documents.batched(texts, GROUP):
        encoded = tokenizer.encode_documents(group)
        yield encoded, sum(len(text.encode()) for text in group)
        tokens += sum(map(len, encoded))
        if num_tokens is None and tokens >= DEFAULT_TOKENS:
            break


def token_groups(tokens: Tokens) -> Iterator[Group]:
    """The documents of an array, one by one."""
    for ids in np.split(tokens.ids, tokens.ends[:-1]):
        yield [ids], len(ids) * tokens.bytes_per_token


def read_valid(
    groups: Iterable[Group],
    context: Sequence[int] | np.ndarray,
    *,
    seq: int,
    packing: bool,
    num_tokens: int | None,
    attend_across: bool = True,
) -> Valid:
    """The rows of the first `num_tokens` targets of some documents, of all by default.

    Args:
      groups: the documents, of which no more are read than it takes.
      context: the token before the first one when packed; without one, that is no target. None is
        taken of documents that do not attend to each other.
      seq: targets of a row.
      packing: all documents are one text, a row's last token is the next one's first; else each
        document is a row, cut or padded.
      num_tokens: number of targets.
      attend_across: packed, a document attends to those before it in its row; else its first token
        is no target.

    Raises:
      UsageError: there are fewer targets, or none.
    """
    read: list[np.ndarray] = []
    is_one_text = packing and attend_across
    num_bytes, targets = 0.0, len(context) - 1 if is_one_text else 0
    most = None if packing else seq
    for new, size in groups:
        read += new
        num_bytes += size
        targets += sum(len(ids) if is_one_text else len(ids[1:][:most]) for ids in new)
        if num_tokens is not None and targets >= num_tokens:
            break
    check_enough(targets, num_tokens)
    segments = None
    if is_one_text:
        rows, mask = covering_rows(np.concatenate([np.array(context, np.int32), *read]), seq)
    elif packing:
        rows, mask = covering_rows(np.concatenate(read), seq)
        numbers = np.repeat(np.arange(len(read)), [len(ids) for ids in read])
        each = apart(covering_rows(numbers, seq)[0])
        mask, segments = mask & each["mask"], each["segments"]
    else:
        rows, mask = padded_rows(read, seq)
    valid = Valid(rows, mask, num_bytes / sum(map(len, read)), segments)
    return valid if num_tokens is None else first_targets(valid, num_tokens)


def check_enough(targets: int, num_tokens: int | None, what: str = "text") -> None:
    """Raises UsageError where there are fewer targets than asked for, or none.

    Args:
      targets: how many there are.
      num_tokens: how many were asked for, None for any.
      what: "text", or "conversations".
    """
    if targets >= (num_tokens or 1):
        return
    asked = "" if num_tokens is None else f", of {num_tokens:,} asked for"
    fewer = "ask for fewer, or " if num_tokens is not None and targets > 0 else ""
    kept = (
        "one document in twenty is kept to validate, where a text file counts as one for every "
        "16 KiB"
        if what == "text"
        else "one in twenty is kept to validate"
    )
    raise UsageError(
        f"There are only {max(targets, 0):,} tokens to validate on{asked}: {fewer}name other "
        f"{what}, {documents.BY_NAME}. Of files that are trained on, {kept}."
    )


def first_targets(valid: Valid, num_tokens: int) -> Valid:
    """The rows in which the first so many targets are, which alone count."""
    mask = valid.mask & (np.cumsum(valid.mask).reshape(valid.mask.shape) <= num_tokens)
    # Rows of which nothing counts would cost time for nothing.
    some = mask.any(axis=1)
    segments = None if valid.segments is None else valid.segments[some]
    return dataclasses.replace(valid, rows=valid.rows[some], mask=mask[some], segments=segments)


def covering_rows(tokens: np.ndarray, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows (R, seq + 1) and masks (R, seq) with every token but the first once as a target."""
    targets = len(tokens) - 1
    index = np.arange(-(-targets // seq))[:, None] * seq + np.arange(seq + 1)
    return tokens[np.minimum(index, targets)].astype(np.int32), index[:, 1:] <= targets
