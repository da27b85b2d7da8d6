"""layerwise_shardings() says where parameters and state lie, and in which memory."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._errors import check_transformation
from galore_optax._layerwise.division import Division
from galore_optax._layerwise.offload import HOST, check_memories, hosted_leaves, hosted_state
from galore_optax._layerwise.settings import Settings, checked_offload
from galore_optax._layerwise.spaces import to_device, to_host
from galore_optax._quantized import is_quantized
from galore_optax._specs import state_shardings
from galore_optax._trees import logical
from galore_optax._types import Params, State


def layerwise_shardings(
    tx: optax.GradientTransformation,
    params: Params,
    shardings: PyTree = None,
    *,
    offload: Sequence[str] = (),
    blocks: str = "blocks",
) -> tuple[Params, State]:
    """Says where the parameters and the state of :func:`layerwise` lie, and in which memory.

    They are what ``jax.device_put``, the ``in_shardings`` and ``out_shardings`` of ``jax.jit``, and
    a checkpoint that is restored want. Without ``offload`` the second is `state_shardings`.

    Args:
      tx: the transformation that `layerwise` gets.
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      shardings: a tree of ``jax.sharding.NamedSharding``, or of None for what is on every device,
        with the structure of the parameters or a prefix of it; by default those that the parameters
        have, and where none has any, a mesh of the device that they are on, or of the first one.
      offload: what of the layers lies in ``pinned_host``, as `layerwise` has it.
      blocks: the key of the stacked layers, as `layerwise` has it.

    Returns:
      A tree with the structure of ``params`` and one with that of ``tx.init(params)``, with a
      ``NamedSharding`` for each array; in codes, for each array of these.

    Raises:
      TypeError: the parameters are not a mapping with the blocks, or a sharding is no
        ``NamedSharding``.
      ValueError: ``offload`` has another word; a device does not have that memory; the state of the
        layers is to be in it, and there is none; or as of `layerwise` and `state_shardings`.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> params = {"blocks": {"kernel": jnp.ones((4, 8, 8))}, "head": jnp.ones(8)}
      >>> numbers = galore_optax.DimensionNumbers(reduction_axis=1, output_axis=2)
      >>> tx = galore_optax.galore_adamw(1e-2, rank=2, weight_dimension_numbers=numbers)
      >>> of_params, of_state = galore_optax.layerwise_shardings(tx, params, offload=("moments",))
      >>> of_state.inner[0].mu["blocks"]["kernel"].memory_kind
      'pinned_host'
    """
    check_transformation("tx", tx)
    offload = checked_offload(offload)
    return _places(tx, params, shardings, Division(tx, params, blocks, 1), offload)


def hosted(
    tx: optax.GradientTransformation, params: Params, offload: Sequence[str], blocks: str
) -> tuple[list[bool], list[bool]]:
    """Says of each array of the parameters and of the state whether ``offload`` names it.

    Raises:
      TypeError: the parameters are not a mapping with the blocks.
      ValueError: as :func:`layerwise_shardings` says.
    """
    offload = checked_offload(offload)
    division = Division(tx, params, blocks, 1)
    leaves = division.treedef.flatten_up_to(params)
    pairs = zip(leaves, hosted_leaves(division, offload), strict=True)
    of_params = [host for leaf, host in pairs for _ in jax.tree.leaves(leaf)]
    return of_params, hosted_state(division, offload)


def _places(
    tx: optax.GradientTransformation,
    params: Params,
    shardings: PyTree,
    division: Division,
    offload: Sequence[str],
) -> tuple[Params, State]:
    """Returns what :func:`layerwise_shardings` does, of parameters that are divided already."""
    if shardings is None:
        shardings = _own(params)
    found = state_shardings(tx, params, shardings)
    itself = optax.GradientTransformation(lambda params: params, tx.update)
    of_params = state_shardings(itself, params, shardings)
    if offload:
        mesh = jax.tree.leaves(found)[0].mesh if jax.tree.leaves(found) else None
        for device in mesh.devices.flat if isinstance(mesh, Mesh) else ():
            check_memories(str(device), [memory.kind for memory in device.addressable_memories()])
    leaves = division.treedef.flatten_up_to(of_params)
    pairs = zip(leaves, hosted_leaves(division, offload), strict=True)
    leaves = [jax.tree.map(_on_host, leaf) if host else leaf for leaf, host in pairs]
    pairs = zip(jax.tree.leaves(found), hosted_state(division, offload), strict=True)
    state = [_on_host(sharding) if host else sharding for sharding, host in pairs]
    return division.treedef.unflatten(leaves), division.state_treedef.unflatten(state)


def first_state(settings: Settings, division: Division, params: Params) -> State:
    """Returns the state that ``tx.init`` makes, what ``offload`` names in the machine's memory."""
    hosted = hosted_state(division, settings.offload)

    def init(params: Params) -> list[PyTree]:
        leaves = division.state_leaves(settings.tx.init(jax.tree.map(to_device, params)))
        return [to_host(x) if host else x for x, host in zip(leaves, hosted, strict=True)]

    arrays = jax.tree.leaves(params)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return division.state_treedef.unflatten(init(params))
    tx = cast(optax.GradientTransformation, settings.tx)
    _, where = _places(tx, params, None, division, settings.offload)
    # Compiled, so that nothing is whole in the device's memory that is to lie in the machine's.
    made = jax.jit(init, out_shardings=jax.tree.leaves(where))(params)
    return division.state_treedef.unflatten(made)


def _own(params: Params) -> PyTree:
    """Returns the shardings of parameters, or one for all, of a mesh of one device."""
    treedef = jax.tree.structure(logical(params))
    found = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params, is_leaf=_codes)]
    named = [x if isinstance(x, NamedSharding) else None for x in found]
    if any(x is not None for x in named):
        return treedef.unflatten(named)
    places = (x.device_set for x in found if x is not None)
    devices = sorted(next(places, {jax.devices()[0]}), key=lambda device: device.id)
    mesh = Mesh(np.array(devices[:1]), ("all",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())


def _codes(x: object) -> bool:
    return is_quantized(x)


def _on_host(sharding: NamedSharding) -> NamedSharding:
    return sharding.with_memory_kind(HOST)
