"""Trains a byte-level BPE on the first documents of each file.

python -m examples.flax_llama.train_tokenizer --data 'c4/*.json.gz' --out tokenizer.json
"""

from pathlib import Path

from examples.flax_llama.command import program
from examples.flax_llama.config import UsageError
from examples.flax_llama.documents import open_shards, sample
from examples.flax_llama.flags import command_line
from examples.flax_llama.reading import Reading
from examples.flax_llama.tokenizer import Tokenizer, train_tokenizer
from examples.flax_llama.writing import make_directory, write_whole


def train(
    data: str,
    out: Path,
    vocab_size: int = 32_000,
    characters: int = 100_000_000,
    text_field: str = "text",
    on_bad_line: str = "error",
    max_bad_lines: int = 100,
) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, with a token that ends documents.

    Args:
      data: files of text or JSON lines, a comma-separated list of paths, globs and directories, or
        hf:NAME[:CONFIG[:SPLIT]].
      out: new file, called *.json.
      vocab_size: number of tokens, at least 257.
      characters: size of the sample that it is trained on: the first documents of each file, or of
        32 files spread over all where there are more.
      text_field: of JSON lines and of Hugging Face data, the field that has the text; a dot goes
        into an object, as in meta.content.
      on_bad_line: at a line that is no JSON, has no text, or is not UTF-8: error, or skip it.
      max_bad_lines: so many are left out; one more is an error.
    """
    if out.suffix.lower() != ".json":
        raise UsageError(f"out={out}: expected a file called *.json.")
    if out.exists():
        raise UsageError(f"out={out} exists: name another one or delete it.")
    shards = open_shards(data, reading=Reading(text_field, on_bad_line, max_bad_lines))
    texts = sample(shards, characters, skip_held_out=False)
    tokenizer = train_tokenizer(texts, f"bpe:{vocab_size}", eos=True)
    make_directory(out.parent)
    write_whole(out, tokenizer.to_bytes())
    return tokenizer


def main() -> None:
    with program(train):
        tokenizer = command_line(train)()
    print(f"{tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    main()
