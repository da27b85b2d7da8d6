"""Writes the memory table of the README, and its picture, from the figures of memory_7b.

python -m benchmarks.memory_table
"""

import json
import pathlib
from typing import Any

from examples.flax_llama.devices import DEVICES, GIB
from examples.flax_llama.memory_chart import Bar, draw

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "memory_7b.json"
PICTURE = FIGURES.with_suffix(".png")
README = ROOT / "README.md"
START = "<!-- made by python -m benchmarks.memory_table -->\n"
END = "<!-- end of the memory table -->\n"


def markdown(record: dict[str, Any]) -> str:
    """The table: one line per model, method and device; the projectors side by side."""
    lines = [
        "| | device | usable | weights and state | peak | with `svd` |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in record["rows"].items():
        if " svd " in name:
            continue
        other = record["rows"].get(name.replace("power_iteration", "svd"))
        svd = "-" if other is None or other is row else peak(other)
        held = f"{row['xla']['arguments'] / GIB:.2f}" if "xla" in row else "-"
        lines.append(
            f"| LLaMA-{row['settings']['preset'].upper()}, {row['method']} "
            f"| {DEVICES[row['device']].description} | {row['usable'] / GIB:.2f} "
            f"| {held} | {peak(row)} | {svd} |"
        )
    return "\n".join(lines) + "\n"


def peak(row: dict[str, Any]) -> str:
    return f"{row['xla']['peak'] / GIB:.2f}" if "xla" in row else "too much"


def replaced(text: str, table: str) -> str:
    """A text with a table between the two comments, in place of what is there.

    Raises:
      ValueError: the comments are not there, once each and in order.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in after or END in before + after:
        raise ValueError(f"expected {START!r} and {END!r} once each")
    return before + start + table + end + after


def bars(record: dict[str, Any]) -> list[Bar]:
    """One for each line of the table: the estimate's parts, and XLA's peak."""
    return [
        Bar(
            f"LLaMA-{row['settings']['preset'].upper()}, {row['method'].replace('`', '')}\n"
            f"{DEVICES[row['device']].description}",
            {k: v for k, v in row["estimate"].items() if k not in ("total", "moment")},
            row["xla"]["peak"] if "xla" in row else None,
        )
        for name, row in record["rows"].items()
        if " svd " not in name
    ]


def main() -> None:
    record = json.loads(FIGURES.read_text())
    draw(bars(record), [DEVICES["rtx4060ti_16gb"], DEVICES["rtx4090_24gb"]], PICTURE)
    README.write_text(replaced(README.read_text(), markdown(record)))


if __name__ == "__main__":
    main()
