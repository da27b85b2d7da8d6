"""Makes tests/data/encoders with PyTorch: small models of Hugging Face, and what they compute.

python tests/data/make_encoders.py

Each directory has config.json and model.safetensors, as `save_pretrained` writes them, and
expected.npz: `tokens`, `types`, `mask` (int64, (3, 11)), `hidden`, the states after the last layer
(float32, (3, 11, 16)). Where the model has a head, also `logits` (float32, (3, outputs)), and the
loss of each of five updates with all three texts, by AdamW without dropout: `labels`, `losses`.
"""

import copy
import pathlib
import sys

import numpy as np
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
BERT = BertConfig(**SIZES, max_position_embeddings=16, type_vocab_size=2, num_labels=3)
ROBERTA = RobertaConfig(
    **SIZES,
    max_position_embeddings=20,
    type_vocab_size=1,
    pad_token_id=1,
    layer_norm_eps=1e-5,
    num_labels=1,
)
# With a head for the task, with none, and with one for another task.
MODELS = {
    "bert": (BertForSequenceClassification, BERT),
    "bert_base": (BertModel, BERT),
    "roberta": (RobertaForSequenceClassification, ROBERTA),
    "roberta_masked": (RobertaForMaskedLM, ROBERTA),
}
LENGTHS = (11, 7, 3)
UPDATES = 5
OUT = pathlib.Path(__file__).parent / "encoders"


def make(name):
    """A model with weights large enough for every part of it to matter."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = kind(copy.deepcopy(config)).eval()
    rng = np.random.default_rng(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32))
            parameter.add_(0.2 * noise)
    return model


def texts(config):
    """Tokens, types and masks of three texts, filled up behind."""
    rng = np.random.default_rng(0)
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(5, config.vocab_size, mask.shape), config.pad_token_id)
    types = np.where(mask, rng.integers(config.type_vocab_size, size=mask.shape), 0)
    return {"tokens": tokens, "types": types, "mask": mask.astype(np.int64)}


def expected(model, arrays):
    """What a model computes of texts."""
    tokens, types, mask = (torch.from_numpy(arrays[name]) for name in ("tokens", "types", "mask"))
    inputs = {"input_ids": tokens, "token_type_ids": types, "attention_mask": mask}
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True)
    result = {"hidden": found.hidden_states[-1].numpy()}
    if "ForSequenceClassification" in type(model).__name__:
        labels = np.array([0.5, -1.0, 2.0] if model.num_labels == 1 else [0, 2, 1])
        result |= {"logits": found.logits.numpy(), "labels": labels}
        result["losses"] = train(model, inputs | {"labels": torch.from_numpy(labels)})
    return result


def train(model, inputs):
    """The loss of each update, at a rate that falls linearly from 0.01 to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-6, weight_decay=0.0)
    losses = []
    for step in range(UPDATES):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / UPDATES)
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def main():
    for name in MODELS:
        model = make(name)
        model.save_pretrained(OUT / name)
        arrays = texts(model.config)
        np.savez_compressed(OUT / name / "expected.npz", **arrays, **expected(model, arrays))
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
