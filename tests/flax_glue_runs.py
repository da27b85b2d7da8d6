"""A small encoder of Hugging Face, a small task, and settings of runs of seconds."""

import pathlib
import shutil

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from examples.flax_glue.config import Config

DATA = pathlib.Path(__file__).parent / "data"
ENCODERS = DATA / "encoders"
GOOD, BAD = ("good", "fine"), ("bad", "dull")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *(f"word{i}" for i in range(8)))


def write_model(directory, name="bert_base", words=WORDS):
    """A model directory with a tokenizer of words."""
    directory = pathlib.Path(shutil.copytree(ENCODERS / name, directory))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    # As the file of MiniLM has it.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_task(directory, sizes=(250, 60, 40)):
    """Sentences with a word that decides the label, in train, dev and test."""
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name, size in zip(("train", "dev", "test"), sizes, strict=True):
        lines = []
        for label in rng.integers(2, size=size):
            words = [f"word{i}" for i in rng.integers(8, size=rng.integers(1, 5))]
            words.insert(rng.integers(len(words) + 1), rng.choice(GOOD if label else BAD))
            lines.append(f"{label} {' '.join(words)}\n")
        (directory / f"{name}.txt").write_text("".join(lines))
    return directory


def tiny(model, data, **settings):
    """Settings of a run of 48 updates that learns the task of `write_task`."""
    small = {
        **{"epochs": 3, "batch": 16, "pooling": "mean", "max_length": 16},
        **{"rank": 4, "lr": 0.02, "scale": 1.0, "update_proj_gap": 8, "quiet": True},
    }
    return Config(model=model, data=data, **small | settings)
