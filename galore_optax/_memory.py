"""Says from shapes alone what parameters and optimizer state cost."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from galore_optax._ownership import ownership
from galore_optax._quantized import QuantizedArray, is_quantized
from galore_optax._state import GaloreState, Inspection, inspecting, is_galore_state
from galore_optax._subspace import Subspace, is_absent
from galore_optax._trees import leaves_with_paths, logical
from galore_optax._types import DType, Params, Shape, State
from galore_optax._view import LeafView, MatrixView, Unprojected


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
class MemoryReport:
    """What :func:`memory_report` found; ``print`` it for a table. Sizes are bytes.

    Attributes:
      groups: the leaves, grouped by path, shape and rank.
      counters: the bytes of step counters and other state that belongs to no leaf's numbers.
      counters_without_galore: the same for the inner optimizer without galore around it.
      dtype: the dtype that floating-point arrays were taken to have, None for their own.
    """

    groups: tuple[LeafGroup, ...]
    counters: int
    counters_without_galore: int
    dtype: str | None

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
        counted = "arrays as they are" if self.dtype is None else f"arrays as if {self.dtype}"
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
            f"({name} = {unit:,} bytes; {counted}; counters included: {self.counters:,} bytes)",
        ]
        left = [group for group in self.groups if group.not_projected is not None]
        if left:
            lines += ["", "not projected:"]
            lines += [f"  {group.path}: {group.not_projected}" for group in left]
        return "\n".join(lines)


def memory_report(
    tx: optax.GradientTransformation, params: Params, dtype: DType | None = None
) -> MemoryReport:
    """Says what parameters and optimizer state cost, without allocating anything.

    Args:
      tx: any transformation; galore may be anywhere in it.
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      dtype: the dtype that every floating-point array is counted as if it had, e.g.
        ``"bfloat16"`` to compare with the published figures; by default arrays count as they are.
        Quantized arrays always do.

    Returns:
      A `MemoryReport`: a plain dataclass that prints as a table.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> report = galore_optax.memory_report(galore_optax.galore_adamw(1e-3, rank=1024), params)
      >>> report.projectors, report.moments
      (16777216, 33554432)
      >>> report.state_without_galore
      134217732
    """
    inspection = Inspection()
    state = _Sizes.of(tx, params, dtype, inspection)
    without = _Sizes.of(tx, params, dtype, Inspection(without_galore=True))
    views = {view.path: view for views in inspection.trees for view in views}
    parameters = [_bytes(leaf, dtype) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)]

    groups: dict[tuple[str, Shape, int | None, str | None], list[int]] = {}
    for i, (path, leaf) in enumerate(leaves_with_paths(logical(params))):
        rank, reason = _projection(views.get(path))
        group = (re.sub(r"(?<![^/])\d+(?![^/])", "*", path), jnp.shape(leaf), rank, reason)
        groups.setdefault(group, []).append(i)

    def total(sizes: Sequence[int], members: list[int]) -> int:
        return sum(sizes[i] for i in members)

    return MemoryReport(
        groups=tuple(
            LeafGroup(
                path=path,
                shape=shape,
                leaves=len(members),
                rank=rank,
                not_projected=reason,
                parameters=total(parameters, members),
                projectors=total(state.projectors, members),
                moments=total(state.moments, members),
                moments_without_galore=total(without.moments, members),
            )
            for (path, shape, rank, reason), members in groups.items()
        ),
        counters=state.counters,
        counters_without_galore=without.counters,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
    )


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
      >>> reports = {name: memory_report(tx, params) for name, tx in optimizers.items()}
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


@dataclasses.dataclass
class _Sizes:
    """The bytes of a state, by leaf of the parameters."""

    projectors: list[int]
    moments: list[int]
    counters: int = 0

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformation,
        params: Params,
        dtype: DType | None,
        inspection: Inspection,
    ) -> "_Sizes":
        with inspecting(inspection):
            # This is a function of its own, so that no earlier trace of tx.init is reused.
            state = jax.eval_shape(lambda p: tx.init(p), _unsharded(params))
        state = jax.tree.map(_listed, state, is_leaf=is_galore_state)
        count = len(jax.tree.leaves(logical(params)))
        sizes = cls([0] * count, [0] * count)
        items = jax.tree.leaves(_mark(state, "moments"))
        for item, leaf in zip(items, ownership(state, params), strict=True):
            if item.kind == "counters" or leaf.owner is None:
                sizes.counters += _bytes(item.array, dtype)
            else:
                getattr(sizes, item.kind)[leaf.owner] += _bytes(item.array, dtype)
        return sizes


def _unsharded(params: Params) -> Params:
    """Returns shapes and dtypes without shardings: bytes are those of all devices together."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), params)


def _listed(node: State) -> State:
    """Returns a state of galore with lists of what residual and transport keep of each parameter.

    Positions in a list are behind the parameter's own keys, by which its owner is found.
    """
    if not is_galore_state(node):
        return node
    old = node.subspace
    residual, transport = (
        jax.tree.map(lambda _, own: jax.tree.leaves(own), old.refreshes, kept, is_leaf=is_absent)
        for kept in (old.residual, old.transport)
    )
    return node._replace(subspace=old._replace(residual=residual, transport=transport))


# What the fields of a subspace are counted for, where they are not counters.
_KINDS = {
    "left": "projectors",
    "right": "projectors",
    "residual": "moments",
    "transport": "moments",
}


@dataclasses.dataclass(frozen=True)
class _Marked:
    """An array of the state, quantized or not, and what it is there for."""

    array: jax.ShapeDtypeStruct | QuantizedArray
    kind: str


def _mark(state: State, kind: str) -> State:
    def mark(node: State) -> State:
        if not isinstance(node, GaloreState):
            return _Marked(node, kind)
        subspace = node.subspace._asdict()
        return GaloreState(
            step=_mark(node.step, "counters"),
            subspace=Subspace(
                **{name: _mark(x, _KINDS.get(name, "counters")) for name, x in subspace.items()}
            ),
            inner=_mark(node.inner, "moments"),
            accumulator=_mark(node.accumulator, "moments"),
            version=_mark(node.version, "counters"),
        )

    return jax.tree.map(
        mark, state, is_leaf=lambda x: isinstance(x, GaloreState) or is_quantized(x)
    )


def _projection(view: LeafView | None) -> tuple[int | None, str | None]:
    if isinstance(view, MatrixView):
        return view.rank, None
    if isinstance(view, Unprojected):
        return None, view.reason
    return None, "no galore sees it"


def _bytes(array: jax.typing.ArrayLike | QuantizedArray, dtype: DType | None) -> int:
    if isinstance(array, QuantizedArray):
        return array.nbytes
    own = jnp.result_type(array)
    counted = dtype if dtype is not None and jnp.issubdtype(own, jnp.floating) else own
    return math.prod(jnp.shape(array)) * jnp.dtype(counted).itemsize


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
