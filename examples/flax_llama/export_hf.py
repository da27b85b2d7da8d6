"""Writes a trained model as a directory of Hugging Face, which `transformers` loads.

python -m examples.flax_llama.export_hf --run runs/chats --out my-model
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from examples.flax_llama.adapters import merged
from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.loading import load_params, model_of
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from examples.flax_llama.tokens import check_new, new_directory
from examples.flax_llama.usage import UsageError
from examples.hf.companions import ORIGINAL, copy_files
from examples.hf.configuration import CONFIG, config_of, read_config
from examples.hf.names import Entry, entries
from examples.hf.tensors import FILE, INDEX
from examples.hf.weights import tensor_of

TOKENIZER_CONFIG = "tokenizer_config.json"


def export_hf(
    run: Path, out: Path, step: str = "last", shard_gigabytes: float = 5.0, quiet: bool = False
) -> str:
    """Writes a run's model as a directory of Hugging Face.

    The directory appears when it is complete; an interrupted export leaves nothing under its name.

    Args:
      run: the directory of a run, or of an imported model.
      out: new directory.
      step: the checkpoint: last, best, or a number of updates.
      shard_gigabytes: the largest file of weights, in 10^9 bytes; what is larger is divided.
      quiet: say nothing.
    """
    check_new(out)
    if not shard_gigabytes > 0:
        raise UsageError(f"shard_gigabytes={shard_gigabytes}: expected a positive number.")
    shape, tokenizer = model_of(read_settings(run)), load_tokenizer(run, None)
    original = read_config(run / ORIGINAL) if (run / ORIGINAL).is_file() else None
    config = config_of(shape, original)
    if original is None and tokenizer.eos_id is not None:
        config["eos_token_id"] = tokenizer.eos_id
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = merged(load_params(run, step, device), shape.adapter)
    with new_directory(out) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(partial, run, tokenizer)
        write_weights(partial, shape, params, shard_gigabytes * 1e9)
    count = dataclasses.replace(shape, adapter=None).num_params
    return f"{shape.architecture.title} of {count:,} parameters, {shape.param_dtype}"


def write_weights(directory: Path, shape: LlamaConfig, params: Any, most: float) -> None:
    """Writes all tensors into files of at most so many bytes, one file at a time."""
    shards = list(divided(shape, most))
    places, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        arrays = {entry.name: tensor_of(entry, params) for entry in shard}
        save_file(arrays, directory / name, metadata={"format": "pt"})
        places |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def divided(shape: LlamaConfig, most: float) -> Iterator[list[Entry]]:
    """The tensors of each file; one that is larger than a file may be has one of its own."""
    shard: list[Entry] = []
    size, itemsize = 0, jax.numpy.dtype(shape.param_dtype).itemsize
    for entry in entries(shape):
        own = int(np.prod(entry.shape)) * itemsize
        if shard and size + own > most:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += own
    yield shard


def write_tokenizer(directory: Path, run: Path, tokenizer: Tokenizer) -> None:
    """Copies the tokenizer's files, and says what it is where nothing does."""
    copy_files(run, directory)
    if (directory / TOKENIZER_CONFIG).is_file():
        return
    is_pieces = isinstance(tokenizer, SentencePieceTokenizer)
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if is_pieces else "PreTrainedTokenizerFast"
    }
    if tokenizer.eos_id is not None:
        settings["eos_token"] = tokenizer.name_of(tokenizer.eos_id)
    (directory / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    # What it has written of a directory disappears.
    with program(export_hf, at_once=False):
        print(command_line(export_hf)())


if __name__ == "__main__":
    main()
