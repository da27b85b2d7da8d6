"""Several processes that train together, on one host or on many."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from examples.flax_llama.changes import settings_of
from examples.flax_llama.config import Config
from examples.flax_llama.roll_call import together
from examples.flax_llama.usage import UsageError
from examples.flax_llama.values import check_processes

# Seconds without a heartbeat after which JAX takes a process for gone.
HEARTBEAT = 10
# Seconds that processes wait for the slowest to have compiled or read something.
PATIENCE = 1800


# Settings of which each process may have its own.
OWN = ("coordinator", "process", "distributed_timeout", "quiet", "by_default")


@contextlib.contextmanager
def processes(config: Config) -> Iterator[None]:
    """Makes this process one of several for as long as the context lasts, where that is asked for.

    Raises:
      UsageError: it is not known which one, not all of them have come, or they have been given
        other settings than each other.
    """
    if not config.distributed:
        yield
        return
    address, count, number, devices = found(config)
    host, _, port = address.rpartition(":")
    timeout = config.distributed_timeout
    with together(host, int(port) - 1, count, number, timeout, shared(config)):
        # Of CPUs, on which nothing else can add up over processes.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            *(address, count, number, devices),
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout),
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        yield


def shared(config: Config) -> dict[str, Any]:
    """What must be the same in all processes, so that they compute the same program."""
    settings = {k: v for k, v in settings_of(config).items() if k not in OWN}
    return {**settings, "jax.__version__": jax.__version__}


def found(config: Config) -> tuple[str, int, int, list[int] | None]:
    """The address of the first process, how many there are, which one this is, and its devices.

    What no flag says is found as `jax.distributed.initialize` does, of which there is no public
    part that starts nothing.

    Raises:
      UsageError: something is neither given nor can be found.
    """
    check_processes(config)
    address = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, number, devices = config.processes, config.process, None
    if address is None or count is None or number is None:
        # Here, so that a version of JAX that has it elsewhere does not end runs of one process.
        from jax._src.clusters import ClusterEnv

        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            *(address, count, number, None, None), int(config.distributed_timeout)
        )
    if address is None or count is None or number is None:
        values = {"coordinator": address, "processes": count, "process": number}
        unknown = [name for name, value in values.items() if value is None]
        raise UsageError(
            f"distributed=True: {', '.join(unknown)} must be given, since this is no job of "
            "SLURM, Open MPI, Kubernetes or a TPU pod, of which JAX knows: "
            "coordinator=HOST:PORT, processes=N and process=0 to N - 1."
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 1 < int(port) < 65536):
        raise UsageError(
            f"coordinator={address!r}: expected HOST:PORT of process 0, the port from 2 to 65535."
        )
    if not 0 <= number < count:
        raise UsageError(f"process={number}: expected 0 to {count - 1}, of processes={count}.")
    return address, count, number, list(devices) if devices else None


def is_first() -> bool:
    """Whether this is the process that writes and tells, of several or the only one."""
    return jax.process_index() == 0


def meet(where: str) -> None:
    """Waits until all processes have got to some place, of that name.

    Before their first exchange of numbers, which waits half a minute on CPUs and no longer.
    """
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=where, timeout_ms=1000 * PATIENCE)


def agreed(value: bool) -> bool:
    """What the first process decides, in all of them."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def gathered(value: int) -> list[int]:
    """What each process has, in their order, in all of them; of at most 32 bits."""
    if jax.process_count() == 1:
        return [value]
    return multihost_utils.process_allgather(np.uint32(value)).tolist()


def check_same_data(digests: Mapping[str, str]) -> None:
    """Refuses processes that were given other data than each other, under the same names.

    Args:
      digests: of what the data is known by, in hexadecimal, by its name.

    Raises:
      UsageError: says which processes have other data than the first one.
    """
    if jax.process_count() == 1:
        return
    meet("data")
    for what, digest in digests.items():
        # As much of it as tells files from others.
        first, *found = gathered(int(digest[:8], 16))
        if others := [str(k) for k, one in enumerate(found, 1) if one != first]:
            raise UsageError(
                f"process {', '.join(others)} of {jax.process_count()} has other {what} data than "
                "process 0: give each host the same files under the same names."
            )
