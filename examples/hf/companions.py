"""The small files beside a model's weights, which go where the weights go."""

import shutil
from pathlib import Path

from examples.hf.configuration import CONFIG

# Of the tokenizer, and of how text is drawn from the model.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "generation_config.json",
)
# What the model's own configuration is called beside our settings, which have its name.
ORIGINAL = "hf_config.json"


def copy_companions(source: Path, target: Path) -> None:
    """Copies what a directory has of these files, and leaves alone what is there already.

    Args:
      source: a directory of Hugging Face, or of a run.
      target: a directory of a run.
    """
    original = source / ORIGINAL if (source / ORIGINAL).is_file() else source / CONFIG
    pairs = {name: source / name for name in COMPANIONS} | {ORIGINAL: original}
    for name, path in pairs.items():
        if path.is_file() and not (target / name).exists():
            shutil.copyfile(path, target / name)
