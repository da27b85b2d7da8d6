"""Runs that are interrupted and go on, against runs that never were."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time

import pytest
from flax_llama_runs import (
    arguments,
    assert_same_end,
    finish,
    metrics,
    start,
    tiny,
    without_checkpoints_after,
    write_text,
)

from examples.flax_llama import evaluate, history, train
from examples.flax_llama.interrupts import answered
from examples.flax_llama.usage import UsageError

# A refresh is due every 2 updates: the checkpoint after 3 is in the middle of a gap.
SAVED, STEPS, GAP = 3, 6, 2
# Runs of adamw alone are those that are killed.
OPTIMIZERS = ("galore_adamw", "galore_adafactor", "q_galore_adamw")
# Devices share what comes before the optimizer; here in float32, and in few bits.
ON_ONE = ("galore_adamw", "q_galore_adamw")
# Runs in a new process, each on so many of its devices.
TRAIN = """
import sys
from pathlib import Path, PosixPath
import jax
from examples.flax_llama import evaluate, history, train
from examples.flax_llama.interrupts import answered
from examples.flax_llama.usage import UsageError
from examples.flax_llama.config import Config
from examples.flax_llama.sharding import make_mesh
for devices, config in eval(sys.argv[1]):
    mesh = make_mesh(devices=jax.devices()[:devices])
    train.make_mesh = lambda _: mesh
    train.train(config)
"""
COMMAND = ("-m", "examples.flax_llama.train")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def text(directory):
    return write_text(directory)


@pytest.mark.long("one run twice, the second time in three parts")
def test_a_signal_saves_and_exits_with_zero_and_a_resumed_run_ends_like_one_that_never_stopped(
    text, tmp_path, monkeypatch, capsys
):
    """Bit for bit; with a refresh in the middle, and signals of both kinds."""
    config = tiny(text, steps=7, eval_every=3, update_proj_gap=3, out=tmp_path / "undisturbed")
    train.train(config)
    # Whoever trains may know of another command that goes on with the run.
    other = f"{train.RESUME}{tmp_path / 'stopped'} --keep 9"
    stopped = dataclasses.replace(config, save_every=100, out=tmp_path / "stopped")
    update = train.RunLog.update
    signals = {2: signal.SIGTERM, 4: signal.SIGINT}

    def signalled(log, step, values):
        update(log, step, values)
        if number := signals.pop(step, None):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.RunLog, "update", signalled)
    for step in (2, 4):
        with answered(), pytest.raises(SystemExit) as exit:
            train.train(stopped, other if step == 2 else None)
        assert exit.value.code == 0
        output = capsys.readouterr().out
        assert f"Stopped after update {step}, which is saved. To go on:\n{train.RESUME}" in output
        assert (other in output) == (step == 2)
        command = output.splitlines()[-1].split()
        assert command[:3] == ["python", *COMMAND]
        stopped = train.from_command_line(command[3:])
    shutil.copytree(stopped.out, tmp_path / "ended")
    train.train(stopped)
    assert signals == {}
    assert_same_end(config.out, stopped.out, config.steps)
    ends_where_it_is(tmp_path / "ended", step)


def ends_where_it_is(out, step):
    """An interrupted run is evaluated, and finished, if it is to have no more updates."""

    def go_on(*given):
        return train.train(train.from_command_line(["--out", str(out), "--resume", *given]))

    before = contents(out)
    with pytest.raises(UsageError, match=f"steps={step - 1}, which was 7 .* {step} ends the run"):
        go_on("--steps", str(step - 1))
    with pytest.raises(UsageError, match=r"^lr=0.5 would hold .*: give more updates as well"):
        go_on("--steps", str(step), "--lr", "0.5")
    assert contents(out) == before
    result = go_on("--steps", str(step))
    assert [record["step"] for record in result.valid] == [3, step]
    scores = evaluate.evaluate(out, tokens=200, step="best")
    assert result.valid[-1]["valid_loss"] == pytest.approx(scores["loss"], rel=1e-6)
    assert json.loads((out / "config.json").read_text())["train"]["steps"] == step
    (*_, entry) = history.read_history(out)
    assert (entry.step, entry.changes) == (step, {"steps": [7, step]})
    ended = contents(out)
    assert go_on().valid == result.valid
    assert contents(out) == ended


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def interrupted(directory, text):
    """Runs on 1 and on 8 devices with each optimizer; those on 8 that went on from the middle."""
    saving = {"accumulate": 2, "batch": 16, "steps": STEPS, "save_every": SAVED, "keep": 9}
    saving |= {"update_proj_gap": GAP, "eval_every": SAVED}

    def out(name, devices, suffix):
        return directory / f"{name}-{devices}{suffix}"

    def run(suffix, *counts, **settings):
        configs = [
            (n, tiny(text, optimizer=name, out=out(name, n, suffix), **saving, **settings))
            for n in counts
            for name in (ON_ONE if n == 1 else OPTIMIZERS)
        ]
        finish(start("-c", TRAIN, configs, cache=directory / "cache", devices=8))

    run("", 1, 8)
    for name in OPTIMIZERS:
        copy = shutil.copytree(out(name, 8, ""), out(name, 8, "-resumed"))
        without_checkpoints_after(copy, SAVED)
    run("-resumed", 8, resume=True)
    return out


@pytest.mark.ci
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumed_in_a_new_process_ends_bit_for_bit_like_one_that_never_stopped(
    interrupted, name
):
    whole, resumed = (interrupted(name, 8, suffix) for suffix in ("", "-resumed"))
    assert [r["step"] for r in metrics(whole) if "loss" in r] == list(range(1, STEPS + 1))
    assert_same_end(whole, resumed, STEPS)


@pytest.mark.ci
@pytest.mark.parametrize("name", ON_ONE)
def test_eight_devices_train_as_one_does(interrupted, name):
    one, eight = (metrics(interrupted(name, devices, "")) for devices in (1, 8))
    for a, b in zip(one, eight, strict=True):
        assert a == pytest.approx(b, rel=2e-3)


def last_update(out):
    """The last update of which there is a whole record."""
    path = out / "metrics.jsonl"
    found = re.findall(r'"step": (\d+),.*}\n', path.read_text()) if path.exists() else []
    return int(found[-1]) if found else 0


def wait_for_update(process, out, update):
    deadline = time.monotonic() + 120
    while last_update(out) < update and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.ci
@pytest.mark.long("five runs in four processes, which are those that users have")
def test_a_process_that_is_stopped_then_killed_again_and_again_loses_only_what_was_not_saved(
    directory, text
):
    """Started as the program itself, and with nothing but the run's directory when it goes on."""
    config = tiny(text, optimizer="adamw", steps=400, save_every=50, eval_every=200, quiet=False)
    undisturbed = dataclasses.replace(config, out=directory / "undisturbed", quiet=True)
    config = dataclasses.replace(config, out=directory / "disturbed")

    def go_on(*command):
        return start(*command, cache=directory / "cache")

    process = go_on(*COMMAND, *arguments(config))
    wait_for_update(process, config.out, 60)
    process.send_signal(signal.SIGTERM)
    output = finish(process, expected=0)
    message = re.search(r"Stopped after update (\d+), which is saved. To go on:\n(.*)\n", output)
    assert message, output
    assert last_update(config.out) == int(message[1]) < config.steps
    rng = random.Random(0)
    for _ in range(2):
        process = go_on(*message[2].split()[1:])
        wait_for_update(process, config.out, last_update(config.out) + rng.randrange(100))
        process.kill()
        assert process.communicate() is not None
        assert process.returncode == -signal.SIGKILL
    done = last_update(config.out)
    resumed = dataclasses.replace(config, resume=True)
    output = finish(go_on("-c", TRAIN, [(1, resumed), (1, undisturbed)]))
    # One checkpoint may still have been on its way to the disk.
    resumed_after = int(re.search(r"Resuming after update (\d+)", output)[1])
    assert done - resumed_after <= 2 * config.save_every
    assert_same_end(undisturbed.out, config.out, config.steps)
