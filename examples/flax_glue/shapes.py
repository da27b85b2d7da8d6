"""The shape of an encoder, and how the config.json of Hugging Face's BERT and RoBERTa says it."""

import dataclasses
from pathlib import Path
from typing import Any

from examples.flax_llama.shapes import DTYPES
from examples.flax_llama.usage import UsageError, at_least_one, one_of, read_object
from examples.hf.values import positive, share, whole

CONFIG = "config.json"
KINDS = ("bert", "roberta")
POOLINGS = ("first", "mean")
# The linear layers of a block that can have an adapter of LoRA, by the names of its targets: PEFT
# takes query and value of these models, where it is told nothing.
LORA_TARGETS = {"qv": ("q", "v"), "all": ("q", "k", "v", "o", "up", "down")}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that fixes the parameters and the forward pass of an `Encoder`."""

    # "bert" or "roberta": they differ in the head, and in the number of the first position.
    kind: str
    vocab_size: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    # Rows of the table of positions; those before `first_position` are never used.
    positions: int
    first_position: int = 0
    token_types: int = 2
    pad_id: int = 0
    norm_eps: float = 1e-12
    # Standard deviation of what is newly drawn.
    init_std: float = 0.02
    # One for regression, else the number of classes.
    outputs: int = 2
    # What of a text the head sees: its "first" token, or the "mean" of all of them.
    pooling: str = "first"
    # Of the hidden states, of attention's weights, and of what the last layer sees.
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    # Of activations; norms, softmax and loss are computed in float32 whatever it is.
    dtype: str = "float32"
    param_dtype: str = "float32"
    # 0 has no adapters.
    lora_rank: int = 0
    lora_alpha: float = 8.0
    # Of `LORA_TARGETS`.
    lora_targets: str = "qv"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        one_of("pooling", self.pooling, POOLINGS)
        one_of("lora_targets", self.lora_targets, LORA_TARGETS)
        for name in ("dtype", "param_dtype"):
            one_of(name, getattr(self, name), DTYPES)
        sizes = ("vocab_size", "hidden", "intermediate", "layers", "heads", "token_types")
        for name in (*sizes, "outputs", "longest"):
            at_least_one(name, getattr(self, name))
        if self.hidden % self.heads:
            raise UsageError(f"hidden={self.hidden} does not divide into heads={self.heads} heads.")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(
                    f"{name}={getattr(self, name)}: expected at least 0 and less than 1."
                )

    @property
    def longest(self) -> int:
        """How many tokens there are positions for."""
        return self.positions - self.first_position

    @property
    def flops_per_token(self) -> int:
        """Operations of forward and backward per token in the layers' matrices.

        Attention's own products, which depend on the length of a text, are not counted.
        """
        return 6 * self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


# Where config.json says nothing, as Hugging Face's classes have it; the padding is 1 of RoBERTa.
DEFAULTS: dict[str, Any] = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
# What these settings must be, if they are there, for the model here to compute the same.
REQUIRED: dict[str, Any] = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}
SIZES = {
    "vocab_size": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
}
RATES = {
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}


def read_encoder(directory: Path, **settings: Any) -> EncoderConfig:
    """The encoder in a model directory.

    Args:
      directory: has a config.json of Hugging Face's BERT or RoBERTa, with any head or none.
      settings: fields of `EncoderConfig` that the directory does not decide.

    Raises:
      UsageError: there is no such file, or it says what the model here does not compute.
    """
    path = directory / CONFIG
    # Null is as if it were not there.
    found = {name: value for name, value in read_object(path).items() if value is not None}
    kind, names = found.get("model_type"), found.get("architectures", [])
    if not isinstance(names, list):
        raise UsageError(f"{path}: architectures={names!r}: expected a list of names.")
    if kind not in KINDS or not all(str(name).lower().startswith(kind) for name in names):
        said = ", ".join(map(str, names)) or kind
        raise UsageError(
            f"{path}: its architecture is {said}; expected BERT or RoBERTa, such as BertModel or "
            "RobertaForMaskedLM."
        )
    for name, wanted in REQUIRED.items():
        if found.get(name, wanted) != wanted:
            raise UsageError(f"{path}: {name} is {found[name]!r}; expected {wanted!r}.")
    values: dict[str, Any] = DEFAULTS | {"pad_token_id": KINDS.index(kind)} | found
    try:
        fields = fields_of(kind, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return EncoderConfig(**fields | settings)


def fields_of(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `EncoderConfig` that the values of a config.json decide.

    Raises:
      UsageError: one of them is not what it should be.
    """
    fields: dict[str, Any] = {ours: whole(values, theirs) for ours, theirs in SIZES.items()}
    if values["hidden_size"] % values["num_attention_heads"]:
        raise UsageError(
            f"num_attention_heads={values['num_attention_heads']}: expected a number that "
            f"hidden_size={values['hidden_size']} divides into."
        )
    pad, size = values["pad_token_id"], fields["vocab_size"]
    if not isinstance(pad, int) or isinstance(pad, bool) or not 0 <= pad < size:
        raise UsageError(f"pad_token_id={pad!r}: expected a whole number from 0 to {size - 1}.")
    # RoBERTa counts positions from behind the number of its padding.
    first = pad + 1 if kind == "roberta" else 0
    if fields["positions"] <= first:
        raise UsageError(
            f"max_position_embeddings={fields['positions']}: expected more than {first}, since "
            f"the first one is behind pad_token_id={pad}."
        )
    rates = {name: share(theirs, values[theirs]) for name, theirs in RATES.items()}
    last = values.get("classifier_dropout", rates["hidden_dropout"])
    return fields | {
        **{"kind": kind, "pad_id": pad, "first_position": first},
        "norm_eps": positive("layer_norm_eps", values["layer_norm_eps"]),
        "init_std": positive("initializer_range", values["initializer_range"]),
        **rates,
        "classifier_dropout": share("classifier_dropout", last),
    }
