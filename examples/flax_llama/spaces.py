"""The memories that arrays lie in: the device's, and that of the machine, where layers may lie."""

from typing import Any

import jax

OFFLOAD = ("moments", "weights")
HOST = "pinned_host"


def is_on_host(x: jax.Array) -> bool:
    """Whether the type of an array says that it lies in the memory of the machine."""
    return hasattr(jax, "memory") and jax.typeof(x).memory_space == jax.memory.Space.Host


def to_device(tree: Any) -> Any:
    """A tree with all its arrays in the memory of the device."""
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree
    )


def to_host(tree: Any) -> Any:
    """A tree that is computed on the device, in the memory of the machine."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)
