"""Fields of an example: of a line of JSON, or of what comes from the hub."""

from typing import Any

from examples.flax_llama.usage import parse_json

LINES = "; of JSON files each line is read as an object of its own"


class BadLine(ValueError):
    """There is no document here; the message says why.

    Attributes:
      fields: the names of those that could be meant.
    """

    def __init__(self, reason: str, fields: list[str] | None = None):
        super().__init__(reason)
        self.fields = fields or []


def value_at(example: Any, field: str) -> Any:
    """The value of a field, of which a dot goes into an object; None where there is none."""
    value = example
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def string_at(example: Any, field: str) -> str:
    """The text of a field.

    Raises:
      BadLine: there is none.
    """
    value = value_at(example, field)
    if not isinstance(value, str):
        raise BadLine(
            f"expected an object with a string '{field}', got {shown(example)}",
            names_of(example, str),
        )
    check_characters(value)
    return value


def objects_at(example: Any, field: str) -> list[dict[str, Any]]:
    """The objects of a field that may be missing, which tables keep as a text of JSON.

    Raises:
      BadLine: it has something else.
    """
    value = given = value_at(example, field)
    if isinstance(given, str) and given:
        try:
            value = parse_json(given)
        except ValueError:
            value = given
    value = [] if value is None or value == "" else value
    if not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
        raise BadLine(
            f"expected a list of objects as '{field}', or the JSON of one, got {str(given)[:40]}"
        )
    return value


def check_characters(text: str) -> None:
    """Raises BadLine where a text has what is no character, since JSON's escapes promise none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine("half a surrogate pair, which is no character") from error


def shown(example: Any) -> str:
    """The beginning of an example that is not what it should be."""
    return repr(example)[:60] + ("" if isinstance(example, dict) else LINES)


def names_of(example: Any, kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all fields whose value is of a kind."""
    if not isinstance(example, dict):
        return []
    found = []
    for name, value in example.items():
        if isinstance(value, kind):
            found.append(f"{prefix}{name}")
        else:
            found += names_of(value, kind, f"{prefix}{name}.")
    return found
