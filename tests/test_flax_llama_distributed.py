"""Runs of several processes: who is missing or has ended is told, and numbers are those of one."""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from flax_llama_runs import (
    ROOT,
    arguments,
    assert_same_end,
    assert_same_losses,
    finish,
    metrics,
    start,
    tiny,
    without_checkpoints_after,
    write_text,
)

from examples.flax_llama import distributed, train
from examples.flax_llama.config import UsageError

# Joins, says so, and does nothing until it is told to on its standard input.
MEMBER = """
import atexit, sys, time
from examples.flax_llama.roll_call import together
from examples.flax_llama.usage import UsageError
port, count, number, timeout = map(int, sys.argv[1:5])
try:
    with together("localhost", port, count, number, timeout, {"lr": float(sys.argv[5])}):
        print("here", flush=True)
        word = sys.stdin.readline().strip()
        if word == "error":
            raise UsageError("this is wrong")
except UsageError as error:
    # As JAX waits for the others when Python ends.
    atexit.register(lambda: time.sleep(60))
    raise SystemExit(f"error: {error}")
"""


def free_port():
    """Of two that follow each other."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("", port))
                other.bind(("", port - 1))
            except OSError:
                continue
            return port


def member(*arguments):
    """A process with a port, how many there are, its number, a time limit, and a setting."""
    return subprocess.Popen(
        [sys.executable, "-c", MEMBER, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def connected(port):
    """A connection to a process, as soon as it listens."""
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except OSError:
            time.sleep(0.05)


def members(count, *numbers, timeout=30):
    """Processes of these numbers."""
    port = free_port()
    return {number: member(port, count, number, timeout, 0.1) for number in numbers}


@pytest.mark.parametrize(("there", "missing"), [((0, 2), "process 1"), ((1, 2), "process 0")])
def test_a_process_that_never_comes_is_named(there, missing):
    for process in members(3, *there, timeout=1).values():
        # It waits at its end, as it does after an error.
        error = process.stderr.readline()
        process.kill()
        out, rest = process.communicate()
        assert (out, rest) == ("", "")
        assert error.startswith(f"error: distributed_timeout=1: of 3 processes, {missing} has not")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((3, 1, 30, 0.2), "process 1 has lr=0.2, and process 0 has lr=0.1: start 3 processes with"),
        ((2, 1, 30, 0.1), "process 1 has processes=2, and process 0 has processes=3: start 3"),
        ((3, 2, 30, 0.1), "process=2 was started twice: start 3 processes with the same settings"),
    ],
    ids=["setting", "count", "twice"],
)
def test_processes_that_do_not_belong_together_are_told_so(other, message):
    port = free_port()
    right = [member(port, 3, k, 30, 0.1) for k in {0, other[1]} & {0, 2}]
    found = [*right, member(port, *other)]
    errors = [process.stderr.readline() for process in found]
    for process in found:
        process.kill()
        process.communicate()
    assert all(error.startswith(f"error: {message}") for error in errors), errors


@pytest.mark.parametrize(
    "words", [b"\x16\x03\x01\xff\n", b"here \xff\n", b"here {}\n", b'here {"number": "1"}\n', b""]
)
def test_what_looks_for_open_ports_is_no_process(words):
    port = free_port()
    first = member(port, 2, 0, 30, 0.1)
    with connected(port) as stranger:
        stranger.sendall(words)
    other = member(port, 2, 1, 30, 0.1)
    for process in (first, other):
        assert process.stdout.readline() == "here\n"
    for process in (first, other):
        assert process.communicate("\n", timeout=30)[1] == ""


def ends_naming(process, number):
    """Whether a process of three ends since this one has, with a line that says so."""
    process.wait(timeout=30)  # Before communicate() closes its standard input, which ends it too.
    _, error = process.communicate()
    ended = error.startswith(f"error: process {number} of 3 has ended before the run has")
    return process.returncode == 1 and ended and error.count("\n") == 1


def test_a_process_that_ends_while_others_are_waited_for_is_named():
    port = free_port()
    first = member(port, 3, 0, 30, 0.1)
    who = {"number": 1, "settings": {"lr": 0.1, "processes": 3}}
    with connected(port) as stand_in:
        stand_in.sendall(f"here {json.dumps(who)}\n".encode())
    assert ends_naming(first, 1)


def test_the_end_of_the_first_process_ends_those_that_wait_with_it():
    port = free_port()
    with socket.create_server(("localhost", port)) as stand_in:
        waiting = member(port, 3, 1, 30, 0.1)
        peer, _ = stand_in.accept()
        with peer:
            assert peer.recv(4) == b"here"
    assert ends_naming(waiting, 0)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", ["killed", "error"])
def test_all_processes_end_where_one_does_and_say_which(victim, how):
    found = members(3, 0, 1, 2)
    for process in found.values():
        assert process.stdout.readline() == "here\n"
    began = time.monotonic()
    if how == "killed":
        found[victim].send_signal(signal.SIGKILL)
    else:
        found[victim].stdin.write("error\n")
        found[victim].stdin.flush()
    ended = found.pop(victim)
    for process in found.values():
        assert ends_naming(process, victim)
    ended.kill()
    assert ended.communicate()[1] == ("" if how == "killed" else "error: this is wrong\n")
    assert time.monotonic() - began < 10


def test_processes_that_are_done_end_one_after_the_other():
    found = members(3, 0, 1, 2)
    for number in (1, 0, 2):
        process = found[number]
        assert process.stdout.readline() == "here\n"
        _, error = process.communicate("\n", timeout=30)
        assert (process.returncode, error) == (0, "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "distributed=True: coordinator, processes, process must be given"),
        (
            {"coordinator": "here", "processes": 2, "process": 0},
            "coordinator='here': expected HOST",
        ),
        ({"coordinator": "a:9", "processes": 2, "process": 2}, "process=2: expected 0 to 1, of"),
        *(
            (
                {"coordinator": f"a:{port}", "processes": 2, "process": 0},
                f"coordinator='a:{port}': expected HOST:PORT of process 0, the port from 2 to 655",
            )
            for port in ("1", "99999", "-5", "\u0665\u0665")
        ),
        ({"processes": 0}, "processes=0: expected at least 1"),
        *(
            (
                {"distributed_timeout": value},
                f"distributed_timeout={value}: expected at least 1 sec",
            )
            for value in (math.nan, math.inf, 0.0, -1.0)
        ),
    ],
)
def test_what_is_not_known_of_processes_is_refused(monkeypatch, settings, message):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    config = tiny("austen", distributed=True, **settings)
    with pytest.raises(UsageError, match=message), distributed.processes(config):
        pass


def test_processes_with_other_data_are_named(monkeypatch):
    rows = {"a" * 32: [1, 1, 1], "b" * 32: [1, 2, 1]}
    found = {int(digest[:8], 16): row for digest, row in rows.items()}
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "meet", lambda where: None)
    monkeypatch.setattr(distributed, "gathered", found.__getitem__)
    distributed.check_same_data({"train": "a" * 32})
    with pytest.raises(UsageError, match="process 1 of 3 has other valid data than process 0"):
        distributed.check_same_data(dict(zip(("train", "valid"), rows, strict=True)))


def test_flags_of_processes_want_the_flag_that_there_are_some():
    with pytest.raises(UsageError, match="processes=2 has no effect without distributed=True"):
        train.from_command_line(["--processes", "2"])


STEPS, SAVED, MESH = 4, 2, "fsdp=2,tensor=2"


def start_both(cache, *words):
    """Two processes of two devices that make a run, or go on with it."""
    port = free_port()
    given = ["--distributed", "--coordinator", f"localhost:{port}", "--processes", 2]
    return [
        start(
            "-m",
            "examples.flax_llama.train",
            *words,
            *given,
            "--process",
            k,
            devices=2,
            cache=cache,
        )
        for k in range(2)
    ]


@pytest.mark.ci
@pytest.mark.long("four processes that each compile a run")
def test_two_processes_train_as_one_and_any_number_goes_on(tmp_path):
    # Text whose order is the same for any number of processes.
    settings = {"steps": STEPS, "save_every": SAVED, "eval_every": STEPS}
    two, one = (tiny("austen", **settings, out=tmp_path / name) for name in ("two", "one"))
    cache = tmp_path / "cache"
    both = start_both(cache, *arguments(two), "--mesh", MESH)
    outputs = [finish(process) for process in both]
    assert "Finished: validation loss" in outputs[0]
    assert "Finished" not in outputs[1]
    train.train(one)
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    without_checkpoints_after(tmp_path / "two", SAVED)
    words = ["--out", str(tmp_path / "two"), "--resume", "--mesh", "data=1"]
    train.train(train.from_command_line(words))
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    # And the other way round.
    without_checkpoints_after(tmp_path / "one", SAVED)
    words = ["--out", tmp_path / "one", "--resume", "--mesh", MESH]
    for process in start_both(cache, *words):
        finish(process)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


@pytest.mark.ci
@pytest.mark.long("processes that are started again after each kill")
def test_a_run_of_which_processes_are_killed_ends_and_goes_on_bit_for_bit(tmp_path):
    """One that is not the first, and then the first."""
    text, cache = write_text(tmp_path), tmp_path / "cache"
    settings = {"steps": 40, "save_every": 10, "eval_every": 40, "mesh": MESH}
    alone, killed = (tiny(text, **settings, out=tmp_path / name) for name in ("alone", "killed"))
    for process in start_both(cache, *arguments(alone)):
        finish(process)
    words = arguments(killed)
    for victim, updates in ((1, 12), (0, 25)):
        both = start_both(cache, *words)
        while not (killed.out / "metrics.jsonl").exists() or len(metrics(killed.out)) < updates:
            assert both[0].poll() is both[1].poll() is None
            time.sleep(0.02)
        os.kill(both[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        output, _ = both[1 - victim].communicate(timeout=60)
        assert time.monotonic() - began < 10
        assert both[1 - victim].returncode == 1
        assert f"error: process {victim} of 2 has ended before the run has" in output
        both[victim].communicate()
        words = ["--out", killed.out, "--resume"]
    for process in start_both(cache, *words):
        finish(process)
    assert_same_end(alone.out, killed.out, 40)
