"""GaLore for Optax: all parameters trained with optimizer state in a low-rank subspace."""

from galore_optax._chain import chain
from galore_optax._galore import GaloreState, galore
from galore_optax._low_bit import LowBitState, low_bit
from galore_optax._matrix import DEFAULT_EXCLUDE, DimensionNumbers
from galore_optax._memory import LeafGroup, MemoryReport, memory_report
from galore_optax._optimizers import (
    adamw_8bit,
    galore_adafactor,
    galore_adamw,
    galore_adamw_8bit,
    galore_lion,
    galore_sgd,
)
from galore_optax._projectors import svd
from galore_optax._quantized import QuantizedArray, quantize
from galore_optax._quantized_params import (
    apply_updates,
    dequantize_params,
    quantize_params,
    value_and_grad,
)
from galore_optax._subspace import Subspace

__all__ = [
    "DEFAULT_EXCLUDE",
    "DimensionNumbers",
    "GaloreState",
    "LeafGroup",
    "LowBitState",
    "MemoryReport",
    "QuantizedArray",
    "Subspace",
    "adamw_8bit",
    "apply_updates",
    "chain",
    "dequantize_params",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_lion",
    "galore_sgd",
    "low_bit",
    "memory_report",
    "quantize",
    "quantize_params",
    "svd",
    "value_and_grad",
]
