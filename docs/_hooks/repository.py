"""What pages link to outside of docs/ is part of the site, under its path in the repository.

So relative links are right in three places: on the repository's web view, in a clone, and on the
site, where the application's README, the benchmarks' figures and pictures are copied along. MkDocs
calls the functions that begin with ``on_``.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
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
        if target.endswith(".md"):
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
        return f"{match[1]}{posixpath.relpath(target, start)}{match[3] or ''}"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(changed, part) for part in parts[::2]]
    return "".join(parts)


def targets(page: str) -> list[str]:
    """The files that a page links to; all are paths in the repository."""
    prose = "".join(CODE.split((ROOT / page).read_text())[::2])
    return [resolved(page, match[2]) for match in LINK.finditer(prose)]


def resolved(here: str, link: str) -> str:
    """The path in the repository of what a file of the repository links to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def in_site(path: str) -> str:
    """The path in the site's sources of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def in_repository(name: str) -> str:
    """The path in the repository of one of the site's sources."""
    inside = f"docs/{name}"
    return inside if (ROOT / inside).exists() else name
