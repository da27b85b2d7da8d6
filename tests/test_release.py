"""What a release is made of agrees with itself: versions, requirements, workflows, recipe."""

import importlib
import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import galore_optax
from benchmarks import versions
from galore_optax import _version

pytestmark = pytest.mark.plain
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def conda(requirement):
    """A requirement as conda writes it."""
    parsed = Requirement(requirement)
    return f"{parsed.name} {parsed.specifier}"


def test_the_version_is_that_of_the_installed_distribution():
    assert galore_optax.__version__ == importlib.metadata.version("galore-optax")


def test_a_library_that_is_not_installed_has_a_version_that_says_so(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert importlib.reload(_version).__version__ == "0+unknown"
    assert importlib.reload(_version).__version__ == galore_optax.__version__


def test_the_recipe_needs_what_the_project_needs(project, recipe):
    run, host = recipe["requirements"]["run"], recipe["requirements"]["host"]
    assert run[1:] == [conda(line) for line in project["project"]["dependencies"]]
    assert host[2:] == [conda(line) for line in project["build-system"]["requires"]]
    assert run[0].startswith("python ")
    assert host[0].startswith("python ")


def test_the_next_release_is_the_same_everywhere(project, recipe):
    fallback = Version(project["tool"]["hatch"]["version"]["fallback-version"])
    assert fallback.is_devrelease
    assert recipe["context"]["version"] == fallback.base_version
    cut = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert Version(cut[0]) <= Version(fallback.base_version)


def test_jobs_run_all_that_a_commit_must_pass():
    """What .ci/run makes one after the other is made by the jobs of the workflow."""
    made = {
        target
        for words in re.findall(r"make (.+)", (ROOT / ".ci" / "run").read_text())
        for target in words.split()
        if re.fullmatch(r"[a-z-]+", target)
    }
    jobs = workflow("tests")["jobs"]["make"]["strategy"]["matrix"]["include"]
    targets = {target for job in jobs for target in job["target"].split()}
    assert made == targets
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= rules


def test_only_what_was_tested_is_published_and_only_the_publisher_may():
    jobs = workflow("release")["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/tests.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")
    may_identify = [name for name, job in jobs.items() if "id-token" in job["permissions"]]
    assert may_identify == ["publish"]


def test_the_oldest_versions_that_are_tested_are_those_that_are_asked_for(project):
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    needed = {r.name: r.specifier for r in map(Requirement, project["project"]["dependencies"])}
    assert all(specifier.contains(pins[name]) for name, specifier in needed.items())
    for name in ("jax", "optax"):
        (least,) = needed[name]
        assert pins[name] == least.version


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one" /><testcase classname="tests.a" name="two" />
<testcase classname="tests.a" name="three"><skipped message="needs jax 0.7" /></testcase>
<testcase classname="tests.b" name="four"><failure message="no" /></testcase>
<testcase classname="tests.b" name="five"><error message="no" /></testcase>
</testsuite></testsuites>"""


def test_what_came_of_tests_is_counted(tmp_path):
    (tmp_path / "junit.xml").write_text(JUNIT)
    assert versions.counted(tmp_path / "junit.xml") == {
        "passed": 2,
        "skipped": 1,
        "failed": ["tests.b.five", "tests.b.four"],
    }


def test_each_version_is_run_once_and_what_cannot_be_installed_is_said(
    tmp_path, monkeypatch, capsys
):
    run = []

    def installed(directory, jax):
        return None if jax == "9" else directory

    def tested(python, directory, files, processes):
        run.append((files, processes))
        return {"jax": str(len(run)), "passed": 1, "skipped": 0, "failed": []}

    monkeypatch.setattr(versions, "installed", installed)
    monkeypatch.setattr(versions, "tested", tested)
    out = tmp_path / "versions.json"
    for again in (["1", "2", "9"], ["1", "2"]):
        monkeypatch.setattr("sys.argv", ["versions", "--out", str(out), "--jax", *again])
        with pytest.raises(SystemExit) as ended:
            versions.main()
        assert not ended.value.code
    assert run == [(["tests"], 2)] * 2
    assert [row["jax"] for row in json.loads(out.read_text())["runs"]] == ["1", "2"]
    assert "jax 9 cannot be installed with Python" in capsys.readouterr().out
