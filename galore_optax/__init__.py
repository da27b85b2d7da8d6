"""GaLore for Optax: all parameters trained with optimizer state in a low-rank subspace."""

from galore_optax import projectors
from galore_optax._chain import chain
from galore_optax._galore import galore
from galore_optax._matrix import DEFAULT_EXCLUDE, DimensionNumbers
from galore_optax._memory import LeafGroup, MemoryReport, memory_report
from galore_optax._optimizers import galore_adafactor, galore_adamw, galore_lion, galore_sgd
from galore_optax._refresh import Lazy, refresh
from galore_optax._state import GaloreState, metrics
from galore_optax._subspace import Subspace

__all__ = [
    "DEFAULT_EXCLUDE",
    "DimensionNumbers",
    "GaloreState",
    "Lazy",
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
    "metrics",
    "projectors",
    "refresh",
]
