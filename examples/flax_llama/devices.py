"""Devices that memory can be planned for, and compiled for, without having them.

python -m examples.flax_llama.devices

prints a table of them.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from examples.flax_llama.attention import capability_here
from examples.flax_llama.config import UsageError
from examples.flax_llama.sharding import AXES
from examples.flax_llama.topology import cuda_devices, tpu_devices
from examples.flax_llama.units import GIB
from examples.flax_llama.usage import one_of

# What a GPU's memory holds besides JAX's arrays: the driver's context, loaded kernels, the handles
# and workspaces of cuBLAS and cuSOLVER. A round number for one process, not a measurement.
CONTEXT = GIB // 2
TARGETS = Path(__file__).with_name("gpu_targets")
# Without a device XLA takes this part of its memory for what a program may use.
XLA_SHARE = 0.8
# The part of a GPU's memory that JAX takes unless this variable says another.
FRACTION, FRACTION_VARIABLE = 0.75, "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
      name: on the command line.
      description: for people.
      memory: bytes that a program can see.
      source: where that figure is from.
      context: bytes of these that are not for JAX's arrays.
      capability: NVIDIA's compute capability of a GPU, None of what is none.
      described_by: the file in gpu_targets, without its suffix, that describes such a GPU, or one
        of the same architecture, to XLA's compiler; none is known where it is empty.
      topology: of the smallest TPU slice with such a device.
      platform: "cuda", "tpu" or "cpu".
    """

    name: str
    description: str
    memory: int
    source: str
    context: int = CONTEXT
    capability: float | None = None
    described_by: str = ""
    topology: str = ""
    platform: str = "cuda"

    @property
    def usable(self) -> int:
        """Bytes for JAX's arrays."""
        return self.memory - self.context

    def mesh(self, count: int = 1) -> Mesh:
        """A mesh like `sharding.make_mesh`, of so many such devices, none of which need be here.

        Functions are compiled for it as for any mesh, but neither run nor given arrays.

        Raises:
          UsageError: JAX for that kind of device is not installed, or cannot be loaded.
          ValueError: the smallest TPU slice does not have so many.
        """
        if self.topology:
            found = tpu_devices(self.name, self.topology)
        elif not self.described_by:
            known = ", ".join(d.name for d in DEVICES.values() if d.described_by or d.topology)
            raise UsageError(
                f"compile: XLA's compiler has no description of {self.name} here. It has those of "
                f"{known}, and of a device that is in this machine."
            )
        else:
            found = cuda_devices(self.name, self.target(), count)
        if not 1 <= count <= len(found):
            raise ValueError(f"count={count}: expected 1 to {len(found)} of {self.name}")
        return along_data(found[:count])

    def target(self) -> str:
        """XLA's description of a GPU (`GpuTargetConfigProto`), with the memory that is usable.

        A process that has the device is allowed what its allocator has, one that has not a share
        of the memory in the description: that is raised so that the share is what is usable.
        """
        text = (TARGETS / f"{self.described_by}.txtpb").read_text()
        size = int(self.usable / XLA_SHARE)
        text, count = re.subn(r"device_memory_size: \d+", f"device_memory_size: {size}", text)
        if count != 1:
            raise ValueError(f"{self.described_by}.txtpb does not say device_memory_size once")
        return text


class Here(Device):
    """The device that JAX computes on in this process."""

    def mesh(self, count: int = 1) -> Mesh:
        """Likewise, of the first devices that are here."""
        return along_data(jax.devices()[:count])


def along_data(devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of some devices that all have whole parameters."""
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(-1, 1, 1), AXES, axis_types=kinds)


def device_here() -> Device:
    """What JAX computes on: a GPU, a TPU, or this machine's processor."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        source = "all that this machine has; --device plans for a GPU or a TPU"
        return Here("here", "This machine's CPU", memory, source, context=0, platform="cpu")
    if device.platform == "tpu":
        source = "what JAX may use of it"
        return Here("here", device.device_kind, limit, source, context=0, platform="tpu")
    memory = int(limit / float(os.environ.get(FRACTION_VARIABLE, FRACTION)))
    return Here("here", device.device_kind, memory, "read from it", capability=capability_here())


XLA_FILE = "CUDA reports it: openxla/xla, xla/backends/gpu/target_config/specs"
COMPILER = "the compiler's message when a program needs more"


def seen(gib: float, issue: str) -> tuple[int, str]:
    """Memory that CUDA reported to somebody, and where that can be read, as its source."""
    return int(gib * GIB), f"an out-of-memory message of PyTorch: github.com/{issue}"


# Of the memory that NVIDIA specifies, CUDA reports a little less: 0.97 of it on a RTX 3070, 0.98 on
# a RTX 4090 and on a RTX 5090, by the sources of these; 0.91 on a T4 and 0.93 on a L40S, which use
# some of it to correct errors.
SHOWN, SHOWN_WITH_ECC = 0.97, 0.91


def specified(gigabytes: int, share: float = SHOWN) -> tuple[int, str]:
    """The memory of a GPU of which only the specification is known here, and that as its source."""
    return int(gigabytes * share * GIB), f"{share:.0%} of the {gigabytes} GB of its specification"


def gpus() -> Iterator[Device]:
    """NVIDIA's, by generation."""
    ampere, ada, hopper, blackwell = "", "rtx4090_24gb", "h100_80gb", ""
    for words, (memory, source), capability, described_by in (
        ("T4 16 GB", seen(14.56, "AlphaGPU/leetgpu-challenges/issues/52"), 7.5, ""),
        ("RTX 3060 12 GB", specified(12), 8.6, ampere),
        ("RTX 3070 8 GB", seen(7.78, "meta-llama/codellama/issues/82"), 8.6, ampere),
        ("RTX 3080 10 GB", specified(10), 8.6, ampere),
        ("RTX 3080 12 GB", specified(12), 8.6, ampere),
        ("RTX 3090 24 GB", specified(24), 8.6, ampere),
        ("A10 24 GB", specified(24, SHOWN_WITH_ECC), 8.6, ampere),
        ("A100 40 GB", (42_298_834_944, XLA_FILE), 8.0, ampere),
        ("A100 80 GB", (85_100_068_864, XLA_FILE), 8.0, ampere),
        ("RTX 4060 8 GB", specified(8), 8.9, ada),
        ("RTX 4060 Ti 8 GB", specified(8), 8.9, ada),
        ("RTX 4060 Ti 16 GB", specified(16), 8.9, "rtx4060ti_16gb"),
        ("RTX 4070 12 GB", specified(12), 8.9, ada),
        ("RTX 4070 Ti 12 GB", specified(12), 8.9, ada),
        ("RTX 4070 Ti SUPER 16 GB", specified(16), 8.9, ada),
        ("RTX 4080 16 GB", specified(16), 8.9, ada),
        ("RTX 4090 24 GB", seen(23.52, "pytorch/torchchat/issues/1341"), 8.9, ada),
        ("L4 24 GB", specified(24, SHOWN_WITH_ECC), 8.9, ada),
        ("L40S 48 GB", seen(44.40, "NVlabs/Eagle/issues/68, of a L40"), 8.9, ada),
        ("H100 80 GB", (84_942_979_072, XLA_FILE), 9.0, hopper),
        ("H200 141 GB", (151_397_597_184, XLA_FILE), 9.0, hopper),
        ("B200 180 GB", (191_514_411_008, XLA_FILE), 10.0, ""),
        ("RTX 5060 Ti 8 GB", specified(8), 12.0, blackwell),
        ("RTX 5060 Ti 16 GB", specified(16), 12.0, blackwell),
        ("RTX 5070 12 GB", specified(12), 12.0, blackwell),
        ("RTX 5070 Ti 16 GB", specified(16), 12.0, blackwell),
        ("RTX 5080 16 GB", specified(16), 12.0, blackwell),
        ("RTX 5090 32 GB", seen(31.36, "TrajectoryCrafter/TrajectoryCrafter/issues/20"), 12.0, ""),
    ):
        name = words.lower()
        for long, short in {"rtx ": "rtx", " ti": "ti", " gb": "gb", " ": "_"}.items():
            name = name.replace(long, short)
        yield Device(
            name,
            f"NVIDIA {words}",
            memory,
            source,
            capability=capability,
            described_by=described_by,
        )


def tpus() -> Iterator[Device]:
    """Google's, one device of JAX each."""
    for name, memory, topology in (
        ("v4, 32 GB", 30.75, "v4:2x2x1"),
        ("v5e, 16 GB", 15.75, "v5e:2x2"),
        ("v5p, 95 GB", 95.74, "v5p:2x2x1"),
        ("v6e, 32 GB", 31.25, "v6e:2x2"),
    ):
        short = f"tpu_{name.partition(',')[0]}"
        yield Device(
            short,
            f"TPU {name}",
            int(memory * GIB),
            COMPILER,
            context=0,
            topology=topology,
            platform="tpu",
        )


DEVICES = {device.name: device for device in (*gpus(), *tpus())}


def device_named(name: str) -> Device:
    """The device of a name.

    Raises:
      UsageError: there is none.
    """
    one_of("device", name, DEVICES)
    return DEVICES[name]


def chosen_device(name: str | None, memory: float | None) -> Device:
    """The device to plan for.

    Args:
      name: of one of `DEVICES`; None takes the one that is here.
      memory: GiB that it has, instead of what is known; without a name, of any NVIDIA GPU that has
        a compute capability of 8.0 or more.

    Raises:
      UsageError: there is no such device, or it would have no memory.
    """
    named = None if name is None else device_named(name)
    if memory is None:
        return named or device_here()
    size = int(memory * GIB)
    if not CONTEXT < size < 2**50:
        raise UsageError(
            f"memory={memory:g}: expected the GiB that a device has, more than {CONTEXT / GIB:g}."
        )
    words = "An NVIDIA GPU of compute capability 8.0 or more"
    device = named or Device("other", words, size, "", capability=8.0)
    return dataclasses.replace(device, memory=size, source="as given by --memory")


def markdown() -> str:
    """A table of the devices."""
    lines = ["| `--device` | | GiB | where that is from |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{d.name}` | {d.description} | {d.memory / GIB:.2f} | {d.source} |"
        for d in DEVICES.values()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
