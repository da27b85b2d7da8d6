"""How all tests compile, how long each may take, and which ones a contributor waits for."""

import contextlib
import importlib.util
import os
import random
import re
import signal
import statistics
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import jax
import jaxtyping
import pytest
from packaging.version import Version

TESTS = Path(__file__).parent
# Scripts that make what tests read, with packages that need not be here.
collect_ignore = ["data"]
# Where the packages of the examples are not installed, the library alone is tested.
if importlib.util.find_spec("tyro") is None:
    of_examples = re.compile(
        r"^\s*(from|import) (examples|benchmarks|flax_|nbformat)|make_golden", re.M
    )
    of_them = [path for path in TESTS.glob("*.py") if of_examples.search(path.read_text())]
    collect_ignore += [path.name for path in of_them]

# Arrays are of the dtypes and shapes that signatures say, checked at every call in the tests. Not
# in modules whose functions themselves check what a user gives them, and say better what is wrong;
# nor in the one that goes through every equation of a program, and in those about trees, which are
# called for every node and say nothing of arrays.
OPEN = {
    *("__init__", "_adamw", "_chain", "_galore", "_inner", "_limiter", "_low_bit", "_memory"),
    *("_memory_report", "_optimizers", "_options", "_presets", "_projector", "_quantized"),
    *("_quantized_params", "_given_specs", "_specs", "_storage"),
    *("_refresh", "_residuals", "_select", "_transports"),
    *(
        "_jaxpr",
        "_ownership",
        "_ranks",
        "_trees",
        "_update",
        "projectors",
        "trainers",
        "_layerwise.__init__",
        "_layerwise.api",
        "_layerwise.settings",
    ),
}
if jax.__version_info__ < (0, 7):
    OPEN |= {"_excerpt"}  # into which these versions put what stands for arrays.
PACKAGE = TESTS.parent / "galore_optax"
MODULES = [".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")]
jaxtyping.install_import_hook(
    [f"galore_optax.{name}" for name in sorted({*MODULES} - OPEN)], "signatures.checked"
)

# Programs of tests run once or twice, so that compiling them is what takes time.
QUICK = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}
# What an Orbax of the time of jax 0.5 says of a target without shardings.
OF_OLD_ORBAX = "ignore:Sharding info not provided when restoring:UserWarning"
# The name that it has had since jax 0.8.
if jax.__version_info__ < (0, 8):
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64
# Half the time on jax 0.10; later versions do not know it, and abort.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    )
CACHE_BYTES = 2**30
# A test should take no more than so many times the median of its file, if that is more than some
# seconds. As machines differ by a factor of three, it fails when it takes three times that.
TIMES_THE_MEDIAN, SECONDS, MACHINES = 20, 6.0, 3.0


def pytest_report_header() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "optax", "flax"))


def pytest_addoption(parser):
    parser.addoption("--seconds", action="store_true", help="print the seconds of each file")
    parser.addoption("--at-most", type=int, help="run so many of the cases of each test")


def pytest_configure(config):
    """Compiles quickly, and keeps what is compiled for the next run of tests on this machine.

    A program is traced and lowered as often as ever; of equal ones, the machine code is made once.
    """
    cache = getattr(config, "cache", None)
    if jax.__version_info__ < (0, 6):  # whose cache holds factorizations that give other numbers.
        cache = None
    settings = QUICK | (
        {} if cache is None else {"jax_compilation_cache_dir": str(cache.mkdir("jax"))}
    )
    for name, value in settings.items():
        jax.config.update(name, value)
    if jax.__version_info__ < (0, 6):
        config.addinivalue_line("filterwarnings", OF_OLD_ORBAX)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget())
    # For the processes that tests start.
    os.environ |= {
        name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in settings.items()
    }


@pytest.fixture(autouse=True)
def _optimized_if_marked(request):
    """Compiles as users do in tests marked `optimized`, whose claims are about machine code."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Skips what needs newer packages, or others; keeps `--at-most` cases of each test.

    These are chosen at random, but they are the same ones in every process.
    """
    for item in items:
        for marker in item.iter_markers("live"):
            if lacking := [x for x in marker.args if importlib.util.find_spec(x) is None]:
                reason = f"needs {', '.join(lacking)}: make test-live"
                item.add_marker(pytest.mark.skip(reason=reason))
        for marker in item.iter_markers("since"):
            for name, needed in marker.kwargs.items():
                if Version(version(name)) < Version(needed):
                    item.add_marker(pytest.mark.skip(reason=f"needs {name} {needed}"))
    most = config.getoption("--at-most")
    if most is None:
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {
        item
        for test, of_test in cases.items()
        for item in random.Random(test).sample(of_test, min(most, len(of_test)))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_sessionstart(session):
    """Lets go of the oldest programs in a cache that has grown too large."""
    # A shell has what it starts in the background ignore Ctrl-C, and so would the programs that
    # tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cache = jax.config.jax_compilation_cache_dir
    if cache is None or hasattr(session.config, "workerinput"):
        return
    kept = 0
    for entry in sorted(Path(cache).iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
        kept += entry.stat().st_size
        if kept > CACHE_BYTES:
            entry.unlink()


@contextlib.contextmanager
def processor_counted(item, when):
    """Counts the processor's seconds, which other programs on the machine change little."""
    before = os.times()
    try:
        yield
    finally:
        # Of this process and of those that it started and waited for.
        item.user_properties.append((when, sum(os.times()[:4]) - sum(before[:4])))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with processor_counted(item, "setup"):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with processor_counted(item, "call"):
        return (yield)


class Budget:
    """What each file takes, and the tests that take too long beside the others of their file."""

    def __init__(self):
        self.wall = defaultdict(float)
        self.cpu = defaultdict(dict)
        # Of what tests share, which is no test's own.
        self.setup = defaultdict(float)
        self.allowed = set()

    def pytest_runtest_logreport(self, report):
        path = report.location[0]
        self.wall[path] += report.duration
        seconds = dict(report.user_properties).get(report.when, 0.0)
        if report.when == "setup":
            self.setup[path] += seconds
        if report.when == "call":
            self.cpu[path][report.nodeid] = seconds
        if "long" in report.keywords:
            self.allowed.add(report.nodeid)

    def too_long(self, times: float = 1.0) -> list[str]:
        """The tests that took more than `times` what they should."""
        found = []
        for tests in filter(None, self.cpu.values()):
            most = max(SECONDS, TIMES_THE_MEDIAN * statistics.median(tests.values()))
            found += [
                f"{name} took {seconds:.1f} s of the processor, where {most:.1f} is the most"
                for name, seconds in tests.items()
                if seconds > times * most and name not in self.allowed
            ]
        return found

    def pytest_sessionfinish(self, session):
        if self.too_long(MACHINES) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if config.getoption("--seconds"):
            terminalreporter.section("seconds by file: wall, processor")
            for path in sorted(self.wall, key=self.wall.get, reverse=True):
                cpu = self.setup[path] + sum(self.cpu[path].values())
                terminalreporter.line(f"{self.wall[path]:8.1f} {cpu:8.1f}  {path}")
        if found := self.too_long():
            terminalreporter.section("tests too long for their files")
            for line in found:
                terminalreporter.line(line)
            terminalreporter.line(
                f"A test may take {TIMES_THE_MEDIAN} times the median of its file, and {SECONDS:g} "
                f"seconds in any case; {MACHINES:g} times as much fails. Make it shorter, or mark "
                "it: @pytest.mark.long('why')."
            )
