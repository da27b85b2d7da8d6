"""Versions for the report of a failing test, and what many tests need."""

from importlib.metadata import version

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "optax", "flax"))


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """Compiles a program once, in half the time, to one that is slower, which few updates bear.

    Yields the directory of the cache, for processes that are started with `JAX_PLATFORMS=cpu`.
    """
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": cache,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield cache
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
