"""Checkpoints of a run, written by Orbax while training goes on.

Each holds the parameters, the optimizer's state, the position in the data, and the configuration.
There is no generator of random numbers to save: initial weights, the order of the data, random
projectors and rounding are functions of the seed, which is in the configuration, and of counts.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import galore_optax
from examples.flax_llama.checksums import check, checksums, of_json
from examples.flax_llama.distributed import agreed, gathered, meet
from examples.flax_llama.interleaved import merged
from examples.flax_llama.losses import DAMAGED, NAME, Manager, metrics_of, rank
from examples.flax_llama.run_directory import CHECKPOINTS as DIRECTORY
from examples.flax_llama.run_directory import read_settings
from examples.flax_llama.sealed import is_sound, sealed, unsealed
from examples.flax_llama.step import State
from examples.flax_llama.stored import check_arrays, has_version, what_is_wrong
from examples.flax_llama.usage import UsageError, file_and_reason, reason

# Orbax warns of options that are meant as they are, and logs the traceback of what it raises too.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are whole."""


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
        best = checkpoint_managers.BestN(
            get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        policies = [checkpoint_managers.LatestN(keep), best]
        self.path = out.absolute() / DIRECTORY
        self._manager = Manager(
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
                if metrics not in (None, DAMAGED)
                and metrics.get("validated_since", 0) == self._validated_since
            )
        )

    def _check_losses(self, name: str) -> None:
        """Refuses to say which checkpoint is the best where a validation loss is damaged."""
        for step in self.steps:
            if self._manager.metrics(step) == DAMAGED:
                raise UsageError(
                    f"{name}='best': {self.path / str(step) / NAME} is damaged, so that it is "
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
        saved |= {"settings": of_json(settings), "step": step}
        for number, position in enumerate(positions := gathered(of_json(batches.get_state()))):
            saved[f"data/process_{number}-of-{len(positions)}.json"] = position
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(state.optimizer),
            data=grain.checkpoint.CheckpointSave(batches),
            settings=ocp.args.JsonSave(settings),
            checksums=ocp.args.JsonSave(sealed(saved)),
        )
        self._writing = step
        try:
            metrics = metrics_of(step, valid_loss, self._validated_since)
            self._manager.save(step, args=items, metrics=metrics)
        except Exception as error:
            raise self._failed(error) from error

    def add_loss(self, step: int, valid_loss: float) -> None:
        """Gives a checkpoint that was saved without a validation loss one, as `save` would have.

        Raises:
          CheckpointError: it could not be written.
        """
        metrics = metrics_of(step, valid_loss, self._validated_since)
        if metrics is None or self._manager.metrics(step) is not None:
            return
        self._writing = step
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler(filename=NAME)) as checkpointer:
                checkpointer.save(self.path / str(step) / NAME, metrics)
        except Exception as error:
            raise self._failed(error) from error
        self._manager.reload()

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
        positions: dict[str, Any] = {}
        try:
            for path in sorted(directory.glob("process_*-of-*.json")):
                positions[f"data/{path.name}"] = json.loads(path.read_text())
            if not positions:
                raise FileNotFoundError("there is no position in the data")
        except (OSError, ValueError) as error:
            raise self._unreadable(step, error, "data") from error
        self._check(step, {name: of_json(each) for name, each in positions.items()}, saved)
        try:
            return merged(list(positions.values()))
        except (ValueError, KeyError, TypeError) as error:
            raise self._unreadable(step, error, "data") from error

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone; otherwise as `restore`."""
        return self._restore(step, params=ocp.args.StandardRestore(like))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        """Some items of a checkpoint, and its checksums, with which they are compared."""
        trees = {k: v for k, v in items.items() if isinstance(v, ocp.args.StandardRestore)}
        for name, item in trees.items():
            with self._reading(step, name):
                check_arrays(self.path / str(step) / name, item.item)
        # Those of an earlier version have none.
        if (self.path / str(step) / "checksums").exists():
            items = {"checksums": ocp.args.JsonRestore()} | items
        found = {}
        for name, item in items.items():
            with self._reading(step, name):
                args = ocp.args.Composite(**{name: item})
                found[name] = self._manager.restore(step, args=args)[name]
        if "checksums" in items:
            meet("restored")
            if not is_sound(found["checksums"]):
                raise self._unreadable(step, ValueError("their own is another"), "checksums")
            if found["checksums"].get("step", step) != step:
                raise self._unreadable(step, ValueError("of another checkpoint"), "checksums")
            found["checksums"] = unsealed(found["checksums"])
            sums = {k: of_json(found[k]) for k in items.keys() - trees.keys() - {"checksums"}}
            sums |= checksums({name: found[name] for name in trees}) if trees else {}
            self._check(step, sums, found["checksums"])
        return found

    def _check(self, step: int, sums: dict[str, int], saved: dict[str, int]) -> None:
        """Refuses a checkpoint of which something is not what was saved."""
        try:
            check(sums, saved)
        except ValueError as error:
            raise self._unreadable(step, error) from error

    @contextlib.contextmanager
    def _reading(self, step: int, name: str) -> Iterator[None]:
        """Says of an error what of a checkpoint cannot be read, and what to do then."""
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            raise self._unreadable(step, error, name) from error

    def _unreadable(self, step: int, error: Exception, name: str = "") -> UsageError:
        said = f"{name}: {what_is_wrong(error)}" if name else what_is_wrong(error)
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
            return UsageError(
                f"checkpoint {self.path / str(step)} cannot be read: Permission denied "
                f"({said}). Nothing has been changed."
            )
        others = [other for other in self.steps if other != step]
        advice = (
            f"To go on from update {others[-1]}, move that directory out of {self.path} first"
            if others
            else "There is no other checkpoint"
        )
        return UsageError(
            f"checkpoint {self.path / str(step)} cannot be read ({said}). "
            f"{advice}; nothing has been changed."
        )

    def _failed(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint after update {self._writing} could not be written: {reason(error)}"
        )


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
