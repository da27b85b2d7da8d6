"""Docstrings, which are written for `help`, as Markdown: links, references and formulas."""

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

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
MATH = re.compile(r"^\.\. math::\n((?:\n| +.*\n?)+)", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites each docstring when it is found."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Griffe calls this for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            for parameter in obj.parameters:
                parameter.annotation = named(parameter.annotation)


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
    return MATH.sub(lambda match: formula(match[1]), text)


def formula(latex: str) -> str:
    """A formula in MathML, which browsers show as they are."""
    return f"<div>{convert(' '.join(latex.split()), display='block')}</div>\n\n"
