"""Imports a model of Hugging Face, as a directory that training and all other commands begin with.

python -m examples.flax_llama.import_hf ~/SmolLM2-135M --out runs/smollm2
python -m examples.flax_llama.finetune --init-from runs/smollm2 --data chats.jsonl --out runs/chats
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.pretrained import Source, open_model
from examples.flax_llama.run_directory import write_settings
from examples.flax_llama.tokens import check_new, new_directory
from examples.flax_llama.units import size
from examples.flax_llama.weights_file import writing
from examples.hf.companions import copy_companions
from examples.hf.names import some
from examples.hf.weights import converted


@contextmanager
def reading(model: Source, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Shows how many bytes of a model are read, by a function that is called after each tensor."""
    dtypes = {"float64": 8, "float32": 4}
    tensors = [model.tensors[entry.name] for entry in model.found.entries]
    total = sum(dtypes.get(x.dtype, 2) * math.prod(x.shape) for x in tensors)
    with Progress(
        BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(), disable=quiet
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda done: progress.advance(task, done)


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
      param_dtype: float32 or bfloat16; by default bfloat16 where all tensors are, else float32.
      int8: keep the layers' matrices in 8 bits, as q_galore_adamw trains them.
      seq: positions that sampling keeps; by default 1024, or all that the model knows.
      quiet: show no progress.
    """
    check_new(out)
    model = open_model(directory, param_dtype=param_dtype, int8=int8, seq=seq)
    with new_directory(out) as partial:
        copy_companions(directory, partial)
        with reading(model, quiet) as told, writing(partial, model.like) as writer:
            for each in converted(model.tensors, model.found.entries, model.like, told):
                writer.put(*each)
        write_settings(partial, model.config, model.shape, imported=str(directory))
    return told_of(model)


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
    with program(import_hf, at_once=False):
        print(command_line(import_hf)())


if __name__ == "__main__":
    main()
