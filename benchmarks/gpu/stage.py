"""The vocabulary of the GPU benchmark: stages, which are lists of items, at one of two sizes."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# In order of value: a run that is cut off has done the first ones.
STAGES = ("correct", "step", "refresh", "memory", "train", "quality", "finetune")
GIB = 2**30
# Lets a process that JAX starts share the device with others.
SHARED_DEVICE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Unavailable(Exception):
    """Raised by an item that this machine cannot do; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is, and what it is trained on.

    Attributes:
      rehearsal: whether shapes are tiny, so that a CPU does all stages in minutes.
      data: what models are trained on, as `--data` of the application.
      device_memory: bytes of the device, which a cap is a part of; made up in a rehearsal.
      pretrained: directories of models and texts for fine-tuning, by "smollm2", "minilm", "sst2".
    """

    rehearsal: bool
    data: str
    device_memory: int
    pretrained: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, full: Any, tiny: Any) -> Any:
        """The one of two values that belongs to this size."""
        return tiny if self.rehearsal else full


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
      name: of the item, unique in its stage.
      measure: function of the time (of `time.time`) by which it has to end; what it returns is
        written as JSON.
      seconds: after which it is stopped.
      memory: bytes that a device must have for it.
      environment: variables of the process that measures it. Neighbours with the same ones share a
        process,
      alone: unless an item wants one of its own, for the peak of memory in it to be its own.
    """

    name: str
    measure: Callable[[float], dict[str, Any]]
    seconds: float
    memory: int = 0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    alone: bool = False


def module_of(stage: str) -> ModuleType:
    """The module of a stage, which has `items(size)` and `describe(name, result)`.

    A name with a dot is that of a module elsewhere.
    """
    return importlib.import_module(stage if "." in stage else f"benchmarks.gpu.{stage}")
