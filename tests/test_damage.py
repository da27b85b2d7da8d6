"""What damage to the files of a run comes to, and the watch over a long one."""

import dataclasses
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import damage, soak
from benchmarks.damage_runs import check_seen, copied, make
from benchmarks.fuzz_search import Wrong
from examples.flax_llama import repair, run_directory
from examples.flax_llama.loading import load_run
from examples.flax_llama.usage import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make("ordinary", tmp_path_factory.mktemp("damage"))


LAST = Path("run/checkpoints/8")
# Each of these was not told, told by a traceback, or told without its name.
FOUND = [
    (LAST / "metrics/metrics", "a byte less", "right"),
    (LAST / "metrics/metrics", "replaced", "right"),
    (LAST / "metrics/metrics", "deleted", "right"),
    (LAST / "checksums/metadata", "replaced", "refused"),
    (LAST / "params/_METADATA", "half", "refused"),
    (LAST / "data/process_0-of-1.json", "emptied", "refused"),
    (Path("run/config.json"), "emptied", "refused"),
    (Path("run/config.json"), "deleted", "refused"),
    (Path("run/data.json"), "a bit", "refused"),
    (Path("run/history.json"), "a bit", "refused"),
    (Path("run/tokenizer.json"), "a bit", "refused"),
    (Path("run/metrics.jsonl"), "a directory", "refused"),
    (Path("run/metrics.jsonl"), "deleted", "right"),
]


@pytest.mark.parametrize(("file", "kind", "came_to"), FOUND)
def test_damage_is_named_or_does_nothing(made, file, kind, came_to):
    assert damage.try_damage(made, file, kind, random.Random(1)) == came_to


@pytest.mark.ci
@pytest.mark.long("makes three runs in a process of its own, and goes on with copies of them")
def test_a_search_for_damage_finds_nothing(tmp_path):
    """In a process of its own: here what Orbax abandons when it fails would be an error."""
    words = [
        "--seed",
        "5",
        "--count",
        "10",
        "--runs",
        tmp_path / "runs",
        "--out",
        tmp_path / "found",
    ]
    command = [sys.executable, "-m", "benchmarks.damage", *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "10 cases tried, 0 failed" in run.stdout


def test_other_settings_in_a_file_that_is_changed_are_refused(made, monkeypatch):
    """A digit of a learning rate would else be another learning rate; and the search sees it."""

    def other_rate(path, rng):
        path.write_text(path.read_text().replace('"clip": 1.0', '"clip": 3.0'))

    monkeypatch.setitem(damage.DAMAGES, "a bit", other_rate)
    assert damage.try_damage(made, Path("run/config.json"), "a bit", random.Random(0)) == "refused"
    monkeypatch.setattr(run_directory, "checked", lambda value, *_: value)
    with pytest.raises(Wrong, match=r"other settings: .*3\.0"):
        damage.try_damage(made, Path("run/config.json"), "a bit", random.Random(0))


@pytest.mark.parametrize("field", ["arrays", "batch", "settings", "tokenizer", "step"])
def test_the_search_sees_what_is_not_right(made, field):
    other = {"step": 5, "settings": {"lr": 1.0}}.get(field, [b"other"])
    with pytest.raises(Wrong, match="it goes on"):
        check_seen(dataclasses.replace(made.right[8], **{field: other}), made.right)


def test_a_run_keeps_its_damaged_settings_when_they_are_written_again(made):
    whole = (made.out / "config.json").read_text()
    (made.out / "config.json").write_text("{")
    try:
        assert repair.repair(made.out) == 8
        written = json.loads((made.out / "config.json").read_text())
        assert written == json.loads(whole)
        assert (made.out / "config.json.damaged").read_text() == "{"
    finally:
        (made.out / "config.json.damaged").unlink(missing_ok=True)
        (made.out / "config.json").write_text(whole)


def test_the_loss_of_another_checkpoint_is_no_loss(made):
    """Which checkpoint is the best is not known then; a run goes on all the same."""
    with copied(made.out.parent) as home:
        checkpoints = home / "run" / "checkpoints"
        shutil.copyfile(*(checkpoints / step / "metrics/metrics" for step in ("4", "8")))
        with pytest.raises(UsageError, match=r"8/metrics is damaged, so that it is not known"):
            load_run(home / "run", "best")


def watched(leak=0.0, slower=1.0, checkpoints=4):
    """A run of 1,000 updates, as it is seen, and its log."""
    seen = [
        {
            "update": n,
            "memory": 1e9 + leak * n,
            "checkpoints": checkpoints,
            "log": n,
            "directory": 1,
        }
        for n in range(10, 1001, 10)
    ]
    times = np.linspace(1.0, slower, 1000)
    return seen, [{"step": n + 1, "loss": 1.0, "seconds": float(x)} for n, x in enumerate(times)]


@pytest.mark.parametrize(
    ("wrong", "beyond"),
    [
        ({}, []),
        ({"leak": 1e5}, ["memory"]),
        ({"slower": 3.0}, ["slowdown"]),
        ({"checkpoints": 9}, ["checkpoints"]),
    ],
)
def test_what_grows_or_slows_is_beyond_the_bounds(wrong, beyond):
    found = soak.figures(*watched(**wrong), 1000)
    assert [name for name, is_within in found["within"].items() if not is_within] == beyond


@pytest.mark.ci
@pytest.mark.long("makes a run of 150 updates")
def test_a_short_soak_writes_figures_and_a_picture(tmp_path, monkeypatch, capsys):
    out = tmp_path / "soak.json"
    words = ["soak", "--updates", "150", "--seconds", "0.1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        soak.main()
    found = json.loads(out.read_text())
    assert found["within"]["updates"]
    assert found["within"]["checkpoints"]
    assert found["most_checkpoints"] >= 3
    assert out.with_suffix(".png").stat().st_size > 10_000
