"""Writes the memory table of docs/will-it-fit.md, and its picture, from the committed figures.

python -m benchmarks.memory_table

What XLA planned without the device (benchmarks/memory_7b.py) and what the device's allocator
counted (benchmarks/gpu/memory.py) are columns apart.
"""

import json
import pathlib
from typing import Any

from examples.flax_llama.devices import DEVICES, GIB
from examples.flax_llama.memory_chart import Bar, draw
from examples.flax_llama.shapes import PRESETS

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "memory_7b.json"
MEASURED = ROOT / "benchmarks" / "results" / "gpu" / "memory.json"
PICTURE = FIGURES.with_suffix(".png")
# Some of the rows, for the start page, what they are called there, and their picture.
FIRST = {
    "7b AdamW h100_80gb": "LLaMA-7B, AdamW",
    "7b 8-bit GaLore power_iteration rtx4090_24gb": "LLaMA-7B, 8-bit GaLore",
    "7b Q-GaLore power_iteration rtx4060ti_16gb": "LLaMA-7B, Q-GaLore",
    "7b fewest GaLore rank 256 1x256 rtx4070_12gb": "LLaMA-7B, rank 256, all in 8 bits",
    "llama-3.1-8b fewest GaLore rank 256 16x256 rtx4080_16gb": "Llama-3.1-8B, the same",
}
FIRST_PICTURE = FIGURES.with_name("memory_start.png")
PAGE = ROOT / "docs" / "will-it-fit.md"
START = "<!-- made by python -m benchmarks.memory_table -->\n"
END = "<!-- end of the memory table -->\n"


def markdown(record: dict[str, Any], measured: dict[str, Any]) -> str:
    """The table: one line per model, method and device; the projectors side by side.

    Args:
      record: what is in FIGURES.
      measured: the items of MEASURED, by the names of rows.
    """
    found = {name: entry for name, entry in measured.items() if "result" in entry}
    lines = [
        "| | device | usable | weights and state | peak, compiled | with `svd` | peak, measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in record["rows"].items():
        if " svd " in name:
            continue
        other = record["rows"].get(name.replace("power_iteration", "svd"))
        svd = "-" if other is None or other is row else peak(other)
        held = f"{row['xla']['arguments'] / GIB:.2f}" if "xla" in row else "-"
        counted = f"{found[name]['result']['peak_bytes'] / GIB:.2f}" if name in found else "-"
        lines.append(
            f"| {model(row)}, {row['method']} "
            f"| {DEVICES[row['device']].description} | {row['usable'] / GIB:.2f} "
            f"| {held} | {peak(row)} | {svd} | {counted} |"
        )
    return "\n".join([*lines, "", where_measured(found)]) + "\n"


def model(row: dict[str, Any]) -> str:
    """The name of a row's model."""
    preset = row["settings"]["preset"]
    return f"LLaMA-{preset.upper()}" if preset in PRESETS else preset


def where_measured(found: dict[str, Any]) -> str:
    """A sentence on where the last column is from."""
    if not found:
        return (
            "Nothing has been measured on a GPU yet: [`make gpu`](../benchmarks/gpu/README.md) "
            "does, where there is one."
        )
    machines = {
        f"{m['device']}, driver {m['driver']}, jax {m['jax']}"
        for m in (entry["machine"] for entry in found.values())
    }
    caps = sorted({f"{entry['result']['usable'] / GIB:.2f}" for entry in found.values()})
    return (
        f"Measured by `make gpu` with no more than {' or '.join(caps)} GiB for JAX, on "
        f"{' and '.join(sorted(machines))} ([report](../benchmarks/results/gpu/report.md))."
    )


def current() -> str:
    """The table of the figures that are committed."""
    measured = json.loads(MEASURED.read_text())["items"] if MEASURED.exists() else {}
    return markdown(json.loads(FIGURES.read_text()), measured)


def peak(row: dict[str, Any]) -> str:
    return f"{row['xla']['peak'] / GIB:.2f}" if "xla" in row else "too much"


def replaced(text: str, table: str, comments: tuple[str, str] = (START, END)) -> str:
    """A text with a table between two comments, in place of what is there.

    Raises:
      ValueError: the comments are not there, once each and in order.
    """
    first, last = comments
    before, start, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not (start and end) or first in after or last in before + after:
        raise ValueError(f"expected {first!r} and {last!r} once each")
    return before + start + table + end + after


def bars(record: dict[str, Any]) -> list[Bar]:
    """One for each line of the table."""
    return [
        bar(row, f"{model(row)}, {row['method'].replace('`', '')}")
        for name, row in record["rows"].items()
        if " svd " not in name
    ]


def bar(row: dict[str, Any], name: str) -> Bar:
    """The estimate's parts, and XLA's peak."""
    parts = {k: v for k, v in row["estimate"].items() if k not in ("total", "moment")}
    peak = row["xla"]["peak"] if "xla" in row else None
    return Bar(f"{name}\n{DEVICES[row['device']].description}", parts, peak)


def main() -> None:
    record = json.loads(FIGURES.read_text())
    cards = [DEVICES["rtx4060ti_16gb"], DEVICES["rtx4090_24gb"]]
    draw(bars(record), cards, PICTURE)
    first = [bar(record["rows"][name], called) for name, called in FIRST.items()]
    draw(first, cards, FIRST_PICTURE)
    PAGE.write_text(replaced(PAGE.read_text(), current()))


if __name__ == "__main__":
    main()
