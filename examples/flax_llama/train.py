"""Trains a LLaMA.

python -m examples.flax_llama.train --preset 9m --optimizer galore_adamw --lr 0.01 --out runs/galore
python -m examples.flax_llama.train --out runs/galore --resume
"""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx

import galore_optax
from examples.flax_llama import sinks
from examples.flax_llama.checkpoint import (
    CheckpointError,
    Checkpoints,
    hide_abandoned_writes,
    last_settings,
)
from examples.flax_llama.command import program
from examples.flax_llama.config import Config, LlamaConfig
from examples.flax_llama.data import Data, open_data
from examples.flax_llama.evaluate import make_evaluate
from examples.flax_llama.interrupts import stopping
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer, start_anew
from examples.flax_llama.progress import Progress, duration, header, print_text, scores, size
from examples.flax_llama.records import Record
from examples.flax_llama.run_directory import (
    SETTINGS,
    SUBSPACE,
    check_contents,
    check_directory,
    check_same,
    config_of,
    lock,
    settings_of,
    write_settings,
)
from examples.flax_llama.run_log import RunLog
from examples.flax_llama.step import (
    State,
    check_divides,
    data_mesh,
    initial_params,
    make_update,
    put_batch,
    replicated,
)
from examples.flax_llama.tokenizer import Tokenizer
from examples.flax_llama.writing import naming

RESUME = "python -m examples.flax_llama.train --resume --out "


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    model: Llama
    tokenizer: Tokenizer
    # One record per update: step (from 1), loss, lr, grad_norm, update_norm, tokens,
    # tokens_per_second, mfu or flops_per_second, and what `galore_optax.metrics` has.
    train: list[Record]
    # One record per evaluation: step, valid_loss (nats per token), its standard_error, perplexity,
    # and bits_per_byte where the bytes are known.
    valid: list[Record]
    # Of device memory for an update, as XLA planned it; None where it does not tell, or where the
    # run had been finished before.
    update_bytes: int | None


def train(config: Config) -> Result:
    """Trains one model; writes only if `config.out` is given, a directory that is new or empty.

    With `config.resume` it goes on with the run that is there, to the same end, bit for bit, as if
    there had been no interruption. Where the program answers signals, SIGTERM or Ctrl-C saves a
    checkpoint and exits.

    Raises:
      UsageError: a setting cannot work; nothing has been written.
      FloatingPointError: the loss or a gradient is not finite any more; no checkpoint has it.
      CheckpointError: a checkpoint, or another file of the run, could not be written.
    """
    config = config.resolve()
    out = config.out
    if out is not None and jax.process_index() == 0:
        check_directory(out, resume=config.resume)
    if out is not None and config.resume:
        check_same(last_settings(out), config)
    check_divides(config)
    optimizer, mesh = make_optimizer(config), data_mesh()
    dataset = open_dataset(config)
    shape = config.shape(dataset.tokenizer.vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def initial_state() -> State:
        params = initial_params(config, shape)
        return State(params, optimizer.init(params))

    go_on = f"To go on:\n{RESUME}{shlex.quote(str(out))}"
    with contextlib.ExitStack() as stack:
        stack.callback(dataset.train.close)
        stop, checkpoints, start, stopped = never, None, 0, False
        if out is not None:
            stop = stack.enter_context(stopping(go_on))
            checkpoints = stack.enter_context(open_checkpoints(out, config, shape))
            stack.enter_context(checkpoints.told_of_errors())
            start = max(checkpoints.steps, default=0)
        if checkpoints and start:
            state = restore(checkpoints, start, config, initial_state, dataset, mesh)
        else:
            state = jax.jit(initial_state, out_shardings=replicated(mesh))()
        log = stack.enter_context(open_log(config, shape, dataset, start))
        update, needed = make_update(config, graphdef, optimizer, mesh), None
        if start < config.steps:
            update, needed = compile_update(update, state, config, mesh, log.progress)
        evaluate = make_evaluate(graphdef, mesh)
        valid = dataset.valid.batches(config.batch // config.accumulate)
        log.start_clock()
        log.progress.begin()
        for step in range(start + 1, config.steps + 1):
            batch = put_batch(next(dataset.train), config.accumulate, mesh)
            state, metrics = update(state, batch)
            log.update(step, metrics)
            last, loss = step == config.steps, None
            if step % config.eval_every == 0 or last:
                log.flush()
                with log.progress.doing("evaluating"):
                    evaluation = evaluate(state.params, *valid)
                loss = evaluation.loss
                found = {"valid_loss": loss, "standard_error": evaluation.standard_error}
                log.evaluation({"step": step} | found | dataset.valid.scores(loss))
                log.start_clock()
            stopped = stop(step) and not last
            if checkpoints and (
                step % config.save_every == 0 or last or stopped or checkpoints.improves(loss)
            ):
                # First what may raise: an update that is not finite is never saved.
                log.flush()
                checkpoints.save(step, state, dataset.train, config, loss)
                log.start_clock()
            if stopped:
                break
    if stopped:
        print(f"Stopped after update {step}, which is saved. {go_on}", flush=True)
        raise SystemExit(0)
    model = nnx.merge(graphdef, galore_optax.dequantize_params(state.params))
    return Result(model, dataset.tokenizer, log.train, log.valid, needed)


def compile_update(
    update: jax.stages.Wrapped,
    state: State,
    config: Config,
    mesh: jax.sharding.Mesh,
    progress: Progress,
) -> tuple[jax.stages.Compiled, int | None]:
    """Compiles ahead, so that the speed of the first update is that of an update.

    Also returns `planned_bytes`.
    """
    began = time.monotonic()
    example = put_batch(any_batch(config), config.accumulate, mesh)
    with progress.doing("compiling"):
        compiled = update.lower(state, example).compile()
    needed = planned_bytes(compiled)
    memory = "" if needed is None else f"; an update needs {size(needed)} of memory"
    progress.say(f"Compiled in {duration(time.monotonic() - began)}{memory}")
    return compiled, needed


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes of the arguments, results and temporary arrays of a program on one device."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def open_dataset(config: Config) -> Data:
    """This process' part of the data."""
    names = ("data", "valid_data", "tokenizer", "batch", "seq", "packing", "seed", "eval_tokens")
    return open_data(
        **{name: getattr(config, name) for name in names},
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def any_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of this process, for its shape."""
    rows = config.batch // jax.process_count()
    return {
        "tokens": np.zeros((rows, config.seq + 1), np.int32),
        "mask": np.ones((rows, config.seq), bool),
    }


@contextlib.contextmanager
def open_checkpoints(out: Path, config: Config, shape: LlamaConfig) -> Iterator[Checkpoints]:
    """The checkpoints in the run's directory, which is made, and kept from other processes."""
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock(out))
            # Another run may have come and gone while the data was read.
            check_contents(out, resume=config.resume)
            if not config.resume:
                # Before anything else is there, so that it can be resumed however soon it ends.
                write_settings(out, config, shape)
        yield stack.enter_context(Checkpoints(out, keep=config.keep))


def restore(
    checkpoints: Checkpoints,
    step: int,
    config: Config,
    initial_state: Callable[[], State],
    dataset: Data,
    mesh: jax.sharding.Mesh,
) -> State:
    """The state after `step` updates; moves the data to the batch after them."""
    stored = config_of(checkpoints.settings(step))
    anew = any(getattr(stored, name) != getattr(config, name) for name in SUBSPACE)
    like = jax.eval_shape(initial_state)
    if anew:
        like = State(like.params, jax.eval_shape(make_optimizer(stored).init, like.params))
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), like
    )
    state = checkpoints.restore(step, like, dataset.train)
    if anew:
        init = jax.jit(make_optimizer(config).init, out_shardings=replicated(mesh))
        state = State(state.params, start_anew(init(state.params), state.optimizer, config))
    return state


@contextlib.contextmanager
def open_log(config: Config, shape: LlamaConfig, dataset: Data, start: int) -> Iterator[RunLog]:
    """The log of the run, on the first process, and what describes the run beside it."""
    out = config.out if jax.process_index() == 0 else None
    with contextlib.ExitStack() as stack:
        services = []
        if out is not None:
            with naming(out / dataset.tokenizer.file_name):
                dataset.tokenizer.save(out)
            write_settings(out, config, shape)
            if config.tensorboard:
                services.append(stack.enter_context(sinks.tensorboard(out, start)))
            if config.wandb:
                settings = settings_of(config)
                services.append(stack.enter_context(sinks.wandb(config.wandb, out, settings)))
        log = RunLog(
            out,
            start=start,
            steps=config.steps,
            flops_per_token=shape.flops_per_token,
            sinks=services,
            quiet=config.quiet or jax.process_index() > 0,
        )
        log.progress.say(header(config, shape, dataset, start))
        yield stack.enter_context(log)


def never(step: int) -> bool:
    return False


def from_command_line(args: Sequence[str] | None = None) -> Config:
    """The settings given; where a run is resumed, all others are its own."""
    config = tyro.cli(Config, args=args)
    if config.resume and config.out is not None and (config.out / SETTINGS).is_file():
        stored = config_of(last_settings(config.out))
        own = {"out": config.out, "resume": True, "new_subspace": False}
        config = tyro.cli(Config, args=args, default=dataclasses.replace(stored, **own))
    return config


def main() -> None:
    hide_abandoned_writes()
    with program(Config, errors=(CheckpointError, FloatingPointError)):
        config = from_command_line()
        if config.distributed:
            jax.distributed.initialize()
        result = train(config)
        print_text(f"Finished: {scores(result.valid[-1])}")


if __name__ == "__main__":
    main()
