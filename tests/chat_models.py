"""Directories of models with chat templates, as Hugging Face has them, without weights."""

import importlib.util
import json
import shutil
from pathlib import Path

DATA = Path(__file__).parent / "data" / "chat"


def load_script():
    spec = importlib.util.spec_from_file_location("make_golden", DATA / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def make_model(path, template, **config):
    """The directory of a model with a template, as Hugging Face has it."""
    name, tokens = SCRIPT.TEMPLATES[template]
    path.mkdir(exist_ok=True)
    shutil.copy(DATA / f"{name}.json", path / "tokenizer.json")
    shutil.copy(DATA / f"{template}.jinja", path / "chat_template.jinja")
    config = {**tokens, "chat_template_now": SCRIPT.NOW.isoformat(), **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
