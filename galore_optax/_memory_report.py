"""Holds what parameters and optimizer state cost, and prints it as tables."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class LeafGroup:
    """Leaves of one shape whose paths differ only in numbers. Sizes are bytes of all of them.

    Attributes:
      path: the common path, numbers replaced by ``*``.
      shape: the shape of one leaf.
      leaves: how many leaves there are.
      rank: the rank of their projectors, or None where they are not projected.
      not_projected: why they are not projected, or None where they are.
      parameters: the bytes of the leaves themselves.
      projectors: the bytes of their projectors.
      moments: the bytes of all else that the optimizer keeps for them.
      moments_without_galore: the bytes that the inner optimizer keeps for them without galore
        around it.
    """

    path: str
    shape: tuple[int, ...]
    leaves: int
    rank: int | None
    not_projected: str | None
    parameters: int
    projectors: int
    moments: int
    moments_without_galore: int


@dataclasses.dataclass(frozen=True)
class HostBytes:
    """What lies in the memory of the machine instead of the device's. Sizes are bytes.

    Attributes:
      parameters: the bytes of parameters.
      state: the bytes of optimizer state.
    """

    parameters: int
    state: int


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one device of a mesh has. Sizes are bytes.

    Attributes:
      devices: how many devices the mesh has.
      parameters: the bytes of its part of the parameters in its own memory.
      state: the bytes of its part of the optimizer state in its own memory.
      on_host: what else of its part lies in the memory of the machine, or None where nothing may.
    """

    devices: int
    parameters: int
    state: int
    on_host: HostBytes | None = None


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What :func:`memory_report` found; ``print`` it for a table. Sizes are bytes.

    Attributes:
      groups: the leaves, grouped by path, shape and rank.
      counters: the bytes of step counters and other state that belongs to no leaf's numbers.
      counters_without_galore: the same for the inner optimizer without galore around it.
      moment_dtype: what most bytes of the moments are: a dtype, or codes such as "8-bit codes".
      moment_dtype_without_galore: the same for the inner optimizer without galore around it.
      of_device: what one device of the mesh has that :func:`memory_report` was given, or None.
      on_host: what of all this lies in the memory of the machine by ``offload``, or None.
    """

    groups: tuple[LeafGroup, ...]
    counters: int
    counters_without_galore: int
    moment_dtype: str | None
    moment_dtype_without_galore: str | None
    of_device: DeviceBytes | None = None
    on_host: HostBytes | None = None

    @property
    def parameters(self) -> int:
        """The bytes of the parameters."""
        return sum(group.parameters for group in self.groups)

    @property
    def projectors(self) -> int:
        """The bytes of the projectors."""
        return sum(group.projectors for group in self.groups)

    @property
    def moments(self) -> int:
        """The bytes of the inner state."""
        return sum(group.moments for group in self.groups)

    @property
    def moments_without_galore(self) -> int:
        """The bytes of the inner state without galore around it."""
        return sum(group.moments_without_galore for group in self.groups)

    @property
    def state(self) -> int:
        """The bytes of the optimizer state: projectors, moments and counters."""
        return self.projectors + self.moments + self.counters

    @property
    def state_without_galore(self) -> int:
        """The bytes of the inner optimizer's state without galore around it."""
        return self.moments_without_galore + self.counters_without_galore

    @property
    def total(self) -> int:
        """The bytes of parameters and optimizer state."""
        return self.parameters + self.state

    @property
    def total_without_galore(self) -> int:
        """The bytes of parameters and of the inner optimizer's state without galore."""
        return self.parameters + self.state_without_galore

    def __str__(self) -> str:
        unit, name = _unit(self.total_without_galore)

        def size(count: int) -> str:
            return f"{count / unit:,.3f}"

        header = (
            "leaves",
            "shape",
            "rank",
            "parameters",
            "projectors",
            "moments",
            "without galore",
        )
        rows = [
            (
                f"{group.path} ({group.leaves})" if group.leaves > 1 else group.path,
                str(group.shape),
                "-" if group.rank is None else str(group.rank),
                size(group.parameters),
                size(group.projectors),
                size(group.moments),
                size(group.moments_without_galore),
            )
            for group in self.groups
        ]
        sums = (self.parameters, self.projectors, self.moments, self.moments_without_galore)
        lines = _table([header, *rows, ("sum", "", "", *map(size, sums))], left=2)
        rule = "-" * max(map(len, lines))
        lines = [
            lines[0],
            rule,
            *lines[1:-1],
            rule,
            lines[-1],
            "",
            f"optimizer state      {size(self.state)} {name}; "
            f"without galore {size(self.state_without_galore)} {name}",
            f"with the parameters  {size(self.total)} {name}; "
            f"without galore {size(self.total_without_galore)} {name}",
            f"({name} = {unit:,} bytes; counters included: {self.counters:,} bytes)",
        ]

        def told(where: str, state: int, parameters: int) -> str:
            return (
                f"{where}  optimizer state {size(state)} {name}, "
                f"with the parameters {size(parameters + state)} {name}"
            )

        if (host := self.on_host) is not None:
            lines.insert(-1, told("of it in the machine's memory", host.state, host.parameters))
        if (one := self.of_device) is not None:
            lines.insert(-1, told(f"on each of {one.devices} devices", one.state, one.parameters))
            if (host := one.on_host) is not None:
                lines.insert(-1, told("beside each", host.state, host.parameters))
        if self.moment_dtype != self.moment_dtype_without_galore:
            lines.append(
                f"(moments are {self.moment_dtype} with galore, and would be "
                f"{self.moment_dtype_without_galore} without: compare what is kept alike)"
            )
        left = [group for group in self.groups if group.not_projected is not None]
        if left:
            lines += ["", "not projected:"]
            lines += [f"  {group.path}: {group.not_projected}" for group in left]
        return "\n".join(lines)


def compare_memory(reports: Mapping[str, MemoryReport]) -> str:
    """Returns a table of what several optimizers cost, one line each, to print.

    Args:
      reports: what :func:`memory_report` found, by the name to show, each for its own parameters,
        which may be in other dtypes or codes.

    Returns:
      A table of parameters, projectors and moments, their total with counters included, and that
      total over the first optimizer's total.

    Raises:
      TypeError: something is not a `MemoryReport`.
      ValueError: there is no report.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
      >>> optimizers = {"AdamW": optax.adamw(1e-3), "8-bit AdamW": galore_optax.adamw_8bit(1e-3)}
      >>> report = lambda tx: galore_optax.memory_report(tx, params)
      >>> reports = {name: report(tx) for name, tx in optimizers.items()}
      >>> print(galore_optax.compare_memory(reports))
      MiB          parameters  projectors  moments  total  / AdamW
      ------------------------------------------------------------
      AdamW             32.00        0.00    64.00  96.00     1.00
      8-bit AdamW       32.00        0.00    32.50  64.50     0.67
    """
    for name, report in reports.items():
        if not isinstance(report, MemoryReport):
            raise TypeError(
                f"reports[{name!r}] must be what memory_report(tx, params) returns; got {report!r}"
            )
    if not reports:
        raise ValueError("reports must have at least one MemoryReport; got none")
    (first, base), *_ = reports.items()
    largest = max(report.total for report in reports.values())
    unit, unit_name = next(
        (2**e, name)
        for e, name in ((30, "GiB"), (20, "MiB"), (10, "KiB"))
        if largest >= 2**e or e == 10
    )
    header = (unit_name, "parameters", "projectors", "moments", "total", f"/ {first}")
    rows = [
        (
            name,
            *(
                f"{size / unit:,.2f}"
                for size in (report.parameters, report.projectors, report.moments, report.total)
            ),
            f"{report.total / base.total:.2f}",
        )
        for name, report in reports.items()
    ]
    lines = _table([header, *rows], left=1)
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _unit(size: int) -> tuple[int, str]:
    return next(
        (10**e, name) for e, name in ((9, "GB"), (6, "MB"), (3, "kB")) if size >= 10**e or e == 3
    )


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
