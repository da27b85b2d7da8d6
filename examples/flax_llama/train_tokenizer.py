"""Trains a byte-level BPE on the first documents of each file.

python -m examples.flax_llama.train_tokenizer --data 'c4/*.json.gz' --out tokenizer.json
"""

from pathlib import Path

import tyro

from examples.flax_llama.command import program
from examples.flax_llama.config import UsageError
from examples.flax_llama.documents import open_shards, sample
from examples.flax_llama.tokenizer import Tokenizer, train_tokenizer


def train(
    data: str, out: Path, vocab_size: int = 32_000, characters: int = 100_000_000
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, with a token that ends documents.

    Args:
      data: files of text or JSON lines, a comma-separated list of paths and globs, or
        hf:NAME[:CONFIG[:SPLIT]].
      out: new file, called *.json.
      vocab_size: number of tokens, at least 257.
      characters: size of the sample that it is trained on: the first documents of each file, or of
        32 files spread over all where there are more.
    """
    if out.suffix != ".json":
        raise UsageError(f"out={out}: expected a file called *.json.")
    if out.exists():
        raise UsageError(f"out={out} exists: name another one or delete it.")
    texts = sample(open_shards(data), characters, skip_held_out=False)
    tokenizer = train_tokenizer(texts, f"bpe:{vocab_size}", eos=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_bytes(tokenizer.to_bytes())
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return tokenizer


def main() -> None:
    with program(train):
        tokenizer = tyro.cli(train)
    print(f"{tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    main()
