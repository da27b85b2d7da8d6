"""Which token ends a document: what a run has kept, what the model's own files say, or a usual one.

Beside a tokenizer, `eos_token` of tokenizer_config.json and special_tokens_map.json says it, and
else `eos_token_id` of generation_config.json and config.json. Earlier versions asked for usual
names first: what they have written goes on as it was.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.flax_llama.documents import META
from examples.flax_llama.tokenizer_config import END
from examples.flax_llama.usage import UsageError, parse_json, say_once

if TYPE_CHECKING:
    from examples.flax_llama.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Names that it has where nothing beside the tokenizer says which it is, the likeliest first.
USUAL = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
# In place of a name.
NO_END = "none"


def find_end(tokenizer: "Tokenizer") -> int | None:
    """The token that ends a document; None where there is none.

    Raises:
      UsageError: a run has kept one that its tokenizer has not, or a file cannot be read.
    """
    config, usual = tokenizer.config, tokenizer.usual_end
    if config is None:
        return usual
    if config.keeps_end:
        return None if config.end is None else id_of(tokenizer, config.end, END)
    if made_here(config.directory):
        return without_kept(tokenizer)
    found = configured_end(tokenizer)
    return usual if found is None else found


def configured_end(tokenizer: "Tokenizer") -> int | None:
    """The token that the files beside a tokenizer call the end of a text, if there is one."""
    named = tokenizer.named("eos_token")
    if named is not None or tokenizer.config is None:
        return named
    numbers = (each for each in tokenizer.config.end_ids if 0 <= each < tokenizer.vocab_size)
    return next(numbers, None)


def lacking_end(tokenizer: "Tokenizer") -> str | None:
    """What the files beside a tokenizer call the end of a text and it has not, as they say it."""
    config = tokenizer.config
    if config is None:
        return None
    named = config.tokens.get("eos_token")
    if named is not None:
        return f"eos_token {named!r}" if tokenizer.id_of(named) is None else None
    numbers = config.end_ids if configured_end(tokenizer) is None else []
    return f"eos_token_id {numbers[0]}" if numbers else None


def without_kept(tokenizer: "Tokenizer") -> int | None:
    """What is found in the directory of a run that says nothing of it."""
    return tokenizer.named("eos_token") if tokenizer.usual_end is None else tokenizer.usual_end


def kept_end(tokenizer: "Tokenizer") -> dict[str, Any]:
    """What is to be kept with a run, since it would not be found again."""
    if tokenizer.eos_id == without_kept(tokenizer):
        return {}
    return {END: None if tokenizer.eos_id is None else tokenizer.name_of(tokenizer.eos_id)}


def made_here(directory: Path) -> bool:
    """Whether there are documents in these tokens: a run, or what the tokenize command made."""
    if (directory / META).is_file():
        return True
    try:
        settings = parse_json((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "train" in settings and "imported" not in settings


def with_end(tokenizer: "Tokenizer", name: str | None) -> "Tokenizer":
    """The same tokenizer, with documents that end in a token of that name, or in none for "none".

    Raises:
      UsageError: there is no such token.
    """
    if name is not None:
        tokenizer.eos_id = None if name == NO_END else id_of(tokenizer, name, "eos_token")
    return tokenizer


def id_of(tokenizer: "Tokenizer", name: str, setting: str) -> int:
    found = tokenizer.id_of(name)
    if found is None:
        raise UsageError(
            f"{setting}={name!r}: the tokenizer has no such token; expected the name of one, such "
            f'as </s>, or "{NO_END}".'
        )
    return found


def tell_of_end(tokenizer: "Tokenizer", spec: str, *, of_answers: bool = False) -> None:
    """Says, once, where nobody knows which token ends a document, or it is another than named.

    A chat template ends answers by itself; what has neither that nor an end is refused elsewhere.
    """
    config, lacking = tokenizer.config, lacking_end(tokenizer)
    has_template = config is not None and bool(config.templates)
    if of_answers and (tokenizer.eos_id is None or (has_template and not lacking)):
        return
    known = configured_end(tokenizer) is not None
    if config and (config.keeps_end or (known and not lacking)):
        return
    lacks = f" lacks its own {lacking} and" if lacking else ""
    usual = [name for name in USUAL if tokenizer.id_of(name) is not None]
    hint = f'--eos-token says which it is, or "{NO_END}"'
    if tokenizer.eos_id is None:
        say_once(
            f"Note: tokenizer={spec}{lacks} has no token that is known to end a document: they "
            f"follow each other with nothing between them. {hint}."
        )
    elif lacking or len(usual) > 1:
        end = tokenizer.name_of(tokenizer.eos_id)
        has = end if known else " and ".join(usual)
        say_once(f"Note: tokenizer={spec}{lacks} has {has}: documents end in {end}. {hint}.")
