"""Draws what steps need of memory, part by part, against what devices have."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

from examples.flax_llama.config import UsageError
from examples.flax_llama.devices import GIB, Device
from examples.flax_llama.plot import STYLE

NAMES = {"inputs": "block inputs", "working": "working set"}


@dataclasses.dataclass(frozen=True)
class Bar:
    """One configuration: bytes by part, and the peak of its compiled step where that is known.

    The number at its right is the peak, or the sum of the parts where there is none.
    """

    name: str
    parts: dict[str, int]
    peak: int | None = None


def picture(out: Path) -> Path:
    """The file that `draw` is to write: in a directory memory.png.

    Raises:
      UsageError: it could not be written.
    """
    if out.is_dir():
        out = out / "memory.png"
    formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(f"out={out}: expected a name that ends in one of .{', .'.join(formats)}.")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UsageError(f"out={out} cannot be written: choose a directory that is there.")
    return out


def draw(bars: Sequence[Bar], devices: Sequence[Device], out: Path) -> None:
    """Writes a picture of stacked bars, with a line where the memory of each device ends.

    Args:
      bars: from top to bottom.
      devices: whose lines to draw.
      out: file to write; its suffix gives the format.

    Raises:
      UsageError: the file cannot be written.
    """
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(9, 1.6 + 0.45 * len(bars)), layout="constrained")
        left = [0.0] * len(bars)
        for part in bars[0].parts:
            widths = [bar.parts[part] / GIB for bar in bars]
            axes.barh(range(len(bars)), widths, 0.6, left, label=NAMES.get(part, part))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, (total, bar) in enumerate(zip(left, bars, strict=True)):
            size = total if bar.peak is None else bar.peak / GIB
            # Right of the axes, where no device's line is.
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axes.annotate(f"{size:.1f}", (1, y), xytext=(7, 0), va="center", **place)
        peaks = [(bar.peak / GIB, y) for y, bar in enumerate(bars) if bar.peak is not None]
        if peaks:
            axes.plot(*zip(*peaks, strict=True), "kD", markersize=5, label="XLA's peak")
        # Each name higher than those at its right, so that it has room beside its line.
        for i, device in enumerate(sorted(devices, key=lambda d: d.usable, reverse=True)):
            line = {"color": "black", "linestyle": "--", "linewidth": 1}
            axes.axvline(device.usable / GIB, zorder=1, **line)
            axes.annotate(
                f" {device.description}",
                (device.usable / GIB, 1),
                xytext=(0, 3 + 12 * i),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                fontsize="small",
                arrowprops=line | {"arrowstyle": "-", "relpos": (0, 0), "shrinkA": 0, "shrinkB": 0},
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
