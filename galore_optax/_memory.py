"""Measures from shapes alone what parameters and optimizer state cost."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import PyTree

from galore_optax._codecs import CODECS
from galore_optax._errors import check_transformation
from galore_optax._given_specs import checked_mesh
from galore_optax._layerwise.places import hosted
from galore_optax._memory_report import DeviceBytes, HostBytes, LeafGroup, MemoryReport
from galore_optax._mesh_axes import names_of
from galore_optax._parts import parts
from galore_optax._quantized import QuantizedArray, is_quantized
from galore_optax._specs import state_partition_specs
from galore_optax._state import Inspection, inspecting
from galore_optax._trees import bare, leaves_with_paths, logical
from galore_optax._types import Params, Shape
from galore_optax._view import LeafView, MatrixView, Unprojected


def memory_report(
    tx: optax.GradientTransformation,
    params: Params,
    specs: PyTree = None,
    *,
    mesh: Mesh | AbstractMesh | None = None,
    offload: Sequence[str] = (),
    blocks: str = "blocks",
) -> MemoryReport:
    """Says what parameters and optimizer state cost, without allocating anything.

    All bytes are those of the arrays that ``tx.init(params)`` makes. Moments in galore are float32
    also where the parameters are bfloat16, in which most optimizers by themselves keep theirs: what
    a bfloat16 state costs is reported for a ``tx`` that has one, such as
    ``galore_adamw(..., moment_dtype="bfloat16", projector_dtype="bfloat16")``.

    Args:
      tx: any transformation; galore may be anywhere in it.
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      specs: where the parameters lie on ``mesh``, as for :func:`state_partition_specs`, by whose
        rules the report then says too what each device has. Without them it does not.
      mesh: the mesh, of which a ``jax.sharding.AbstractMesh`` is enough; by default the one of
        ``jax.set_mesh``.
      offload: what of the layers lies in the memory of the machine, as `layerwise` has it; the
        report then says how much of all this that is, and does not count it to a device's.
      blocks: the key of the stacked layers, as `layerwise` has it; read with ``offload`` alone.

    Returns:
      A `MemoryReport`: a plain dataclass that prints as a table.

    Raises:
      TypeError: there is ``offload``, and the parameters are not a mapping with the blocks.
      ValueError: there are specs and no mesh, or a mesh and no specs, or as
        :func:`state_partition_specs` says, or with ``offload`` as :func:`layerwise_shardings` does.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> report = galore_optax.memory_report(galore_optax.galore_adamw(1e-3, rank=1024), params)
      >>> report.projectors, report.moments
      (16777216, 33554432)
      >>> report.state_without_galore
      134217732
    """
    check_transformation("tx", tx)
    if specs is None and mesh is not None:
        raise ValueError("memory_report needs specs to say what a device of the mesh has")
    hosts = hosted(tx, params, offload, blocks) if offload else None
    inspection = Inspection()
    state = _Sizes.of(tx, params, inspection)
    without = _Sizes.of(tx, params, Inspection(without_galore=True))
    views = {view.path: view for views in inspection.trees for view in views}
    parameters = [_bytes(leaf) for leaf in jax.tree.leaves(params, is_leaf=is_quantized)]

    groups: dict[tuple[str, Shape, int | None, str | None], list[int]] = {}
    for i, (path, leaf) in enumerate(leaves_with_paths(logical(params))):
        rank, reason = _projection(views.get(path))
        group = (re.sub(r"(?<![^/])\d+(?![^/])", "*", path), np.shape(leaf), rank, reason)
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
        moment_dtype=state.moment_dtype,
        moment_dtype_without_galore=without.moment_dtype,
        of_device=None if specs is None else _of_device(tx, params, specs, mesh, hosts),
        on_host=None if hosts is None else _on_host(tx, params, hosts),
    )


# Of each array of the parameters and of the state whether it lies in the machine's memory.
_Hosts = tuple[list[bool], list[bool]]


def _on_host(tx: optax.GradientTransformation, params: Params, hosts: _Hosts) -> HostBytes:
    """Returns the bytes of all that lies in the machine's memory."""
    state = jax.eval_shape(lambda p: tx.init(p), _unsharded(params))
    sizes = (map(_bytes, jax.tree.leaves(tree)) for tree in (params, state))
    return HostBytes(*map(_sum, sizes, hosts))


def _sum(sizes: Iterable[int], chosen: Iterable[bool]) -> int:
    return sum(size for size, yes in zip(sizes, chosen, strict=True) if yes)


def _of_device(
    tx: optax.GradientTransformation,
    params: Params,
    specs: PyTree,
    mesh: Mesh | AbstractMesh | None,
    hosts: _Hosts | None,
) -> DeviceBytes:
    """Returns the bytes of one device of a mesh."""
    found = checked_mesh(mesh)
    if found is None:
        raise ValueError("memory_report needs the mesh of specs: pass mesh, or use jax.set_mesh")
    sizes = found.shape
    of_state = state_partition_specs(tx, params, specs, mesh=found)
    of_params = state_partition_specs(_PARAMS, params, specs, mesh=found)
    state = jax.eval_shape(lambda p: tx.init(p), _unsharded(params))

    def nbytes(tree: PyTree, places: PyTree) -> Iterator[int]:
        for x, spec in zip(
            jax.tree.leaves(tree),
            jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        ):
            axes = itertools.chain.from_iterable(map(names_of, spec))
            yield _bytes(x) // math.prod(sizes[axis] for axis in axes)

    parts_of_params = list(nbytes(params, of_params))
    parts_of_state = list(nbytes(state, of_state))
    if hosts is None:
        return DeviceBytes(found.size, sum(parts_of_params), sum(parts_of_state))
    there = HostBytes(_sum(parts_of_params, hosts[0]), _sum(parts_of_state, hosts[1]))
    own = sum(parts_of_params) - there.parameters, sum(parts_of_state) - there.state
    return DeviceBytes(found.size, *own, on_host=there)


# Its state is the parameters, which lie by the same rules where they are in codes.
_PARAMS = optax.GradientTransformation(lambda params: bare(params), optax.identity().update)


@dataclasses.dataclass
class _Sizes:
    """The bytes of a state, by leaf of the parameters."""

    projectors: list[int]
    moments: list[int]
    counters: int = 0
    moment_dtype: str | None = None

    @classmethod
    def of(
        cls,
        tx: optax.GradientTransformation,
        params: Params,
        inspection: Inspection,
    ) -> "_Sizes":
        with inspecting(inspection):
            # This is a function of its own, so that no earlier trace of tx.init is reused.
            state = jax.eval_shape(lambda p: tx.init(p), _unsharded(params))
        count = len(jax.tree.leaves(logical(params)))
        sizes = cls([0] * count, [0] * count)
        of_moments: collections.Counter[str] = collections.Counter()
        for part in parts(state, params):
            kind, size = _KINDS.get(part.field, "counters"), _bytes(part.array)
            if kind == "counters" or part.owner is None:
                sizes.counters += size
            else:
                getattr(sizes, kind)[part.owner] += size
                if kind == "moments":
                    of_moments[_held_in(part.array)] += size
        sizes.moment_dtype = max(of_moments, key=of_moments.__getitem__, default=None)
        return sizes


def _unsharded(params: Params) -> Params:
    """Returns shapes and dtypes without shardings: bytes are those of all devices together."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)


# What the parts of a state are counted for by their fields; all others are counters.
_KINDS = {
    None: "moments",
    "inner": "moments",
    "accumulator": "moments",
    "residual": "moments",
    "transport": "moments",
    "left": "projectors",
    "right": "projectors",
}


def _projection(view: LeafView | None) -> tuple[int | None, str | None]:
    if isinstance(view, MatrixView):
        return view.rank, None
    if isinstance(view, Unprojected):
        return None, view.reason
    return None, "no galore sees it"


def _bytes(array: jax.typing.ArrayLike | QuantizedArray) -> int:
    if isinstance(array, QuantizedArray):
        return array.nbytes
    return math.prod(np.shape(array)) * jnp.result_type(array).itemsize


def _held_in(array: jax.typing.ArrayLike | QuantizedArray) -> str:
    """Returns in what the numbers of an array are held, for people."""
    if isinstance(array, QuantizedArray):
        return f"{8 // CODECS[array.scheme].codes_per_byte}-bit codes"
    return jnp.result_type(array).name
