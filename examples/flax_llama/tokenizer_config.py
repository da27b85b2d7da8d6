"""What stands beside a tokenizer in a model's directory: special tokens, and chat templates."""

import dataclasses
import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from examples.flax_llama.usage import UsageError, cannot_be_read

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# Of other templates than the first, each in a file by its name.
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT, WITH_TOOLS = "default", "tool_use"
# A template may write the date into a prompt, and a run that goes on tomorrow is to have the same
# tokens: where it is saved, it keeps the time at which it was read.
NOW, ASKS_FOR_IT = "chat_template_now", "strftime_now"


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The files beside a tokenizer."""

    directory: Path
    # {name: contents}, to be written as they are.
    files: dict[str, bytes]
    read_at: datetime

    @classmethod
    def read(cls, directory: Path) -> "TokenizerConfig":
        """What there is in a directory, which may be nothing.

        Raises:
          UsageError: a file cannot be read.
        """
        more = sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
        paths = [*(directory / name for name in (CONFIG, SPECIAL, TEMPLATE)), *more]
        try:
            files = {
                path.relative_to(directory).as_posix(): path.read_bytes()
                for path in paths
                if path.is_file()
            }
        except OSError as error:
            raise cannot_be_read(str(error.filename), error) from error
        # To the second, as it is saved.
        return cls(directory, files, datetime.now().replace(microsecond=0))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of a tokenizer of `transformers`."""
        return self._json(SPECIAL) | self._json(CONFIG)

    @property
    def tokens(self) -> dict[str, str]:
        """The names of special tokens, by what they are for, such as `bos_token`."""
        found = {}
        for name, value in self.settings.items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                found[name] = token
        return found

    @property
    def adds_bos(self) -> bool | None:
        """Whether texts begin with `bos_token`; None where nothing is said about it."""
        return self.settings.get("add_bos_token")

    @property
    def templates(self) -> dict[str, str]:
        """The chat templates by their names, of which that of a single one is `DEFAULT`."""
        in_files = {
            DEFAULT if name == TEMPLATE else Path(name).stem: self._text(name)
            for name in self.files
            if name.endswith(".jinja")
        }
        own = self.settings.get("chat_template")
        if in_files or not own:
            return in_files
        if isinstance(own, str):
            return {DEFAULT: own}
        try:
            return {each["name"]: each["template"] for each in own}
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"{self.directory / CONFIG}: expected a text as its chat_template, or a list of "
                "objects with name and template."
            ) from error

    @property
    def now(self) -> datetime:
        """The time that templates are told."""
        try:
            return datetime.fromisoformat(self.settings.get(NOW) or self.read_at.isoformat())
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.directory / CONFIG}: {NOW} is no time: {error}.") from error

    def save(self, directory: Path) -> None:
        """Writes the files, with the time where a template asks for it."""
        files = self.files
        if any(ASKS_FOR_IT in template for template in self.templates.values()):
            config = self._json(CONFIG) | {NOW: self.now.isoformat()}
            files = files | {CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode()}
        for name, contents in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(contents)

    def _text(self, name: str) -> str:
        try:
            return self.files[name].decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.directory / name} is not UTF-8: {error}.") from error

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.files:
            return {}
        text = self._text(name)
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{self.directory / name} is not JSON: {error}.") from error
        if not isinstance(found, dict):
            raise UsageError(f"{self.directory / name}: expected an object.")
        return found
