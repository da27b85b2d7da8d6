"""What all commands share: errors that name flags as they are typed, and answers to signals."""

import contextlib
import os
import re
import selectors
import signal
import time

import pytest
from flax_llama_runs import arguments, start, tiny, write_text

from examples.flax_llama import command, train
from examples.flax_llama.command import as_typed, defaults, program
from examples.flax_llama.config import Config, UsageError


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("rank=16: expected 1 to 15", "--rank 16: expected 1 to 15"),
        ("optimizer='adam': expected", "--optimizer adam: expected"),
        ("data='no/*.txt' matches no file", "--data 'no/*.txt' matches no file"),
        ("new_data=True needs resume=True.", "--new-data needs --resume."),
        ("packing=False is for rows", "--no-packing is for rows"),
        ("int8_weights=True needs", "--int8-weights True needs"),
        ("see update_proj_gap, valid_data.", "see --update-proj-gap, --valid-data."),
        # Words, paths and values that are no settings.
        ("where lr is 0.5: a smaller lr", "where lr is 0.5: a smaller lr"),
        ("out=a/lr=0.1/valid_data/x exists", "--out a/lr=0.1/valid_data/x exists"),
        ("a/valid_data.txt: not JSON", "a/valid_data.txt: not JSON"),
        ('optimizer="it\'s": no', "--optimizer 'it'\"'\"'s': no"),
        ("valid_loss=3 of galore_adamw", "valid_loss=3 of galore_adamw"),
    ],
)
def test_settings_in_a_message_are_written_as_flags(message, typed):
    assert as_typed(message, defaults(Config)) == typed


# What is wrong with each of them is known before any data is read.
WRONG = """
--preset 9b|--hidden 15|--layers 0|--heads 3|--seq 0|--eval-tokens 0|--optimizer adam|--lr -1
--matrix-lr-ratio 0|--schedule step|--warmup 2|--final-lr 2|--weight-decay -1|--b2 2|--eps 0
--clip-by x|--rank 1000|--update-proj-gap 0|--scale 0|--projector none|--transport none
--residual none|--projector-dtype int2|--refresh never|--steps 0|--dtype int8|--param-dtype float16
--attention flash|--on-nan x|--eval-every 0|--new-data|--resume|--wandb p|--data=|--tokenizer=
--optimizer adamw --residual sign --rank 4|--layerwise --on-nan skip|--clip-by layer
--moment-dtype bfloat16 --optimizer lion|--init-step best|--max-bad-lines 3|--stochastic-rounding
--optimizer apollo_adamw --transport rotate|--optimizer galore_lion --transport rotate
"""


@pytest.mark.parametrize("words", WRONG.strip().replace("\n", "|").split("|"))
def test_errors_of_a_run_name_its_flags_as_they_are_typed(words, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_dataset", lambda _: pytest.fail("work was done"))
    shape = "--hidden 16 --intermediate 40 --layers 2 --heads 2"
    monkeypatch.setattr("sys.argv", ["train", *shape.split(), *words.split()])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    line = stopped.value.code
    assert line.startswith("error: ")
    assert "\n" not in line
    for flag in re.findall("--[a-z0-9-]+", words):
        assert flag in line
    assert "galore_optax" not in line
    names = "|".join(defaults(Config))
    assert not re.search(rf"\b({names})=|--\w*_|\b(?!galore|apollo)[a-z]+_[a-z_]+ must\b", line)
    assert capsys.readouterr().out == ""


def test_an_error_has_the_exit_status_of_its_command(capsys):
    with pytest.raises(SystemExit) as stopped, program(train.train, Config, status=2):
        raise UsageError("seed=-1: expected more.")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --seed -1: expected more.\n"
    with pytest.raises(ValueError, match="a bug"), program(Config):
        raise ValueError("a bug")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_cleans_up_is_interrupted_in_a_line(capsys, number):
    done = []

    def interrupted():
        with program(Config, at_once=False), contextlib.ExitStack() as stack:
            stack.callback(done.append, "cleaned up")
            os.kill(os.getpid(), number)
            time.sleep(10)

    # As while the program was imported, it would quit at once.
    previous = signal.signal(number, lambda *_: done.append("quit"))
    try:
        with pytest.raises(SystemExit) as stopped:
            interrupted()
        os.kill(os.getpid(), number)
        assert done.pop() == "quit"
    finally:
        signal.signal(number, previous)
    assert stopped.value.code == 128 + number
    assert (done, capsys.readouterr().err) == (["cleaned up"], "Interrupted.\n")


def read_line(process, seconds):
    """The next line of a process, which must come soon."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(seconds), "no answer"
    return process.stdout.readline()


@pytest.mark.long("a process of its own, which is interrupted before it has imported anything")
def test_a_signal_is_answered_in_a_line_while_a_program_is_imported():
    process = start("-X", "importtime", "-m", "examples.flax_llama.sample", "--help")
    try:
        while not read_line(process, 60).endswith(" examples.flax_llama\n"):
            pass
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        assert process.wait(5) == 128 + signal.SIGINT
    finally:
        process.kill()
        process.stdout.close()
    lines = [line for line in output.splitlines() if not line.startswith("import time:")]
    assert lines == ["Interrupted."]


def test_signals_that_a_program_is_started_without_stay_so():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with command.answered():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, previous)


# As the program, and says when the compiler has the main thread. What it compiles takes minutes.
COMPILING = """
import sys
import jax
import jax.numpy as jnp
from examples.flax_llama import train
def compile(*_):
    def slow(x):
        for i in range(4000):
            x = jnp.tanh(x @ x + i)
        return x
    lowered = jax.jit(slow).lower(jnp.ones((8, 8)))
    print("compiling", flush=True)
    lowered.compile()
    raise AssertionError("it should have taken longer")
train.compile_update = compile
train.main()
"""


@pytest.mark.long("a process of its own, which compiles when the signals come")
def test_signals_are_answered_at_once_while_xla_compiles(tmp_path):
    config = tiny(write_text(tmp_path), optimizer="sgd", out=tmp_path / "run", quiet=True)
    process = start("-c", COMPILING, *arguments(config))
    try:
        assert read_line(process, 100) == "compiling\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert read_line(process, 5) == "Stopping after this update; again to quit now.\n"
        process.send_signal(signal.SIGTERM)
        assert read_line(process, 5) == "Quit. To go on:\n"
        last = process.stdout.read()
        assert process.wait(5) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.stdout.close()
    assert last == f"{train.RESUME}{config.out}\n"
    resumed = train.from_command_line(last.split()[3:])
    assert resumed.resume
    assert resumed.optimizer == "sgd"
