"""Runs the library's tests with one version of JAX after the other, each beside what it goes with.

    python -m benchmarks.versions --out benchmarks/results/versions.json

Each has an environment of its own, of the newest Optax, Flax and Orbax that can be installed with
it; one case of each test runs, as in `make test-oldest`. Versions that are in the JSON file are not
run again. A version of JAX that this Python does not have is for a newer one, which runs the same
command.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.gpu.record import write

ROOT = Path(__file__).parents[1]
# The oldest that is supported, then the last of each series.
VERSIONS = ("0.5.3", "0.6.2", "0.7.2", "0.8.3", "0.9.2", "0.10.2", "0.12.0.1")
NAMED = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "numpy")
TESTED_WITH = ("beartype", "chex", "cloudpickle", "flax", "orbax-checkpoint")
RUN_BY = ("pytest", "pytest-timeout", "pytest-xdist")
TESTS = ["-m", "not (ci or plain)", "--at-most", "1", "--dist", "loadfile"]
# They compare the pins, and settings of another environment.
NOT_TESTED = ("tests/test_constraints.py", "tests/test_settings.py")


def installed(directory: Path, jax: str) -> Path | None:
    """The interpreter of an environment with this JAX; None where there is none for this Python."""
    venv.create(directory, with_pip=True, clear=True)
    python = directory / "bin" / "python"
    words = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    found = subprocess.run(
        [*words, f"jax=={jax}", "-e", str(ROOT), *TESTED_WITH, *RUN_BY], check=False
    )
    return python if found.returncode == 0 else None


def versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version;"
        f"print(json.dumps({{name: version(name) for name in {NAMED}}}))"
    )
    return json.loads(subprocess.check_output([python, "-c", code], text=True))


def counted(junit: Path) -> dict[str, Any]:
    """How many tests passed, were skipped and failed, and which ones failed."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": sorted(f"{case.get('classname')}.{case.get('name')}" for case in failed),
    }


def tested(python: Path, directory: Path, files: Sequence[str], processes: int) -> dict[str, Any]:
    """Runs the tests."""
    junit = directory / "junit.xml"
    words = [python, "-m", "pytest", *files, "-q", "-n", str(processes), *TESTS]
    words += [f"--ignore={name}" for name in NOT_TESTED]
    began = time.monotonic()
    subprocess.run(
        [*words, f"--junitxml={junit}"],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    return {**versions(python), **counted(junit), "seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--jax", nargs="+", default=VERSIONS, help="versions")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files or directories")
    parser.add_argument("--processes", type=int, default=2, help="that tests run in")
    args = parser.parse_args()
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    for jax in args.jax:
        if any(run["jax"] == jax for run in runs):
            continue
        with tempfile.TemporaryDirectory() as place:
            python = installed(Path(place) / "venv", jax)
            if python is None:
                print(f"jax {jax} cannot be installed with Python {platform.python_version()}.")
                continue
            run = tested(python, Path(place), args.tests, args.processes)
        runs = [*runs, {"python": platform.python_version(), **run}]
        print(run, flush=True)
        write({"benchmark": "versions", "runs": runs}, args.out)
    sys.exit(any(run["failed"] for run in runs))


if __name__ == "__main__":
    main()
