"""Writes report.md, and the tables of README.md beside this file, from the committed results.

python -m benchmarks.gpu.readme
"""

import json
import pathlib

from benchmarks.gpu.record import ROOT, Entry
from benchmarks.gpu.report import report, tables
from benchmarks.gpu.stage import STAGES, Size
from benchmarks.memory_table import replaced

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
REPORT = RESULTS / "report.md"
# Of the report the other stages are told of in words.
SHOWN = ("step", "memory", "train")
README = pathlib.Path(__file__).with_name("README.md")
COMMENTS = (
    "<!-- made by python -m benchmarks.gpu.readme -->\n",
    "<!-- end of the tables -->\n",
)


def stages() -> dict[str, dict[str, Entry]]:
    """The committed entries by stage and item."""
    files = {stage: RESULTS / f"{stage}.json" for stage in STAGES}
    return {s: json.loads(f.read_text())["items"] for s, f in files.items() if f.exists()}


def current() -> tuple[str, str]:
    """The report, and the tables of the README."""
    found = stages()
    memory = max(e["machine"]["memory"] for entries in found.values() for e in entries.values())
    size = Size(rehearsal=False, data="", device_memory=memory)
    shown = {stage: found[stage] for stage in SHOWN}
    return report(found, size)[0], "\n".join(tables(shown, size, "###")) + "\n"


def main() -> None:
    text, shown = current()
    REPORT.write_text(text)
    README.write_text(replaced(README.read_text(), shown, COMMENTS))


if __name__ == "__main__":
    main()
