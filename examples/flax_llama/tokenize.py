"""Tokenizes documents into a directory that training reads as a memory map, the fastest way.

python -m examples.flax_llama.tokenize --data 'c4/*.json.gz' --tokenizer tokenizer.json --out tokens
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.flax_llama.command import program
from examples.flax_llama.document_end import tell_of_end
from examples.flax_llama.documents import Shard, batched, open_shards, texts
from examples.flax_llama.flags import command_line
from examples.flax_llama.reading import Reading
from examples.flax_llama.tokenizer import shard_tokenizer
from examples.flax_llama.tokens import Tokens, check_new, write_tokens

# Documents tokenized at a time.
GROUP = 1024


def tokenize(
    data: str,
    tokenizer: str,
    out: Path,
    eos_token: str | None = None,
    text_field: str = "text",
    on_bad_line: str = "error",
    max_bad_lines: int = 100,
    quiet: bool = False,
) -> Tokens:
    """Tokenizes documents into a directory to train on.

    The directory appears when it is complete; an interrupted run leaves nothing under its name.

    Args:
      data: files of text or JSON lines, a comma-separated list of paths, globs and directories, or
        hf:NAME[:CONFIG[:SPLIT]].
      tokenizer: bytes; bpe:SIZE, trained on a sample of the documents; or the path of a
        tokenizer.json, of a SentencePiece model, or of a directory with one of them.
      out: new directory.
      eos_token: name of the token that ends a document, or none; by default what the files beside
        the tokenizer call its eos_token, else a usual one such as </s> or <|endoftext|>.
      text_field: of JSON lines and of Hugging Face data, the field that has the text; a dot goes
        into an object, as in meta.content.
      on_bad_line: at a line that is no JSON, has no text, or is not UTF-8: error, or skip it.
      max_bad_lines: so many are left out; one more is an error.
      quiet: show no progress.
    """
    check_new(out)
    reading = Reading(text_field, on_bad_line, max_bad_lines)
    shards = open_shards(data, reading=reading)
    encoder = shard_tokenizer(tokenizer, shards, skip_held_out=False, eos_token=eos_token)
    if eos_token is None:
        tell_of_end(encoder, tokenizer)
    with Progress(
        BarColumn(),
        TextColumn("{task.completed} of {task.total} shards"),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[characters]:,} characters"),
        TimeElapsedColumn(),
        disable=quiet,
    ) as progress:
        alike = len({shard.number for shard in shards}) < len(shards)
        tokens = write_tokens(out, watched(shards, progress), encoder, alike=alike)
    if reading.bad_lines:
        print(reading.summary())
    return tokens


def watched(shards: Sequence[Shard], progress: Progress) -> Iterator[list[str]]:
    """All documents in groups, which the progress bar counts."""
    documents = characters = 0
    task = progress.add_task("", total=len(shards), documents=0, characters=0)
    for done, shard in enumerate(shards):
        for group in batched(texts([shard]), GROUP):
            yield group
            documents += len(group)
            characters += sum(map(len, group))
            progress.update(task, completed=done, documents=documents, characters=characters)
    progress.update(task, completed=len(shards))


def main() -> None:
    # What it has written of a directory disappears.
    with program(tokenize, at_once=False):
        tokens = command_line(tokenize)()
    print(f"{len(tokens.ids):,} tokens of {len(tokens.ends):,} documents")


if __name__ == "__main__":
    main()
