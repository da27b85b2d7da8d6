"""Devices that need not be here, described by the compilers for them, which JAX loads as plugins.

JAX's plugin for CUDA is not registered unless a check of the CUDA packages passes. That check calls
the NVIDIA driver, so that it fails on a machine without one, whatever the packages are; to compile
needs no driver. Where there is none the check is left out; where there is one it is JAX's matter.
"""

import contextlib
import importlib
import importlib.util
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental import topologies

from examples.flax_llama.config import UsageError

# By these JAX, too, knows whether there is an NVIDIA driver: of Linux, of containers, of WSL 2.
DRIVER_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
# Set, it makes JAX's plugin leave out its check.
SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
CUDA_PLUGINS = {"cuda13": "jax_plugins.xla_cuda13", "cuda12": "jax_plugins.xla_cuda12"}


def installed(modules: Sequence[str]) -> bool:
    """Whether any of some modules is."""

    def found(module: str) -> bool:
        package = module.partition(".")[0]
        return bool(importlib.util.find_spec(package) and importlib.util.find_spec(module))

    return any(map(found, modules))


def cuda_extra() -> str | None:
    """The extra of JAX, "cuda13" or "cuda12", that is installed; None where neither is."""
    return next((extra for extra, plugin in CUDA_PLUGINS.items() if installed([plugin])), None)


def cuda_packages() -> str:
    """What pip has to install for the JAX that is here to have CUDA, quoted for a shell."""
    return f"'jax[{cuda_extra() or 'cuda13'}]=={jax.__version__}'"


def driver_is_here() -> bool:
    """Whether this machine has an NVIDIA driver, working or not."""
    return any(Path(file).exists() for file in DRIVER_FILES)


@contextlib.contextmanager
def check_needs_driver() -> Iterator[None]:
    """Leaves out JAX's check of CUDA where no driver could answer it; elsewhere changes nothing.

    JAX checks once in a process, when it first looks for devices. A command that compiles, or that
    has no use for this machine's devices, is best run inside as a whole: JAX logs the traceback of
    a check that fails.
    """
    if driver_is_here() or SKIP_CHECK in os.environ:
        yield
        return
    os.environ[SKIP_CHECK] = "1"
    try:
        yield
    finally:
        del os.environ[SKIP_CHECK]


def cuda_devices(name: str, target: str, count: int = 1) -> list[jax.Device]:
    """So many GPUs of one machine, none of which need be here.

    Args:
      name: of such a GPU, for errors.
      target: XLA's description of it (`GpuTargetConfigProto`).
      count: of GPUs.

    Raises:
      UsageError: JAX for CUDA is not installed, or cannot be loaded.
    """
    extra = cuda_extra()
    if extra is None:
        raise UsageError(missing(name, cuda_packages()))

    def describe() -> list[jax.Device]:
        # One partition, of one host, that has all the GPUs.
        shape = f"1x1x{count}"
        found = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target, topology=shape
        )
        return found.devices

    with check_needs_driver(), without_tracebacks():
        try:
            return describe()
        except NotImplementedError:
            # The check has failed, now or when JAX first looked for devices in this process.
            try:
                importlib.import_module(CUDA_PLUGINS[extra]).initialize()
                return describe()
            except Exception as error:
                raise UsageError(not_loaded(name, error)) from error


def tpu_devices(name: str, topology: str) -> list[jax.Device]:
    """The TPUs of a slice, none of which need be here.

    Args:
      name: of such a TPU, for errors.
      topology: of the slice, such as "v5e:2x2".

    Raises:
      UsageError: JAX for TPUs is not installed.
    """
    if not installed(["libtpu"]):
        raise UsageError(missing(name, "libtpu"))
    # The two cores of a v4 are one device, as they are where there is one.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return found.devices


def missing(name: str, package: str) -> str:
    return f"Compiling for {name} needs pip install {package}; the estimate does not."


def not_loaded(name: str, error: Exception) -> str:
    """Why the installed plugin does not work, and what would, in one line."""
    reason = " ".join(str(error).split()) or type(error).__name__
    instead = (
        ", or a driver that they work with, or JAX_PLATFORMS=cpu, which leaves this machine's GPU "
        "alone"
        if driver_is_here()
        else ""
    )
    return (
        f"Compiling for {name}: JAX's plugin for CUDA cannot be loaded ({reason.rstrip('.')}). It "
        f"needs pip install -U {cuda_packages()}{instead}."
    )


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Keeps back the exceptions that JAX logs, and what else it logs until the end."""
    log, keeper = logging.getLogger("jax"), logging.handlers.BufferingHandler(sys.maxsize)
    handlers, propagate = log.handlers, log.propagate
    instead: list[logging.Handler] = [keeper]
    log.handlers, log.propagate = instead, False
    try:
        yield
    finally:
        log.handlers, log.propagate = handlers, propagate
        for record in keeper.buffer:
            if not record.exc_info:
                log.handle(record)
