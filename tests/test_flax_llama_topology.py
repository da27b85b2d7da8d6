"""Compilers for devices that are not here: loaded without a driver, or one line of why not."""

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from examples.flax_llama import compile_step as compiling
from examples.flax_llama import devices, topology
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.topology import SKIP_CHECK, check_needs_driver, installed

ROOT = Path(__file__).parents[1]
PLAN = "--preset 9m --layers 1 --hidden 32 --heads 2 --intermediate 32 --tokenizer bytes --batch 2"
PLAN += " --seq 16 --optimizer sgd --device h100_80gb"
COMMANDS = {
    "plan": f"examples.flax_llama.plan {PLAN} --compile",
    "memory_7b": "benchmarks.memory_7b --rows '7b AdamW h100_80gb'",
}
# It refuses, as JAX's own does that cannot call a driver, and tells whether it was to check.
REFUSES = """
import os, pathlib

def initialize():
    with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
        print("JAX_SKIP_CUDA_CONSTRAINTS_CHECK" in os.environ, file=calls)
    raise RuntimeError("Unable to load cuPTI.\\nIs it installed?")
"""
needs_cuda = pytest.mark.skipif(topology.cuda_extra() is None, reason="needs JAX for CUDA")
needs_no_driver = pytest.mark.skipif(topology.driver_is_here(), reason="a driver is here")


def python(code, path="", **environment):
    """What a process of its own with that code returns, in the environment of a user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(path)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def command(words, driver_files=()):
    """Code that runs a module as a command, where there are those files of a driver."""
    module, *_ = argv = shlex.split(words)
    return (
        "import importlib, sys\n"
        "from examples.flax_llama import topology\n"
        f"topology.DRIVER_FILES = {driver_files!r}\n"
        f"sys.argv = {argv!r}\n"
        f"importlib.import_module({module!r}).main()"
    )


def test_installed_modules_are_found_at_any_depth():
    assert installed(["no_such_package.module", "jax.experimental"])
    assert not installed(["no_such_package.module", "jax.no_such_module"])


@pytest.mark.parametrize(
    ("driver", "given", "inside"),
    [(False, None, "1"), (True, None, None), (False, "0", "0"), (True, "1", "1")],
)
def test_the_check_is_left_out_only_without_a_driver_and_only_inside(
    monkeypatch, tmp_path, driver, given, inside
):
    file = tmp_path / "nvidia0"
    monkeypatch.setattr(topology, "DRIVER_FILES", (str(file), str(tmp_path / "none")))
    if driver:
        file.touch()
    if given is None:
        monkeypatch.delenv(SKIP_CHECK, raising=False)
    else:
        monkeypatch.setenv(SKIP_CHECK, given)
    assert topology.driver_is_here() == driver
    seen = []

    @check_needs_driver()
    def fail():
        seen.append(os.environ.get(SKIP_CHECK))
        raise KeyError("raised inside")

    with pytest.raises(KeyError, match="raised inside"):
        fail()
    assert seen == [inside]
    assert os.environ.get(SKIP_CHECK) == given


def test_what_jax_logs_is_kept_but_for_exceptions(caplog):
    log = logging.getLogger("jax.some.module")
    with topology.without_tracebacks():
        log.warning("a warning")
        try:
            raise RuntimeError("a reason")
        except RuntimeError:
            log.exception("an exception")
        assert caplog.messages == []
    assert caplog.messages == ["a warning"]
    log.error("later")
    assert caplog.messages == ["a warning", "later"]


@pytest.fixture
def refusing(tmp_path):
    """A directory with plugins for CUDA that cannot be loaded, found before those that can."""
    for module in topology.CUDA_PLUGINS.values():
        plugin = tmp_path.joinpath(*module.split("."))
        plugin.mkdir(parents=True)
        (plugin / "__init__.py").write_text(REFUSES)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("driver", [True, False])
def test_a_plugin_that_cannot_be_loaded_is_one_line(refusing, name, driver):
    files = (__file__,) if driver else ()
    done = python(command(COMMANDS[name], files), refusing)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Compiling for h100_80gb: JAX's plugin for CUDA cannot be loaded")
    assert "(Unable to load cuPTI. Is it installed?)" in line
    assert f"pip install -U 'jax[cuda13]=={jax.__version__}'" in line
    assert ("JAX_PLATFORMS=cpu" in line) == driver
    assert (done.returncode, done.stdout) == (2, "")
    # JAX's look for devices, and one more try, both with the check where there is a driver.
    calls = (refusing / "jax_plugins" / "xla_cuda13" / "calls").read_text().split()
    assert calls == [str(not driver)] * 2


def test_a_plan_that_compiles_nothing_needs_no_plugin_for_cuda(refusing):
    done = python(command(f"examples.flax_llama.plan {PLAN}"), refusing)
    assert done.returncode == 0
    assert "estimate: " in done.stdout


@needs_cuda
@needs_no_driver
def test_a_plan_is_compiled_without_a_driver():
    done = python(command(COMMANDS["plan"]))
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nXLA: " in done.stdout


@needs_cuda
@needs_no_driver
def test_the_check_is_jaxs_where_a_driver_is():
    """Here a driver that does not work: there are its files, but not its library."""
    words = command(COMMANDS["plan"], (__file__,))
    done = python(words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "cannot be loaded (" in line
    # As the line advises.
    assert python(words, JAX_PLATFORMS="cpu").returncode == 0


@needs_cuda
@needs_no_driver
def test_the_plugin_is_loaded_after_jax_has_found_devices_without_it():
    done = python(
        "import jax\n"
        "print(jax.devices()[0].platform)\n"
        "from examples.flax_llama.devices import device_named\n"
        "print(device_named('h100_80gb').mesh(2).devices)\n"
        "print(jax.numpy.ones(3).sum().devices())"
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "cpu"
    assert done.stdout.count("H100") == 2
    assert "cpu" in last.lower()


def test_there_are_no_more_devices_than_a_slice_has(monkeypatch):
    monkeypatch.setattr(devices, "tpu_devices", lambda *_: jax.devices()[:1])
    tpu = devices.device_named("tpu_v5e")
    assert tpu.mesh().shape == {"data": 1, "fsdp": 1, "tensor": 1}
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"count={count}: expected 1 to 1 of tpu_v5e"):
            tpu.mesh(count)


@pytest.mark.parametrize("raised", ["cuDNN not found.", "another fault"])
def test_a_missing_cudnn_is_named(monkeypatch, raised):
    def lower(*_):
        raise RuntimeError(raised)

    monkeypatch.setattr(compiling, "lower", lower)
    monkeypatch.setattr(devices.Device, "mesh", lambda self: None)
    given = Config(preset="9m", attention="cudnn").resolve(), 300, devices.device_named("h100_80gb")
    if "cuDNN" in raised:
        message = r"attention='cudnn': cuDNN not found\. It needs pip install -U 'jax\[cuda1"
        with pytest.raises(UsageError, match=message):
            compiling.compile_step(*given)
    else:
        with pytest.raises(RuntimeError, match="another fault"):
            compiling.compile_step(*given)
