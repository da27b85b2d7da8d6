"""The pins of constraints.txt: all that is needed here, and CUDA packages that belong together."""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(python=None):
    """Version by package, of this Python or of another."""
    environment = {"python_version": python} if python else None
    pins = {}
    for line in CONSTRAINTS.read_text().splitlines():
        pin = Requirement(line) if not line.startswith("#") else None
        if pin is not None and (pin.marker is None or pin.marker.evaluate(environment)):
            assert pin.name not in pins, f"{pin.name} is pinned twice"
            (version,) = pin.specifier
            assert version.operator == "=="
            pins[pin.name] = version.version
    return pins


def needed(package, extras=()):
    """The requirements of a package that is installed, and of those that are installed of these."""
    found, seen, left = [], set(), [(package, extra) for extra in ("", *extras)]
    while left:
        name, extra = key = left.pop()
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.append((name, requirement))
                left += [(requirement.name, extra) for extra in ("", *requirement.extras)]
    return found


@pytest.mark.parametrize("extra", ["dev", "cuda12", "cuda13"])
def test_all_that_is_needed_is_pinned_to_a_version_that_will_do(extra):
    """Of what is not installed only the name is known here, not what it needs in turn."""
    pins = pinned()
    requirements = needed("galore-optax", [extra])
    assert requirements
    for package, requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == "galore-optax":
            continue
        assert name in pins, f"{package} needs {requirement}"
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{package} needs {requirement}, but {pins[name]} is pinned"
        )


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("cuda", ["cuda12", "cuda13"])
def test_jax_and_its_plugins_for_cuda_are_of_one_version(python, cuda):
    pins = pinned(python)
    names = ("jax", "jaxlib", f"jax-{cuda}-plugin", f"jax-{cuda}-pjrt")
    assert len({pins[name] for name in names}) == 1


@pytest.mark.parametrize("python", PYTHONS)
def test_every_library_of_cuda_12_is_pinned_of_cuda_13_too(python):
    def libraries(suffix, names):
        return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}

    names = [name for name in pinned(python) if name.startswith("nvidia-")]
    twelve = libraries("-cu12", names)
    # Most of CUDA 13 have no suffix.
    thirteen = {name for name in names if not name.endswith("-cu12")}
    thirteen = {re.sub("-cu13$", "", name) for name in thirteen}
    assert len(twelve) > 10
    assert twelve <= thirteen
