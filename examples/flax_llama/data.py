"""What a run trains and validates on, out of the built-in text, files, or the Hugging Face hub.

Tokens in memory or in a memory map are read in any order: an epoch is a permutation of all rows.
Conversations are all read into memory first, so that whatever is wrong with one is said at once.
Other documents are read from start to end, by a stream that shuffles a group of them at a time.
Either way, the seed gives all batches and their order.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from examples.flax_llama.conversation_data import (
    encoder_of,
    open_conversation_shards,
    open_valid_conversations,
    read_valid_conversations,
    recognise,
)
from examples.flax_llama.document_end import tell_of_end
from examples.flax_llama.documents import (
    BUILT_IN,
    is_tokenized,
    open_shards,
    read_split,
    texts,
)
from examples.flax_llama.interleaved import InterleavedRows
from examples.flax_llama.packing import ConversationRows
from examples.flax_llama.paths import TRAINED_ON
from examples.flax_llama.reading import Reading
from examples.flax_llama.rows import Row, Rows, TokenRows
from examples.flax_llama.stream import DocumentGroups
from examples.flax_llama.tokenizer import (
    Tokenizer,
    is_trained_here,
    load_tokenizer,
    train_tokenizer,
    trained_size,
)
from examples.flax_llama.tokenizer_choice import DEFAULT_TOKENIZER, Spec, check_end, check_same
from examples.flax_llama.tokens import Tokens, load_tokens
from examples.flax_llama.usage import UsageError, say_once
from examples.flax_llama.validation import (
    Group,
    Valid,
    encode_groups,
    open_groups,
    read_valid,
    token_groups,
)

# Enough for ever: grain's own endless repetition has a length that overflows in batches of one.
EPOCHS = 1 << 20
# Batches made ahead of the training step.
PREFETCH = 16


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run trains and validates on."""

    tokenizer: Tokenizer
    # Endless {"tokens": int32 (rows of this host, seq + 1), "mask": bool (rows, seq)}, where the
    # mask has the targets that count; of conversations or documents apart also "segments", int32
    # (rows, seq + 1), see `packing`. `get_state` is the position, which can be written as JSON,
    # and `set_state` goes to it.
    train: grain.DatasetIterator[Row]
    valid: Valid
    # (T,) all tokens of the training part, of conversations those to be learnt; None where they
    # are streamed.
    train_tokens: np.ndarray | None
    # How many documents these are, likewise.
    documents: int | None
    # And how many rows, which are an epoch.
    rows: int | None = None
    # Knows the lines that were left out.
    reading: Reading = dataclasses.field(default_factory=Reading)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The built-in text, split and tokenized."""

    tokenizer: Tokenizer
    # The first 95 % of each novel, and the rest.
    train: Tokens
    valid: Tokens


@dataclasses.dataclass(frozen=True)
class Batches:
    """What batches are asked for; `open_data` says what each of it is."""

    batch: int
    seq: int
    packing: bool
    attend_across: bool
    seed: int
    process_index: int
    process_count: int

    @property
    def rows(self) -> dict[str, Any]:
        return {"seq": self.seq, "packing": self.packing}

    @property
    def text_rows(self) -> dict[str, Any]:
        return {**self.rows, "attend_across": self.attend_across}

    @property
    def host(self) -> dict[str, int]:
        return {"process_index": self.process_index, "process_count": self.process_count}


@functools.cache
def load_corpus(tokenizer: str) -> Corpus:
    """Reads, splits and tokenizes the text; a few seconds, once per process and tokenizer."""
    parts = read_split()
    if is_trained_here(tokenizer):
        encoder = train_tokenizer(parts[0], tokenizer, eos=False)
    else:
        encoder = load_tokenizer(tokenizer)
    encoded = [encoder.encode_batch(part) for part in parts]
    sizes = [sum(len(text.encode()) for text in part) for part in parts]
    return Corpus(encoder, *map(Tokens.join, encoded, sizes))


def open_data(
    data: str | Sequence[Path] = BUILT_IN,
    *,
    valid_data: str | Sequence[Path] | None = None,
    tokenizer: str | None = None,
    eos_token: str | None = None,
    batch: int,
    seq: int,
    packing: bool = True,
    attend_across: bool = True,
    seed: int = 0,
    eval_tokens: int | None = None,
    reading: Reading | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens everything that a run reads, and refuses what could not be trained on.

    Args:
      data: "austen", the built-in text; files of text or JSON lines, a comma-separated list of
        paths, globs and directories, or the files themselves; a directory made by the tokenize
        command; or "hf:NAME[:CONFIG[:SPLIT]]".
      valid_data: the same to validate on. By default the end of each built-in novel; the last
        documents of a tokenized directory; one document in twenty of files, which is then not
        trained on; and the split "validation" from the hub.
      tokenizer: "bytes"; "bpe:SIZE", trained on the training part, or a sample of it where that is
        streamed; or the path of one. By default that of a tokenized directory, else "bpe:2048".
      eos_token: name of the token that ends a document, or "none"; by default what the files beside
        the tokenizer say, else a usual one.
      batch: rows of a batch, on all hosts together.
      seq: targets of a row.
      packing: all documents are one text, cut into rows; else a document is a row.
      attend_across: packed, a document attends to those before it in its row.
      seed: of the order.
      eval_tokens: tokens to validate on; by default all there are, of files and of the hub about
        the first million.
      reading: where the texts of files and of the hub are, and what becomes of lines without one.
      process_index: which host this is.
      process_count: number of hosts.

    Raises:
      UsageError: something cannot be read, is too small, or does not fit together.
    """
    reading = reading or Reading()
    if batch < 1 or batch % process_count:
        raise UsageError(f"batch={batch}: expected a multiple of {process_count} processes.")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed={seed}: expected 0 to {(1 << 32) - 1}.")
    if reading.data_format == "auto":
        found = recognise(data, reading).data_format
        reading = dataclasses.replace(reading, data_format=found)
    if valid_data is None and isinstance(data, str) and data.startswith("hf:"):
        name, config, *_ = [*data.removeprefix("hf:").split(":"), ""]
        valid_data = f"hf:{name}:{config}:validation"
    open_them = open_text if reading.data_format == "text" else open_conversations
    batches = Batches(batch, seq, packing, attend_across, seed, process_index, process_count)
    tokens = Spec(tokenizer, eos_token)
    return open_them(data, valid_data, tokens, eval_tokens, reading, batches)


def open_text(
    data: str | Sequence[Path],
    valid_data: str | Sequence[Path] | None,
    tokenizer: Spec,
    eval_tokens: int | None,
    reading: Reading,
    batches: Batches,
) -> Data:
    """What `open_data` does with text."""
    held_out: Iterable[Group] = ()
    if data == BUILT_IN:
        corpus = load_corpus(tokenizer.of_text)
        encoder, train, held_out = corpus.tokenizer, corpus.train, token_groups(corpus.valid)
    elif isinstance(data, str) and is_tokenized(data):
        train, encoder = load_tokens(Path(data))
        check_same(tokenizer.given, encoder, data)
        if isinstance(valid_data, str) and os.path.realpath(valid_data) == os.path.realpath(data):
            say_once(TRAINED_ON)
        if valid_data is None:
            train, last = train.split()
            held_out = token_groups(last)
    else:
        train = open_shards(data, reading=reading, valid_data=valid_data)
        encoder = tokenizer.open(train, skip_held_out=valid_data is None)
        if tokenizer.eos_token is None:
            tell_of_end(encoder, tokenizer.of_text)
        held_out = encode_groups(texts(train, held_out=True), encoder, eval_tokens)
    if valid_data is not None:
        held_out = open_groups(valid_data, encoder, eval_tokens, reading)
    if isinstance(train, Tokens) and tokenizer.eos_token is not None:
        check_end(tokenizer.eos_token, encoder, data)
    context = [] if encoder.eos_id is None else [encoder.eos_id]
    tokens = documents = rows = None
    if isinstance(train, Tokens):
        dataset = token_batches(train, **dataclasses.asdict(batches))
        context = context or train.ids[-1:]
        tokens, documents = train.ids, len(train.ends)
        rows = len(TokenRows(train, **batches.text_rows))
    else:
        held = {"skip_held_out": valid_data is None, "seed": batches.seed}

        def groups(stream: int, streams: int) -> DocumentGroups:
            return DocumentGroups(train, **held, process_index=stream, process_count=streams)

        host = batches.process_index, batches.process_count
        own = batches.batch // batches.process_count
        dataset = stream_batches(groups, encoder, batch=own, **batches.text_rows, host=host)
    valid = read_valid(held_out, context, num_tokens=eval_tokens, **batches.text_rows)
    return Data(encoder, iter(dataset), valid, tokens, documents, rows, reading)


def open_conversations(
    data: str | Sequence[Path],
    valid_data: str | Sequence[Path] | None,
    tokenizer: Spec,
    eval_tokens: int | None,
    reading: Reading,
    batches: Batches,
) -> Data:
    """What `open_data` does with conversations, which every host reads whole."""
    shards = open_conversation_shards(data, reading, valid_data=valid_data)
    own_valid = valid_data is None
    encoder = tokenizer.open(shards, skip_held_out=own_valid)
    if tokenizer.eos_token is None:
        tell_of_end(encoder, tokenizer.of_text, of_answers=True)
    to_tokens = encoder_of(encoder, reading, batches.seq)
    train, _ = to_tokens.tokenize(texts(shards, held_out=False if own_valid else None))
    source = ConversationRows(train, seed=batches.seed, **batches.rows)
    size = batches.batch
    if len(source) < size:
        found = f"{len(train.ends):,} conversations are {len(source):,} rows"
        raise too_small(size, batches.seq, found)
    dataset = row_batches(source, batch=size, seed=batches.seed, **batches.host)
    rows: dict[str, Any] = {"num_tokens": eval_tokens, **batches.rows}
    if valid_data is None:
        valid = read_valid_conversations(texts(shards, held_out=True), to_tokens, **rows)
    else:
        valid = open_valid_conversations(valid_data, encoder, **rows, reading=reading)
    targets, documents = train.targets, len(train.ends)
    return Data(encoder, iter(dataset), valid, targets, documents, len(source), reading)


def vocabulary_size(data: str, tokenizer: str | None) -> int:
    """The tokens of the tokenizer that `open_data` would take, found without reading the text.

    A BPE that is trained on a text too small for its size has fewer.

    Raises:
      UsageError: there is no such tokenizer.
    """
    if tokenizer is None and is_tokenized(data):
        return load_tokenizer(data, None).vocab_size
    spec = tokenizer or DEFAULT_TOKENIZER
    if not is_trained_here(spec):
        return load_tokenizer(spec).vocab_size
    # Of bytes, the end of a document is one more; the built-in novels have none.
    return trained_size(spec) + (spec == "bytes" and data != BUILT_IN)


def token_batches(
    tokens: Tokens,
    *,
    batch: int,
    seq: int,
    packing: bool = True,
    attend_across: bool = True,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Row]:
    """Endless batches of tokens in memory or in a memory map; every epoch is shuffled anew.

    The hosts share the rows of each batch: together they are the same for any number of them.
    """
    rows = TokenRows(tokens, seq=seq, packing=packing, attend_across=attend_across)
    if len(rows) < batch:
        raise too_small(batch, seq, f"{len(tokens.ids)} tokens are {len(rows)} rows")
    host = {"process_index": process_index, "process_count": process_count}
    return row_batches(rows, batch=batch, seed=seed, **host)


def row_batches(
    rows: TokenRows | ConversationRows,
    *,
    batch: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> grain.IterDataset[Row]:
    """Endless batches of rows that can be read in any order; as `token_batches`."""
    shuffled = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(EPOCHS)
    mine = shuffled[process_index::process_count].batch(batch // process_count)
    # One thread keeps up; many would only wait for each other.
    return mine.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))


def position_in_batches(position: Any, was: int, now: int) -> tuple[Any, int]:
    """A position in batches of one size as one in batches of another.

    Returns:
      The position, and how many rows are left out up to the next whole batch. Streams count rows.
    """
    if "next_index" not in position:
        return position, 0
    rows = position["next_index"] * was
    batches = -(-rows // now)
    return {**position, "next_index": batches}, batches * now - rows


def stream_batches(
    groups: Callable[[int, int], DocumentGroups],
    tokenizer: Tokenizer,
    *,
    batch: int,
    seq: int,
    packing: bool = True,
    attend_across: bool = True,
    host: tuple[int, int] = (0, 1),
) -> grain.IterDataset[Row]:
    """Endless batches of streams of documents, made in a thread; see `interleaved`.

    Args:
      groups: makes the stream of a number, out of so many.
      tokenizer: of the texts.
      batch: rows of this host.
      seq: targets of a row.
      packing: as of `open_data`.
      attend_across: likewise.
      host: which one this is, and the number of hosts.
    """
    context = [] if tokenizer.eos_id is None or not attend_across else [tokenizer.eos_id]
    tokens = rows = 0
    for text, _ in groups(*host).documents(epoch=0):
        (ids,) = tokenizer.encode_documents([text])
        tokens += len(ids)
        rows = (len(context) + tokens - 1) // seq if packing else rows + (len(ids) > 1)
        if rows >= batch:
            break
    else:
        raise too_small(batch, seq, f"{tokens} tokens are {rows} rows")

    def rows_of(stream: int, streams: int) -> grain.IterDataset[Row]:
        encoded = groups(stream, streams).map(tokenizer.encode_documents)
        own = {"packing": packing, "attend_across": attend_across}
        return Rows(encoded, seq=seq, **own, context=context)

    batches = InterleavedRows(rows_of, *host).batch(batch)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=PREFETCH)


def too_small(batch: int, seq: int, found: str) -> UsageError:
    return UsageError(
        f"batch={batch} of seq={seq} is larger than the data: {found}. Choose a smaller batch or "
        "seq, or more text."
    )


def unigram_loss(data: Data) -> float:
    """Nats per token to validate on under the training part's frequencies, add-one smoothed."""
    if data.train_tokens is None:
        raise ValueError("The tokens to train on are streamed.")
    counts = np.bincount(data.train_tokens, minlength=data.tokenizer.vocab_size) + 1
    targets = data.valid.rows[:, 1:][data.valid.mask]
    return float(-np.log(counts / counts.sum())[targets].mean())
