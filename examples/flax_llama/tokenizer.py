"""Tokenizers behind one interface: bytes, byte-level BPE, any tokenizer.json, SentencePiece."""

import dataclasses
import functools
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from examples.flax_llama.chat_template import Rendered
from examples.flax_llama.document_end import END_OF_TEXT, USUAL, find_end, kept_end, with_end
from examples.flax_llama.documents import Shard, sample
from examples.flax_llama.sealed import checked, sealed
from examples.flax_llama.tokenizer_config import TokenizerConfig
from examples.flax_llama.usage import UsageError, cannot_be_read, read_object

EXPECTED = (
    'expected "bytes", "bpe:SIZE" with SIZE at least 256, a tokenizer.json, a SentencePiece '
    ".model, or a directory with one of them."
)

# Characters of files or of the hub that "bpe:SIZE" is trained on.
SAMPLE = 20_000_000
# Texts encoded at a time: enough for all cores, and few enough for flat memory.
ENCODE_BATCH = 64
# The CRC-32 of each file that was saved, by its name.
SUMS = "tokenizer_sums.json"


@dataclasses.dataclass(frozen=True)
class Marked:
    """Tokens, and the characters that they are of."""

    # int32 (T,).
    ids: np.ndarray
    # int64 (T, 2): from a character up to another one.
    spans: np.ndarray

    @classmethod
    def of(cls, encoding: tokenizers.Encoding) -> "Marked":
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return cls(np.array(encoding.ids, np.int32), spans)


def within(tokenizer: tokenizers.Tokenizer, text: str, place: int) -> Marked:
    """The tokens of a part of a text, from some place in it on.

    Where a text begins, some tokenizers add a space, and here they must not.
    """
    alone = Marked.of(tokenizer.encode(text, add_special_tokens=False))
    line, whole = (
        Marked.of(tokenizer.encode(each, add_special_tokens=False)) for each in ("\n", f"\n{text}")
    )
    count = len(line.ids)
    if place == 0 or not np.array_equal(whole.ids[:count], line.ids):
        return Marked(alone.ids, alone.spans + place)
    return Marked(whole.ids[count:], whole.spans[count:] + place - 1)


class Tokenizer(ABC):
    """Turns texts into token ids and back.

    Attributes:
      vocab_size: one more than the largest id.
      eos_id: the token that ends a document, None where there is none.
      usual_end: which one it is where nothing beside the tokenizer says so.
      file_name: name of the file that `save` writes.
      config: what stands beside it in a model's directory, if it is from one.
    """

    vocab_size: int
    eos_id: int | None
    usual_end: int | None
    file_name: str
    config: TokenizerConfig | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 (T,), with no token added at its start or end."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids."""

    @abstractmethod
    def name_of(self, token: int) -> str:
        """What a token is called, as special ones are."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The contents of its file."""

    @abstractmethod
    def id_of(self, name: str) -> int | None:
        """The id of a token, None where there is no such token."""

    @property
    def start_ids(self) -> list[int]:
        """The tokens that a text begins with, as a model's directory says, or else its file.

        Raises:
          UsageError: the tokenizer lacks the one that is named.
        """
        config = self.config
        if config is None or config.adds_bos is None:
            return self._own_start()
        if not config.adds_bos or (name := config.tokens.get("bos_token")) is None:
            return []
        if (bos := self.id_of(name)) is None:
            raise UsageError(f"{config.directory}: the tokenizer lacks its own bos_token {name!r}.")
        return [bos]

    def named(self, purpose: str) -> int | None:
        """The special token that a model's directory has for a purpose, such as `eos_token`."""
        name = None if self.config is None else self.config.tokens.get(purpose)
        return None if name is None else self.id_of(name)

    def is_same(self, other: "Tokenizer") -> bool:
        """Whether documents are the same tokens with another one."""
        return self.to_bytes() == other.to_bytes() and self.eos_id == other.eos_id

    def _own_start(self) -> list[int]:
        return []

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 (T,)."""
        return self.encode_batch([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document, ended by `eos_id` if there is one."""
        end = np.array([] if self.eos_id is None else [self.eos_id], np.int32)
        return [np.append(ids, end) for ids in self.encode_batch(texts)]

    def save(self, directory: Path) -> None:
        """Writes the file that `load_tokenizer` finds in a directory, and what stood beside it."""
        config = self.config or TokenizerConfig.none(directory)
        files = {self.file_name: self.to_bytes()} | config.to_save(kept_end(self))
        sums = {name: zlib.crc32(contents) for name, contents in files.items()}
        files[SUMS] = (json.dumps(sealed(sums), indent=1) + "\n").encode()
        for name, contents in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(contents)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, by the contents of a tokenizer.json."""

    file_name = "tokenizer.json"

    def __init__(self, contents: str, config: TokenizerConfig | None = None):
        self.config = config
        self._tokenizer = tokenizers.Tokenizer.from_str(contents)
        # What a file may ask for; documents are cut and padded by the data pipeline alone.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that spells the name of a special token has not the token in it.
        self._tokenizer.encode_special_tokens = True
        vocab = self._tokenizer.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        self.usual_end = next((vocab[name] for name in USUAL if name in vocab), None)
        self.eos_id = find_end(self)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = []
        for start in range(0, len(texts), ENCODE_BATCH):
            some = list(texts[start : start + ENCODE_BATCH])
            encodings = self._tokenizer.encode_batch_fast(some, add_special_tokens=False)
            ids += [np.array(encoding.ids, np.int32) for encoding in encodings]
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(list(map(int, ids)))

    def name_of(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def to_bytes(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def id_of(self, name: str) -> int | None:
        return self._tokenizer.token_to_id(name)

    @functools.cached_property
    def special(self) -> dict[int, str]:
        """The names of special tokens by their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {id: token.content for id, token in added.items() if token.special}

    @functools.cached_property
    def _of_rendered(self) -> tokenizers.Tokenizer:
        """The same where the name of a special token is that token."""
        tokenizer = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        # Which may leave out spaces from what a token is of.
        tokenizer.post_processor = None
        return tokenizer

    def encode_rendered(self, texts: Sequence[Rendered]) -> list[Marked]:
        """What chat templates made, where the names of special tokens are these tokens."""
        encodings = self._of_rendered.encode_batch(
            [each.text for each in texts], add_special_tokens=False
        )
        return [
            self._in_pieces(each) if each.literal else Marked.of(encoding)
            for each, encoding in zip(texts, encodings, strict=True)
        ]

    def _in_pieces(self, rendered: Rendered) -> Marked:
        """A text in which there are names of special tokens that are no such tokens."""
        found, place = [], 0
        for start, end in [*rendered.literal, (len(rendered.text),) * 2]:
            for tokenizer, first, last in (
                (self._of_rendered, place, start),
                (self._tokenizer, start, end),
            ):
                if first < last:
                    found.append(within(tokenizer, rendered.text[first:last], first))
            place = end
        ids, spans = zip(*((each.ids, each.spans) for each in found), strict=True)
        return Marked(np.concatenate(ids), np.concatenate(spans))

    def _own_start(self) -> list[int]:
        alone, whole = (
            self._tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True)
        )
        places = (k for k in range(len(whole)) if whole[k : k + len(alone)] == alone)
        return whole[: next(places, 0)]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, by the contents of its file."""

    file_name = "tokenizer.model"

    def __init__(self, contents: bytes, config: TokenizerConfig | None = None):
        self.config = config
        self._contents = contents
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=contents)
        self.vocab_size = self._processor.vocab_size()
        self.usual_end = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        self.eos_id = find_end(self)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = self._processor.encode(list(texts), out_type=int)
        return [np.array(each, np.int32) for each in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._processor.decode(list(map(int, ids)))

    def name_of(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def to_bytes(self) -> bytes:
        return self._contents

    def id_of(self, name: str) -> int | None:
        found = self._processor.piece_to_id(name)
        return found if self._processor.id_to_piece(found) == name else None


def is_trained_here(spec: str) -> bool:
    """Whether `train_tokenizer` makes this tokenizer, rather than `load_tokenizer`."""
    return spec == "bytes" or spec.startswith("bpe:")


def trained_size(spec: str) -> int:
    """Vocabulary asked for by "bytes" or "bpe:SIZE"."""
    if spec == "bytes":
        return 256
    match = re.fullmatch(r"bpe:(\d+)", spec)
    if match is None or int(match[1]) < 256:
        raise UsageError(f"tokenizer={spec!r}: {EXPECTED}")
    return int(match[1])


def train_tokenizer(texts: Iterable[str], spec: str, *, eos: bool) -> Tokenizer:
    """Byte-level BPE of "bpe:SIZE"; of "bytes", which has no merges, and a token is a byte.

    Args:
      texts: to train on.
      spec: "bytes" or "bpe:SIZE".
      eos: add a token that ends documents: one of SIZE, and a 257th of "bytes".

    Raises:
      UsageError: it is neither.
    """
    special = [END_OF_TEXT] if eos else []
    size = trained_size(spec) + (len(special) if spec == "bytes" else 0)
    if size < 256 + len(special):
        raise UsageError(
            f"tokenizer={spec!r}: expected at least {256 + len(special)}, of all bytes and the "
            "end of a document."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([] if spec == "bytes" else texts, trainer)
    return JsonTokenizer(tokenizer.to_str())


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of tokenizers in a directory."""
    names = (JsonTokenizer.file_name, SentencePieceTokenizer.file_name)
    return [directory / name for name in names if (directory / name).is_file()]


def check_sums(directory: Path) -> None:
    """Refuses files of a tokenizer that are not as `save` wrote them, if it did.

    Raises:
      UsageError: one of them is damaged, or was changed.
    """
    path = directory / SUMS
    advice = f"Bring it back; or, if that is as it is to be, delete {SUMS}"
    if not path.is_file():
        return
    for name, saved in checked(read_object(path), path, advice).items():
        try:
            contents = (directory / name).read_bytes()
        except OSError as error:
            raise cannot_be_read(str(directory / name), error) from error
        if zlib.crc32(contents) != saved:
            raise UsageError(
                f"{directory / name} is damaged, or was changed since the tokenizer was saved. "
                f"{advice}."
            )


def load_tokenizer(path: str | Path, name: str | None = "tokenizer") -> Tokenizer:
    """The tokenizer of a tokenizer.json, a SentencePiece .model, or a directory with either.

    Args:
      path: of it.
      name: of the setting that says so, for errors; None where none does, as of a run's own.

    Raises:
      UsageError: there is none, or the file is not one.
    """

    def what() -> str:
        return f"{name}={str(path)!r}" if name else str(path)

    if path == "":
        raise UsageError(f"{what()}: {EXPECTED}")
    path = Path(path)
    if os.path.isdir(path):
        found = tokenizer_files(path)
        if not found:
            names = f"{JsonTokenizer.file_name} or {SentencePieceTokenizer.file_name}"
            raise UsageError(f"{what()}: expected {names} in the directory.")
        path = found[0]
    if not os.path.isfile(path):
        raise UsageError(f"{what()}: there is no such file; {EXPECTED}")
    check_sums(path.parent)
    try:
        if path.suffix.lower() == ".json":
            contents = path.read_text(encoding="utf-8")
            return JsonTokenizer(contents, TokenizerConfig.read(path.parent))
        if path.suffix.lower() == ".model":
            return SentencePieceTokenizer(path.read_bytes(), TokenizerConfig.read(path.parent))
    except UsageError:
        raise
    except OSError as error:
        raise cannot_be_read(what(), error) from error
    # The two libraries raise bare Exception and RuntimeError.
    except Exception as error:
        raise UsageError(f"{what()} cannot be read as a tokenizer: {error}") from error
    raise UsageError(f"{what()}: expected a file called *.json or *.model.")


def shard_tokenizer(
    spec: str, shards: Sequence[Shard], *, skip_held_out: bool, eos_token: str | None = None
) -> Tokenizer:
    """The tokenizer of files or of the hub, trained on a sample if it is one to be trained.

    Args:
      spec: of the tokenizer.
      shards: to train it on.
      skip_held_out: whether a part of them is kept to validate on.
      eos_token: what ends a document, if it is not what the tokenizer says.

    Raises:
      UsageError: there is no such tokenizer, or it has no such token.
    """
    if not is_trained_here(spec):
        return with_end(load_tokenizer(spec), eos_token)
    texts = sample(shards, SAMPLE, skip_held_out=skip_held_out)
    return with_end(train_tokenizer(texts, spec, eos=True), eos_token)
