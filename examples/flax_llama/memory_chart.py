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
from examples.flax_llama.devices import Device
from examples.flax_llama.fit import Fit
from examples.flax_llama.plot import STYLE
from examples.flax_llama.units import size, unit_of

COLORS = {Fit.SURE: "tab:green", Fit.CLOSE: "darkorange", Fit.NOT: "tab:red"}
# Of what stays between updates blue, of what passes brown; neither is a color of those above.
PARTS = {
    "weights": "#2f6ba6",
    "projectors": "#64a8d8",
    "moments": "#b3d4ea",
    "gradients": "#8c510a",
    "inputs": "#bf9a5a",
    "working": "#e6d3a8",
}
# A device with so many times the memory of the largest bar is named, but not in the picture, whose
# bars would be too short to read.
FAR = 3
# For the same reason a bar is cut at so many times the memory of the largest device.
CUT = 2.5
# Characters of a bar's name in a line.
WIDTH = 48


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
    near = [device for device in devices if device.usable <= FAR * longest]
    far = [device for device in devices if device.usable > FAR * longest]
    most = max((device.usable for device in near), default=longest)
    right = 1.05 * max(most, min(longest, CUT * most))
    scale, unit = unit_of(right)
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        names = [
            "\n".join(textwrap.fill(line, WIDTH) for line in bar.name.splitlines()) for bar in bars
        ]
        lines = max(len(name.splitlines()) for name in names)
        height = 1.6 + max(0.5, 0.18 * lines) * len(bars) + 0.16 * len(devices)
        figure, axes = plt.subplots(figsize=(10, height), layout="constrained")
        axes.set(xlim=(0, right / scale), ylim=(len(bars) - 0.4, -0.6))
        draw_bars(axes, bars, (scale, unit))
        draw_devices(axes, near, far, (scale, unit), longest)
        axes.set(yticks=range(len(bars)), yticklabels=names)
        axes.set_xlabel(f"{unit} at the fullest moment of an update")
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=7, fontsize="small")
        try:
            figure.savefig(out, dpi=150)
        except (ValueError, OSError) as error:
            raise UsageError(f"picture={out} cannot be written: {error}") from error
        finally:
            plt.close(figure)


def draw_bars(axes: Axes, bars: Sequence[Bar], unit: tuple[int, str]) -> None:
    """The parts of each bar, its peak, and beside the axes its size and whether it fits."""
    scale, right = unit[0], axes.get_xlim()[1]
    left = [0.0] * len(bars)
    for part in bars[0].parts:
        widths = [bar.parts[part] / scale for bar in bars]
        axes.barh(range(len(bars)), widths, 0.6, left, label=part, color=PARTS[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    peaks = [(bar.peak / scale, y) for y, bar in enumerate(bars) if bar.peak is not None]
    if peaks:
        axes.plot(*zip(*peaks, strict=True), "kD", markersize=5, label="XLA's peak")
    for y, bar in enumerate(bars):
        if bar.end / scale > right:
            # It is torn off there.
            teeth = [right * (0.985 - 0.01 * (i % 2)) for i in range(9)]
            heights = [y - 0.32 + 0.08 * i for i in range(9)]
            axes.plot(teeth, heights, color="white", linewidth=3)
        axes.annotate(
            f"{size(bar.size, unit)}  {bar.fit.value}" if bar.fit else size(bar.size, unit),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=COLORS[bar.fit] if bar.fit else "black",
            weight="bold",
            annotation_clip=False,
        )


def draw_devices(
    axes: Axes,
    near: Sequence[Device],
    far: Sequence[Device],
    unit: tuple[int, str],
    longest: int,
) -> None:
    """A line where the memory of each device ends, with its name above; of far ones the name."""
    line = {"color": "black", "linewidth": 1.5}
    right = axes.get_xlim()[1]
    # Each name higher than those at its right, so that it has room beside its line.
    ordered = sorted([*near, *far], key=lambda device: device.usable, reverse=True)
    for i, device in enumerate(ordered):
        words = f" {device.description}: {size(device.usable, unit)} for JAX "
        place = device.usable / unit[0]
        arrow = line | {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0}
        if device in far:
            words += (
                f"are {device.usable / longest:,.0f} times as much, beyond the right edge \u2192"
            )
            place, arrow = right, None
        else:
            axes.axvline(place, **line)
        # Left of its line where the right edge is near.
        before = place > 0.6 * right
        if arrow is not None:
            arrow |= {"relpos": (float(before), 0)}
        axes.annotate(
            words,
            (place, 1),
            xytext=(0, 3 + 12 * i),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if before else "left",
            fontsize="small",
            arrowprops=arrow,
        )
