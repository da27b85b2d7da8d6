"""Where everything lies on the devices of a mesh: one table of parameters, and one of activations.

A mesh has three axes. Over "data" devices have the same parameters and other sequences; over
"fsdp" they have other sequences too, and each has a part of all parameters, which are gathered
where they are used; over "tensor" they share the sequences, and each computes a part of every
layer. Optimizer state lies where `galore_optax.state_partition_specs` says.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import galore_optax
from examples.flax_llama.spaces import HOST
from examples.flax_llama.usage import UsageError

AnyMesh = Mesh | AbstractMesh

AXES = ("data", "fsdp", "tensor")
# What the sequences of a batch are divided over.
ROWS = ("data", "fsdp")

# By the end of its path, what the last axes of a parameter are divided over; those before, and all
# of what is not here, are whole. Of two kernels that follow each other the first is divided by its
# outputs over "tensor" and the second by its inputs, so that nothing is gathered in between.
FIRST, SECOND = "(q|k|v|gate|up)", "(o|down)"
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "embed/embedding": ("tensor", "fsdp"),
    "head/kernel": ("fsdp", "tensor"),
    f"{FIRST}/kernel": ("fsdp", "tensor"),
    f"{SECOND}/kernel": ("tensor", "fsdp"),
    f"{FIRST}(/b)?/bias": ("tensor",),
    # Of kernels of low rank, and of LoRA's: the rank is not divided.
    f"{FIRST}/(a/kernel|lora/lora_a)": ("fsdp", None),
    f"{FIRST}/(b/kernel|lora/lora_b)": (None, "tensor"),
    f"{SECOND}/(a/kernel|lora/lora_a)": ("tensor", None),
    f"{SECOND}/(b/kernel|lora/lora_b)": (None, "fsdp"),
}
ACTIVATIONS: dict[str, PartitionSpec] = {
    # (vocabulary, hidden), where tokens are looked up: they are not moved to a part of the hidden
    # size each.
    "table": PartitionSpec("tensor", None),
    # (batch, sequence, hidden), between layers.
    "layers": PartitionSpec(ROWS, None, None),
    # (batch, sequence, heads, size of a head).
    "heads": PartitionSpec(ROWS, None, "tensor", None),
    # (batch, sequence, width of the MLP).
    "mlp": PartitionSpec(ROWS, None, "tensor"),
}


def sizes_of(mesh: str | None) -> dict[str, int]:
    """The size of each axis of a mesh as it is written, such as data=2,fsdp=4; 1 is left out.

    Raises:
      UsageError: it says something else.
    """
    sizes: dict[str, int] = {}
    for word in mesh.split(",") if mesh is not None else ():
        axis, _, size = (part.strip() for part in word.partition("="))
        if axis not in AXES or not (size.isascii() and size.isdecimal() and int(size) > 0):
            raise UsageError(
                f"mesh={mesh!r}: {word!r} is not the size of an axis; expected sizes of "
                f"{', '.join(AXES)}, each at least 1, as in 'data=2,fsdp=4'."
            )
        if axis in sizes:
            raise UsageError(f"mesh={mesh!r} has {axis} twice.")
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def planned_mesh(mesh: str) -> AbstractMesh:
    """A mesh of devices that need not be here."""
    sizes = sizes_of(mesh)
    return AbstractMesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES))


def make_mesh(mesh: str | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices of all processes; by default all of them along "data".

    Args:
      mesh: the sizes of the axes, as of `sizes_of`.
      devices: other devices than all that JAX knows.

    Raises:
      UsageError: the mesh has another number of devices than there are.
    """
    found = jax.devices() if devices is None else devices
    if mesh is None:
        sizes = {axis: 1 for axis in AXES} | {"data": len(found)}
    elif math.prod((sizes := sizes_of(mesh)).values()) != len(found):
        raise UsageError(
            f"mesh={mesh!r} is {math.prod(sizes.values())} devices, and here are {len(found)}: "
            f"choose sizes whose product is {len(found)}."
        )
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, kinds, devices=devices)


def is_whole(mesh: AnyMesh) -> bool:
    """Whether every device has all parameters."""
    return mesh.shape["fsdp"] == mesh.shape["tensor"] == 1


def row_parts(mesh: Mesh) -> int:
    """How many parts the sequences of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: AnyMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """Of arrays with an axis of sequences, that one."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))


def part_of_data(mesh: Mesh) -> tuple[int, int]:
    """The number of the part of each batch that this process reads, and how many parts there are.

    Processes whose devices compute with the same sequences read the same part.

    Raises:
      UsageError: some processes would share a part of what they read.
    """
    rows: dict[int, set[int]] = {}
    for device, (of_device,) in by_rows(mesh).devices_indices_map((row_parts(mesh),)).items():
        rows.setdefault(device.process_index, set()).add(of_device.start or 0)
    parts = sorted(set(map(frozenset, rows.values())), key=min)
    if len(set(map(len, parts))) > 1 or sum(map(len, parts)) != row_parts(mesh):
        sizes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise UsageError(
            f"mesh={sizes!r}: the devices of a process would compute with a part of the sequences "
            "of another one: choose a size of tensor that divides the devices of a process, or "
            "that they divide."
        )
    return parts.index(frozenset(rows[jax.process_index()])), len(parts)


def parameter_specs(params: Any, mesh: AnyMesh) -> Any:
    """The spec of each parameter, by `PARAMETERS`; what is in codes counts as one.

    A mesh axis that does not divide an axis of the parameter is left out there, as are those of
    size 1.
    """

    def spec(path: tuple[Any, ...], x: Any) -> PartitionSpec:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rules = (axes for end, axes in PARAMETERS.items() if re.search(f"(^|/){end}$", name))
        axes = next(rules, ())
        entries = (*[None] * (len(x.shape) - len(axes)), *axes)
        return dividing(PartitionSpec(*entries), x.shape, mesh)

    return jax.tree.map_with_path(spec, params, is_leaf=is_quantized)


def dividing(spec: PartitionSpec, shape: Sequence[int], mesh: AnyMesh) -> PartitionSpec:
    """A spec without the mesh axes that do not divide what they are to divide, or are one device.

    Args:
      spec: with an entry for each axis.
      shape: of the array.
      mesh: the mesh.
    """

    def entry(axes: Any, size: int) -> Any:
        parts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
        return axes if parts > 1 and size % parts == 0 else None

    entries = (axes and entry(axes, size) for axes, size in zip(spec, shape, strict=True))
    return PartitionSpec(*entries)


def shardings_of(init: optax.TransformInitFn, params: Any, mesh: AnyMesh) -> Any:
    """Where that lies which a function makes of the parameters, such as optimizer state.

    Args:
      init: the function, such as that of an optimizer.
      params: the parameters, or their shapes.
      mesh: the mesh.

    Returns:
      A tree of the shardings of its arrays, or one for all of them.
    """
    if is_whole(mesh):
        return replicated(mesh)
    made = optax.GradientTransformation(init, optax.identity().update)
    specs = parameter_specs(params, mesh)
    found = galore_optax.state_partition_specs(made, params, specs, mesh=mesh)
    return jax.tree.map(functools.partial(NamedSharding, mesh), found, is_leaf=is_spec)


def parameter_shardings(params: Any, mesh: Mesh, offload: Sequence[str] = ()) -> Any:
    """`shardings_of` the parameters themselves, of which those in codes are several arrays.

    The layers lie in the memory of the machine where `offload` says so.
    """
    found = shardings_of(lambda params: params, params, mesh)
    if "weights" not in offload:
        return found
    tree = jax.tree.structure(params).unflatten(spread(found, params))
    hosted = jax.tree.map(lambda x: x.with_memory_kind(HOST), tree["blocks"])
    return tree | {"blocks": hosted}


def spread(shardings: Any, tree: Any) -> list[jax.sharding.Sharding]:
    """The sharding of each array of a tree, of which a part may have one for all of its arrays."""
    of_parts = jax.tree.map(
        lambda sharding, part: [sharding] * len(jax.tree.leaves(part)), shardings, tree
    )
    return jax.tree.leaves(of_parts)


def on(shardings: Any, tree: Any) -> Any:
    """The shapes of a tree, with where they lie."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(leaves, spread(shardings, tree), strict=True)
    )


def share(tree: Any) -> tuple[int, int]:
    """What a device has of arrays, or of shapes that are `on` a mesh, and all bytes of them."""

    def of(shape: Sequence[int], x: Any) -> int:
        return math.prod(shape) * x.dtype.itemsize

    leaves = jax.tree.leaves(tree)
    own = (of(x.sharding.shard_shape(x.shape), x) for x in leaves)
    return sum(own), sum(of(x.shape, x) for x in leaves)


def laid(x: jax.Array, what: str) -> jax.Array:
    """What is computed with, where `ACTIVATIONS` says, if it is computed on a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    on_mesh = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto} and mesh.size > 1
    if not on_mesh:
        return x
    return jax.lax.with_sharding_constraint(x, dividing(ACTIVATIONS[what], x.shape, mesh))


def laid_as_parameters(gradients: Any, mesh: Mesh) -> Any:
    """Gradients where the parameters lie, where that is not everywhere."""
    if is_whole(mesh):
        return gradients
    specs = parameter_specs(gradients, mesh)
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)),
        *(gradients, specs),
    )


def computing_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which `laid` knows the mesh."""

    def under_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return under_mesh


def divided(
    function: Callable[..., Any], mesh: Mesh, in_specs: Any, *, rows: PartitionSpec | None = None
) -> Callable[..., Any]:
    """A function of sequences, and of what is the same for all, divided over the devices of a mesh.

    Where each device has all parameters it computes with its own sequences, from the first to the
    last, and what it returns is added up once, unless it is of sequences. Else XLA divides it.

    Args:
      function: the function; it has no effect of one sequence on what it returns of another.
      mesh: the mesh.
      in_specs: the spec of each argument: of sequences, or of what is whole.
      rows: the spec of what it returns; None where that is a sum over sequences.
    """
    if not is_whole(mesh):
        return computing_on(mesh, function)

    def of_device(*arguments: Any) -> Any:
        found = function(*arguments)
        return jax.lax.psum(found, ROWS) if rows is None else found

    return jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec() if rows is None else rows,
        # What is added up is of this device's sequences until then, which the check forbids.
        check_vma=False,
    )


def is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def is_quantized(x: Any) -> bool:
    return isinstance(x, galore_optax.QuantizedArray)
