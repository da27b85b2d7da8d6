"""Trains a LLaMA.

python -m examples.flax_llama.train --preset 9m --optimizer galore_adamw --lr 0.01 --out runs/galore
python -m examples.flax_llama.train --out runs/galore --resume
"""

import contextlib
import dataclasses
import functools
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from examples.flax_llama import sinks
from examples.flax_llama.beginning import (
    Beginning,
    begin,
    check_same_tokenizer,
    commit,
    validation_began,
)
from examples.flax_llama.changes import settings_of
from examples.flax_llama.checkpoint import (
    CheckpointError,
    Checkpoints,
    told_of_errors,
)
from examples.flax_llama.command import program
from examples.flax_llama.config import Config
from examples.flax_llama.conversation_data import recognise
from examples.flax_llama.data import Data, open_data
from examples.flax_llama.distributed import agreed, check_same_data, is_first, meet, processes
from examples.flax_llama.evaluate import Evaluation, make_evaluate
from examples.flax_llama.flags import command_line
from examples.flax_llama.given import settings_given
from examples.flax_llama.initial import first_state
from examples.flax_llama.interrupts import never, stopping
from examples.flax_llama.memory import check_machine
from examples.flax_llama.model import Llama, Params
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.progress import Progress, duration, header, print_text, scores
from examples.flax_llama.reading import reading_of
from examples.flax_llama.records import METRICS, Record, missing
from examples.flax_llama.run_directory import (
    check_contents,
    check_directory,
    lock,
    write_settings,
)
from examples.flax_llama.run_log import RunLog
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.sharding import make_mesh, part_of_data, share
from examples.flax_llama.step import (
    State,
    check_divides,
    has_segments,
    initial_state,
    make_update,
    put_batch,
    state_shardings,
    trained_model,
)
from examples.flax_llama.tokenizer import Tokenizer, tokenizer_files
from examples.flax_llama.units import size
from examples.flax_llama.usage import UsageError
from examples.flax_llama.validation import Valid
from examples.flax_llama.writing import make_directory, naming
from examples.hf.companions import copy_companions

RESUME = "python -m examples.flax_llama.train --resume --out "


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    model: Llama
    tokenizer: Tokenizer
    # One record per update: step (from 1), loss, lr, grad_norm, update_norm, tokens, seconds,
    # tokens_per_second, mfu or flops_per_second, and what `galore_optax.metrics` has.
    train: list[Record]
    # One record per evaluation: step, valid_loss (nats per token), its standard_error, perplexity,
    # and bits_per_byte where the bytes are known.
    valid: list[Record]
    # Of device memory for an update, as XLA planned it; None where it does not tell, or where the
    # run had been finished before.
    update_bytes: int | None
    # What it was validated on.
    valid_data: Valid


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of while it goes on."""

    config: Config
    beginning: Beginning
    shape: LlamaConfig
    dataset: Data
    mesh: jax.sharding.Mesh
    log: RunLog
    # None where nothing is written.
    checkpoints: Checkpoints | None
    # Whether to stop after some update.
    stop: Callable[[int], bool]
    # Of parameters, over the tokens to validate on.
    evaluate: Callable[[Params], Evaluation]


def train(
    config: Config,
    how_to_go_on: str | None = None,
    before: Callable[[Llama, Data], None] | None = None,
    data: Data | None = None,
) -> Result:
    """Trains one model; writes only if `config.out` is given, a directory that is new or empty.

    With `config.resume` it goes on with the run that is there: with the same settings to the same
    end, bit for bit, as if there had been no interruption, and else with the changed ones from
    there on. Where the program answers signals, SIGTERM or Ctrl-C saves a checkpoint and exits.

    Args:
      config: the settings.
      how_to_go_on: the command that does, where the run is stopped; that of the run by default.
      before: is called before the first update of a run, with the model and the data.
      data: that of a new run, where it is open already; it is closed.

    Raises:
      UsageError: a setting cannot work; nothing has been written.
      FloatingPointError: the loss or a gradient is not finite any more; no checkpoint has it.
      CheckpointError: a checkpoint, or another file of the run, could not be written.
    """
    config, needed, stopped = recognised(config.resolve()), None, None
    out = config.out
    go_on = f"To go on:\n{how_to_go_on or f'{RESUME}{shlex.quote(str(out))}'}"
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(told_of_errors(out))
            if is_first():
                check_directory(out, resume=config.resume)
        beginning = begin(config)
        config = beginning.config
        check_same_data(beginning.fingerprint.digests)
        check_divides(config)
        optimizer, mesh = make_optimizer(config), make_mesh(config.mesh)
        dataset = data or open_dataset(own_tokenizer(config, beginning))
        stack.callback(dataset.train.close)
        if not beginning.step:
            check_same_tokenizer(config, dataset.tokenizer)
        shape = config.shape(dataset.tokenizer.vocab_size)
        check_machine(config, dataset.tokenizer.vocab_size)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
        initial = functools.partial(initial_state, config, shape, optimizer)
        stop, checkpoints = never, None
        if out is not None:
            stop = stack.enter_context(stopping(go_on))
            checkpoints = stack.enter_context(open_checkpoints(out, config, shape, beginning))
        state = first_state(checkpoints, beginning, config, initial, dataset, mesh)
        log = stack.enter_context(open_log(config, shape, dataset, beginning))
        run = Parts(
            *(config, beginning, shape, dataset, mesh, log, checkpoints, stop),
            evaluate=over_validation(make_evaluate(graphdef, mesh), dataset.valid, config),
        )
        if config.mesh is not None:
            own, whole = map(size, share(state))
            log.progress.say(f"A device has {own} of {whole} of weights and optimizer state")
        if before is not None and not beginning.step:
            before(nnx.merge(graphdef, state.params), dataset)
        if beginning.finished:
            conclude(run, state)
        else:
            where = state_shardings(config, optimizer, state.params, mesh)
            update = make_update(config, graphdef, optimizer, mesh, where)
            compiled, needed = compile_update(update, state, config, mesh, log.progress)
            state, stopped = make_updates(run, compiled, state)
        if dataset.reading.bad_lines:
            log.progress.say(dataset.reading.summary())
    if stopped is not None:
        if is_first():
            print(f"Stopped after update {stopped}, which is saved. {go_on}", flush=True)
        raise SystemExit(0)
    model = trained_model(config, graphdef, state.params)
    return Result(model, dataset.tokenizer, log.train, log.valid, needed, dataset.valid)


def make_updates(run: Parts, update: jax.stages.Compiled, state: State) -> tuple[State, int | None]:
    """Makes all updates that are left, and evaluates and saves between them.

    Returns:
      The state in the end, and the update that the run was told to stop after, if it was.
    """
    config, log, start = run.config, run.log, run.beginning.step
    log.start_clock()
    for step in range(start + 1, config.steps + 1):
        batch = put_batch(next(run.dataset.train), config.accumulate, run.mesh)
        state, metrics = update(state, batch)
        if step == start + 1:
            jax.block_until_ready(state)
            commit(run.beginning, run.shape)
        log.update(step, metrics)
        last, loss = step == config.steps, None
        if step % config.eval_every == 0 or last:
            log.flush()
            loss = evaluate_after(step, run, state)
            log.start_clock()
        stopped = run.stop(step) and not last
        if run.checkpoints and (
            step % config.save_every == 0 or last or stopped or run.checkpoints.improves(loss)
        ):
            # First what may raise: an update that is not finite is never saved.
            log.flush()
            settings = run.beginning.settings
            run.checkpoints.save(step, state, run.dataset.train, settings, loss)
            log.start_clock()
        if stopped:
            return state, step
    return state, None


def conclude(run: Parts, state: State) -> None:
    """Ends a run that has no update left, where it has not ended yet."""
    step, valid = run.beginning.step, run.log.valid
    if agreed(not valid or valid[-1]["step"] < step):
        loss = evaluate_after(step, run, state)
        if run.checkpoints is not None:
            run.checkpoints.add_loss(step, loss)
    if run.beginning.to_write:
        commit(run.beginning, run.shape)


def evaluate_after(step: int, run: Parts, state: State) -> float:
    """Evaluates and records the validation loss after some update, and returns it."""
    with run.log.progress.doing("evaluating"):
        found = run.evaluate(state.params)
    record = {"step": step, "valid_loss": found.loss, "standard_error": found.standard_error}
    run.log.evaluation(record | run.dataset.valid.scores(found.loss))
    return found.loss


def over_validation(
    evaluate: Callable[..., Evaluation], valid: Valid, config: Config
) -> Callable[[Params], Evaluation]:
    """Evaluates parameters on all tokens to validate on, as many rows at a time as training."""
    batches = valid.batches(config.batch // config.accumulate)
    return lambda params: evaluate(params, *batches)


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
    meet("compiled")
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
    part, parts = part_of_data(make_mesh(config.mesh))
    names = ("data", "valid_data", "tokenizer", "eos_token", "batch", "seq", "packing", "seed")
    more = ("attend_across", "eval_tokens")
    given = {name: getattr(config, name) for name in (*names, *more)}
    reading = reading_of(config)
    with reading.told():
        return open_data(**given, reading=reading, process_index=part, process_count=parts)


def recognised(config: Config) -> Config:
    """With the format that the data has, where that is to be recognised, which is told."""
    if config.data_format != "auto":
        return config
    found = recognise(config.data, reading_of(config))
    if not config.quiet:
        print_text(f"{found.said}.")
    return dataclasses.replace(config, data_format=found.data_format)


def own_tokenizer(config: Config, beginning: Beginning) -> Config:
    """With the tokenizer that a run has kept, where it goes on: its file or text may be gone."""
    if beginning.step and config.out is not None and tokenizer_files(config.out):
        return dataclasses.replace(config, tokenizer=str(config.out))
    return config


def any_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of this process, for its shape."""
    rows = config.batch // part_of_data(make_mesh(config.mesh))[1]
    tokens = np.zeros((rows, config.seq + 1), np.int32)
    segments = {"segments": np.ones_like(tokens)} if has_segments(config) else {}
    return {"tokens": tokens, "mask": np.ones((rows, config.seq), bool), **segments}


@contextlib.contextmanager
def open_checkpoints(
    out: Path, config: Config, shape: LlamaConfig, beginning: Beginning
) -> Iterator[Checkpoints]:
    """The checkpoints in the run's directory, which is made, and kept from other processes."""
    with contextlib.ExitStack() as stack:
        if is_first():
            make_directory(out)
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
    config: Config, shape: LlamaConfig, dataset: Data, beginning: Beginning
) -> Iterator[RunLog]:
    """The log of the run, on the first process, and what describes the run beside it."""
    out, start = config.out if is_first() else None, beginning.step
    # Before anything is written.
    lacking = 0 if out is None else missing(out / METRICS, start)
    with contextlib.ExitStack() as stack:
        services = []
        if out is not None:
            if not start:
                with naming(out / dataset.tokenizer.file_name):
                    dataset.tokenizer.save(out)
                    if config.init_from is not None:
                        copy_companions(config.init_from, out)
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
            quiet=config.quiet or not is_first(),
        )
        log.progress.say("\n".join([header(config, shape, dataset, start), *beginning.lines()]))
        if lacking:
            log.progress.say(f"Note: {METRICS} has no record of {lacking} of {start} updates.")
        if start >= config.steps and log.valid:
            log.progress.say(scores(log.valid[-1]))
        yield stack.enter_context(log)


def from_command_line(args: Sequence[str] | None = None) -> Config:
    """The settings given, and those of the run that they go on with."""
    return settings_given(
        lambda base: command_line(Config, args, default=base, description=__doc__)
    )


def main() -> None:
    with program(Config, errors=(CheckpointError, FloatingPointError)):
        config = from_command_line()
        with processes(config):
            result = train(config)
            if is_first():
                # What else is there to say has been said.
                print_text(f"Finished: {scores(result.valid[-1])}" if config.quiet else "Finished.")


if __name__ == "__main__":
    main()
