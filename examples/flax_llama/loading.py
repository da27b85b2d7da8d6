"""Loads what a run has trained, or what was imported, for other programs than `train`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import galore_optax
from examples.flax_llama.changes import config_of
from examples.flax_llama.checkpoint import open_run
from examples.flax_llama.model import Llama
from examples.flax_llama.run_directory import imported_from, read_settings
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.sharding import on
from examples.flax_llama.step import initial_params
from examples.flax_llama.tokenizer import Tokenizer, load_tokenizer
from examples.flax_llama.usage import UsageError
from examples.flax_llama.weights_file import read_weights


def load_params(
    directory: Path, step: int | str, where: jax.sharding.Sharding | Callable[[Any], Any]
) -> Any:
    """The parameters of a run's checkpoint, or of an imported model, as they are kept there.

    Args:
      directory: the `out` of a run, which may go on meanwhile, or an imported model.
      step: number of updates of a checkpoint; or "last", or "best" for the lowest validation loss.
      where: to put all of them, or says of their shapes where to put each, as `on` has it.

    Raises:
      UsageError: there is no such run or checkpoint, or it cannot be read.
    """
    settings = read_settings(directory)
    config, shape = config_of(settings["train"]), model_of(settings)
    shapes = jax.eval_shape(lambda: initial_params(config, shape))
    like = on(where if isinstance(where, jax.sharding.Sharding) else where(shapes), shapes)
    if imported_from(directory):
        if step not in ("last", 0):
            raise UsageError(f"step={step}: {directory} is an imported model, which has but one.")
        return read_weights(directory, like)
    with open_run(directory) as checkpoints:
        return checkpoints.restore_params(checkpoints.find(step), like)


def model_of(settings: dict[str, Any]) -> LlamaConfig:
    """The shape of a run's model, on a machine that may be another one than that of the run."""
    return dataclasses.replace(LlamaConfig.of(settings["model"]), attention="auto")


def load_run(directory: Path, step: int | str = "last") -> tuple[Llama, Tokenizer]:
    """The model, on one device, and the tokenizer of a run; see `load_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = load_params(directory, step, device)
    shape = model_of(read_settings(directory))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, galore_optax.dequantize_params(params))
    return model, load_tokenizer(directory, None)
