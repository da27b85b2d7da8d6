"""The runs that have been made, in a JSON file that is whole after each of them."""

import dataclasses
import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import write
from benchmarks.quality.training import Result, Run


class Record:
    """Results by run.

    Args:
      path: of the file, which is gone on with if it is there; None to write nothing.
      about: what all runs share; a file of others is refused.
      machine: where they are made.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], machine: dict[str, Any]):
        self._path = path
        self._head = {"benchmark": "quality", "machine": machine, "about": about}
        self._summary: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.results: dict[Run, Result] = {}
        if path is None or not path.exists():
            return
        known = json.loads(path.read_text())
        if known.get("about") != json.loads(json.dumps(about)):
            raise SystemExit(f"error: {path} is of other runs, {known.get('about')}: name another.")
        for entry in known["runs"]:
            self.results[run_of(entry["run"])] = entry["result"]

    def put(self, run: Run, result: Result) -> None:
        """Adds a run."""
        with self._lock:
            self.results[run] = result
            self._write()

    def summarize(self, summary: dict[str, Any]) -> None:
        """Puts beside the runs what comes of them."""
        with self._lock:
            self._summary = summary
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        runs = [
            {"run": dataclasses.asdict(run), "result": result}
            for run, result in self.results.items()
        ]
        write(self._head | {"summary": self._summary, "runs": runs}, self._path)


def run_of(entry: Mapping[str, Any]) -> Run:
    """The run that JSON says."""
    factors = entry["factors"]
    changed: dict[str, Any] = {"factors": factors and tuple(map(tuple, factors))}
    return Run(**{**entry, **changed})


def loss_of(result: Result) -> float:
    """The validation loss, infinite where training diverged."""
    loss = result["valid_loss"]
    return math.inf if loss is None else loss
