"""The built-in text: novels split and tokenized, batches to train on, batches to validate on."""

import dataclasses
import functools
import lzma
import math
import re
from pathlib import Path

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from examples.flax_llama.config import UsageError

TEXT = Path(__file__).parent / "data" / "austen.txt.xz"
# Each is a line of the text exactly once, where the novel begins.
TITLES = (
    "EMMA",
    "MANSFIELD PARK",
    "NORTHANGER ABBEY",
    "Persuasion",
    "PRIDE AND PREJUDICE",
    "SENSE AND SENSIBILITY",
)
HELD_OUT = 0.05


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text, split and tokenized."""

    tokenizer: Tokenizer
    # (T,) int32: the first 95 % of each novel.
    train: np.ndarray
    # (1 + N,) int32: the last token of `train` as context, then the N held-out tokens.
    valid: np.ndarray
    # Bytes of UTF-8 per held-out token.
    bytes_per_token: float

    def scores(self, loss: float) -> dict[str, float]:
        """What a held-out loss in nats per token is in other units."""
        bits_per_byte = loss / math.log(2) / self.bytes_per_token
        return {"perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}


def vocab_size(tokenizer: str) -> int:
    """Vocabulary asked for by "bytes" or "bpe:SIZE"."""
    if tokenizer == "bytes":
        return 256
    match = re.fullmatch(r"bpe:(\d+)", tokenizer)
    if match is None or int(match[1]) < 256:
        raise UsageError(
            f'tokenizer={tokenizer!r}: expected "bytes" or "bpe:SIZE" with SIZE at least 256.'
        )
    return int(match[1])


def train_tokenizer(texts: list[str], size: int) -> Tokenizer:
    """Byte-level BPE; with a vocabulary of 256 there are no merges, and a token is a byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_split() -> tuple[list[str], list[str]]:
    """The six novels as (training parts, held-out parts)."""
    text = lzma.decompress(TEXT.read_bytes()).decode()
    novels = re.split(rf"^(?=(?:{'|'.join(TITLES)})$)", text, flags=re.MULTILINE)[1:]
    cuts = [round(len(novel) * (1 - HELD_OUT)) for novel in novels]
    train = [novel[:cut] for novel, cut in zip(novels, cuts, strict=True)]
    valid = [novel[cut:] for novel, cut in zip(novels, cuts, strict=True)]
    return train, valid


@functools.cache
def load_corpus(tokenizer: str) -> Corpus:
    """Reads, splits and tokenizes the text; a few seconds, once per process and tokenizer."""
    train_texts, valid_texts = read_split()
    trained = train_tokenizer(train_texts, vocab_size(tokenizer))

    def encode(texts: list[str]) -> np.ndarray:
        ids = [encoding.ids for encoding in trained.encode_batch_fast(texts)]
        return np.concatenate([np.array(part, np.int32) for part in ids])

    train, valid = encode(train_texts), encode(valid_texts)
    num_bytes = sum(len(text.encode()) for text in valid_texts)
    return Corpus(trained, train, np.append(train[-1:], valid), num_bytes / len(valid))


class Windows:
    """Source of windows of seq + 1 tokens; one's last token is the next one's first."""

    def __init__(self, tokens: np.ndarray, seq: int):
        self.tokens, self.seq = tokens, seq

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[index * self.seq : (index + 1) * self.seq + 1]


def train_batches(tokens: np.ndarray, batch: int, seq: int, seed: int) -> grain.MapDataset:
    """Endless int32 (batch, seq + 1); `[i]` is batch i, every epoch is shuffled anew."""
    windows = Windows(tokens, seq)
    if len(windows) < batch:
        raise UsageError(
            f"batch={batch} of seq={seq} is larger than the data: {len(tokens)} tokens are "
            f"{len(windows)} windows. Choose a smaller batch or seq."
        )
    return grain.MapDataset.source(windows).seed(seed).shuffle().repeat().batch(batch)


def valid_batches(tokens: np.ndarray, batch: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """All tokens but the first, each once as a target, in order.

    Returns:
      tokens, int32 (batches, batch, seq + 1), and the mask of targets that count, bool (batches,
      batch, seq): what it takes to fill the last batch is padding.
    """
    targets = len(tokens) - 1
    rows = batch * math.ceil(targets / (batch * seq))
    index = np.arange(rows)[:, None] * seq + np.arange(seq + 1)
    mask = index[:, 1:] <= targets
    padded = tokens[np.minimum(index, targets)]
    return padded.reshape(-1, batch, seq + 1), mask.reshape(-1, batch, seq)


def unigram_loss(corpus: Corpus) -> float:
    """Nats per held-out token under the training part's token frequencies, add-one smoothed."""
    counts = np.bincount(corpus.train, minlength=corpus.tokenizer.get_vocab_size()) + 1
    return float(-np.log(counts / counts.sum())[corpus.valid[1:]].mean())
