"""Writes a LLaMA in GGUF, llama.cpp's format, as a directory of Hugging Face.

python -m examples.flax_llama.gguf_to_hf SmolLM2-135M-Instruct.Q8_0.gguf --out SmolLM2
python -m examples.flax_llama.import_hf SmolLM2 --out runs/smollm2
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import tokenizers
import tyro
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from examples.flax_llama.command import program
from examples.flax_llama.flags import command_line
from examples.flax_llama.shapes import LlamaConfig
from examples.flax_llama.tokens import check_new, new_directory
from examples.flax_llama.usage import UsageError, cannot_be_read, one_of
from examples.hf.configuration import CONFIG, DIMENSIONS, shape_of
from examples.hf.names import Entry, entries, some
from examples.hf.tensors import FILE

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
# The names of the numbers in our dimensions' order.
NUMBERS = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
# What stands in the names of tensors for what Hugging Face calls it.
NAMES = {
    r"^model\.embed_tokens": "token_embd",
    r"^model\.norm": "output_norm",
    r"^lm_head": "output",
    r"^model\.layers": "blk",
    r"self_attn\.([qkv])_proj": r"attn_\1",
    r"self_attn\.o_proj": "attn_output",
    r"mlp\.(\w+)_proj": r"ffn_\1",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# What a plain llama has, if it says so; 0 is as if it did not.
PLAIN = {
    **{"rope.scale_linear": 1.0, "rope.scaling.factor": 1.0, "attention.sliding_window": 0},
    **{"logit_scale": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_count": 0},
}
# What is as large as a head.
OF_HEADS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
# How a text is cut before its bytes are merged, by the name of it.
CUTS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
}
# Numbers of a token's kind: a control token, one that users have defined.
SPECIAL = (3, 4)


class File:
    """A GGUF file: its values by name, and its tensors.

    Raises:
      UsageError: it cannot be read, or is none.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = GGUFReader(path)
        except OSError as error:
            raise cannot_be_read(str(path), error) from error
        except (ValueError, IndexError, KeyError) as error:
            raise UsageError(f"{path} is cut, or no GGUF file: {error}.") from error
        self.values: dict[str, Any] = {k: field.contents() for k, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, name: str) -> Any:
        if name not in self.values:
            raise UsageError(f"{self.path} has no {name}.")
        return self.values[name]

    def read(self, entry: Entry, shape: LlamaConfig) -> np.ndarray:
        """A tensor as Hugging Face has it, float32."""
        tensor = self.tensors[gguf_name(entry.name)]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise UsageError(f"{self.path}: {tensor.name} is {kind}, which is not read.") from error
        if array.shape != entry.shape:
            raise UsageError(
                f"{self.path}: {tensor.name} has the shape {array.shape}, where the rest of the "
                f"file makes it {entry.shape}."
            )
        heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
        for name, count in heads.items():
            if f".{name}." in tensor.name:
                # llama.cpp rotates neighbours, not entries that are half a head apart.
                pairs = array.reshape(count, shape.head_size // 2, 2, -1)
                array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array


def gguf_name(name: str) -> str:
    """What a tensor of Hugging Face is called in GGUF."""
    for theirs, own in NAMES.items():
        name = re.sub(theirs, own, name)
    return name


def config_of(file: File) -> dict[str, Any]:
    """The config.json of the model in a file.

    Raises:
      UsageError: it is none that this program has.
    """
    family = file.value("general.architecture")
    scaling = file.values.get("llama.rope.scaling.type", "none")
    if family != "llama" or scaling != "none" or "rope_freqs.weight" in file.tensors:
        stretched = "" if family != "llama" else " with a stretched rotary embedding"
        raise UsageError(
            f"{file.path} is a {family}{stretched}: expected a llama with a plain one. Others are "
            "imported from the safetensors they were made of."
        )
    numbers = [file.value(f"llama.{name}") for name in NUMBERS]
    check_plain(file, head_size=numbers[0] // numbers[3])
    config: dict[str, Any] = dict(zip(DIMENSIONS, numbers, strict=True))
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(file.value("tokenizer.ggml.tokens")),
        "max_position_embeddings": file.value("llama.context_length"),
        "num_key_value_heads": file.values.get("llama.attention.head_count_kv", numbers[3]),
        # Of the shortest decimal that is the number in float32.
        "rms_norm_eps": shortest(file.value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest(file.values.get("llama.rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = file.values.get(f"tokenizer.ggml.{name}_token_id")
    return config


def check_plain(file: File, head_size: int) -> None:
    """Raises UsageError where a value makes of a llama something else."""
    for name, right in {**PLAIN, **dict.fromkeys(OF_HEADS, head_size)}.items():
        value = file.values.get(f"llama.{name}", right)
        if value not in (right, 0):
            raise UsageError(
                f"{file.path}: llama.{name} is {value}, and only {right} is taken. Others are "
                "imported from the safetensors they were made of."
            )


def shortest(value: float) -> float:
    return float(str(np.float32(value)))


def tokenizer_of(file: File) -> tokenizers.Tokenizer:
    """The tokenizer in a file.

    Raises:
      UsageError: it is not byte-level BPE, or cuts texts in a way that is not known here.
    """
    kind, cut = (file.values.get(f"tokenizer.ggml.{x}", "") for x in ("model", "pre"))
    if kind != "gpt2" or cut not in CUTS:
        raise UsageError(
            f"{file.path} has a tokenizer of model {kind!r} and pre {cut!r}: expected 'gpt2', and "
            f"one of {', '.join(map(repr, CUTS))}."
        )
    tokens = file.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.value("tokenizer.ggml.merges")]
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # of no class of its own
        raise UsageError(f"{file.path} has a tokenizer that does not work: {error}.") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = file.values.get("tokenizer.ggml.token_type", [])
    tokenizer.add_special_tokens(
        [token for token, kind in zip(tokens, types, strict=False) if kind in SPECIAL]
    )
    return tokenizer


def settings_of(file: File) -> dict[str, Any]:
    """The tokenizer_config.json: the class, special tokens, the template of chats."""
    tokens = file.value("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = file.values.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            settings[f"{name}_token"] = tokens[number]
    template = file.values.get("tokenizer.chat_template")
    return settings | ({"chat_template": template} if template else {})


def gguf_to_hf(
    file: Annotated[Path, tyro.conf.Positional], out: Path, param_dtype: str = "float32"
) -> str:
    """Writes a LLaMA in GGUF as a directory of Hugging Face, its weights dequantized.

    The directory appears when it is complete.

    Args:
      file: in GGUF.
      out: new directory.
      param_dtype: float32 or bfloat16.
    """
    check_new(out)
    one_of("param_dtype", param_dtype, DTYPES)
    model = File(file)
    config, tokenizer = config_of(model), tokenizer_of(model)
    shape = shape_of(config)
    wanted = list(entries(shape))
    expected = {gguf_name(entry.name) for entry in wanted}
    if missing := expected - model.tensors.keys():
        raise UsageError(f"{file}: {len(missing)} tensors are missing: {some(sorted(missing))}.")
    if extra := model.tensors.keys() - expected:
        raise UsageError(
            f"{file}: {len(extra)} tensors belong to nothing in a llama: {some(sorted(extra))}."
        )
    with new_directory(out) as partial:
        arrays = {e.name: model.read(e, shape).astype(DTYPES[param_dtype]) for e in wanted}
        save_file(arrays, partial / FILE, metadata={"format": "pt"})
        config["torch_dtype"] = param_dtype
        for name, value in {CONFIG: config, "tokenizer_config.json": settings_of(model)}.items():
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")
        tokenizer.save(str(partial / "tokenizer.json"))
    return f"{shape.architecture.title} of {shape.num_params:,} parameters in {param_dtype}"


def main() -> None:
    # What it has written of a directory disappears.
    with program(gguf_to_hf, at_once=False):
        print(command_line(gguf_to_hf)())


if __name__ == "__main__":
    main()
