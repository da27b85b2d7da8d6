"""Checkpoints of a run, written by Orbax while training goes on.

Each holds the parameters, the optimizer's state, the position in the data, and the configuration.
There is no generator of random numbers to save: initial weights, the order of the data, random
projectors and rounding are functions of the seed, which is in the configuration, and of counts.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_manager, checkpoint_managers

import galore_optax
from examples.flax_llama.checksums import check, checksums, of_json
from examples.flax_llama.distributed import agreed, gathered, meet
from examples.flax_llama.interleaved import merged
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.step import State
from examples.flax_llama.stored import check_arrays, has_version
from examples.flax_llama.usage import UsageError, file_and_reason, first_line, reason

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
            loss = metrics["valid_loss"] if is_sound(metrics) else math.inf
            return -metrics.get("validated_since", 0), loss

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

    def find(self, which: int | str, name: str = "step") -> int:
        """The number of updates of a checkpoint that is named by it, "last" or "best".

        Args:
          which: of them.
          name: of the setting that says so, for errors.

        Raises:
          UsageError: there is none.
        """
        named = {"last": self._manager.latest_step(), "best": self._manager.best_step()}
        step = int(which) if str(which).isdecimal() else named.get(str(which))
        if not self.steps:
            raise UsageError(f"There is no checkpoint in {self.path.parent} yet.")
        if which == "best" and step is None:
            raise UsageError(
                f"{name}='best': no checkpoint in {self.path} has a validation loss yet; those "
                f"there are, {self}, are named by their number of updates or 'last'."
            )
        if which == "best":
            self._check_losses(name)
        if step not in self.steps:
            raise UsageError(
                f"{name}={which}: there is no such checkpoint in {self.path}; expected 'last', "
                f"'best', or a number of updates of {self}."
            )
        return step

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps)) or "none"

    def improves(self, valid_loss: float | None) -> bool:
        """Whether a validation loss, if there is one, is lower than all that it compares with.

        It waits for the losses that are being written, and is the same in all processes.
        """
        if valid_loss is None:
            return False
        self.wait()
        found = [self._manager.metrics(step) for step in self.steps]
        return agreed(
            all(
                valid_loss < metrics["valid_loss"]
                for metrics in found
                if metrics and metrics.get("validated_since", 0) == self._validated_since
            )
        )

    def _check_losses(self, name: str) -> None:
        """Refuses to say which checkpoint is the best where a validation loss is damaged."""
        for step in self.steps:
            if not is_sound(self._manager.metrics(step) or {}):
                raise UsageError(
                    f"{name}='best': {self.path / str(step) / 'metrics'} is damaged, so that it is "
                    f"not known which checkpoint is. Name one by its number of updates: {self}."
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
        saved = checksums({"params": state.params, "optimizer": state.optimizer})
        saved["settings"] = of_json(settings)
        for number, position in enumerate(positions := gathered(of_json(batches.get_state()))):
            saved[f"data/process_{number}-of-{len(positions)}.json"] = position
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=grain.checkpoint.CheckpointSave(batches),
            settings=ocp.args.JsonSave(settings),
            checksums=ocp.args.JsonSave(saved),
        )
        self._writing = step
        try:
            self._manager.save(step, args=items, metrics=self._metrics(valid_loss))
        except Exception as error:
            raise self._failed(error) from error

    def add_loss(self, step: int, valid_loss: float) -> None:
        """Gives a checkpoint that was saved without a validation loss one, as `save` would have.

        Raises:
          CheckpointError: it could not be written.
        """
        metrics = self._metrics(valid_loss)
        if metrics is None or self._manager.metrics(step) is not None:
            return
        self._writing, name = step, checkpoint_manager.METRIC_ITEM_NAME
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=name)) as checkpointer:
                checkpointer.save(self.path / str(step) / name, metrics)
        except Exception as error:
            raise self._failed(error) from error
        self._manager.reload()

    def _metrics(self, valid_loss: float | None) -> dict[str, float] | None:
        if valid_loss is None or not math.isfinite(valid_loss):
            return None
        metrics = {"valid_loss": valid_loss, "validated_since": self._validated_since}
        return metrics | {"checksum": of_json(metrics)}

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
        optimizer = like.optimizer
        if not has_version(self.path / str(step) / "optimizer"):
            optimizer = galore_optax.as_version(optimizer, 1)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(like.params),
            optimizer=ocp.args.StandardRestore(optimizer),
        )
        state = State(items["params"], galore_optax.migrate(items["optimizer"]))
        return state, self._position(step, items.get("checksums") or {})

    def _position(self, step: int, saved: dict[str, int]) -> Any:
        """The position in the data, out of the files that the processes of the run wrote.

        These may have been more or fewer than there are now, so that grain does not find them.
        """
        directory = self.path / str(step) / "data"
        try:
            files = sorted(directory.glob("process_*-of-*.json"))
            if not files:
                raise FileNotFoundError(f"{directory} has no position in the data")
            positions = {f"data/{path.name}": json.loads(path.read_text()) for path in files}
            check({name: of_json(position) for name, position in positions.items()}, saved)
            return merged(list(positions.values()))
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error) from error

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone; otherwise as `restore`."""
        return self._restore(step, params=ocp.args.StandardRestore(like))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            trees = {k: v for k, v in items.items() if isinstance(v, ocp.args.StandardRestore)}
            for name, item in trees.items():
                check_arrays(self.path / str(step) / name, item.item)
            # Those of an earlier version have none.
            if (self.path / str(step) / "checksums").exists():
                items["checksums"] = ocp.args.JsonRestore()
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            if "checksums" in items:
                meet("restored")
                sums = {k: of_json(found[k]) for k in items.keys() - trees.keys() - {"checksums"}}
                sums |= checksums({name: found[name] for name in trees}) if trees else {}
                check(sums, found["checksums"])
            return found
        except UsageError:
            raise
        except Exception as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> UsageError:
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
            return UsageError(
                f"checkpoint {self.path / str(step)} cannot be read: Permission denied "
                f"({first_line(error)}). Nothing has been changed."
            )
        others = [other for other in self.steps if other != step]
        advice = (
            f"To go on from update {others[-1]}, move that directory out of {self.path} first"
            if others
            else "There is no other checkpoint"
        )
        return UsageError(
            f"checkpoint {self.path / str(step)} cannot be read ({first_line(error)}). "
            f"{advice}; nothing has been changed."
        )

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint after update {self._writing} could not be written: {reason(error)}"
        )


def is_sound(metrics: dict[str, float]) -> bool:
    """Whether the metrics of a checkpoint are as they were saved, as far as that can be told."""
    others = {name: value for name, value in metrics.items() if name != "checksum"}
    return metrics.get("checksum", of_json(others)) == of_json(others)


@contextlib.contextmanager
def told_of_errors(out: Path) -> Iterator[None]:
    """Where something of a run cannot be written, says what checkpoints there are to go on from.

    Raises:
      CheckpointError: in place of one without that, or of an error of the operating system.
    """
    try:
        yield
    except (OSError, CheckpointError) as error:
        what = file_and_reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{what}.{whole_checkpoints(out)}") from error


def whole_checkpoints(out: Path) -> str:
    """A sentence about the checkpoints of a run, if it has got so far as to have any."""
    with contextlib.suppress(OSError):
        if (out / DIRECTORY).is_dir():
            with Checkpoints(out, read_only=True) as checkpoints:
                return f" Whole checkpoints in {checkpoints.path}: {checkpoints}."
    return ""


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


def open_run(directory: Path) -> Checkpoints:
    """The checkpoints of a run, to be read.

    Raises:
      UsageError: there are none yet.
    """
    if not (directory / DIRECTORY).is_dir():
        raise UsageError(f"There is no checkpoint in {directory} yet.")
    return Checkpoints(directory, read_only=True)
