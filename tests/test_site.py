"""The pages of the site: links, tables, commands, the API, and where to find what."""

import argparse
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import shlex
import tomllib

import pytest
import tyro
import yaml

import galore_optax
from benchmarks import memory_table, site_tables
from examples.flax_llama import plan_models

# What no version of JAX changes.
pytestmark = pytest.mark.plain

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*/README.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
CODE = re.compile(r"^```.*?^```\n|`[^`\n]*`", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def anchors(page):
    """Those of a page's titles, as the repository's web view and the site make them."""
    prose = re.sub(r"^```.*?^```\n", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_to_files_and_titles_that_there_are(page):
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match("[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or found.suffix != ".md" or anchor in anchors(found), target


def test_the_anchors_of_titles_are_as_they_should_be(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# What it `costs`, in all\n\n```\n# no title\n```\n## From optax.contrib\n")
    assert anchors(page) == {"what-it-costs-in-all", "from-optaxcontrib"}


def test_the_readme_is_of_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


@each_page
def test_tables_are_those_of_the_committed_figures(page):
    text = page.read_text()
    assert site_tables.current(text) == text


def test_every_table_is_on_a_page():
    shown = [name for page in PAGES for _, name, *_ in site_tables.TABLE.findall(page.read_text())]
    assert sorted(shown) == sorted(site_tables.TABLES)


def test_a_table_goes_between_its_comments():
    text = (
        "a\n<!-- presets: made by python -m benchmarks.site_tables -->\n\n<!-- end: presets -->\nb"
    )
    made = site_tables.current(text)
    assert made.replace(site_tables.presets() + "\n", "") == text
    assert site_tables.current(made) == made
    with pytest.raises(KeyError, match="absent"):
        site_tables.current(text.replace("presets", "absent"))


def test_the_start_page_has_the_figures_of_the_table():
    rows = json.loads(memory_table.FIGURES.read_text())["rows"].values()
    [adamw] = [row for row in rows if row["method"] == "AdamW, ordinary step"]
    start = (ROOT / "docs" / "index.md").read_text()
    assert f"AdamW's takes {memory_table.peak(adamw)} GiB" in start


def test_the_table_of_cards_has_the_models_and_cards_that_the_page_tells():
    text = (ROOT / "docs" / "will-it-fit.md").read_text()
    assert "twelve published models" in text
    assert "nine cards" in text
    assert (len(plan_models.MODELS), len(plan_models.CARDS)) == (12, 9)


# The commands.

BLOCK = re.compile(r"^```(?:sh|bash)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for block in BLOCK.findall(page.read_text())
        for line in re.sub(r"\\\n\s*", " ", block).splitlines()
        if re.match(r"(\w+=\S+ )*(python -m|make|pip) ", line)
    }
)


class ParsedError(Exception):
    """The words of a command line were understood."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Programs end when they have read their command lines."""

    def ends(parse):
        def parsed(*args, **kwargs):
            parse(*args, **kwargs)
            raise ParsedError

        return parsed

    monkeypatch.setattr(tyro, "cli", ends(tyro.cli))
    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ends(parse))


def test_there_are_commands():
    assert len(COMMANDS) > 40


@pytest.mark.ci
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_such_as_their_programs_take(command, only_parsed, monkeypatch):
    words = shlex.split(command, comments=True)
    while re.match(r"\w+=", words[0]):
        del words[0]
    if "&&" in words:  # what follows is in a shell of its own
        del words[words.index("&&") :]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "pip":
        with (ROOT / "pyproject.toml").open("rb") as file:
            extras = tomllib.load(file)["project"]["optional-dependencies"]
        for asked in re.findall(r"\[(.*?)\]", " ".join(words)):
            assert set(asked.split(",")) <= set(extras)
    else:
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[2]}.__main__")
        if len(words) == 3:
            return
        monkeypatch.setattr("sys.argv", words[2:])
        with pytest.raises(ParsedError):
            module.main()


def test_commands_that_are_wrong_are_found(only_parsed, monkeypatch):
    from examples.flax_llama import plan

    monkeypatch.setattr("sys.argv", ["plan", "--no-such-flag", "3"])
    with pytest.raises(SystemExit):
        plan.main()


# The API.

DOCUMENTED = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: galore_optax\.(\S+)$", page.read_text(), re.MULTILINE)
]


def test_every_name_is_documented_once():
    assert sorted(DOCUMENTED) == sorted(galore_optax.__all__)


def test_every_optimizer_has_a_page_that_the_first_one_links():
    start = (ROOT / "docs" / "api" / "index.md").read_text()
    listed = re.findall(r"^\| \[`(\w+)`\]\(\1\.md\) \|", start, re.MULTILINE)
    optimizers = {
        name.removesuffix("_8bit") if name != "adamw_8bit" else name
        for name in galore_optax.__all__
        if "learning_rate" in signature(name)
        and "return" not in name
        and "update" not in signature(name)
        and not name.startswith("learning_rate")
    }
    assert set(listed) == optimizers
    for name in listed:
        text = (ROOT / "docs" / "api" / f"{name}.md").read_text()
        assert text.startswith(f"# {name}\n")
        assert f"::: galore_optax.{name}\n" in text


def signature(name):
    value = getattr(galore_optax, name)
    return inspect.signature(value).parameters if inspect.isfunction(value) else {}


METHODS = (ROOT / "docs" / "methods.md").read_text()


def test_the_table_of_methods_has_what_presets_choose():
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)`.*? \| (.+?) \| (\w+) \| (\w+)", METHODS, re.MULTILINE
    )
    assert len(rows) == 11
    for name, projector, every, transport, residual in rows:
        chosen = {key: value.default for key, value in signature(name).items()}
        assert chosen["projector"] == projector
        gap = chosen["update_proj_gap"]
        assert {"T": gap > 1, "step": gap == 1}.get(every, every == f"{gap} steps")
        assert chosen["transport"] == transport
        taken = chosen["residual"]
        names = {"NormScaled": "norm_scaled", "ScaleGradient": "scale_gradient"}
        assert (taken if isinstance(taken, str) else names[type(taken).__name__]) == residual


# What makes the site of it; the packages for that need not be here.


def hook(name):
    """One of the modules that the build takes from docs/_hooks."""
    pytest.importorskip("griffe")
    path = ROOT / "docs" / "_hooks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown():
    markdown = hook("docstrings").markdown
    assert markdown("See `GaLore <https://a.b/c>`_, 2024") == "See [GaLore](https://a.b/c), 2024"
    assert markdown("`galore_optax.chain` and ``galore_optax.chain``") == (
        "[`galore_optax.chain`][galore_optax.chain] and ``galore_optax.chain``"
    )
    assert markdown(":func:`galore`") == "`galore`"
    assert markdown("P, (*batch, m), ``f(*x)``") == r"P, (\*batch, m), ``f(*x)``"
    made = markdown("As in\n\n.. math::\n  R = P^\\top G\n\nHere")
    assert re.fullmatch(r"As in\n\n<div><math .*</math></div>\n\nHere", made)


def test_links_between_files_become_links_between_pages():
    repository = hook("repository")
    assert repository.in_site("docs/api/galore.md") == "api/galore.md"
    assert repository.in_site("README.md") == "index.md"
    assert repository.in_repository("faq.md") == "docs/faq.md"
    assert repository.in_repository("CHANGELOG.md") == "CHANGELOG.md"
    found = repository.targets("docs/migration/galore-torch.md")
    assert {"docs/leaves.md", "examples/flax_llama/README.md", "tests/test_parity.py"} <= {*found}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_becomes_a_page_with_all_that_it_printed_and_drew(path):
    pages = hook("notebook_pages")
    page, pictures = pages.as_markdown(path)
    assert page.startswith("# ")
    assert f"](../notebooks/{path.name})" not in page
    assert f"]({path.name})" in page
    cells = json.loads(path.read_text())["cells"]
    drawn = [
        output for cell in cells for output in cell.get("outputs", []) if "image/png" in str(output)
    ]
    assert re.findall(r"!\[.*?\]\((.*?)\)", page) == list(pictures)
    assert len(pictures) == len(drawn) > 0
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert page.count("```python\n") == len(code)
    # Of formulas no dollar is left.
    assert "$" not in re.sub(r"^```.*?^```$|`[^`\n]*`", "", page, flags=re.DOTALL | re.MULTILINE)


def test_formulas_are_known_to_browsers_and_code_stays():
    with_formulas = hook("notebook_pages").with_formulas
    made = with_formulas("With $r/m$, `$x$` and\n\n$$\na = b\n$$\n")
    assert re.search(
        r"With <span><math .*?</math></span>, `\$x\$` and\n\n<math .*block.*</math>", made
    )


# What finds its way into the site.


def in_nav(entry):
    """The pages that an entry of the navigation leads to."""
    if isinstance(entry, str):
        return [entry]
    values = entry if isinstance(entry, list) else entry.values()
    return [page for value in values for page in in_nav(value)]


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation():
    listed = in_nav(SITE["nav"])
    assert len(listed) == len(set(listed))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed)
    assert all((ROOT / name).exists() for name in set(listed) - pages)


def test_the_four_questions_of_a_newcomer_are_answered_within_two_clicks():
    start = (ROOT / "docs" / "index.md").read_text()
    for target in (
        "quickstart.md",
        "will-it-fit.md",
        "migration/optax-contrib.md",
        "troubleshooting.md#my-loss-is-worse-than-adamws",
    ):
        assert f"]({target})" in start


def test_the_build_is_strict():
    assert SITE["strict"]
    assert set(SITE["validation"]["links"].values()) == {"warn"}
