"""What pages link to outside of docs/ is part of the site, under its path in the repository.

So relative links are right in three places: on the repository's web view, in a clone, and on the
site, where the application's README, the benchmarks' figures and pictures are copied along. MkDocs
calls the functions that begin with ``on_``.
"""

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# MkDocs loads each hook by its path.
sys.path.append(str(Path(__file__).parent))
from notebook_pages import as_markdown

ROOT = Path(__file__).parents[2]
NOTEBOOK = ".ipynb"
# Code is left alone: in blocks, and between backticks.
CODE = re.compile(r"(^```.*?^```\n|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
# [text](target) and ![text](target), where the target is no URL and not on the page itself.
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages and the navigation lead to, and what that links to in turn."""
    left = list(in_navigation(config.nav))
    for file in files.documentation_pages():
        left += targets(in_repository(file.src_uri))
    for target in left:
        name = in_site(target)
        if name in files.src_uris or not (ROOT / target).is_file():
            continue  # where there is no such file, MkDocs says so
        files.append(File.generated(config, name, abs_src_path=str(ROOT / target)))
        if target.endswith(NOTEBOOK):
            text, pictures = as_markdown(ROOT / target)
            files.append(File.generated(config, page_of(name), content=text))
            for picture, content in pictures.items():
                place = posixpath.join(posixpath.dirname(name), picture)
                files.append(File.generated(config, place, content=content))
            left += targets(target, text)
        elif target.endswith(".md"):
            left += targets(target)
    return files


def in_navigation(entry: Any) -> Iterator[str]:
    """The paths in the repository of the pages that an entry of the navigation leads to."""
    if isinstance(entry, str):
        yield in_repository(entry)
    else:
        for value in entry if isinstance(entry, list) else entry.values():
            yield from in_navigation(value)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links between files of the repository links between those of the site."""
    here = in_repository(page.file.src_uri)
    start = posixpath.dirname(page.file.src_uri) or "."

    def changed(match: re.Match[str]) -> str:
        target = in_site(resolved(here, match[2]))
        # A notebook's own page leads to the notebook, and all others to that page.
        if target.endswith(NOTEBOOK) and page.file.src_uri != page_of(target):
            target = page_of(target)
        return f"{match[1]}{posixpath.relpath(target, start)}{match[3] or ''}"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(changed, part) for part in parts[::2]]
    return "".join(parts)


def targets(page: str, text: str | None = None) -> list[str]:
    """The files that a page links to; all are paths in the repository."""
    prose = "".join(CODE.split((ROOT / page).read_text() if text is None else text)[::2])
    return [resolved(page, match[2]) for match in LINK.finditer(prose)]


def resolved(here: str, link: str) -> str:
    """The path in the repository of what a file of the repository links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def page_of(notebook: str) -> str:
    """The page of a notebook, in the site's sources."""
    return f"{notebook.removesuffix(NOTEBOOK)}.md"


def in_site(path: str) -> str:
    """The path in the site's sources of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def in_repository(name: str) -> str:
    """The path in the repository of one of the site's sources."""
    inside = f"docs/{name}"
    return inside if (ROOT / inside).exists() else name
