"""Which tensors of a Hugging Face directory are which of our parameters."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.usage import UsageError
from examples.hf.tensors import Tensor

# Of a layer, by the name of theirs and the path of ours; the norms of Gemma have other names.
ATTENTION = {f"self_attn.{name}_proj": f"attention/{name}" for name in "qkvo"}
MLP = {f"mlp.{name}_proj": f"mlp/{name}" for name in ("gate", "up", "down")}
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
NORMS_AROUND = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_norm_after",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_norm_after",
}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# What comes before the names, of a language model by itself or as a part of another.
PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
# Tensors that hold nothing that is trained.
BUFFERS = ("rotary_emb.inv_freq", "attention.bias", "masked_bias")
# Parts of models that see or hear, which are not imported.
TOWERS = ("vision_tower", "multi_modal_projector", "vision_model", "audio_tower", "visual")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs, and where it goes.

    Attributes:
      name: of the tensor.
      path: of our parameter, "blocks/attention/q/kernel".
      layer: of the stack that it is; None outside of the blocks.
      transposed: whether ours is the transpose, as of all matrices that multiply.
      shape: of theirs.
    """

    name: str
    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        return theirs.T if self.transposed else theirs

    theirs = ours


def entries(shape: LlamaConfig, prefix: str = PREFIXES[0]) -> Iterator[Entry]:
    """Every tensor of a model."""
    own, D, V = shape.architecture, shape.hidden, shape.vocab_size
    yield Entry(f"{prefix}{EMBEDDING}", "embed/embedding", None, False, (V, D))
    for layer in range(shape.layers):
        yield from of_layer(shape, layer, f"{prefix}layers.{layer}.")
    yield Entry(f"{prefix}norm.weight", "norm/scale", None, False, (D,))
    if not own.tied:
        yield Entry(head_name(prefix), "head/kernel", None, True, (V, D))


def of_layer(shape: LlamaConfig, layer: int, prefix: str) -> Iterator[Entry]:
    own, D, F = shape.architecture, shape.hidden, shape.intermediate
    Q, G, K = shape.q_width, shape.kv_width, shape.head_size
    sizes = {
        **{"attention/q": (Q, D), "attention/k": (G, D), "attention/v": (G, D)},
        **{"attention/o": (D, Q), "mlp/gate": (F, D), "mlp/up": (F, D), "mlp/down": (D, F)},
    }
    bias = {
        **dict.fromkeys(("attention/q", "attention/k", "attention/v"), own.attention_bias),
        **{"attention/o": own.output_bias},
    }
    for name, path in (ATTENTION | MLP).items():
        kernel = f"blocks/{path}/kernel"
        yield Entry(f"{prefix}{name}.weight", kernel, layer, True, sizes[path])
        if bias.get(path, own.mlp_bias):
            place = f"blocks/{path}/bias"
            yield Entry(f"{prefix}{name}.bias", place, layer, False, sizes[path][:1])
    for name, path in (NORMS_AROUND if own.norm_after else NORMS).items():
        yield Entry(f"{prefix}{name}.weight", f"blocks/{path}/scale", layer, False, (D,))
    for name in ("q_norm", "k_norm") if own.qk_norm else ():
        place = f"blocks/attention/{name}/scale"
        yield Entry(f"{prefix}self_attn.{name}.weight", place, layer, False, (K,))


def head_name(prefix: str) -> str:
    """The name of the head beside a language model with such a prefix."""
    return {"language_model.model.": f"language_model.{HEAD}"}.get(prefix, HEAD)


@dataclasses.dataclass(frozen=True)
class Found:
    """The tensors of a directory that a model consists of.

    Attributes:
      entries: each of them.
      left_out: the names of those that belong to no language model, or are of a head of its own
        where config.json has the embedding be the head.
    """

    entries: list[Entry]
    left_out: list[str]


def match(shape: LlamaConfig, tensors: dict[str, Tensor]) -> Found:
    """Finds all tensors of a model among those of a directory.

    Raises:
      UsageError: some are missing, have another shape or no dtype of weights, or are too many;
        names them.
    """
    prefix = next((p for p in PREFIXES if f"{p}{EMBEDDING}" in tensors), None)
    if prefix is None:
        raise UsageError(
            f"There is no tensor {PREFIXES[0]}{EMBEDDING}: the first ones are "
            f"{some(sorted(tensors))}."
        )
    wanted = list(entries(shape, prefix))
    names = {entry.name for entry in wanted}
    rest = [name for name in tensors if name not in names and not name.endswith(BUFFERS)]
    others = {head_name(prefix)} if shape.architecture.tied else set()
    left_out = [name for name in rest if name in others or set(name.split(".")) & set(TOWERS)]
    if missing := [entry.name for entry in wanted if entry.name not in tensors]:
        raise UsageError(f"{len(missing)} tensors are missing: {some(missing)}.")
    if extra := sorted(set(rest) - set(left_out)):
        raise UsageError(
            f"{len(extra)} tensors belong to nothing in the model of config.json: {some(extra)}."
        )
    for entry in wanted:
        tensor = tensors[entry.name]
        if tensor.shape != entry.shape:
            raise UsageError(
                f"{entry.name} in {tensor.file} has the shape {tensor.shape}, where config.json "
                f"makes it {entry.shape}."
            )
        if "float" not in tensor.dtype:
            raise UsageError(
                f"{entry.name} in {tensor.file} is {tensor.dtype}: expected weights in 16 or 32 "
                "bits, not quantized ones."
            )
    return Found(wanted, left_out)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, and how many there are beside them."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
