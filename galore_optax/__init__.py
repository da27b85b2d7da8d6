"""GaLore for Optax: all parameters trained with optimizer state in a low-rank subspace."""

from galore_optax import _serialization, projectors, trainers
from galore_optax._chain import chain
from galore_optax._errors import CombinationError
from galore_optax._factored import FactoredAdamState, scale_by_factored_adam
from galore_optax._galore import galore
from galore_optax._layerwise import Layerwise, layerwise, layerwise_shardings
from galore_optax._learning_rate import learning_rate_from_adamw
from galore_optax._limiter import LimitNormGrowthState, limit_norm_growth
from galore_optax._low_bit import LowBitState, low_bit
from galore_optax._memory import memory_report
from galore_optax._memory_report import (
    DeviceBytes,
    HostBytes,
    LeafGroup,
    MemoryReport,
    compare_memory,
)
from galore_optax._migrate import as_version, migrate
from galore_optax._optimizers import flora, galore_adafactor, galore_lion, galore_muon, galore_sgd
from galore_optax._presets import (
    adamw_8bit,
    apollo_adamw,
    apollo_adamw_8bit,
    apollo_mini_adamw,
    apollo_mini_adamw_8bit,
    dct_adamw,
    dct_adamw_8bit,
    fira_adamw,
    fira_adamw_8bit,
    frugal_adamw,
    frugal_adamw_8bit,
    galore_adamw,
    galore_adamw_8bit,
    grass_adamw,
    grass_adamw_8bit,
    ldadamw,
    ldadamw_8bit,
    q_galore_adamw,
    tracked_adamw,
    tracked_adamw_8bit,
)
from galore_optax._quantized import QuantizedArray, quantize
from galore_optax._quantized_params import (
    apply_updates,
    dequantize_params,
    quantize_params,
    value_and_grad,
)
from galore_optax._ranks import MOARA, RankByRole
from galore_optax._refresh import Lazy, refresh
from galore_optax._residuals import Discard, ErrorFeedback, NormScaled, ScaleGradient, Sign
from galore_optax._select import DEFAULT_EXCLUDE
from galore_optax._specs import state_partition_specs, state_shardings
from galore_optax._state import GaloreState, metrics
from galore_optax._subspace import Subspace
from galore_optax._transports import Keep, Project, Reset, Rotate
from galore_optax._version import __version__ as __version__
from galore_optax._view import DimensionNumbers

_serialization.register()

__all__ = [
    "DEFAULT_EXCLUDE",
    "MOARA",
    "CombinationError",
    "DeviceBytes",
    "DimensionNumbers",
    "Discard",
    "ErrorFeedback",
    "FactoredAdamState",
    "GaloreState",
    "HostBytes",
    "Keep",
    "Layerwise",
    "Lazy",
    "LeafGroup",
    "LimitNormGrowthState",
    "LowBitState",
    "MemoryReport",
    "NormScaled",
    "Project",
    "QuantizedArray",
    "RankByRole",
    "Reset",
    "Rotate",
    "ScaleGradient",
    "Sign",
    "Subspace",
    "adamw_8bit",
    "apollo_adamw",
    "apollo_adamw_8bit",
    "apollo_mini_adamw",
    "apollo_mini_adamw_8bit",
    "apply_updates",
    "as_version",
    "chain",
    "compare_memory",
    "dct_adamw",
    "dct_adamw_8bit",
    "dequantize_params",
    "fira_adamw",
    "fira_adamw_8bit",
    "flora",
    "frugal_adamw",
    "frugal_adamw_8bit",
    "galore",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_lion",
    "galore_muon",
    "galore_sgd",
    "grass_adamw",
    "grass_adamw_8bit",
    "layerwise",
    "layerwise_shardings",
    "ldadamw",
    "ldadamw_8bit",
    "learning_rate_from_adamw",
    "limit_norm_growth",
    "low_bit",
    "memory_report",
    "metrics",
    "migrate",
    "projectors",
    "q_galore_adamw",
    "quantize",
    "quantize_params",
    "refresh",
    "scale_by_factored_adam",
    "state_partition_specs",
    "state_shardings",
    "tracked_adamw",
    "tracked_adamw_8bit",
    "trainers",
    "value_and_grad",
]
