"""Objects of JSON that have a checksum of themselves, by which damage of their files is found."""

from pathlib import Path
from typing import Any

from examples.flax_llama.checksums import of_json
from examples.flax_llama.usage import UsageError

CHECKSUM = "checksum"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with its checksum."""
    return value | {CHECKSUM: of_json(value)}


def is_sound(value: dict[str, Any]) -> bool:
    """Whether it is as it was sealed; one of an earlier version, without a checksum, may be."""
    return value.get(CHECKSUM, of_json(unsealed(value))) == of_json(unsealed(value))


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same without its checksum."""
    return {name: each for name, each in value.items() if name != CHECKSUM}


def checked(value: dict[str, Any], path: Path, advice: str) -> dict[str, Any]:
    """The same without its checksum, which must be right.

    Args:
      value: of a file.
      path: of the file.
      advice: what to do where it is damaged, a sentence without its end.

    Raises:
      UsageError: it is damaged.
    """
    if not is_sound(value):
        raise UsageError(
            f"{path} is damaged, or was changed by hand: its checksum is another. {advice}."
        )
    return unsealed(value)
