"""Draws what steps need of memory, part by part, against what devices have."""

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase

from examples.flax_llama.config import UsageError
from examples.flax_llama.devices import GIB, Device
from examples.flax_llama.fit import Fit
from examples.flax_llama.plot import STYLE

NAMES = {"inputs": "layer inputs", "working": "working set"}
COLORS = {Fit.SURE: "tab:green", Fit.CLOSE: "tab:orange", Fit.NOT: "tab:red"}
# A device with so many times the memory of the largest bar is named, but not in the picture, whose
# bars would be too short to read.
FAR = 3
# Characters of a bar's name in a line.
WIDTH = 44


@dataclasses.dataclass(frozen=True)
class Bar:
    """One configuration: bytes by part, and the peak of its compiled step where that is known.

    The number at its end is the peak, or the sum of the parts where there is none.
    """

    name: str
    parts: dict[str, int]
    peak: int | None = None
    fit: Fit | None = None

    @property
    def size(self) -> int:
        return sum(self.parts.values()) if self.peak is None else self.peak

    @property
    def end(self) -> int:
        """Where what is drawn of it ends."""
        return max(sum(self.parts.values()), self.size)


def picture(out: Path) -> Path:
    """The file that `draw` is to write: in a directory memory.png.

    Raises:
      UsageError: it could not be written.
    """
    if out.is_dir():
        out = out / "memory.png"
    formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.removeprefix(".").lower() not in formats:
        raise UsageError(
            f"picture={out}: expected a name that ends in one of .{', .'.join(formats)}."
        )
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise UsageError(f"picture={out} cannot be written: choose a directory that is there.")
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
    longest = max(bar.end for bar in bars)
    unit, unit_name = (GIB, "GiB") if longest >= GIB else (2**20, "MiB")
    near = [device for device in devices if device.usable <= FAR * longest]
    far = [device for device in devices if device.usable > FAR * longest]
    right = max([longest, *(device.usable for device in near)]) / unit
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure, axes = plt.subplots(figsize=(10, 2.0 + 0.5 * len(bars)), layout="constrained")
        draw_bars(axes, bars, unit)
        # With room for what stands at the end of the longest bar.
        axes.set(xlim=(0, 1.28 * right), ylim=(len(bars) - 0.4, -0.6))
        draw_devices(axes, near, unit)
        label = f"{unit_name} needed at the fullest moment of an update"
        for device in far:
            label += (
                f"\nbeyond the right edge: {device.description}, {device.usable / GIB:.1f} GiB,"
            )
            label += f" {device.usable / longest:,.0f} times as much"
        names = [
            "\n".join(textwrap.fill(line, WIDTH) for line in bar.name.splitlines()) for bar in bars
        ]
        axes.set(xlabel=label, yticks=range(len(bars)), yticklabels=names)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=7, fontsize="small")
        try:
            figure.savefig(out, dpi=150)
        except (ValueError, OSError) as error:
            raise UsageError(f"picture={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)


def draw_bars(axes: Axes, bars: Sequence[Bar], unit: int) -> None:
    """The parts of each bar, its peak, and at its end its size and whether it fits."""
    left = [0.0] * len(bars)
    for part in bars[0].parts:
        widths = [bar.parts[part] / unit for bar in bars]
        axes.barh(range(len(bars)), widths, 0.6, left, label=NAMES.get(part, part))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    peaks = [(bar.peak / unit, y) for y, bar in enumerate(bars) if bar.peak is not None]
    if peaks:
        axes.plot(*zip(*peaks, strict=True), "kD", markersize=5, label="XLA's peak")
    for y, bar in enumerate(bars):
        words = f"{bar.size / unit:,.{1 if unit == GIB else 0}f}"
        axes.annotate(
            f"{words}  {bar.fit.value}" if bar.fit else words,
            (bar.end / unit, y),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[bar.fit] if bar.fit else "black",
            weight="bold",
            # A device's line may be behind it.
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def draw_devices(axes: Axes, devices: Sequence[Device], unit: int) -> None:
    """A line where the memory of each device ends, with its name above."""
    # Each name higher than those at its right, so that it has room beside its line.
    for i, device in enumerate(sorted(devices, key=lambda d: d.usable, reverse=True)):
        line = {"color": "black", "linestyle": "--", "linewidth": 1}
        axes.axvline(device.usable / unit, zorder=1, **line)
        # Left of its line where the right edge is near.
        before = device.usable / unit > 0.6 * axes.get_xlim()[1]
        axes.annotate(
            f" {device.description}: {device.usable / GIB:.1f} GiB for JAX ",
            (device.usable / unit, 1),
            xytext=(0, 3 + 12 * i),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if before else "left",
            fontsize="small",
            arrowprops=line
            | {"arrowstyle": "-", "relpos": (float(before), 0), "shrinkA": 0, "shrinkB": 0},
        )
