"""What distinguishes a decoder from a LLaMA: heads, norms, biases, positions, windows."""

import dataclasses
import math
from typing import Any

from examples.flax_llama.usage import UsageError, one_of

# What families are called in a sentence.
TITLES = {
    **{"llama": "LLaMA", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"smollm3": "SmolLM3", "gemma3_text": "Gemma 3"},
}
ACTIVATIONS = ("silu", "gelu_tanh")
ROPES = ("plain", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, and how it is stretched beyond the length of pre-training.

    Attributes:
      theta: the base of the wavelengths.
      kind: "plain" (arXiv:2104.09864); "linear", all positions divided by the factor
        (arXiv:2306.15595); "dynamic", a base that grows with the sequence; "llama3", long
        wavelengths divided by the factor (Llama 3.1's); or "yarn" (arXiv:2309.00071).
      factor: by which it is stretched.
      context: the tokens that it is stretched from; needed by "dynamic", "llama3" and "yarn".
      low_freq_factor: llama3's: wavelengths above `context` over this are stretched.
      high_freq_factor: llama3's: wavelengths below `context` over this are not.
      beta_fast: yarn's: what turns more often than this in `context` is not stretched.
      beta_slow: yarn's: what turns less often than this in it is.
      truncate: yarn's: whether these bounds are rounded to whole dimensions.
      attention_factor: what yarn multiplies queries and keys with.
    """

    theta: float = 10_000.0
    kind: str = "plain"
    factor: float = 1.0
    context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        one_of("rope", self.kind, ROPES)
        if not 0 < self.theta < math.inf or not 0 < self.factor < math.inf:
            raise UsageError(
                f"rope: theta={self.theta} and factor={self.factor} must be positive numbers."
            )
        if self.kind in ("dynamic", "llama3", "yarn") and not self.context:
            raise UsageError(f"rope={self.kind!r} needs the length of pre-training.")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the layers of one kind have in common.

    Attributes:
      rope: None for layers that do not know positions.
      window: how many tokens a token attends to, itself included; None for all before it.
    """

    rope: Rope | None = Rope()
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of decoder; the defaults are LLaMA's.

    Attributes:
      family: the `model_type` of its Hugging Face configuration.
      kv_heads: heads of keys and values, each of which serves several of queries; None for as many.
      head_size: of a head; None for the hidden size over the heads.
      tied: the head is the embedding.
      attention_bias: queries, keys and values have biases.
      output_bias: what attention is projected back with has one.
      mlp_bias: the MLP's three matrices have.
      qk_norm: queries and keys are normalized, head by head.
      activation: of the MLP's gate.
      norm_eps: added to mean squares.
      norm_after: what attention and MLP return is normalized before it is added.
      norm_offset: norms multiply by 1 + scale, not by scale.
      embed_scaled: embeddings are multiplied by the root of the hidden size.
      attention_scale: of the scores; None for 1 over the root of the head's size.
      kinds: of layers.
      pattern: the number of each layer's kind; empty where all are of the first.
      context: tokens that it was trained with at most; None where nobody says.
    """

    family: str = "llama"
    kv_heads: int | None = None
    head_size: int | None = None
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_after: bool = False
    norm_offset: bool = False
    embed_scaled: bool = False
    attention_scale: float | None = None
    kinds: tuple[Kind, ...] = (Kind(),)
    pattern: tuple[int, ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        one_of("family", self.family, TITLES)
        one_of("activation", self.activation, ACTIVATIONS)
        if not self.kinds or not set(self.pattern) <= set(range(len(self.kinds))):
            raise UsageError(
                f"pattern={self.pattern}: expected numbers of {len(self.kinds)} kinds."
            )

    @property
    def title(self) -> str:
        return TITLES[self.family]

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Architecture":
        """Undoes `dataclasses.asdict`, also after a way through JSON."""
        own: dict[str, Any] = dict(fields)
        own["kinds"] = tuple(
            Kind(kind["rope"] and Rope(**kind["rope"]), kind["window"]) for kind in fields["kinds"]
        )
        own["pattern"] = tuple(fields["pattern"])
        return cls(**own)


LLAMA = Architecture()
