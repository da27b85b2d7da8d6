"""Docstrings, which are written for `help`, as Markdown: links, references and formulas."""

import functools
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
RULES = [
    # `text <url>`_
    (re.compile(r"`([^`<]+?)\s*<(http[^>]+)>`_"), r"[\1](\2)"),
    # :func:`name`
    (re.compile(r":(?:func|class|meth|mod):`([^`]+)`"), r"`\1`"),
    # `galore_optax.name`, which is a reference
    (re.compile(r"(?<![`\[])`(galore_optax\.[\w.]+)`(?![`\]])"), r"[`\1`][\1]"),
]
# Types as they are written out, which nobody wants to read, and their names.
NAMES = {
    re.compile(r"typing\.Union\[float, [\w.]*Array, [\w.]*Callable\[\["): "ScalarOrSchedule",
    re.compile(r"typing\.Union\[str, type\[typing\.Any\], [\w.]*dtype"): "DTypeLike",
}
# Code, which stays, or the star of a shape such as (*batch, m, n), which begins no emphasis.
STAR = re.compile(r"(``.*?``|`[^`]*`|^ *>>>.*$)|\(\*(?=\w)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")
MATH = re.compile(r"^\.\. math::\n((?:\n| +.*\n?)+)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites each docstring when it is found."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Griffe calls this for each module, class, function and attribute."""
        if isinstance(obj, griffe.Attribute):
            obj.docstring = beside(obj.path)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.annotation = named(parameter.annotation)


@functools.cache
def source() -> griffe.Object | griffe.Alias:
    """The library as its source has it, where attributes have docstrings of their own."""
    return griffe.load("galore_optax", search_paths=[ROOT], resolve_aliases=True)


def beside(path: str) -> griffe.Docstring | None:
    """The docstring that stands below an attribute; its value has but that of its type."""
    try:
        found = source()[path.removeprefix("galore_optax.")]
    except KeyError:
        return None
    found = found.final_target if isinstance(found, griffe.Alias) else found
    return found.docstring and griffe.Docstring(found.docstring.value, parent=found)


def named(annotation: Any) -> Any:
    """A type by the name that it has in Optax or here, where it is a long union."""
    text = str(annotation)
    for start, name in NAMES.items():
        if start.match(text):
            return name + " | None" * text.endswith(("NoneType]", "| None"))
    return annotation


def markdown(text: str) -> str:
    """A docstring in Markdown."""
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = STAR.sub(lambda match: match[1] or r"(\*", text)
    text = INLINE.sub(lambda match: convert(match[1]), text)
    return MATH.sub(lambda match: formula(match[1]), text)


def formula(latex: str) -> str:
    """A formula in MathML, which browsers show as they are."""
    return f"<div>{convert(' '.join(latex.split()), display='block')}</div>\n\n"
