"""A model of Hugging Face, opened: everything about it but its weights, which are read later."""

import dataclasses
from pathlib import Path

import jax

from examples.flax_llama.changes import config_of
from examples.flax_llama.config import Config
from examples.flax_llama.model import Params
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.shapes import DTYPES, LlamaConfig
from examples.flax_llama.step import initial_params
from examples.flax_llama.tokenizer import load_tokenizer, tokenizer_files
from examples.flax_llama.usage import UsageError, at_least_one, one_of
from examples.hf.configuration import is_model, read_shape
from examples.hf.names import Found, match
from examples.hf.tensors import Tensor, open_tensors

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
      param_dtype: float32 or bfloat16; by default bfloat16 where all tensors are, else float32.
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
    if seq is not None:
        at_least_one("seq", seq)
    own = {tensors[entry.name].dtype for entry in found.entries}
    param_dtype = param_dtype or ("bfloat16" if own == {"bfloat16"} else "float32")
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


def settings_of_source(directory: Path) -> Config:
    """The settings of a run or an imported model, or those that go with one of Hugging Face.

    Raises:
      UsageError: it is neither, or cannot be read.
    """
    if is_model(directory):
        return open_model(directory).config
    return config_of(read_settings(directory)["train"])
