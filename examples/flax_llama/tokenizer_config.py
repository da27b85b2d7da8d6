"""What stands beside a tokenizer in a model's directory: special tokens, and chat templates.

The token that ends a document is `eos_token` of tokenizer_config.json or special_tokens_map.json,
or what generation_config.json or config.json calls `eos_token_id`. Runs and tokenized directories
keep the one that they were made with, where that is another one.
"""

import dataclasses
import functools
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from examples.flax_llama.usage import UsageError, cannot_be_read, parse_json, read_object

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# Of the model, which have numbers of tokens; the last one is its configuration beside our settings.
OF_MODEL = ("generation_config.json", "config.json", "hf_config.json")
# Of a run, which goes on with it: the name of the token that ends a document, null for none.
END_FILE, END = "document_end.json", "document_end"
# Of other templates than the first, each in a file by its name.
MORE_TEMPLATES = "additional_chat_templates"
# What a text begins and ends with.
ENDS = ("bos_token", "eos_token")
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
        paths = [*(directory / name for name in (CONFIG, SPECIAL, TEMPLATE, END_FILE)), *more]
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

    @classmethod
    def none(cls, directory: Path) -> "TokenizerConfig":
        """What there is beside a tokenizer that is alone."""
        return cls(directory, {}, datetime.now().replace(microsecond=0))

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of a tokenizer of `transformers`, of which null is none."""
        own = {k: v for k, v in self._json(CONFIG).items() if v is not None}
        return self._json(SPECIAL) | own

    @property
    def tokens(self) -> dict[str, str]:
        """The names of special tokens, by what they are for, such as `bos_token`.

        Raises:
          UsageError: that of a text's beginning or end is no name.
        """
        found = {}
        for name, value in self.settings.items():
            token = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(token, str):
                found[name] = token
            elif name in ENDS and value is not None:
                file = CONFIG if self._json(CONFIG).get(name) is not None else SPECIAL
                raise UsageError(
                    f"{self.directory / file}: expected the name of a token as {name}, got "
                    f"{value!r}."
                )
        return found

    @property
    def keeps_end(self) -> bool:
        """Whether a run has written which token ends its documents."""
        return END in self._json(END_FILE)

    @property
    def end(self) -> str | None:
        """The name of that token; None for none.

        Raises:
          UsageError: it is no name.
        """
        name = self._json(END_FILE).get(END)
        if not isinstance(name, str | None):
            raise UsageError(f"{self.directory / END_FILE}: {name!r} is no name of a token.")
        return name

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """The numbers of the tokens that end a text, as the model's own files say."""
        found: list[int] = []
        for name in OF_MODEL:
            path = self.directory / name
            settings = read_object(path) if path.is_file() else {}
            nested = settings.get("text_config")
            of_text = nested if isinstance(nested, dict) else {}
            ids = settings.get("eos_token_id", of_text.get("eos_token_id"))
            ids = ids if isinstance(ids, list) else [ids]
            found += [each for each in ids if type(each) is int]
        return list(dict.fromkeys(found))

    @property
    def adds_bos(self) -> bool | None:
        """Whether texts begin with `bos_token`; None where nothing is said about it.

        Raises:
          UsageError: what is said is neither true nor false.
        """
        adds = self.settings.get("add_bos_token")
        if not isinstance(adds, bool | None):
            raise UsageError(
                f"{self.directory / CONFIG}: expected true or false as add_bos_token, got {adds!r}."
            )
        return adds

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
        found = {}
        for each in own if isinstance(own, list) else [own]:
            pair = each if isinstance(each, dict) else {}
            name, template = pair.get("name"), pair.get("template")
            if not (isinstance(name, str) and isinstance(template, str)):
                raise UsageError(
                    f"{self.directory / CONFIG}: expected a text as its chat_template, or a list "
                    "of objects with name and template, which are texts."
                )
            found[name] = template
        return found

    @property
    def now(self) -> datetime:
        """The time that templates are told."""
        try:
            return datetime.fromisoformat(self.settings.get(NOW) or self.read_at.isoformat())
        except (TypeError, ValueError) as error:
            raise UsageError(f"{self.directory / CONFIG}: {NOW} is no time: {error}.") from error

    def to_save(self, end: dict[str, Any]) -> dict[str, bytes]:
        """The files, with the time where a template asks for it.

        Args:
          end: what the file that says the end of a document is to have; without any there is none.
        """
        files = {name: contents for name, contents in self.files.items() if name != END_FILE}
        if any(ASKS_FOR_IT in template for template in self.templates.values()):
            config = self._json(CONFIG) | {NOW: self.now.isoformat()}
            files |= {CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode()}
        if end:
            files[END_FILE] = json.dumps(end, ensure_ascii=False).encode()
        return files

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
            found = parse_json(text)
        except ValueError as error:
            raise UsageError(f"{self.directory / name} is not JSON: {error}.") from error
        if not isinstance(found, dict):
            raise UsageError(f"{self.directory / name}: expected an object.")
        return found
