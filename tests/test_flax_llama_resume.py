"""Runs that are interrupted and go on in a new process, against runs that never were."""

import dataclasses
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
    write_text,
)

# A refresh is due every 4 updates: the checkpoint after 6 is in the middle of a gap.
SAVED, STEPS, GAP = 6, 12, 4
# Runs of adamw alone are those that are killed.
OPTIMIZERS = ("galore_adamw", "galore_adafactor", "q_galore_adamw")
TRAIN = """
import sys
from pathlib import Path, PosixPath
from examples.flax_llama.config import Config
from examples.flax_llama.train import train
for config in eval(sys.argv[1]):
    train(config)
"""
COMMAND = ("-m", "examples.flax_llama.train")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def text(directory):
    return write_text(directory)


@pytest.fixture(scope="module")
def interrupted(directory, text):
    """Runs on 1 and on 8 devices with each optimizer; those on 8 that went on from the middle."""
    saving = {"accumulate": 2, "batch": 16, "steps": STEPS, "save_every": SAVED, "keep": 9}
    saving |= {"update_proj_gap": GAP, "eval_every": SAVED}

    def out(name, devices, suffix):
        return directory / f"{name}-{devices}{suffix}"

    def run(suffix, *counts, **settings):
        processes = []
        for devices in counts:
            configs = [
                tiny(text, optimizer=name, out=out(name, devices, suffix), **saving, **settings)
                for name in OPTIMIZERS
            ]
            cache = directory / "cache"
            processes.append(start("-c", TRAIN, configs, cache=cache, devices=devices))
        for process in processes:
            finish(process)

    run("", 1, 8)
    for name in OPTIMIZERS:
        copy = shutil.copytree(out(name, 8, ""), out(name, 8, "-resumed"))
        for later in {path.name for path in (copy / "checkpoints").iterdir()} - {str(SAVED)}:
            shutil.rmtree(copy / "checkpoints" / later)
    run("-resumed", 8, resume=True)
    return out


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(interrupted, name):
    whole, resumed = (interrupted(name, 8, suffix) for suffix in ("", "-resumed"))
    assert [r["step"] for r in metrics(whole) if "loss" in r] == list(range(1, STEPS + 1))
    assert_same_end(whole, resumed, STEPS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_eight_devices_train_as_one_does(interrupted, name):
    one, eight = (metrics(interrupted(name, devices, "")) for devices in (1, 8))
    for a, b in zip(one, eight, strict=True):
        assert a == pytest.approx(b, rel=2e-3)


@pytest.fixture(scope="module")
def long_run(directory, text):
    """Settings of a run of some seconds, and where it ran to its end undisturbed."""
    config = tiny(text, optimizer="adamw", steps=400, save_every=50, eval_every=200)
    config = dataclasses.replace(config, out=directory / "undisturbed")
    finish(start(*COMMAND, *arguments(config), cache=directory / "cache"))
    return config


def go_on(config, directory):
    """Starts a run, or goes on with it where there is one, with nothing but its directory given."""
    is_there = (config.out / "config.json").exists()
    given = ["--out", config.out, "--resume"] if is_there else arguments(config)
    return start(*COMMAND, *given, cache=directory / "cache")


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


def test_a_signal_saves_and_exits_with_zero_and_says_how_to_resume(directory, long_run):
    config = dataclasses.replace(long_run, out=directory / "stopped", save_every=10_000)
    process = go_on(config, directory)
    for number, update in ((signal.SIGTERM, 50), (signal.SIGINT, 225)):
        wait_for_update(process, config.out, update)
        process.send_signal(number)
        output = finish(process, expected=0)
        message = re.search(
            r"Stopped after update (\d+), which is saved. To go on:\n(.*)\n", output
        )
        assert message, output
        assert last_update(config.out) == int(message[1]) < config.steps
        process = start(*message[2].split()[1:], cache=directory / "cache")
    finish(process)
    assert_same_end(long_run.out, config.out, config.steps)


def test_a_run_killed_again_and_again_loses_what_came_after_the_last_checkpoint_alone(
    directory, long_run
):
    config = dataclasses.replace(long_run, out=directory / "killed", quiet=False)
    rng = random.Random(0)
    process = go_on(config, directory)
    for _ in range(2):
        wait_for_update(process, config.out, last_update(config.out) + rng.randrange(100))
        process.kill()
        process.communicate()
        done = last_update(config.out)
        process = go_on(config, directory)
    output = finish(process)
    resumed = int(re.search(r"Resuming after update (\d+)", output)[1])
    # One checkpoint may still have been on its way to the disk.
    assert done - resumed <= 2 * config.save_every
    assert_same_end(long_run.out, config.out, config.steps)
