"""The real training step, compiled for a device that need not be here: what XLA says it needs."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import Device
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.sharding import AnyMesh, by_rows, on
from examples.flax_llama.step import (
    Batch,
    State,
    has_segments,
    initial_params,
    make_update,
    state_shardings,
)
from examples.flax_llama.topology import cuda_packages

# What XLA logs where a program does not fit unless it computes things again, which makes it slow.
REMATERIALIZES = re.compile(r"Can't reduce memory use below .*|exceeds the base limit.*")
# The compiler for TPUs refuses a program that needs more than there is.
TOO_LARGE = re.compile(r"memory on HBM.*? exceeds available HBM \([^)]*\)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """XLA's analysis of a compiled step, in bytes.

    Attributes:
      arguments: parameters, optimizer state and batch.
      outputs: the same after the step, and metrics.
      alias: of the outputs, those in the memory of arguments.
      temporaries: all else, as one allocation.
      peak: the most that is in use at a time, arguments included. On a GPU XLA's own
        `peak_memory_in_bytes`; a TPU's counts the donated arguments twice, and a CPU's leaves out
        the temporaries, so that this is arguments, outputs without alias, temporaries and the
        program. What lies in the memory of the machine is in none of these figures.
      seconds: that tracing and compiling took.
      rematerializes: what XLA logged if it had to compute things again to fit, or could not.
      host: what the step has in the memory of the machine.
    """

    arguments: int
    outputs: int
    alias: int
    temporaries: int
    peak: int
    seconds: float
    rematerializes: tuple[str, ...]
    host: int = 0


class TooLarge(Exception):
    """The compiler refused the program for its size; the message is the compiler's."""


def compile_step(config: Config, vocab_size: int, device: Device) -> Compiled:
    """Compiles the update of a resolved configuration for one device.

    Attention is XLA's, unless `config.attention` is "cudnn": that is compiled without its
    workspace, which cuDNN only tells on its device.

    Raises:
      UsageError: JAX for that kind of device is not installed, or cuDNN that is asked for is not.
      TooLarge: the compiler refused, as it does for a TPU.
    """
    mesh = device.mesh()
    start = time.perf_counter()
    with standard_error() as logged:
        try:
            compiled = lower(config, vocab_size, mesh).compile()
        except jax.errors.JaxRuntimeError as error:
            found = TOO_LARGE.search(str(error))
            if found is None:
                raise
            raise TooLarge(found.group()) from error
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            raise UsageError(
                f"attention='cudnn': {error} It needs pip install -U {cuda_packages()}; "
                "attention='xla' does not."
            ) from error
    seconds = time.perf_counter() - start
    found = compiled.memory_analysis()
    arguments, outputs, alias, temporaries, code, peak = (
        getattr(found, f"{name}_in_bytes")
        for name in (
            *("argument_size", "output_size", "alias_size", "temp_size"),
            *("generated_code_size", "peak_memory"),
        )
    )
    held, made, shared, computed = (
        getattr(found, f"host_{name}_size_in_bytes")
        for name in ("argument", "output", "alias", "temp")
    )
    host = held + made - shared + computed
    # XLA's own counts what lies in the memory of the machine, too.
    if device.platform != "cuda" or host:
        peak = arguments + outputs - alias + temporaries + code
    rematerializes = tuple(match.group() for match in REMATERIALIZES.finditer(logged()))
    return Compiled(arguments, outputs, alias, temporaries, peak, seconds, rematerializes, host)


def lower(config: Config, vocab_size: int, mesh: Mesh) -> jax.stages.Lowered:
    """The update of a resolved configuration, lowered for the devices of a mesh."""
    attention = "cudnn" if config.attention == "cudnn" else "xla"
    # Chosen here, since the model would look at the devices that are here.
    shape = dataclasses.replace(config.shape(vocab_size), attention="xla")

    def model() -> Llama:
        llama = Llama(shape, rngs=nnx.Rngs(0))
        llama.blocks.attention.implementation = attention
        return llama

    graphdef = nnx.graphdef(nnx.eval_shape(model))
    rows = config.accumulate, config.batch // config.accumulate

    def example() -> Batch:
        tokens = jnp.zeros((*rows, config.seq + 1), jnp.int32)
        mask = jnp.zeros((*rows, config.seq), bool)
        return Batch(tokens, mask, tokens if has_segments(config) else None)

    batch = jax.eval_shape(example)
    optimizer, where = make_optimizer(config), None
    state = planned_state(config, vocab_size, mesh)
    if config.offload:
        where = jax.tree.map(lambda x: x.sharding, state)
    update = make_update(config, graphdef, optimizer, mesh, where)
    return update.lower(state, on(by_rows(mesh, axis=1), batch))


def planned_state(config: Config, vocab_size: int, mesh: AnyMesh) -> Any:
    """The shapes of the state of a resolved configuration, on a mesh that need not be here."""
    shape = dataclasses.replace(config.shape(vocab_size), attention="xla")
    optimizer = make_optimizer(config)
    params = jax.eval_shape(lambda: initial_params(config, shape))
    state = State(params, jax.eval_shape(optimizer.init, params))
    # A mesh of devices that are not here drops the memories that arrays are said to lie in.
    named = mesh.abstract_mesh if config.offload else mesh
    return on(state_shardings(config, optimizer, params, named), state)


@contextlib.contextmanager
def standard_error() -> Iterator[Any]:
    """Yields a function: what has been written to standard error, by C++ libraries too.

    Nothing of it appears but for what an exception leaves behind.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def written() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        text = ""
        try:
            yield lambda: text
        except BaseException:
            os.dup2(kept, 2)
            os.write(2, written().encode())
            raise
        finally:
            sys.stderr.flush()
            text = written()
            os.dup2(kept, 2)
            os.close(kept)
