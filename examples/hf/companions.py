"""The small files beside a model's weights, which go where the weights go."""

import shutil
from pathlib import Path

from examples.hf.configuration import CONFIG, is_model

# Of the tokenizer, and of how text is drawn from the model.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("generation_config.json", "additional_chat_templates"),
)
# What the model's own configuration is called beside our settings, which have its name.
ORIGINAL = "hf_config.json"


def copy_companions(source: Path, target: Path) -> None:
    """Copies what a directory has of these files, and leaves alone what is there already.

    Args:
      source: a directory of Hugging Face, or of a run.
      target: another one; of a run, it gets the model's configuration too, where that is known.
    """
    copy_files(source, target)
    original = source / (CONFIG if is_model(source) else ORIGINAL)
    if original.is_file() and not (target / ORIGINAL).exists():
        shutil.copyfile(original, target / ORIGINAL)


def copy_files(source: Path, target: Path) -> None:
    """Copies the files alone."""
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        elif (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
