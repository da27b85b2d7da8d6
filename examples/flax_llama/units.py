"""How many bytes are said, the same everywhere."""

GIB = 2**30
# From the largest.
UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def unit_of(count: float) -> tuple[int, str]:
    """The largest unit of which there is one, and its name."""
    return next((unit for unit in UNITS if count >= unit[0]), UNITS[-1])


def size(count: float, unit: tuple[int, str] | None = None) -> str:
    """Bytes in a unit, by default one in which they are at least 1.

    Of GiB there are two decimals, of anything else three digits.
    """
    scale, name = unit or unit_of(count)
    number = count / scale
    decimals = 2 if scale == GIB else 0 if scale == 1 else max(0, 3 - len(f"{number:.0f}"))
    return f"{number:,.{decimals}f} {name}"
