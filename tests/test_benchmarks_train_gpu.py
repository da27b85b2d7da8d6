"""The benchmark of whole training on a GPU, on whatever there is, at a size that takes seconds."""

import json
import statistics
import subprocess
import time
import types

import jax
import pytest

from benchmarks import train_gpu
from examples.flax_llama.config import Config

SMALL = {"batch": 2, "seq": 32, "vocab_size": 300, "tokenizer": "bytes"}
RUN = {"preset": "9m", "optimizer": "galore_adamw", "losses": [3.0] * 20 + [1.0] * 10}


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that are asked for; each fits with at most four sequences."""
    asked = []

    def run(command, timeout, **_):
        settings = json.loads(command[-1])["settings"]
        asked.append(settings)
        if settings["batch"] > 4:
            return types.SimpleNamespace(
                returncode=1, stdout="", stderr="Traceback\nRESOURCE_EXHAUSTED: Out of memory"
            )
        return types.SimpleNamespace(returncode=0, stdout='{"losses": [1.0]}\n', stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_a_small_run_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    words = ["--presets", "9m", "--optimizers", "galore_adamw", "--steps", "5"]
    for name, value in SMALL.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    monkeypatch.setattr("sys.argv", ["train_gpu", *words, "--out", str(tmp_path / "out.json")])
    train_gpu.main()
    record = json.loads((tmp_path / "out.json").read_text())
    (run,) = record["runs"]
    assert record["machine"]["jax"] == jax.__version__
    assert run["updates"] == len(run["losses"]) == 5
    assert run["losses"][0] == pytest.approx(5.7, abs=0.1)
    shape = Config(preset="9m", vocab_size=300, seq=32).resolve().shape(257)
    assert run["parameters"] == shape.num_params
    # Parameters, gradients, and AdamW's moments of what is not projected, in float32.
    assert run["peak_bytes"] > 4 * (2 * shape.num_params + 2 * 2 * 300 * 128)
    # Chosen again on each update here, on one of 200 there.
    assert run["refresh_step_ms"] > 0
    assert run["tokens_per_second"] > 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:4] == ["9m", "galore_adamw", "2", "5"]
    assert line[-1] == f"{statistics.mean(run['losses']):.3f}"


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_stops_at_its_deadline_after_as_many_updates_as_are_timed():
    settings = {"preset": "9m", "optimizer": "adamw", "steps": 50, **SMALL, "layers": 1}
    run = train_gpu.train(settings, deadline=time.time())
    assert run["updates"] == train_gpu.LEAST == 3
    assert run["step_ms"] > 0


def test_a_batch_that_does_not_fit_is_halved_until_it_does(trained):
    run = train_gpu.train_apart({"batch": 16}, seconds=1, limit=1)
    assert [settings["batch"] for settings in trained] == [16, 8, 4]
    assert run == {"batch": 4, "losses": [1.0]}


def test_what_fails_or_takes_too_long_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def run(command, timeout, **_):
        settings = json.loads(command[-1])["settings"]
        if settings["optimizer"] == "adamw":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nNo such kernel")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sys.argv", ["train_gpu", "--presets", "60m", "--minutes", "1"])
    with pytest.raises(SystemExit) as stopped:
        train_gpu.main()
    assert stopped.value.code == 1
    output = capsys.readouterr().out
    assert "not done after 60 seconds" in output
    assert "No such kernel" in output


def test_runs_share_the_time_that_is_left(monkeypatch, tmp_path):
    parts = []

    def train_apart(settings, seconds, limit):
        parts.append((round(seconds), round(limit)))
        return settings | {"error": "none"}

    monkeypatch.setattr(train_gpu, "train_apart", train_apart)
    monkeypatch.setattr("sys.argv", ["train_gpu", "--minutes", "4"])
    with pytest.raises(SystemExit):
        train_gpu.main()
    assert parts == [(round(240 / left), 240) for left in range(8, 0, -1)]


def test_losses_are_compared_after_as_many_updates(trained):
    short = RUN | {"optimizer": "adamw", "losses": [3.0] * 5 + [2.0] * 10}
    other = RUN | {"preset": "60m", "losses": [9.0]}
    assert train_gpu.common_loss(RUN, [RUN, short, other]) == 3.0
    assert train_gpu.common_loss(short, [RUN, short, other]) == 2.0
    assert train_gpu.common_loss(RUN, [RUN, other]) == 1.0


def test_what_cannot_work_is_told_before_any_run(monkeypatch, trained):
    monkeypatch.setattr("sys.argv", ["train_gpu", "--projector", "none"])
    with pytest.raises(SystemExit, match=r"^error: .* projector must be one of svd"):
        train_gpu.main()
    assert trained == []
