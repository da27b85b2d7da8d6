"""Fine-tunes BERT, RoBERTa or MiniLM to classify texts, or to give them a number.

python -m examples.flax_glue.finetune --model MiniLM-L6 --task sst2 --data SST-2 \
    --optimizer galore_adamw --rank 8 --out runs/sst2

python -m examples.flax_glue.finetune --out runs/sst2 --resume
"""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import optax

import galore_optax
from examples.flax_glue.batches import Epochs, Texts
from examples.flax_glue.config import Config
from examples.flax_glue.log import Log, in_words
from examples.flax_glue.optimizers import in_8_bits, make_optimizer, trained
from examples.flax_glue.readers import Dataset, Examples, open_task
from examples.flax_glue.run_files import (
    check_files,
    check_metrics,
    check_settings,
    config_of,
    digests,
    read_settings,
    settings_of,
    write_settings,
)
from examples.flax_glue.shapes import EncoderConfig
from examples.flax_glue.step import Update, make_predict
from examples.flax_glue.tasks import TASKS
from examples.flax_glue.tokens import encode, open_tokenizer
from examples.flax_glue.weights import Loaded, Params, joined, load_weights, parts, shapes_of
from examples.flax_llama.checkpoint import (
    CheckpointError,
    Checkpoints,
    told_of_errors,
)
from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.interrupts import stopping
from examples.flax_llama.progress import print_text
from examples.flax_llama.records import Record
from examples.flax_llama.run_directory import check_contents, check_directory, lock
from examples.flax_llama.sharding import on
from examples.flax_llama.step import State
from examples.flax_llama.train import never
from examples.flax_llama.units import size
from examples.flax_llama.writing import make_directory

RESUME = "python -m examples.flax_glue.finetune --resume --out "


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run."""

    # All parameters in the end, of an `Encoder` of this shape.
    params: Params
    encoder: EncoderConfig
    # One record per update: step (from 1), loss, lr, grad_norm, update_norm, tokens, seconds, ...
    train: list[Record]
    # One record per epoch: step, epoch, valid_loss (of dev), its scores, and those of the test as
    # "test_..." where dev is better than in all epochs before.
    valid: list[Record]
    # Of parameters, of those that are trained, and of the optimizer's state.
    memory: dict[str, int]

    @property
    def best(self) -> Record:
        """The record of the epoch that dev chooses: the first of those with the best score."""
        return max(self.valid, key=lambda record: record["score"])


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run consists of while it goes on."""

    config: Config
    encoder: EncoderConfig
    # By what precedes their scores: to choose by, beside it, and "test_".
    evaluated: dict[str, Texts]
    epochs: Epochs
    batches: grain.DatasetIterator
    frozen: Params
    log: Log
    # None where nothing is written.
    checkpoints: Checkpoints | None
    # Whether to stop after some update.
    stop: Callable[[int], bool]


def finetune(config: Config, how_to_go_on: str | None = None) -> Result:
    """Fine-tunes one model; writes only if `config.out` is given, a directory that is new or empty.

    With `config.resume` it goes on with the run that is there, to the same end, bit for bit, as if
    there had been no interruption. Where the program answers signals, SIGTERM or Ctrl-C saves a
    checkpoint and exits.

    Args:
      config: the settings.
      how_to_go_on: the command that does, where the run is stopped; that of the run by default.

    Raises:
      UsageError: a setting, the model or the data cannot work; nothing has been written.
      FloatingPointError: the loss or a gradient is not finite any more; no checkpoint has it.
      CheckpointError: a checkpoint, or another file of the run, could not be written.
    """
    out = config.out
    if config.resume and out is not None:
        check_settings(read_settings(out), config)
    config = config.resolve()
    go_on = f"To go on:\n{how_to_go_on or f'{RESUME}{shlex.quote(str(out))}'}"
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(told_of_errors(out))
            check_directory(out, resume=config.resume)
        dataset = open_task(config.task, config.data, config.test, config.limit)
        encoder = config.encoder(dataset.outputs)
        train, evaluated = texts_of(config, encoder, dataset)
        epochs = Epochs(train, config.epochs, config.seed)
        optimizer = make_optimizer(config, encoder, len(epochs))
        files = digests(config, dataset.files)
        if config.resume and out is not None:
            check_files(read_settings(out), out, files)
        loaded = load_weights(config.model, encoder, config.seed)
        params, frozen = trained_and_frozen(config, encoder, loaded)
        stop, checkpoints = never, None
        if out is not None:
            stop = stack.enter_context(stopping(go_on))
            checkpoints = stack.enter_context(open_checkpoints(config, encoder, files))
        start = max(checkpoints.steps, default=0) if checkpoints else 0
        if out is not None:
            check_metrics(out, start, train.batches)
        batches = epochs.iterator()
        state = first_state(params, optimizer, checkpoints, start, batches)
        memory = memory_of(optimizer, params, frozen)
        log = Log(config, encoder, steps=len(epochs), start=start)
        stack.enter_context(log)
        log.progress.say(introduction(config, epochs, dataset, loaded, memory, start))
        run = Parts(*(config, encoder, evaluated, epochs, batches, frozen, log, checkpoints, stop))
        state, stopped, needed = make_updates(run, optimizer, state, start)
    if stopped is not None:
        print(f"Stopped after update {stopped}, which is saved. {go_on}", flush=True)
        raise SystemExit(0)
    params = joined(state.params, frozen)
    return Result(params, encoder, log.train, log.valid, memory | needed)


def texts_of(
    config: Config, encoder: EncoderConfig, dataset: Dataset
) -> tuple[Texts, dict[str, Texts]]:
    """The tokens of what is trained on, and of what is evaluated, by what precedes the scores."""
    tokenizer = open_tokenizer(config.model, encoder, config.max_length)

    def texts(examples: Examples) -> Texts:
        return Texts(
            encode(tokenizer, examples.texts, encoder),
            examples.labels,
            batch=config.batch,
            pad_id=encoder.pad_id,
            max_length=config.max_length,
        )

    others = dict(dataset.dev)
    if dataset.test is not None:
        others["test_"] = dataset.test
    return texts(dataset.train), {prefix: texts(some) for prefix, some in others.items()}


def trained_and_frozen(
    config: Config, encoder: EncoderConfig, loaded: Loaded
) -> tuple[Params, Params]:
    """The parameters that the optimizer gets, as it keeps them, and all others."""
    paths = frozenset(shapes_of(encoder))
    params, frozen = parts(loaded.params, trained(config, paths, loaded.drawn))
    return in_8_bits(config, encoder, params), frozen


@contextlib.contextmanager
def open_checkpoints(
    config: Config, encoder: EncoderConfig, files: list[list[Any]]
) -> Iterator[Checkpoints]:
    """The checkpoints in the run's directory, which is made, and kept from other processes."""
    out = config.out
    assert out is not None
    make_directory(out)
    with lock(out):
        # Another run may have come and gone while the data was read.
        check_contents(out, resume=config.resume)
        if not config.resume:
            write_settings(out, config, encoder, files)
        with Checkpoints(out) as checkpoints:
            yield checkpoints


def first_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    checkpoints: Checkpoints | None,
    start: int,
    batches: grain.DatasetIterator,
) -> State:
    """The state before the first update of this process, whose batches it goes to."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if checkpoints is None or not start:
        return State(params, jax.jit(optimizer.init)(params))
    like = State(params, jax.eval_shape(optimizer.init, params))
    state, position = checkpoints.restore(start, on(device, like))
    batches.set_state(position)
    return state


def memory_of(
    optimizer: optax.GradientTransformation, params: Params, frozen: Params
) -> dict[str, int]:
    """Bytes of the parameters, of those that are trained, and of the optimizer's state."""
    report = galore_optax.memory_report(optimizer, params)
    of_frozen = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    return {
        "parameter_bytes": report.parameters + of_frozen,
        "trained_bytes": report.parameters,
        "state_bytes": report.state,
    }


def make_updates(
    run: Parts, optimizer: optax.GradientTransformation, state: State, start: int
) -> tuple[State, int | None, dict[str, int]]:
    """Makes all updates that are left; evaluates and saves after each epoch.

    Returns:
      The state in the end; the update that the run was told to stop after, if it was; and what
      XLA planned for an update of the longest texts, where it tells.
    """
    config, log, steps = run.config, run.log, len(run.epochs)
    predict = make_predict(run.encoder)
    update, needed = Update(config, run.encoder, optimizer, steps), {}
    if start < steps:
        with log.progress.doing("compiling"):
            # Ahead, so that the seconds of an update are its own.
            examples = [run.epochs.texts.example(length) for length in run.epochs.lengths()]
            planned = update.compile(state, run.frozen, examples)
            needed = {} if planned is None else {"update_bytes": planned}
    log.start_clock()
    for step in range(start + 1, steps + 1):
        batch = next(run.batches)
        state, metrics = update(state, run.frozen, batch)
        log.update(step, metrics)
        score, ends = None, step % run.epochs.texts.batches == 0
        if ends:
            log.flush()
            score = evaluate_after(step, run, predict, state)
            log.start_clock()
        stopped = run.stop(step) and step < steps
        if run.checkpoints and (ends or stopped):
            # First what may raise: an update that is not finite is never saved.
            log.flush()
            # Checkpoints know losses: what a score lacks to 1.
            loss = None if score is None else 1 - score
            run.checkpoints.save(step, state, run.batches, settings_of(config), loss)
            log.start_clock()
        if stopped:
            return state, step, needed
    return state, None, needed


def evaluate_after(step: int, run: Parts, predict: Callable, state: State) -> float:
    """Evaluates and records, and returns the score that chooses.

    On the test only where that is better than all before: of no other epoch is it ever looked at.
    """
    record: Record = {"step": step, "epoch": step // run.epochs.texts.batches}
    before = max((each["score"] for each in run.log.valid), default=-float("inf"))
    with run.log.progress.doing("evaluating"):
        for prefix, texts in run.evaluated.items():
            if prefix == "test_" and record["score"] <= before:
                continue
            outputs, loss = predict(state.params, run.frozen, texts)
            found = TASKS[run.config.task].scores(outputs, texts.labels)
            if not prefix:
                found["valid_loss"] = loss
            record |= {f"{prefix}{name}": value for name, value in found.items()}
    run.log.evaluation(record)
    return record["score"]


def introduction(
    config: Config,
    epochs: Epochs,
    dataset: Dataset,
    loaded: Loaded,
    memory: dict[str, int],
    start: int,
) -> str:
    """What is about to be trained, and on what, in a few lines."""
    dev = " and ".join(f"{len(examples):,}" for examples in dataset.dev.values())
    test = "" if dataset.test is None else f", {len(dataset.test):,} to report on"
    rank = "" if config.rank is None else f" of rank {config.rank:g}"
    trained_share = memory["trained_bytes"] / memory["parameter_bytes"]
    lines = [
        loaded.note,
        f"{config.task}: {len(dataset.train):,} texts to train on, {dev} to choose by{test}",
        *dataset.notes,
        f"{config.optimizer}{rank}, peak learning rate {config.lr:g}; {len(epochs):,} updates of "
        f"{config.batch} texts, {config.epochs} times each",
        f"parameters {size(memory['parameter_bytes'])}, of which {trained_share:.1%} are trained; "
        f"optimizer state {size(memory['state_bytes'])}",
    ]
    if config.resume:
        what = "Already finished" if start >= len(epochs) else "Resuming"
        lines.append(f"{what} after update {start:,}" if start else "No checkpoint yet: from 0")
    return "\n".join(lines)


def from_command_line(args: Sequence[str] | None = None) -> Config:
    """The settings given, and those of the run that they go on with."""
    if "--resume" not in (sys.argv if args is None else args):
        return command_line(Config, args, description=__doc__)
    nothing = Config(model=Path(), data=Path())
    out = command_line(Config, args, default=nothing).out
    base = nothing if out is None else config_of(read_settings(out)["finetune"])
    return command_line(Config, args, default=base)


def main() -> None:
    with program(Config, errors=(CheckpointError, FloatingPointError)):
        result = finetune(from_command_line())
        print_text(f"Finished; dev chooses epoch {in_words(result.best)}")


if __name__ == "__main__":
    main()
