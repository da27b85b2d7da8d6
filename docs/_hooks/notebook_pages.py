"""Notebooks as pages of the site: their text, their code, and what it printed and drew."""

import base64
import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert

# Code is left alone; formulas stand between dollars, one or two.
FORMULA = re.compile(r"`[^`]*`|(\$\$?)(.+?)\1", re.DOTALL)


def with_formulas(text: str) -> str:
    """Text whose formulas are MathML, which browsers know."""

    def formula(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0]
        if match[1] == "$$":
            return convert(match[2], display="block")
        # In a span, without which a formula that begins a line would be a paragraph.
        return f"<span>{convert(match[2])}</span>"

    return FORMULA.sub(formula, text)


def as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook that was executed, in Markdown.

    Args:
      path: of the notebook.

    Returns:
      The page, and its pictures by the names that it calls them.
    """
    parts = [f"(This page is [a notebook]({path.name}) as it was executed.)"]
    pictures: dict[str, bytes] = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            parts.append(with_formulas(cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![what the code above draws]({name})")
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```\n{text.rstrip()}\n```")
    # The title comes first.
    parts[:2] = parts[1::-1]
    return "\n\n".join(parts) + "\n", pictures
