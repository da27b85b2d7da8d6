"""What Hugging Face calls the parameters of an encoder: one table."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from examples.flax_glue.shapes import EncoderConfig
from examples.flax_llama.usage import UsageError
from examples.hf.names import some

# The path of a parameter in ours.
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """What a parameter is made of.

    Attributes:
      names: Hugging Face's, without the prefix of the model: one, or that of each layer.
      stacked: whether there is one of each layer.
      transposed: whether theirs is (out, in), as PyTorch has it.
    """

    names: tuple[str, ...]
    stacked: bool = False
    transposed: bool = False


EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
}
NORMS = {"embeddings.norm": "embeddings.LayerNorm"}
LAYER_LINEARS = {
    "blocks.attention.q": "attention.self.query",
    "blocks.attention.k": "attention.self.key",
    "blocks.attention.v": "attention.self.value",
    "blocks.attention.o": "attention.output.dense",
    "blocks.mlp.up": "intermediate.dense",
    "blocks.mlp.down": "output.dense",
}
LAYER_NORMS = {
    "blocks.attention_norm": "attention.output.LayerNorm",
    "blocks.mlp_norm": "output.LayerNorm",
}
# Of a first token; to the mean of all of them no model of theirs has a head.
HEADS = {
    "bert": {"pooler": "pooler.dense", "head.out": "classifier"},
    "roberta": {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"},
}
# Parts that a checkpoint may have or lack.
OPTIONAL = ("pooler", "head")
# The layer of a head that makes as many numbers as there are classes.
OUTPUT = ("head", "out", "kernel")
# What else may be in a checkpoint: heads for other tasks, and buffers.
OTHERS = re.compile(
    r"(?P<head>cls|lm_head|qa_outputs|pooler|classifier)\..*|embeddings\.(position|token_type)_ids"
)


def path(module: str, parameter: str) -> Path:
    """The path of a parameter of a module."""
    return (*module.split("."), parameter)


def sources(config: EncoderConfig) -> dict[Path, Source]:
    """What each parameter of an encoder is made of; adapters of LoRA and new heads are not in it.

    Only a head of the first token is one that theirs have.
    """
    heads = HEADS[config.kind] if config.pooling == "first" else {}
    found: dict[Path, Source] = {}
    for ours, theirs in EMBEDDINGS.items():
        found[path(ours, "embedding")] = Source((f"{theirs}.weight",))
    for ours, theirs in NORMS.items():
        found[path(ours, "scale")] = Source((f"{theirs}.weight",))
        found[path(ours, "bias")] = Source((f"{theirs}.bias",))
    for ours, theirs in heads.items():
        found[path(ours, "kernel")] = Source((f"{theirs}.weight",), transposed=True)
        found[path(ours, "bias")] = Source((f"{theirs}.bias",))

    def of_layers(name: str) -> tuple[str, ...]:
        return tuple(f"encoder.layer.{i}.{name}" for i in range(config.layers))

    for ours, theirs in LAYER_LINEARS.items():
        kernels, biases = of_layers(f"{theirs}.weight"), of_layers(f"{theirs}.bias")
        found[path(ours, "kernel")] = Source(kernels, stacked=True, transposed=True)
        found[path(ours, "bias")] = Source(biases, stacked=True)
    for ours, theirs in LAYER_NORMS.items():
        found[path(ours, "scale")] = Source(of_layers(f"{theirs}.weight"), stacked=True)
        found[path(ours, "bias")] = Source(of_layers(f"{theirs}.bias"), stacked=True)
    return found


def plain_names(names: Iterable[str], kind: str) -> dict[str, str]:
    """The full name of each tensor, by the name without the prefix that the model may have.

    Norms of old checkpoints have gamma and beta for weight and bias.

    Raises:
      UsageError: two tensors have the same name then.
    """
    plain: dict[str, str] = {}
    for name in names:
        short = name.removeprefix(f"{kind}.")
        short = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", short)
        short = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", short)
        if short in plain:
            raise UsageError(f"{plain[short]} and {name} are the same tensor of the model.")
        plain[short] = name
    return plain


def left_over(plain: Mapping[str, str], used: Iterable[str]) -> list[str]:
    """The names of tensors that a model has no use for, each head by its first word.

    Raises:
      UsageError: some of them are none that a checkpoint of such a model has.
    """
    rest = plain.keys() - set(used)
    if unknown := [plain[name] for name in rest if not OTHERS.fullmatch(name)]:
        raise UsageError(
            f"the checkpoint has tensors that this model has not: {some(sorted(unknown))}."
        )
    heads = (match["head"] for name in rest if (match := OTHERS.fullmatch(name)))
    return sorted({head for head in heads if head is not None})
