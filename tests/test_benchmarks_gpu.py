"""The GPU benchmark: how it runs, keeps and reports what may fail; and a rehearsal of all of it."""

import argparse
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax
from benchmarks import memory_table
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    correct,
    readme,
    record,
    refresh,
    report,
    runner,
    stage,
    step,
    timing,
    train,
)
from benchmarks.gpu.record import is_done
from benchmarks.gpu.stage import GIB, STAGES, Item, Size

TINY = Size(rehearsal=True, data="austen", device_memory=32 * GIB)
FULL = Size(rehearsal=False, data="austen", device_memory=80 * GIB)
MACHINE = {"machine": {"device": "H100", "driver": "580.1", "jax": "0.11.2", "python": "3.12"}}
MACHINE |= {"commit": "abc", "library_sha256": "def"}


@pytest.fixture
def broken(monkeypatch):
    """Lets the stage of `tests/gpu_stage.py` be the only one, and wait little."""
    monkeypatch.setattr(stage, "STAGES", ("tests.gpu_stage",))
    monkeypatch.setattr(gpu, "STAGES", ("tests.gpu_stage",))
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.1)


def arguments(**changes):
    defaults = {"minutes": 1.0, "stages": ["tests.gpu_stage"], "again": [], "resume": None}
    return argparse.Namespace(**defaults | {"rehearse": True, "out": None} | changes)


def measured(args, found=MACHINE["machine"]):
    """The entries of a measurement, from the file that it wrote, and whether it is complete."""
    out, files = gpu.prepare(args)
    gpu.measure(args, TINY, found, files)
    return json.loads((out / "tests.gpu_stage.json").read_text())["items"]


def test_each_item_is_kept_however_it_ends_and_the_next_one_runs(broken, tmp_path, capsys):
    entries = measured(arguments(out=tmp_path))
    assert list(entries) == [
        *("large", "fails", "unavailable", "dies", "of its own environment", "alone", "hangs"),
        *("works", "works, too"),
    ]
    assert "needs 1024.0 GiB of memory; here are 32.0" in entries["large"]["skipped"]
    assert entries["fails"]["error"].endswith("ValueError: no such kernel\n")
    assert "Traceback" in entries["fails"]["error"]
    assert entries["unavailable"]["skipped"] == "needs another card"
    assert entries["dies"]["exit_status"] == 3
    assert "terminate called" in entries["dies"]["error"]
    assert entries["of its own environment"]["result"] == {"is": "1"}
    assert entries["hangs"]["timed_out"] == pytest.approx(0.5, abs=0.3)
    assert "compiling" in entries["hangs"]["log"]
    works, too = entries["works"]["result"], entries["works, too"]["result"]
    assert 4 < works["left"] <= 5
    # Neighbours share a process, unless one wants to be alone.
    assert works["process"] == too["process"] != entries["alone"]["result"]["process"]
    assert too["size"] == "tiny"
    assert all(entry["machine"] == MACHINE["machine"] for entry in entries.values())
    assert len(capsys.readouterr().out.splitlines()) == len(entries)


def test_a_run_goes_on_with_what_is_missing_then_with_what_failed(broken, tmp_path, capsys):
    before = measured(arguments(out=tmp_path / "a"))
    path = tmp_path / "a" / "tests.gpu_stage.json"
    kept = json.loads(path.read_text())
    del kept["items"]["works"]
    path.write_text(json.dumps(kept))
    capsys.readouterr()
    after = measured(arguments(out=tmp_path / "b", resume=tmp_path / "a"))
    tried = [
        line.split("gpu_stage ")[1][:12].strip() for line in capsys.readouterr().out.splitlines()
    ]
    assert tried == ["large", "works", "fails", "unavailable", "dies", "hangs"]
    for name in ("of its own environment", "alone", "works, too"):
        assert after[name] == before[name]
    assert after.keys() == before.keys()
    measured(arguments(out=tmp_path / "b", again=["tests.gpu_stage"]))
    assert len(capsys.readouterr().out.splitlines()) == len(before)


def test_nothing_begins_when_the_time_is_over(tmp_path):
    put = []
    items = [Item("late", lambda _: {}, 5)]
    runner.run_items("tests.gpu_stage", items, TINY, time.time() + 1, lambda *x: put.append(x))
    assert put == []


def test_results_of_a_rehearsal_and_of_a_gpu_are_never_mixed(tmp_path, capsys):
    record.StageFile(tmp_path / "step.json", "step", rehearsal=True).put("copy", {"result": {}})
    with pytest.raises(SystemExit) as stopped:
        gpu.prepare(arguments(out=tmp_path, rehearse=False))
    assert stopped.value.code == 2
    assert "of a rehearsal: name another directory" in capsys.readouterr().err
    (tmp_path / "step.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no results of this benchmark"):
        record.StageFile(tmp_path / "x.json", "step", True).take(tmp_path / "step.json")


def test_a_file_is_whole_after_every_entry(tmp_path, monkeypatch):
    file = record.StageFile(tmp_path / "new" / "step.json", "step", rehearsal=False)
    file.put("copy", {"result": {"a": 1}})

    def disk_full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.raises(OSError, match="No space"):
        file.put("adamw", {"result": {}})
    again = record.StageFile(tmp_path / "other.json", "step", rehearsal=False)
    again.take(tmp_path / "new" / "step.json")
    assert again.items == {"copy": {"result": {"a": 1}}}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_one_line_names_the_rehearsal(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu", "--out", str(tmp_path)])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("No GPU that JAX can use: it computes on ")
    assert "make gpu REHEARSE=1" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [("--minutes", "0"), ("--resume", "/no/such/directory")])
def test_wrong_arguments_are_named(monkeypatch, capsys, wrong):
    monkeypatch.setattr("sys.argv", ["gpu", *wrong])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err.splitlines()[-1]


def test_every_stage_has_items_of_both_sizes_with_names_and_time():
    for name in STAGES:
        full, tiny = (stage.module_of(name).items(size) for size in (FULL, TINY))
        assert len({item.name for item in full}) == len(full)
        assert all(item.seconds > 0 for item in full + tiny)
        assert all(item.memory <= 40 * GIB for item in full)
    # What does not fit into a small card is known before it is tried.
    assert [item.memory for item in step.items(FULL)].count(40 * GIB) == 16


@pytest.mark.parametrize("wrong_for", ["square", "wide"])
def test_an_svd_that_is_wrong_for_some_matrices_is_found(monkeypatch, wrong_for):
    right = galore_optax.projectors.svd

    def wrong(matrix, rank):
        m, n = matrix.shape
        return jnp.eye(m)[:, :rank] if (m == n) == (wrong_for == "square") else right(matrix, rank)

    assert correct.svd(*correct.TINY_SVD)["passed"]
    monkeypatch.setattr(galore_optax.projectors, "svd", wrong)
    found = correct.svd(*correct.TINY_SVD)
    assert not found["passed"]
    energy = min(row["galore_optax"]["energy_over_the_most"] for row in found["matrices"].values())
    assert energy < 0.9
    assert f"galore_optax {energy:.7f}" in found["says"]


def test_a_model_is_not_trained_for_its_gradients_where_time_is_too_short():
    items = {item.name: item for item in refresh.items(FULL)}
    with pytest.raises(stage.Unavailable, match=r"(29|30) seconds are too few"):
        items["gradients of a trained model"].measure(time.time() + 30)


def test_a_report_has_a_line_for_each_item_and_names_what_failed():
    passed = {"passed": True, "says": "as the reference"}
    entries = {
        "reference trajectories": {"result": passed, "seconds": 3.2, **MACHINE},
        "codes as on the CPU": {"result": passed | {"passed": False}, **MACHINE},
        "one compilation": {"error": "Traceback\nOops", **MACHINE},
        "svd against float64": {"timed_out": 60.0, **MACHINE},
        "killed and resumed": {"skipped": "no time", **MACHINE},
    }
    text, failed = report.report({"correct": entries}, FULL)
    assert "- H100, driver 580.1, jax 0.11.2, Python 3.12, abc" in text
    assert "| reference trajectories | passed: as the reference | 3 |" in text
    assert "| one compilation | failed: Oops |" in text
    assert "| cuDNN attention against XLA's | not reached |" in text
    names = ("codes as on the CPU", "one compilation", "svd against float64")
    assert failed == [f"correct: {name}" for name in names]


def test_a_report_says_which_version_of_the_library_an_item_is_of():
    older, newer = (MACHINE | {"commit": "abc-dirty", "library_sha256": x} for x in ("b1", "a2"))
    entries = {
        "reference trajectories": {"result": {"passed": True, "says": "as it is"}, **older},
        "one compilation": {"skipped": "no time", **newer},
    }
    lines = report.report({"correct": entries}, FULL)[0].splitlines()
    assert "1. H100, driver 580.1, jax 0.11.2, Python 3.12, abc-dirty, library b1" in lines
    assert "2. H100, driver 580.1, jax 0.11.2, Python 3.12, abc-dirty, library a2" in lines
    assert "| reference trajectories | passed: as it is | 0 | 1 |" in lines
    assert "| one compilation | skipped: no time | 0 | 2 |" in lines
    assert "| codes as on the CPU | not reached |  |  |" in lines


def test_the_readme_and_the_report_have_the_tables_of_the_figures():
    text, shown = readme.current()
    assert readme.REPORT.read_text() == text
    written = readme.README.read_text()
    assert memory_table.replaced(written, shown, readme.COMMENTS) == written


def test_times_of_steps_are_means_over_runs_that_are_not_waited_for(monkeypatch):
    clock = iter(np.cumsum([0, 5, 1, 7, 1, 6]).astype(float))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    taken = []
    carry, seconds = timing.per_step(lambda x: taken.append(x) or x + 1, 0, steps=4, runs=3)
    assert carry == len(taken) == 1 + 3 * 4
    assert seconds == {"median": 6 / 4, "least": 5 / 4, "most": 7 / 4}


def test_refreshes_are_timed_apart_from_ordinary_updates_and_the_first_ones():
    seconds = [9.0, 7.0, 1.0, 5.0, 2.0, 3.0, 6.0]
    assert train.split_times(seconds, 3) == (9.0, 2.0, 5.5)
    assert train.split_times(seconds, None) == (9.0, 3.0, None)
    assert train.split_times(seconds[:2], 3).refresh_s is None


def test_a_run_stops_at_its_deadline_after_as_many_updates_as_are_timed(monkeypatch):
    monkeypatch.setattr(train, "put_batch", lambda batch, *_: batch)
    losses = iter(range(100))

    def update(state, batch):
        return state, {"loss": next(losses)}

    late = train.updates(update, None, iter(range(100)), 50, None, deadline=time.time())
    assert [loss for loss, _ in late] == list(range(train.LEAST))
    whole = train.updates(update, None, iter(range(100)), 5, None, deadline=time.time() + 60)
    assert len(list(whole)) == 5


def test_a_batch_that_does_not_fit_is_halved_until_it_does(monkeypatch):
    asked = []

    def run(settings, deadline):
        asked.append(settings["batch"])
        if settings["batch"] > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"losses": [1.0]}

    monkeypatch.setattr(train, "train", run)
    assert train.speed({"batch": 16}, 0.0) == {"batch": 4, "losses": [1.0]}
    assert asked == [16, 8, 4]


@pytest.mark.ci
@pytest.mark.long("every item of every stage, in processes of their own")
def test_the_rehearsal_runs_every_item_of_every_stage(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in STAGES:
        entries = json.loads((tmp_path / f"{name}.json").read_text())["items"]
        assert sorted(entries) == sorted(item.name for item in stage.module_of(name).items(TINY))
        for item, entry in entries.items():
            assert entry["machine"]["jax"] == jax.__version__
            if item == "cuDNN attention against XLA's":
                assert "needs an NVIDIA GPU" in entry["skipped"]
            elif name == "finetune":  # which no model is named for.
                assert entry["skipped"].startswith("needs --")
            else:
                assert entry["result"].get("passed", True), item
    assert (tmp_path / "report.md").read_text() in done.stdout


@pytest.mark.parametrize(
    ("entry", "done"),
    [
        (None, False),
        ({"error": "out of memory"}, False),
        ({"result": {"passed": False}}, False),
        ({"result": {"passed": True}}, True),
        ({"result": {"seconds": 1.0}}, True),
    ],
)
def test_what_failed_or_was_found_wrong_is_measured_again(entry, done):
    assert is_done(entry) is done
