"""Devices that memory can be planned for, and compiled for, without having them."""

import dataclasses
from pathlib import Path

import numpy as np
from jax.sharding import AxisType, Mesh

from examples.flax_llama.config import one_of
from examples.flax_llama.topology import cuda_devices, tpu_devices

GIB = 2**30
# What a GPU's memory holds besides JAX's arrays: the driver's context, loaded kernels, the handles
# and workspaces of cuBLAS and cuSOLVER. A round number for one process, not a measurement.
CONTEXT = GIB // 2
TARGETS = Path(__file__).with_name("gpu_targets")
# Without a device XLA takes this part of its memory for what a program may use.
XLA_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      name: on the command line.
      description: for people.
      memory: bytes that a program can see.
      source: where that figure is from.
      context: bytes of these that are not for JAX's arrays.
      topology: of the smallest TPU slice with such a device; a GPU has none, but a description for
        XLA, the file of its name in gpu_targets.
    """

    name: str
    description: str
    memory: int
    source: str
    context: int = CONTEXT
    topology: str = ""

    @property
    def usable(self) -> int:
        """Bytes for JAX's arrays."""
        return self.memory - self.context

    @property
    def is_tpu(self) -> bool:
        return bool(self.topology)

    def mesh(self, count: int = 1) -> Mesh:
        """A mesh like `step.data_mesh`, of so many such devices, none of which need be here.

        Functions are compiled for it as for any mesh, but neither run nor given arrays.

        Raises:
          UsageError: JAX for that kind of device is not installed, or cannot be loaded.
          ValueError: the smallest TPU slice does not have so many.
        """
        if self.is_tpu:
            found = tpu_devices(self.name, self.topology)
        else:
            found = cuda_devices(self.name, self.target(), count)
        if not 1 <= count <= len(found):
            raise ValueError(f"count={count}: expected 1 to {len(found)} of {self.name}")
        return Mesh(np.array(found[:count]), ("data",), axis_types=(AxisType.Auto,))

    def target(self) -> str:
        """XLA's description of a GPU (`GpuTargetConfigProto`), with the memory that is usable.

        A process that has the device is allowed what its allocator has, one that has not a share
        of the memory in the description: that is raised so that the share is what is usable.
        """
        text = (TARGETS / f"{self.name}.txtpb").read_text()
        written = f"device_memory_size: {self.memory}\n"
        if text.count(written) != 1:
            raise ValueError(f"{self.name}.txtpb does not say {written!r}")
        return text.replace(written, f"device_memory_size: {int(self.usable / XLA_SHARE)}\n")


DRIVER = "what CUDA reports, device_memory_size in its .txtpb"
COMPILER = "available HBM in the compiler's message when a program needs more"

DEVICES = {
    device.name: device
    for device in (
        Device("rtx4060ti_16gb", "NVIDIA RTX 4060 Ti 16 GB", 17_179_869_184, DRIVER),
        Device("rtx4090_24gb", "NVIDIA RTX 4090 24 GB", 25_393_692_672, DRIVER),
        Device("h100_80gb", "NVIDIA H100 80 GB", 84_942_979_072, DRIVER),
        Device("tpu_v5e", "TPU v5e, 16 GB", int(15.75 * GIB), COMPILER, 0, "v5e:2x2"),
        Device("tpu_v6e", "TPU v6e, 32 GB", int(31.24 * GIB), COMPILER, 0, "v6e:2x2"),
    )
}


def device_named(name: str) -> Device:
    """The device of a name.

    Raises:
      UsageError: there is none.
    """
    one_of("device", name, DEVICES)
    return DEVICES[name]
