"""Writes the tables of README.md beside this file from the committed results.

python -m benchmarks.quality.readme
"""

import json
from pathlib import Path

from benchmarks.gpu.record import ROOT
from benchmarks.memory_table import replaced
from benchmarks.quality.report import tables

README = Path(__file__).with_name("README.md")
# Results by what the comments around their tables call them.
RESULTS = {"demo": "quality.json", "60m": "quality_60m.json"}


def comments(name: str) -> tuple[str, str]:
    """What stands before and after the tables of a result."""
    return (
        f"<!-- {name}: made by python -m benchmarks.quality.readme -->\n",
        f"<!-- end: {name} -->\n",
    )


def current(text: str) -> str:
    """The README with the tables of what is committed now."""
    for name, file in RESULTS.items():
        record = json.loads((ROOT / "benchmarks" / "results" / file).read_text())
        text = replaced(text, tables(record["summary"]).strip() + "\n", comments(name))
    return text


def main() -> None:
    README.write_text(current(README.read_text()))


if __name__ == "__main__":
    main()
