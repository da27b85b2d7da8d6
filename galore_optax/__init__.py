"""GaLore for Optax: all parameters trained with optimizer state in a low-rank subspace."""

from galore_optax import projectors
from galore_optax._chain import chain
from galore_optax._galore import galore
from galore_optax._layerwise import Layerwise, layerwise
from galore_optax._low_bit import LowBitState, low_bit
from galore_optax._memory import LeafGroup, MemoryReport, compare_memory, memory_report
from galore_optax._migrate import as_version, migrate
from galore_optax._optimizers import galore_adafactor, galore_adamw, galore_lion, galore_sgd
from galore_optax._optimizers_low_bit import adamw_8bit, galore_adamw_8bit, q_galore_adamw
from galore_optax._quantized import QuantizedArray, quantize
from galore_optax._quantized_params import (
    apply_updates,
    dequantize_params,
    quantize_params,
    value_and_grad,
)
from galore_optax._refresh import Lazy, refresh
from galore_optax._select import DEFAULT_EXCLUDE
from galore_optax._state import GaloreState, metrics
from galore_optax._subspace import Subspace
from galore_optax._view import DimensionNumbers

__all__ = [
    "DEFAULT_EXCLUDE",
    "DimensionNumbers",
    "GaloreState",
    "Layerwise",
    "Lazy",
    "LeafGroup",
    "LowBitState",
    "MemoryReport",
    "QuantizedArray",
    "Subspace",
    "adamw_8bit",
    "apply_updates",
    "as_version",
    "chain",
    "compare_memory",
    "dequantize_params",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_lion",
    "galore_sgd",
    "layerwise",
    "low_bit",
    "memory_report",
    "metrics",
    "migrate",
    "projectors",
    "q_galore_adamw",
    "quantize",
    "quantize_params",
    "refresh",
    "value_and_grad",
]
