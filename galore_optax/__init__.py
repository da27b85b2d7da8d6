"""GaLore for Optax: all parameters trained with optimizer state in a low-rank subspace."""

from galore_optax._chain import chain
from galore_optax._galore import GaloreState, galore
from galore_optax._matrix import DEFAULT_EXCLUDE, DimensionNumbers
from galore_optax._memory import LeafGroup, MemoryReport, memory_report
from galore_optax._optimizers import galore_adafactor, galore_adamw, galore_lion, galore_sgd
from galore_optax._projectors import svd
from galore_optax._subspace import Subspace

__all__ = [
    "DEFAULT_EXCLUDE",
    "DimensionNumbers",
    "GaloreState",
    "LeafGroup",
    "MemoryReport",
    "Subspace",
    "chain",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_lion",
    "galore_sgd",
    "memory_report",
    "svd",
]
