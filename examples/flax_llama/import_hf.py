"""Imports a model of Hugging Face, as a directory that training and all other commands begin with.

python -m examples.flax_llama.import_hf ~/SmolLM2-135M --out runs/smollm2
python -m examples.flax_llama.finetune --model runs/smollm2 --data chats.jsonl --out runs/chats
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from examples.flax_llama.changes import settings_of
from examples.flax_llama.checkpoint import CheckpointError, Checkpoints
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.flags import command_line
from examples.flax_llama.model import Params
from examples.flax_llama.run_directory import write_settings
from examples.flax_llama.shapes import DTYPES, LlamaConfig
from examples.flax_llama.step import initial_params
from examples.flax_llama.tokenizer import load_tokenizer, tokenizer_files
from examples.flax_llama.tokens import check_new, new_directory
from examples.flax_llama.units import size
from examples.flax_llama.usage import UsageError, one_of
from examples.hf.companions import copy_companions
from examples.hf.configuration import read_shape
from examples.hf.names import EMBEDDING, Found, match, some
from examples.hf.tensors import Tensor, open_tensors
from examples.hf.weights import load

# Positions of an imported model that sampling keeps, if it knows as many.
SEQ = 1024


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of Hugging Face, of which no weights are read yet."""

    config: Config
    shape: LlamaConfig
    tensors: dict[str, Tensor]
    found: Found

    @property
    def like(self) -> Params:
        """The shapes and dtypes of the parameters."""
        return jax.eval_shape(lambda: initial_params(self.config, self.shape))


def open_model(
    directory: Path, *, param_dtype: str | None = None, int8: bool = False, seq: int | None = None
) -> Source:
    """Checks all of a model's directory but the numbers in it.

    Args:
      directory: of Hugging Face, with config.json, safetensors and a tokenizer.
      param_dtype: float32 or bfloat16; by default that of the embedding, float32 for other ones.
      int8: whether the layers' matrices are quantized.
      seq: positions that sampling keeps; by default 1024, or what the model knows.

    Raises:
      UsageError: something is missing, damaged, or not supported; names it.
    """
    shape = read_shape(directory)
    tensors = open_tensors(directory)
    try:
        found = match(shape, tensors)
    except UsageError as error:
        raise UsageError(f"{directory}: {error}") from error
    if not tokenizer_files(directory):
        raise UsageError(f"{directory} has no tokenizer.json or tokenizer.model.")
    tokens = load_tokenizer(directory, None).vocab_size
    if tokens > shape.vocab_size:
        raise UsageError(
            f"{directory}: the tokenizer has {tokens} tokens, and the model only "
            f"{shape.vocab_size}."
        )
    own = next(tensors[e.name].dtype for e in found.entries if e.name.endswith(EMBEDDING))
    param_dtype = param_dtype or (own if own in DTYPES else "float32")
    one_of("param_dtype", param_dtype, DTYPES)
    config = Config(
        preset=str(directory),
        param_dtype=param_dtype,
        dtype=param_dtype,
        tokenizer=str(directory),
        seq=seq or min(SEQ, shape.max_seq),
        optimizer="q_galore_adamw" if int8 else "galore_adamw",
    ).resolve()
    return Source(config, config.shape(tokens), tensors, found)


@contextmanager
def reading(model: Source, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes of a model are read, by a function that is called after each tensor."""
    dtypes = {"float64": 8, "float32": 4}
    tensors = [model.tensors[entry.name] for entry in model.found.entries]
    total = sum(dtypes.get(x.dtype, 2) * count(x.shape) for x in tensors)
    with Progress(
        BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(), disable=quiet
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)


def count(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def import_hf(
    directory: Annotated[Path, tyro.conf.Positional],
    out: Path,
    param_dtype: str | None = None,
    int8: bool = False,
    seq: int | None = None,
    quiet: bool = False,
) -> str:
    """Imports a model, one tensor at a time.

    The directory appears when it is complete; an interrupted import leaves nothing under its name.

    Args:
      directory: of a model of Hugging Face: config.json, model.safetensors, in one file or many
        with an index, and tokenizer.json or tokenizer.model.
      out: new directory.
      param_dtype: float32 or bfloat16; by default as in the files.
      int8: keep the layers' matrices in 8 bits, as q_galore_adamw trains them.
      seq: positions that sampling keeps; by default 1024, or all that the model knows.
      quiet: show no progress.
    """
    check_new(out)
    model = open_model(directory, param_dtype=param_dtype, int8=int8, seq=seq)
    with reading(model, quiet) as told:
        params = load(model.tensors, model.found.entries, model.like, told)
    write_model(out, model, params, imported=str(directory))
    return told_of(model)


def write_model(out: Path, model: Source, params: Any, imported: str) -> None:
    """Writes the directory of an imported model, whole or not at all."""
    with new_directory(out) as partial:
        copy_companions(Path(model.config.preset), partial)
        with Checkpoints(partial) as checkpoints:
            checkpoints.save_params(params, settings_of(model.config))
        write_settings(partial, model.config, model.shape, imported)


def told_of(model: Source) -> str:
    """What was imported, in a line or two."""
    shape, config = model.shape, model.config
    held = "8 bits" if config.int8_weights else config.param_dtype
    stays = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.like))
    lines = [
        f"{shape.architecture.title} of {shape.num_params:,} parameters in {held}, {size(stays)}: "
        f"{shape.layers} layers, vocabulary {shape.vocab_size:,}, {shape.architecture.context:,} "
        "positions"
    ]
    if left_out := model.found.left_out:
        lines.append(f"Left out {len(left_out)} tensors of other parts: {some(left_out)}")
    return "\n".join(lines)


def main() -> None:
    # What it has written of a directory disappears.
    with program(import_hf, errors=(CheckpointError,), at_once=False):
        print(command_line(import_hf)())


if __name__ == "__main__":
    main()
