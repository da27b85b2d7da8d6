"""What is trained on: the first documents of a large corpus where there is one, else six novels."""

import dataclasses
import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import ROOT
from examples.flax_llama.data import load_corpus
from examples.flax_llama.documents import BUILT_IN, META, TEXT, is_tokenized
from examples.flax_llama.tokenize import tokenize
from examples.flax_llama.tokens import TOKENS

# Names the directory of the large corpus.
VARIABLE = "QUALITY_CORPUS"
DEFAULT = ROOT.parent / "shared" / "data" / "corpus"
TRAIN, VALID = "train.jsonl.xz", "valid.jsonl.xz"
# Of so many, the difference of two losses has a standard error of 0.04 % from the choice of text.
VALID_CHARACTERS = 600_000


@dataclasses.dataclass(frozen=True)
class Text:
    """What to train on.

    Attributes:
      settings: of the application that say so.
      about: for the record: which text it is, the digests of its files, and numbers of tokens.
    """

    settings: dict[str, Any]
    about: dict[str, Any]


def default_directory() -> Path | None:
    """The directory of the large corpus, where it is."""
    path = Path(os.environ.get(VARIABLE, DEFAULT))
    return path if (path / TRAIN).is_file() else None


def prepare(directory: Path | None, tokenizer: str, characters: int, cache: Path) -> Text:
    """Tokenizes what is needed, once for each text, tokenizer and size.

    Args:
      directory: of the large corpus; or one that the application's tokenize command made, whose
        last documents are then validated on; None for the built-in novels.
      tokenizer: to train, of all but tokenized text.
      characters: of the training part of the large corpus.
      cache: directory for what is tokenized.
    """
    if directory is None:
        parts = load_corpus(tokenizer)
        about = {
            "text": "the six built-in novels",
            "sha256": {TEXT.name: digest(TEXT)},
            "train_tokens": len(parts.train.ids),
            "valid_tokens": len(parts.valid.ids),
        }
        return Text({"data": BUILT_IN, "tokenizer": tokenizer}, about)
    if is_tokenized(str(directory)):
        tokens = json.loads((directory / META).read_text())["tokens"]
        # The application keeps a twentieth to validate on.
        valid_tokens = min(VALID_CHARACTERS, tokens // 25)
        about = {
            "text": "tokenized documents, the last ones to validate on",
            "sha256": {TOKENS: digest(directory / TOKENS)},
            "tokens": tokens,
            "valid_tokens": valid_tokens,
        }
        return Text({"data": str(directory), "eval_tokens": valid_tokens}, about)
    digests = {name: digest(directory / name) for name in (TRAIN, VALID)}
    key = "-".join(
        [*(d[:12] for d in digests.values()), tokenizer.replace(":", ""), f"{characters}"]
    )
    train, valid = cache / key / "train", cache / key / "valid"
    about = {"text": "the first documents of a large corpus", "sha256": digests}
    for out, name, size, spec in (
        (train, TRAIN, characters, tokenizer),
        (valid, VALID, VALID_CHARACTERS, str(train)),
    ):
        if not is_tokenized(str(out)):
            text = cache / key / f"{out.name}.jsonl"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(first_lines(directory / name, size)), encoding="utf-8")
            tokenize(str(text), spec, out, quiet=True)
            text.unlink()
        meta = json.loads((out / META).read_text())
        about |= {f"{out.name}_tokens": meta["tokens"], f"{out.name}_documents": meta["documents"]}
    return Text({"data": str(train), "valid_data": str(valid), "tokenizer": None}, about)


def first_lines(path: Path, characters: int) -> Iterator[str]:
    """The first lines of compressed JSON lines, with at least so many characters of text."""
    read = 0
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield line
            read += len(json.loads(line)["text"])
            if read >= characters:
                return


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
