"""What became of a run: when and where it was begun and gone on with, and what was changed then.

`history.json` in the directory of a run is a list of entries, by number of updates. An entry has

    step            updates that were done when it was made
    time            of the clock, in UTC
    machine         devices and versions
    changes         {setting: [what it was, what it is]}, by the names of `config.json`
    notes           sentences about what these changes come to
    marked          those of the changes that what is computed depends on: plots have a line there
    new_validation  whether validation losses before and after it are of other tokens
    checksum        of the other fields

Updates that were made again, because nothing after an earlier one was saved, have no entries.
"""

import dataclasses
import json
from collections.abc import Container
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from examples.flax_llama.sealed import checked, sealed
from examples.flax_llama.usage import UsageError
from examples.flax_llama.writing import write_whole

HISTORY = "history.json"
MOVE_AWAY = (
    "Move it away to go on without it: training does not depend on it, but where the data to "
    "validate on has changed, it says which losses compare, and so which checkpoint is the best"
)


def machine_here() -> dict[str, Any]:
    """What decides, beside settings and data, whether an update has the same bits."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        **{name: version_of(name) for name in ("jax", "jaxlib", "galore-optax")},
    }


@dataclasses.dataclass(frozen=True)
class Entry:
    """One process' part in a run, from its first update on; see the fields above."""

    step: int
    changes: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    marked: list[str] = dataclasses.field(default_factory=list)
    new_validation: bool = False
    time: str = dataclasses.field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds")
    )
    machine: dict[str, Any] = dataclasses.field(default_factory=machine_here)

    def lines(self, names: Container[str]) -> list[str]:
        """Some of the changes, in as few words as will do."""
        pairs = [(name, self.changes[name]) for name in self.changes if name in names]
        return [f"{name} {show(was)} → {show(now)}" for name, (was, now) in pairs]


def show(value: Any) -> str:
    """A setting as a person would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_history(out: Path) -> list[Entry]:
    """All entries of a run, by number of updates; none of a run of an earlier version.

    Raises:
      UsageError: they cannot be read.
    """
    path = out / HISTORY
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        return [Entry(**checked(entry, path, MOVE_AWAY)) for entry in found]
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. {MOVE_AWAY}.") from error


def add_entry(out: Path, entry: Entry) -> None:
    """Adds what holds from its update on, in place of all there was from there on."""
    entries = [old for old in read_history(out) if old.step < entry.step] + [entry]
    text = json.dumps([sealed(dataclasses.asdict(old)) for old in entries], indent=1)
    write_whole(out / HISTORY, text + "\n")


def marks(out: Path) -> list[tuple[int, str]]:
    """After how many updates something changed that is computed, and what, for a picture."""
    entries = [entry for entry in read_history(out) if entry.step and entry.marked]
    return [(entry.step, ", ".join(entry.lines(entry.marked))) for entry in entries]


def validated_since(entries: list[Entry]) -> int:
    """After how many updates the tokens that a run is validated on were last changed."""
    return max((entry.step for entry in entries if entry.new_validation), default=0)
