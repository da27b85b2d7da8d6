"""What a run shows while it goes on: lines without a terminal, a bar in one, and a header."""

import dataclasses
import io
import itertools
import json
import math
import os
import re

import numpy as np
import pytest
from flax_llama_runs import tiny, write_text
from rich.console import Console

from examples.flax_llama import progress
from examples.flax_llama.config import PRESETS
from examples.flax_llama.progress import Part, Progress, Speed, fitting, header, significant
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.tokens import write_tokens
from examples.flax_llama.train import open_dataset

SECOND = {"loss": 2.5, "lr": 0.01, "tokens": 400, "seconds": 1.0, "tokens_per_second": 400.0}
SCORES = {"standard_error": 0.25, "perplexity": 7.4, "bits_per_byte": 2.9}


@pytest.fixture
def clock(monkeypatch):
    """The time, which goes on when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(console):
    return console.file.getvalue().splitlines()


def plain(**settings):
    return Console(file=io.StringIO(), **{"force_terminal": False, "width": 80} | settings)


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_for_each_evaluation(clock):
    console = plain()
    with Progress(start=0, steps=25, console=console) as shows:
        with shows.doing("compiling"):
            clock[0] += 60
        for step in range(1, 26):
            # The first one takes longer.
            clock[0] += 1 if step > 1 else 7
            shows.update({**SECOND, "step": step, "loss": 5 - step / 10})
            if step % 12 == 0:
                shows.evaluation({"step": step, "valid_loss": 3 - step / 100, **SCORES})
    lines = shown(console)
    begins = ["update 1/25 ", "update 11/25 ", "update 12: ", "update 21/25 ", "update 24: "]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=False)] == begins
    # What ends it is the last evaluation.
    assert len(lines) == 5
    assert re.fullmatch(r"update 1/25  loss 4.900  lr 0.01  [\d.,]+ [GM]iB used", lines[0])
    assert "loss 3.900  lr 0.01  400 tokens/s  0:00:14 left" in lines[1]
    assert "loss 2.900  validation 2.880  lr" in lines[3]
    found = "validation loss 2.8800 ± 0.2500, perplexity 7.40, 2.9000 bits per byte"
    assert lines[2] == f"update 12: {found}"
    assert lines[4].endswith("bits per byte, the best so far")
    assert not re.search("nan|None", "".join(lines))


def test_there_is_no_loss_before_the_first_one(clock):
    shows = Progress(start=4, steps=9, console=plain())
    with shows.doing("compiling"):
        clock[0] += 75
        text = "  ".join(part.text for part in shows.parts() if part.text)
    assert re.fullmatch(r"update 4/9  compiling 0:01:15  [\d.,]+ [GM]iB used", text)


def test_the_time_left_is_told_after_some_updates_and_without_the_first(clock):
    shows = Progress(start=0, steps=100, console=plain())
    left = []
    for step in range(1, 6):
        clock[0] += 30 if step == 1 else 0.9
        shows.update({**SECOND, "step": step, "seconds": 0.9})
        left += [part.text for part in shows.parts() if part.text.endswith((" left", "tokens/s"))]
    assert left == ["444 tokens/s", "0:01:26 left", "444 tokens/s", "0:01:26 left"]


def test_the_speed_is_of_the_last_updates_that_take_long_enough():
    rng = np.random.default_rng(0)
    times = rng.exponential(0.05, 400)
    speed = Speed(1.0)
    assert speed.add(8, 30.0) == pytest.approx(8 / 30)
    found = [speed.add(8, each) for each in times]
    for end in range(1, 401):
        last = next((n for n in range(1, end + 1) if times[end - n : end].sum() >= 1), end)
        assert found[end - 1] == pytest.approx(8 * last / times[end - last : end].sum())
    # One that takes longer is by itself.
    assert speed.add(8, 2.0) == pytest.approx(4.0)


def test_an_evaluation_of_a_single_row_has_no_error():
    record = {"step": 1, "valid_loss": 2.0, **SCORES, "standard_error": math.nan}
    assert progress.scores(record).startswith("validation loss 2.0000, perplexity")


def test_what_a_device_says_of_its_memory_is_shown(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30, "bytes_in_use": 5}

    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device()])
    assert Progress(start=0, steps=1, console=plain()).parts()[-1].text == "3.00 GiB used"


def test_the_parts_that_matter_most_are_those_that_fit():
    parts = [Part(0, 4), Part(3, 6), Part(1, 2), Part(2, 5)]

    def best(width):
        """Of all sets that fit the one that has the most important parts, one after the other."""
        ranked = sorted(parts, key=lambda part: part.rank)
        sets = itertools.product([True, False], repeat=4)
        for taken in sorted(sets, reverse=True):
            kept = [part for part in parts if taken[ranked.index(part)]]
            if len("  ".join("x" * part.width for part in kept)) <= width:
                return kept
        raise AssertionError

    for width in range(4, 40):
        assert fitting(parts, width) == best(width)
    assert fitting(parts, 3) == parts[:1]


@pytest.mark.parametrize("width", [40, 60, 100, 160])
def test_everything_fits_a_terminal_and_stays_in_its_place(clock, width, monkeypatch):
    console = plain(force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "memory_used", lambda: clock[0] * 1e6)
    with Progress(start=0, steps=1200, console=console) as shows:
        shows.say("a text of many words " * 9)
        with shows.doing("compiling"):
            clock[0] += 75
            shows._live.refresh()
        for step in (1, 9, 10, 99, 100, 999, 1000):
            clock[0] += step / 4
            speed = {"tokens_per_second": 99 * step, "seconds": 400 / 99 / step, "mfu": step / 2000}
            shows.update({**SECOND, "step": step, "lr": 0.1 / step, **speed})
            shows._live.refresh()
            if step in (10, 100):
                with shows.doing("evaluating"):
                    shows._live.refresh()
                shows.evaluation({"step": step, "valid_loss": 3 - step / 1e3, **SCORES})
                shows._live.refresh()
    text = re.sub(r"\x1b\[[\d?]*[A-Za-z]", "", console.file.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) <= width
    shown = [line for line in lines if re.search(r"update [\d,]+/1,200  +(compiling|loss)", line)]
    assert re.search(r"update 0/1,200  compiling 0:01:15", shown[0])
    assert any("evaluating" in line for line in shown) == (width > 40)
    assert re.search(r"update 10: validation loss 2\.99", text)
    # Wherever a word is shown, it begins in the same column.
    words = {"update", "loss", "validation", "lr"}
    columns = {word: {line.find(word) for line in shown[1:]} - {-1} for word in words}
    assert all(len(found) < 2 for found in columns.values())
    # What is shown once is not left out again, but for what gives way to an evaluation.
    words |= {"left", "tokens/s", "MFU", "used"}
    there = {word for word in words if any(word in line for line in shown[1:])}
    assert len(there) == {40: 3, 60: 4, 100: 7, 160: 8}[width]
    assert all(word in shown[-1] for word in there)
    assert {"update", "loss"} <= there
    assert ("left" in there) == (width > 40)
    assert ("━" in shown[-1]) == (width == 160)


def test_quiet_shows_nothing(clock):
    for console in (plain(), plain(force_terminal=True)):
        with Progress(start=0, steps=2, quiet=True, console=console) as shows:
            shows.say("text")
            shows.update({"step": 1, **SECOND})
            shows.evaluation({"step": 1, "valid_loss": 3.0, **SCORES})
        assert console.file.getvalue() == ""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The texts of the documents of a file, and the file."""
    path = write_text(tmp_path_factory.mktemp("text"))
    with open(path) as file:
        return [json.loads(line)["text"] for line in file], path


@pytest.mark.parametrize(("packing", "steps"), [(True, 700), (True, 1), (False, 700)])
def test_the_header_counts_documents_tokens_and_epochs(texts, tmp_path, packing, steps):
    documents, _ = texts
    write_tokens(tmp_path / "tokens", [documents], train_tokenizer([], "bytes", eos=True))
    settings = {"tokenizer": None, "eval_tokens": None, "packing": packing, "steps": steps}
    config = tiny(str(tmp_path / "tokens"), **settings).resolve()
    data = open_dataset(config)
    data.train.close()
    text = header(config, config.shape(257), data, 0)
    found = re.search(
        r"tokens: ([\d,]+) documents, ([\d,]+) tokens to train on \(([\d.]+) epochs\), and "
        r"([\d,]+) to validate on",
        text,
    )
    trained, tokens, valid = (int(found[i].replace(",", "")) for i in (1, 2, 4))
    sizes = [len(text.encode()) + 1 for text in documents]
    assert tokens == sum(sizes[:trained])
    rest = sizes[trained:]
    assert valid == (sum(rest) if packing else sum(min(size - 1, 20) for size in rest))
    # An epoch has each row once.
    rows = tokens // 20 if packing else trained
    assert float(found[3]) == pytest.approx(steps * 8 / rows, rel=0.05)
    assert f"{steps * 8 * 20:,} in all" in text


def test_the_header_is_of_the_real_model_and_of_files_says_what_it_can(texts):
    config = tiny(texts[1], preset="9m", steps=1).resolve()
    data = open_dataset(config)
    data.train.close()
    text = header(config, config.shape(257), data, 0)
    kernels = 2 * (4 * 16 * 16 + 3 * 16 * 40)
    count = kernels + 2 * 257 * 16 + 5 * 16
    assert f"LLaMA of {count:,} parameters: hidden 16, 2 layers, 2 heads, vocabulary 257;" in text
    assert not any(re.search(rf"\b{name}\b", text) for name in PRESETS)
    kib = os.path.getsize(texts[1]) / 1024
    told = f"{texts[1]}: 1 file of {kib:.1f} KiB, whose tokens are not counted, and 200 to validate"
    assert told in text
    config = dataclasses.replace(config, data="hf:name")
    assert "hf:name: read from the hub, whose tokens" in header(config, config.shape(257), data, 0)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000267, "0.00027"), (0.0349, "0.035"), (1.04, "1.0"), (27.3, "27"), (1234.5, "1,234")],
)
def test_two_digits_that_count_are_shown(value, shown):
    assert significant(value) == shown


def test_a_resumed_run_says_from_where(texts):
    config = tiny(texts[1], steps=1200, resume=True, out="somewhere").resolve()
    data = open_dataset(config)
    data.train.close()
    said = {start: header(config, config.shape(257), data, start) for start in (0, 1100, 1200)}
    ends = [text.splitlines()[-1] for text in said.values()]
    assert ends == [
        *("No checkpoint yet: from 0", "Resuming after update 1,100"),
        "Already finished after update 1,200",
    ]
