"""The results on disk: one JSON file for each stage, complete after every item."""

import hashlib
import json
import os
import pathlib
import subprocess
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
Entry = dict[str, Any]


class StageFile:
    """The results of one stage.

    An entry has `result`, or `skipped`, `error` or `timed_out`, which say why there is none;
    `seconds`; and `machine`, since a run may go on elsewhere.
    """

    def __init__(self, path: pathlib.Path, stage: str, rehearsal: bool):
        self._path = path
        self._record: dict[str, Any] = {"stage": stage, "rehearsal": rehearsal, "items": {}}

    @property
    def items(self) -> dict[str, Entry]:
        """The entries by name."""
        return self._record["items"]

    def take(self, path: pathlib.Path) -> None:
        """Takes over the entries of a file of the same stage, if there is one.

        Raises:
          ValueError: it holds something else, or a rehearsal where this is none.
        """
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            stage, rehearsal, items = (found[key] for key in ("stage", "rehearsal", "items"))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} holds no results of this benchmark.") from None
        if (stage, rehearsal) != (self._record["stage"], self._record["rehearsal"]):
            kind = "a rehearsal" if rehearsal else "a run on a GPU"
            raise ValueError(f"{path} is of stage {stage!r} of {kind}: name another directory.")
        self.items.update(items)

    def put(self, name: str, entry: Entry) -> None:
        """Adds an entry, and writes the file as a whole."""
        self.items[name] = entry
        write(self._record, self._path)


def write(record: dict[str, Any], out: pathlib.Path) -> None:
    """Replaces a file by a whole new one, so that an interruption leaves one of the two."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(out.name + ".new")
    new.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(new, out)


def is_done(entry: Entry | None) -> bool:
    """Whether an item need not be measured again: it has a result, and not one that is wrong."""
    return entry is not None and "result" in entry and entry["result"].get("passed", True)


def sources() -> dict[str, str | None]:
    """What was measured: the commit, where git knows it, and a digest of the library's files."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "galore_optax").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {"commit": commit(), "library_sha256": digest.hexdigest()[:16]}


def commit() -> str | None:
    """The commit that is checked out, with "-dirty" if files differ; None without git."""

    def git(*words: str) -> str:
        folder = pathlib.Path(__file__).parent
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        # Results differ by themselves, as rows are added.
        paths = (":/", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None
