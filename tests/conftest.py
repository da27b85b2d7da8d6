"""What the report of a failing test needs to say besides the version of Python."""

from importlib.metadata import version


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "optax", "flax"))
