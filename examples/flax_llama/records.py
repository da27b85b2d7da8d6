"""The metrics of a run, as its file has them: a line of JSON for each update and evaluation."""

import json
import math
from pathlib import Path

from examples.flax_llama.config import UsageError
from examples.flax_llama.writing import write_whole

Record = dict[str, float]

METRICS = "metrics.jsonl"
# By the group that they are drawn in; README.md says what each of them is.
GROUPS = {
    "train": ("loss", "lr", "grad_norm", "update_norm", "tokens", "skipped", "skipped_in_a_row"),
    "eval": ("valid_loss", "standard_error", "perplexity", "bits_per_byte"),
    "subspace": ("refreshes", "captured_energy", "captured_energy_min", "overlap"),
    "speed": ("seconds", "tokens_per_second", "flops_per_second", "mfu"),
}
TAGS = {name: f"{group}/{name}" for group, names in GROUPS.items() for name in names}


def tagged(record: Record) -> Record:
    """A record's metrics by their names in groups."""
    return {TAGS[name]: value for name, value in record.items() if name != "step"}


def dump(record: Record) -> str:
    """One line of JSON, which has null in place of numbers that are not finite."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in record.items()})


def read_records(path: Path) -> list[Record]:
    """The records of a metrics file, which may be of a run that goes on or that was killed.

    Raises:
      UsageError: a line is not a record.
    """
    records = []
    # What comes after the last end is being written, or never to be.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = {k: math.nan if v is None else v for k, v in json.loads(line).items()}
            record["step"] = int(record["step"])
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            shown = line[:60].decode(errors="backslashreplace")
            raise UsageError(f"{path}:{number} is not a record of a run: {shown!r}") from error
        records.append(record)
    return records


def missing(path: Path, start: int) -> int:
    """How many of the first updates a metrics file, which may be gone, has no record of.

    Raises:
      UsageError: a line is not a record.
    """
    records = read_records(path) if path.exists() else []
    return start - len({x["step"] for x in records if "loss" in x and 0 < x["step"] <= start})


def restart(path: Path, start: int) -> list[Record]:
    """Drops from a metrics file what is beyond `start` updates, and returns what is left."""
    if not path.exists():
        return []
    records = [record for record in read_records(path) if record["step"] <= start]
    write_whole(path, "".join(dump(record) + "\n" for record in records))
    return records
