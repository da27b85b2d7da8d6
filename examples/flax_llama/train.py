"""Trains a LLaMA.

python -m examples.flax_llama.train --preset 9m --optimizer galore_adamw --lr 0.01 --out runs/galore
python -m examples.flax_llama.train --out runs/galore --resume
"""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from jax.experimental import multihost_utils

import galore_optax
from examples.flax_llama import run_log
from examples.flax_llama.beginning import (
    Beginning,
    begin,
    check_same_tokenizer,
    commit,
    of_the_source,
    validation_began,
)
from examples.flax_llama.changes import config_of, settings_of
from examples.flax_llama.checkpoint import CheckpointError, Checkpoints, hide_abandoned_writes
from examples.flax_llama.config import Config
from examples.flax_llama.data import Data, open_data
from examples.flax_llama.evaluate import make_evaluate
from examples.flax_llama.methods import IN_GALORE
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.reading import Reading
from examples.flax_llama.resume import first_state
from examples.flax_llama.run_directory import (
    SETTINGS,
    check_contents,
    check_directory,
    lock,
    read_settings,
    write_settings,
)
from examples.flax_llama.run_log import Record, RunLog
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.step import (
    State,
    check_divides,
    data_mesh,
    initial_params,
    make_update,
    put_batch,
)
from examples.flax_llama.tokenizer import Tokenizer, tokenizer_files
from examples.flax_llama.usage import UsageError

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
    # Of device memory for an update, as XLA planned it; None where it does not tell.
    update_bytes: int | None


def train(config: Config) -> Result:
    """Trains one model; writes only if `config.out` is given, a directory that is new or empty.

    With `config.resume` it goes on with the run that is there: with the same settings to the same
    end, bit for bit, as if there had been no interruption, and else with the changed ones from
    there on. SIGTERM or Ctrl-C saves a checkpoint and exits the program.

    Raises:
      UsageError: a setting cannot work; nothing has been written.
      FloatingPointError: the loss or a gradient is not finite any more; no checkpoint has it.
      CheckpointError: a checkpoint could not be written.
    """
    config = config.resolve()
    out = config.out
    if out is not None and jax.process_index() == 0:
        check_directory(out, resume=config.resume)
    beginning = begin(config)
    check_divides(config)
    optimizer, mesh = make_optimizer(config), data_mesh()
    dataset = open_dataset(own_tokenizer(config, beginning))
    if not beginning.step:
        check_same_tokenizer(config, dataset.tokenizer)
    shape = config.shape(dataset.tokenizer.vocab_size)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))

    def initial_state() -> State:
        params = initial_params(config, shape)
        return State(params, optimizer.init(params))

    with contextlib.ExitStack() as stack:
        stack.callback(dataset.train.close)
        stop, checkpoints = never, None
        if out is not None:
            stop = stack.enter_context(stop_signals())
            checkpoints = stack.enter_context(open_checkpoints(out, config, shape, beginning))
        state = first_state(checkpoints, beginning, config, initial_state, dataset, mesh)
        log = stack.enter_context(open_log(config, shape, dataset.tokenizer, beginning))
        # Compiled ahead, so that the tokens per second of the first update are those of an update.
        example = put_batch(any_batch(config), config.accumulate, mesh)
        update = make_update(config, graphdef, optimizer, mesh).lower(state, example).compile()
        evaluate = make_evaluate(graphdef, mesh)
        valid = dataset.valid.batches(config.batch // config.accumulate)
        log.start_clock()
        for step in range(beginning.step + 1, config.steps + 1):
            batch = put_batch(next(dataset.train), config.accumulate, mesh)
            state, metrics = update(state, batch)
            if step == beginning.step + 1:
                jax.block_until_ready(state)
                commit(beginning, config, shape)
            log.update(step, metrics)
            last, stopping, loss = step == config.steps, stop(step), None
            if step % config.eval_every == 0 or last:
                log.flush()
                evaluation = evaluate(state.params, *valid)
                loss = evaluation.loss
                scores = {"valid_loss": loss, "standard_error": evaluation.standard_error}
                log.evaluation({"step": step} | scores | dataset.valid.scores(loss))
                log.start_clock()
            if checkpoints and (
                step % config.save_every == 0 or last or stopping or checkpoints.improves(loss)
            ):
                # First what may raise: an update that is not finite is never saved.
                log.flush()
                checkpoints.save(step, state, dataset.train, beginning.settings(config), loss)
                if stopping and not last:
                    checkpoints.wait()
                    print(f"Stopped after update {step}, which is saved. To go on:\n{RESUME}{out}")
                    raise SystemExit(0)
                log.start_clock()
        if beginning.step == config.steps and beginning.changes:
            commit(beginning, config, shape)  # of a finished run
    if not config.quiet and dataset.reading.bad_lines:
        print(dataset.reading.summary())
    model = nnx.merge(graphdef, galore_optax.dequantize_params(state.params))
    return Result(model, dataset.tokenizer, log.train, log.valid, planned_bytes(update))


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
        reading=Reading(config.text_field, config.on_bad_line, config.max_bad_lines),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def own_tokenizer(config: Config, beginning: Beginning) -> Config:
    """With the tokenizer that a run has kept, where it goes on: its file or text may be gone."""
    if beginning.step and config.out is not None and tokenizer_files(config.out):
        return dataclasses.replace(config, tokenizer=str(config.out))
    return config


def any_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of this process, for its shape."""
    rows = config.batch // jax.process_count()
    return {
        "tokens": np.zeros((rows, config.seq + 1), np.int32),
        "mask": np.ones((rows, config.seq), bool),
    }


@contextlib.contextmanager
def open_checkpoints(
    out: Path, config: Config, shape: LlamaConfig, beginning: Beginning
) -> Iterator[Checkpoints]:
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
        since = validation_began(out, beginning)
        checkpoints = Checkpoints(out, keep=config.keep, validated_since=since)
        stack.enter_context(checkpoints)
        if max(checkpoints.steps, default=0) != beginning.step:
            raise UsageError(f"out={out}: another process has gone on with the run meanwhile.")
        yield checkpoints


@contextlib.contextmanager
def open_log(
    config: Config, shape: LlamaConfig, tokenizer: Tokenizer, beginning: Beginning
) -> Iterator[RunLog]:
    """The log of the run, on the first process, and what describes the run beside it."""
    out = config.out if jax.process_index() == 0 else None
    quiet, start = config.quiet or jax.process_index() > 0, beginning.step
    if not quiet:
        print("\n".join([summary(config, shape, start), *beginning.lines()]))
    with contextlib.ExitStack() as stack:
        sinks = []
        if out is not None:
            if not start:
                tokenizer.save(out)
            if config.tensorboard:
                sinks.append(stack.enter_context(run_log.tensorboard(out, start)))
            if config.wandb:
                settings = settings_of(config)
                sinks.append(stack.enter_context(run_log.wandb(config.wandb, out, settings)))
        yield stack.enter_context(
            RunLog(
                out,
                start=start,
                steps=config.steps,
                flops_per_token=shape.flops_per_token,
                sinks=sinks,
                quiet=quiet,
            )
        )


def summary(config: Config, shape: LlamaConfig, start: int) -> str:
    """What is about to be trained, in a few lines."""
    rank = f", rank {config.rank}" if config.optimizer in IN_GALORE else ""
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    lines = [
        f"LLaMA of {shape.num_params:,} parameters ({config.preset}), vocabulary "
        f"{shape.vocab_size:,}; {shape.flops_per_token / 1e6:,.1f} MFLOP per token",
        f"{config.optimizer}{rank}, peak learning rate {config.lr:g}; {config.steps:,} updates of "
        f"{config.batch} x {config.seq} tokens, on {device}",
    ]
    if config.resume:
        lines.append(f"Resuming after update {start}" if start else "No checkpoint yet: from 0")
    return "\n".join(lines)


def never(step: int) -> bool:
    return False


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields whether, by some update, SIGTERM or a first Ctrl-C has come; a second one kills."""
    if jax.process_count() > 1:
        # All must stop after the same update; JAX's own handler of SIGTERM sees to that.
        yield multihost_utils.reached_preemption_sync_point
    elif threading.current_thread() is not threading.main_thread():
        yield never  # Python has signals in the main thread only
    else:
        received: list[int] = []
        previous: dict[int, Any] = {}

        def receive(number: int, _: object) -> None:
            received.append(number)
            signal.signal(number, previous[number])

        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, receive)
        try:
            yield lambda step: bool(received)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def from_command_line(args: Sequence[str] | None = None) -> Config:
    """The settings given.

    Where a run is resumed, all others are its own; but what its optimizer had by default is another
    optimizer's own. Where one begins with another run, its model and optimizer are that one's.
    """
    config = tyro.cli(Config, args=args)
    if config.resume and config.out is not None and (config.out / SETTINGS).is_file():
        stored = config_of(read_settings(config.out)["train"])
        own = dataclasses.replace(stored, out=config.out, resume=True, new_data=False)
        config = tyro.cli(Config, args=args, default=own)
        if config.optimizer != stored.optimizer:
            config = tyro.cli(Config, args=args, default=own.without_defaults())
    elif config.init_from is not None:
        source = config_of(read_settings(config.init_from)["train"])
        names = of_the_source(weights_only=config.weights_only)
        same = {name: getattr(source, name) for name in names}
        default = Config(**same, tokenizer=str(config.init_from))
        config = tyro.cli(Config, args=args, default=default)
    return config


def main() -> None:
    hide_abandoned_writes()
    try:
        config = from_command_line()
        if config.distributed:
            jax.distributed.initialize()
        result = train(config)
    except (UsageError, CheckpointError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(" ".join(f"{name} {value:.4g}" for name, value in result.valid[-1].items()))


if __name__ == "__main__":
    main()
