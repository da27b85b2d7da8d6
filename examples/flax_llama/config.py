"""Settings: the shape of a LLaMA, those of the published experiments, and a training run."""

import dataclasses
import math
from pathlib import Path


class UsageError(ValueError):
    """A setting that cannot work; the message says what would."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the parameters and the forward pass of a `Llama`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab_size: int = 32_000
    # Longest sequence trained on, and the context that sampling keeps.
    max_seq: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    # Of activations; norms, softmax and loss are computed in float32 whatever it is.
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} does not divide into heads={self.heads} heads of an even "
                "size, which rotary embeddings need."
            )

    @property
    def num_params(self) -> int:
        """Number of parameters, embedding, untied head and norms included."""
        attention = 4 * self.hidden**2
        mlp = 3 * self.hidden * self.intermediate
        norms = 2 * self.hidden
        return (
            2 * self.vocab_size * self.hidden
            + self.layers * (attention + mlp + norms)
            + self.hidden
        )


# Zhao et al., "GaLore" (arXiv:2403.03507), and the reference implementation's smaller siblings.
PRESETS = {
    "9m": LlamaConfig(hidden=128, intermediate=352, layers=4, heads=4),
    "20m": LlamaConfig(hidden=256, intermediate=688, layers=4, heads=4),
    "35m": LlamaConfig(hidden=384, intermediate=1024, layers=6, heads=8),
    "60m": LlamaConfig(hidden=512, intermediate=1376, layers=8, heads=8),
    "130m": LlamaConfig(hidden=768, intermediate=2048, layers=12, heads=12),
    "250m": LlamaConfig(hidden=768, intermediate=2560, layers=24, heads=16),
    "350m": LlamaConfig(hidden=1024, intermediate=2736, layers=24, heads=16),
    "1b": LlamaConfig(hidden=2048, intermediate=5461, layers=24, heads=32),
    "3b": LlamaConfig(hidden=2560, intermediate=6848, layers=32, heads=32),
    "7b": LlamaConfig(hidden=4096, intermediate=11008, layers=32, heads=32),
}
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a training run."""

    # Shape of the model: 9m, 20m, 35m, 60m, 130m, 250m, 350m, 1b, 3b or 7b.
    preset: str = "9m"
    # "bytes", or "bpe:SIZE" for a byte-level BPE trained on the training part.
    tokenizer: str = "bpe:2048"
    # adamw or galore_adamw.
    optimizer: str = "galore_adamw"
    # Peak learning rate; 10 % of it is left at the last update.
    lr: float = 0.01
    # Factor of `lr` for the layers' matrices; GaLore's `scale` already is one.
    matrix_lr_ratio: float = 1.0
    # Rank of the projected gradients; a quarter of the hidden size by default.
    rank: int | None = None
    # Updates from one choice of the subspaces to the next.
    update_proj_gap: int = 200
    # Factor of the projected-back update.
    scale: float = 0.25
    # Of everything but the norms, multiplied by the learning rate.
    weight_decay: float = 0.0
    # Fraction of the updates in which the learning rate rises to its peak.
    warmup: float = 0.1
    # Number of updates.
    steps: int = 1000
    # Sequences per update.
    batch: int = 16
    # Tokens per sequence.
    seq: int = 256
    # Updates between evaluations on the held-out text; the last update is always followed by one.
    eval_every: int = 100
    # Of the initial weights and the order of the data.
    seed: int = 0
    # Largest global norm of a gradient.
    clip: float = 1.0
    # float32 or bfloat16, of activations.
    dtype: str = "float32"
    # float32 or bfloat16, of parameters.
    param_dtype: str = "float32"
    # Directory for metrics, tokenizer and checkpoint; nothing is written without one.
    out: Path | None = None
    # Show no progress bar.
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, choices in {
            "preset": PRESETS,
            "dtype": DTYPES,
            "param_dtype": DTYPES,
        }.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}."
                )
        hidden = PRESETS[self.preset].hidden
        if self.rank is not None and not 1 <= self.rank < hidden:
            raise UsageError(
                f"rank={self.rank}: expected 1 to {hidden - 1}, less than the hidden size "
                f"{hidden} of preset {self.preset}."
            )
        for name in ("update_proj_gap", "steps", "batch", "seq", "eval_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("lr", "matrix_lr_ratio", "scale", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name}={getattr(self, name)}: expected a positive number.")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"weight_decay={self.weight_decay}: expected 0 or more.")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup={self.warmup}: expected a fraction, 0 <= warmup < 1.")
