"""Checkpoints of a run, written by Orbax while training goes on.

Each holds the parameters, the optimizer's state, the position in the data, and the configuration.
There is no generator of random numbers to save: initial weights, the order of the data, random
projectors and rounding are functions of the seed, which is in the configuration, and of counts.
"""

import contextlib
import dataclasses
import errno
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

import galore_optax
from examples.flax_llama.changes import config_of
from examples.flax_llama.model import Llama
from examples.flax_llama.optimizer_state import arrays
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.step import State, initial_params
from examples.flax_llama.tokenizer import Tokenizer, load_tokenizer
from examples.flax_llama.usage import UsageError

DIRECTORY = "checkpoints"

# Orbax warns of options that are meant as they are, and logs the traceback of what it raises too.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


def hide_abandoned_writes() -> None:
    """Silences, in a program, the writes that Orbax does not wait for after one has failed.

    They complain of their event loop, which is closed, or that nobody has retrieved their errors;
    the error of the first is in the `CheckpointError`.
    """
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


class Position(grain.DatasetIterator):
    """Takes a position in the data out of a checkpoint, and goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self._state: Any = None

    def __next__(self) -> Any:
        raise StopIteration

    def get_state(self) -> Any:
        return self._state

    def set_state(self, state: Any) -> None:
        self._state = state


class Checkpoints:
    """Context manager of the checkpoints of a run: the last `keep` ones and the best.

    Leaving it waits until all are written.

    Args:
      out: the run's directory.
      keep: how many of the last ones there are to be.
      read_only: leave everything as it is.
      validated_since: after how many updates the validation losses began that can be compared. The
        best checkpoint is of the last losses that can.
    """

    def __init__(
        self, out: Path, *, keep: int = 1, read_only: bool = False, validated_since: int = 0
    ):
        def rank(metrics: dict[str, float]) -> Any:
            return -metrics.get("validated_since", 0), metrics["valid_loss"]

        best = checkpoint_managers.BestN(
            get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [checkpoint_managers.LatestN(keep), best]
        self.path = out.absolute() / DIRECTORY
        self._manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                best_mode="min",
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            ),
        )
        self._validated_since = validated_since
        self._writing: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if error is None:
                raise
        finally:
            self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The numbers of updates after which there is a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def find(self, which: int | str) -> int:
        """The number of updates of a checkpoint that is named by it, "last" or "best".

        Raises:
          UsageError: there is none.
        """
        named = {"last": self._manager.latest_step(), "best": self._manager.best_step()}
        step = named.get(which, which) if isinstance(which, str) else which
        if not isinstance(step, int) or step not in self.steps:
            there = ", ".join(map(str, self.steps)) or "none"
            raise UsageError(f"{self.path} has no checkpoint {which}: it has {there}.")
        return step

    def improves(self, valid_loss: float | None) -> bool:
        """Whether a validation loss, if there is one, is lower than all that it compares with."""
        if valid_loss is None:
            return False
        found = [self._manager.metrics(step) for step in self.steps]
        return all(
            valid_loss < metrics["valid_loss"]
            for metrics in found
            if metrics and metrics.get("validated_since", 0) == self._validated_since
        )

    def save(
        self,
        step: int,
        state: State,
        batches: grain.DatasetIterator,
        settings: dict[str, Any],
        valid_loss: float | None = None,
    ) -> None:
        """Copies everything, then writes in the background; the next update may donate `state`.

        Raises:
          CheckpointError: this or an earlier one could not be written.
        """
        self.wait()
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=grain.checkpoint.CheckpointSave(batches),
            settings=ocp.args.JsonSave(settings),
        )
        finite = valid_loss is not None and math.isfinite(valid_loss)
        comparable = {"valid_loss": valid_loss, "validated_since": self._validated_since}
        metrics = comparable if finite else None
        self._writing = step
        try:
            self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: something could not be.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error

    def settings(self, step: int) -> dict[str, Any]:
        """The settings that a checkpoint was saved with."""
        return self._restore(step, settings=ocp.args.JsonRestore())["settings"]

    def restore(self, step: int, like: State) -> tuple[State, Any]:
        """The state after `step` updates, and the position in the data.

        Args:
          step: of an existing checkpoint.
          like: shapes, dtypes and shardings to restore to.

        Raises:
          UsageError: the checkpoint cannot be read, or holds other arrays than these.
        """
        optimizer, position = like.optimizer, Position()
        if not has_version(self.path / str(step) / "optimizer"):
            optimizer = galore_optax.as_version(optimizer, 1)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(like.params),
            optimizer=ocp.args.StandardRestore(optimizer),
            data=grain.checkpoint.CheckpointRestore(position),
        )
        state = State(items["params"], galore_optax.migrate(items["optimizer"]))
        return state, position.get_state()

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone; otherwise as `restore`."""
        return self._restore(step, params=ocp.args.StandardRestore(like))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            for name, item in items.items():
                if isinstance(item, ocp.args.StandardRestore):
                    check_arrays(self.path / str(step) / name, item.item)
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except UsageError:
            raise
        except Exception as error:
            if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
                raise UsageError(
                    f"checkpoint {self.path / str(step)} cannot be read: Permission denied "
                    f"({first_line(error)}). Nothing has been changed."
                ) from error
            others = [other for other in self.steps if other != step]
            advice = (
                f"To go on from update {others[-1]}, move that directory out of {self.path} first"
                if others
                else "There is no other checkpoint"
            )
            raise UsageError(
                f"checkpoint {self.path / str(step)} cannot be read ({first_line(error)}). "
                f"{advice}; nothing has been changed."
            ) from error

    @contextlib.contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """Where something else of the run cannot be written, says what checkpoints there are.

        Raises:
          CheckpointError: in place of an error of the operating system.
        """
        try:
            yield
        except OSError as error:
            raise self._error(error.filename or "the run cannot go on", error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        return self._error(
            f"the checkpoint after update {self._writing} could not be written", error
        )

    def _error(self, what: str, error: Exception) -> CheckpointError:
        full = os.strerror(errno.ENOSPC) in str(error)
        reason = "the disk is full" if full else getattr(error, "strerror", "") or first_line(error)
        whole = ", ".join(str(step) for step in self.steps if step != self._writing) or "none"
        return CheckpointError(f"{what}: {reason}. Whole checkpoints in {self.path}: {whole}.")


def stored_arrays(path: Path) -> dict[str, str]:
    """The dtype and shape of each array of a saved tree, by path."""
    with ocp.StandardCheckpointer() as checkpointer:
        return arrays(checkpointer.metadata(path).item_metadata.tree)


def has_version(path: Path) -> bool:
    """Whether a saved optimizer state says of which version it is, which those of 0.1 do not."""
    try:
        return any(name.split("/")[-1] == "version" for name in stored_arrays(path))
    except Exception:  # whatever is wrong with it, reading it says so
        return True


def check_arrays(path: Path, like: Any) -> None:
    """Refuses a saved tree with other arrays than `like`, before any of them is read.

    Orbax casts those of another dtype without a word, and does not name those of another shape.

    Raises:
      UsageError: an array has another shape or dtype, is missing, or should not be there.
    """

    def at(name: str, tree: dict[str, str]) -> str:
        parts = [
            f"{key[len(name) + 1 :]} {x}" for key, x in tree.items() if key.startswith(f"{name}/")
        ]
        return tree.get(name) or ", ".join(parts) or "absent"

    stored, wanted = stored_arrays(path), arrays(like)
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            raise UsageError(
                f"{path} does not fit: {name} is {at(name, stored)}, and should be "
                f"{at(name, wanted)}. Resume with the settings and the version of galore_optax "
                "that it was made with; nothing has been changed."
            )


def first_line(error: Exception) -> str:
    """The beginning and the end of an error's first line, where the reason may be."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:80]} ... {line[-110:]}"


def last_checkpoint(out: Path) -> tuple[int, dict[str, Any]]:
    """The number of updates of a run's last checkpoint, and the settings that it was saved with.

    Where there is none yet these are 0 and the settings of the run.
    """
    if (out / DIRECTORY).is_dir():
        with Checkpoints(out, read_only=True) as checkpoints:
            if checkpoints.steps:
                step = checkpoints.steps[-1]
                return step, checkpoints.settings(step)
    return 0, read_settings(out)["train"]


def on(sharding: jax.sharding.Sharding, tree: Any) -> Any:
    """The shapes of a tree, to be restored to a placement."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def load_params(directory: Path, step: int | str, sharding: jax.sharding.Sharding) -> Any:
    """The parameters of a run's checkpoint, as they are kept there.

    Args:
      directory: the `out` of a run, which may go on meanwhile.
      step: number of updates of a checkpoint; or "last", or "best" for the lowest validation loss.
      sharding: where to put them.

    Raises:
      UsageError: there is no such run or checkpoint, or it cannot be read.
    """
    settings = read_settings(directory)
    config, shape = config_of(settings["train"]), model_of(settings)
    like = on(sharding, jax.eval_shape(lambda: initial_params(config, shape)))
    with open_run(directory) as checkpoints:
        return checkpoints.restore_params(checkpoints.find(step), like)


def open_run(directory: Path) -> Checkpoints:
    """The checkpoints of a run, to be read.

    Raises:
      UsageError: there are none yet.
    """
    if not (directory / DIRECTORY).is_dir():
        raise UsageError(f"{directory} has no checkpoint yet.")
    return Checkpoints(directory, read_only=True)


def model_of(settings: dict[str, Any]) -> LlamaConfig:
    """The shape of a run's model, on a machine that may be another one than that of the run."""
    return dataclasses.replace(LlamaConfig(**settings["model"]), attention="auto")


def load_run(directory: Path, step: int | str = "last") -> tuple[Llama, Tokenizer]:
    """The model, on one device, and the tokenizer of a run; see `load_params`."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = load_params(directory, step, device)
    shape = model_of(read_settings(directory))
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Llama(shape, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, galore_optax.dequantize_params(params))
    return model, load_tokenizer(directory)
