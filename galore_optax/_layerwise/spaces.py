"""Moves arrays between the memory of the device and that of the machine that it is in."""

import jax
from jaxtyping import Array


def is_on_host(array: Array) -> bool:
    """Whether the type of an array says that it lies in the memory of the machine."""
    return hasattr(jax, "memory") and jax.typeof(array).memory_space == jax.memory.Space.Host


def to_device(array: Array) -> Array:
    """Returns an array in the memory of the device."""
    return jax.device_put(array, jax.memory.Space.Device) if is_on_host(array) else array


def to_host(array: Array) -> Array:
    """Returns an array in the memory of the machine; it must not lie there."""
    return jax.device_put(array, jax.memory.Space.Host)
