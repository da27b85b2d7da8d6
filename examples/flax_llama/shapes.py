"""The shape of a LLaMA, and the published shapes and recipes."""

import dataclasses
import math
from typing import Any

from examples.flax_llama.adapters import Adapter
from examples.flax_llama.architecture import LLAMA, Architecture, Kind, Rope
from examples.flax_llama.usage import UsageError, at_least_one, one_of

DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "cudnn")


# What a preset says of a model; the vocabulary is that of the tokenizer.
DIMENSIONS = ("hidden", "intermediate", "layers", "heads")


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
    architecture: Architecture = LLAMA
    # What is trained beside the layers' kernels, or in their place.
    adapter: Adapter | None = None
    # Of activations; norms, softmax and loss are computed in float32 whatever it is.
    dtype: str = "float32"
    param_dtype: str = "float32"
    # "auto", "xla" or "cudnn"; auto is cudnn on an NVIDIA GPU with 16-bit activations.
    attention: str = "auto"
    # Keep only the input of each layer and compute the rest again in the backward pass.
    remat: bool = False

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("param_dtype", self.param_dtype, DTYPES)
        one_of("attention", self.attention, ATTENTIONS)
        for name in (*DIMENSIONS, "vocab_size", "max_seq"):
            at_least_one(name, getattr(self, name))
        if self.architecture.head_size is None and self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} does not divide into heads={self.heads} heads of an even "
                "size, which rotary embeddings need."
            )
        if self.head_size % 2:
            raise UsageError(f"head_size={self.head_size}: rotary embeddings need an even one.")
        if self.heads % self.kv_heads:
            raise UsageError(
                f"heads={self.heads} do not divide into groups for {self.kv_heads} heads of keys "
                "and values."
            )
        if self.architecture.pattern and len(self.architecture.pattern) < self.layers:
            raise UsageError(
                f"layers={self.layers}: expected at most {len(self.architecture.pattern)}, whose "
                "kinds are known."
            )

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "LlamaConfig":
        """Undoes `dataclasses.asdict`, also of an earlier version, which knew LLaMAs alone."""
        fields = dict(fields)
        if "architecture" in fields:
            architecture = Architecture.of(fields.pop("architecture"))
        else:
            eps, theta = fields.pop("rms_norm_eps"), fields.pop("rope_theta")
            architecture = Architecture(norm_eps=eps, kinds=(Kind(Rope(theta)),))
        adapter = fields.pop("adapter", None)
        return cls(**fields, architecture=architecture, adapter=adapter and Adapter(**adapter))

    @property
    def head_size(self) -> int:
        return self.architecture.head_size or self.hidden // self.heads

    @property
    def kv_heads(self) -> int:
        return self.architecture.kv_heads or self.heads

    @property
    def pattern(self) -> tuple[int, ...]:
        """The number of each layer's kind."""
        return self.architecture.pattern[: self.layers] or (0,) * self.layers

    @property
    def alternates(self) -> bool:
        """Whether there are layers of several kinds."""
        return len(set(self.pattern)) > 1

    @property
    def q_width(self) -> int:
        """Of the queries of all heads together, and of what they attend to."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Of the keys, and of the values, of all heads together."""
        return self.kv_heads * self.head_size

    @property
    def num_params(self) -> int:
        """Number of parameters, embedding, untied head and norms included."""
        kind, tokens = self.architecture, self.vocab_size * self.hidden
        norms = (4 if kind.norm_after else 2) * self.hidden
        norms += 2 * self.head_size if kind.qk_norm else 0
        biases = (self.q_width + 2 * self.kv_width) * kind.attention_bias
        biases += self.hidden * kind.output_bias
        biases += (2 * self.intermediate + self.hidden) * kind.mlp_bias
        own = self.layer_matrices + self.lora_entries
        layers = self.layers * (own + norms + biases)
        return layers + self.hidden + tokens * (1 if kind.tied else 2)

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        """The sizes of a layer's kernels, inputs first."""
        D, F, Q, G = self.hidden, self.intermediate, self.q_width, self.kv_width
        attention = {"q": (D, Q), "k": (D, G), "v": (D, G), "o": (Q, D)}
        return attention | {"gate": (D, F), "up": (D, F), "down": (F, D)}

    @property
    def layer_matrices(self) -> int:
        """Entries of the attention and MLP kernels of a layer."""
        if self.adapter is not None:
            return self.adapter.entries(self.kernels)[0]
        return sum(m * n for m, n in self.kernels.values())

    @property
    def lora_entries(self) -> int:
        """Entries of what is beside the kernels of a layer."""
        return 0 if self.adapter is None else self.adapter.entries(self.kernels)[1]

    @property
    def trained_params(self) -> int:
        """Number of parameters that are trained: not, with LoRA, the kernels that it is beside."""
        if not self.tables_are_trained:
            return self.layers * self.lora_entries
        frozen = 0 if self.adapter is None else self.adapter.left_as_they_are(self.kernels)
        return self.num_params - self.layers * frozen

    @property
    def tables_are_trained(self) -> bool:
        """Whether embedding, head and norms are trained: not with LoRA alone."""
        return self.lora_entries == 0 or self.adapter is None or not self.adapter.only

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token of a whole sequence.

        6 for each entry of a matrix that multiplies (the embedding is looked up), and 12 S times
        the width of all heads in each layer for attention, whose causal half is counted too, and
        what is outside of a window: what PaLM (arXiv:2204.02311, appendix B) calls model FLOPs.
        Rematerialization does not count, nor that LoRA needs no gradients of kernels.
        """
        layer = self.layer_matrices + self.lora_entries
        matrices = self.layers * layer + self.vocab_size * self.hidden
        return 6 * matrices + 12 * self.layers * self.q_width * self.max_seq


# Zhao et al., "GaLore" (arXiv:2403.03507), and the reference implementation's smaller siblings;
# 13b is LLaMA's (arXiv:2302.13971).
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
    "13b": LlamaConfig(hidden=5120, intermediate=13824, layers=40, heads=40),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a preset is trained with GaLore, unless a setting says otherwise."""

    rank: int
    steps: int
    batch: int = 512
    lr: float = 0.01
    update_proj_gap: int = 200
    # 0 does not clip.
    clip: float = 0.0
    q_galore_lr: float = 0.015


# 60m to 7b are published (same paper and its scripts); 250m borrows from 350m, 3b from 1b, 13b from
# 7b. The three smallest have no published recipe: a quarter of the hidden size, and minutes on one
# machine.
RECIPES = {
    "9m": Recipe(rank=32, steps=1000, batch=16, clip=1.0),
    "20m": Recipe(rank=64, steps=1000, batch=16, clip=1.0),
    "35m": Recipe(rank=96, steps=1000, batch=16, clip=1.0),
    "60m": Recipe(rank=128, steps=10_000),
    "130m": Recipe(rank=256, steps=20_000),
    "250m": Recipe(rank=256, steps=60_000, q_galore_lr=0.01),
    "350m": Recipe(rank=256, steps=60_000, q_galore_lr=0.01),
    "1b": Recipe(rank=512, steps=100_000, q_galore_lr=0.01),
    "3b": Recipe(rank=512, steps=100_000, q_galore_lr=0.01),
    "7b": Recipe(
        rank=1024, steps=150_000, lr=0.005, q_galore_lr=0.004, update_proj_gap=500, clip=1.0
    ),
}
RECIPES["13b"] = RECIPES["7b"]


def recipe_of(preset: str, shape: LlamaConfig) -> Recipe:
    """The recipe of a published shape; of another model, that of the nearest size.

    The rank is then a quarter of the hidden size.
    """
    if preset in RECIPES:
        return RECIPES[preset]
    size = math.log(shape.num_params)
    nearest = min(RECIPES, key=lambda name: abs(size - math.log(PRESETS[name].num_params)))
    return dataclasses.replace(RECIPES[nearest], rank=max(1, shape.hidden // 4))
