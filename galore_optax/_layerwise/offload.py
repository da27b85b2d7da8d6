"""Keeps what belongs to layers in the memory of the machine, and moves a layer at a time."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, PyTree

from galore_optax._layerwise.division import Division
from galore_optax._layerwise.settings import MOMENTS, WEIGHTS, Leaf
from galore_optax._layerwise.spaces import is_on_host
from galore_optax._trees import path_name

HOST = "pinned_host"


def hosted_leaves(division: Division, offload: Sequence[str]) -> list[bool]:
    """Says of each leaf of the parameters whether it lies in the memory of the machine."""
    return [own and WEIGHTS in offload for own in division.in_blocks]


def hosted_state(division: Division, offload: Sequence[str]) -> list[bool]:
    """Says of each leaf of the state whether it lies in the memory of the machine.

    It does where it has an axis of layers and another one: what is one figure of each layer, such
    as the step of its next refresh, is read for all layers at once.

    Raises:
      ValueError: the moments are to lie there, and there are none.
    """
    if MOMENTS not in offload:
        return [False] * len(division.layered)
    pairs = zip(division.layered, division.state_shapes, strict=True)
    found = [layered and len(shape) > 1 for layered, shape in pairs]
    if not any(found):
        raise ValueError(
            f"offload has {MOMENTS!r}, and the transformation keeps no state of the layers: leave "
            "it out"
        )
    return found


def check_memories(device: str, kinds: Sequence[str]) -> None:
    """Raises an error where a device cannot use the memory of the machine that it is in.

    Args:
      device: the device.
      kinds: of its memories; none are known of a device that is only compiled for.
    """
    if kinds and HOST not in kinds:
        raise ValueError(
            f"offload needs the memory {HOST!r}, which {device} does not have; it has "
            f"{', '.join(map(repr, kinds))}: leave out offload"
        )


def check_places(
    division: Division, offload: Sequence[str], leaves: Sequence[Leaf], state: Sequence[Array]
) -> None:
    """Raises an error where something does not lie in the memory that ``offload`` says.

    Args:
      division: how the parameters and the state divide.
      offload: the argument of `galore_optax.layerwise`.
      leaves: the parameters.
      state: the leaves of the state.
    """
    params = jax.tree_util.tree_leaves_with_path(division.treedef.unflatten(leaves))
    own = hosted_leaves(division, offload)
    wanted = [own[i] for i, leaf in enumerate(leaves) for _ in jax.tree.leaves(leaf)]
    _check("parameters'", params, wanted, offload)
    of_state = jax.tree_util.tree_leaves_with_path(division.state_treedef.unflatten(state))
    _check("state's", of_state, hosted_state(division, offload), offload)


def _check(
    whose: str, found: Sequence[PyTree], wanted: Sequence[bool], offload: Sequence[str]
) -> None:
    for (path, array), host in zip(found, wanted, strict=True):
        if is_on_host(array) != host:
            there, here = (HOST, "device") if host else ("device", HOST)
            raise ValueError(
                f"the {whose} {path_name(path)} lies in the memory {here!r}, and with "
                f"offload={tuple(offload)!r} it has to lie in {there!r}: jax.device_put it where "
                "layerwise_shardings says"
            )
