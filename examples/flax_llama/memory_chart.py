"""Draws what steps need of memory, part by part, against what devices have."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from examples.flax_llama.config import UsageError
from examples.flax_llama.devices import GIB, Device
from examples.flax_llama.plot import STYLE

NAMES = {"inputs": "block inputs", "working": "working set"}


@dataclasses.dataclass(frozen=True)
class Bar:
    """One configuration: bytes by part, and the peak of its compiled step where that is known.

    The number beside it is the peak, or the sum of the parts where there is none.
    """

    name: str
    parts: dict[str, int]
    peak: int | None = None


def draw(bars: Sequence[Bar], devices: Sequence[Device], out: Path) -> None:
    """Writes a picture of stacked bars, with a line where the memory of each device ends.

    Args:
      bars: from top to bottom.
      devices: whose lines to draw.
      out: file to write; its suffix gives the format. In a directory it is memory.png.

    Raises:
      UsageError: the file cannot be written.
    """
    if out.is_dir():
        out = out / "memory.png"
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(9, 1.6 + 0.45 * len(bars)), layout="constrained")
        left = [0.0] * len(bars)
        for part in bars[0].parts:
            widths = [bar.parts[part] / GIB for bar in bars]
            axes.barh(range(len(bars)), widths, 0.6, left, label=NAMES.get(part, part))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, (total, bar) in enumerate(zip(left, bars, strict=True)):
            peak = total if bar.peak is None else bar.peak / GIB
            axes.annotate(
                f"{peak:.1f}",
                (max(total, peak), y),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                bbox={"color": "white", "pad": 1},
            )
        peaks = [(bar.peak / GIB, y) for y, bar in enumerate(bars) if bar.peak is not None]
        if peaks:
            axes.plot(*zip(*peaks, strict=True), "kD", markersize=5, label="XLA's peak")
        for device in devices:
            axes.axvline(device.usable / GIB, color="black", linestyle="--", linewidth=1, zorder=1)
            axes.annotate(
                device.name,
                (device.usable / GIB, 1),
                xytext=(0, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
        axes.set(xlabel="GiB", yticks=range(len(bars)), yticklabels=[bar.name for bar in bars])
        axes.set_axisbelow(True)
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=7, fontsize="small")
        try:
            figure.savefig(out, dpi=150)
        except (ValueError, OSError) as error:
            raise UsageError(f"out={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)
