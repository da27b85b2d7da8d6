"""What a run shows while it goes on: lines without a terminal, a bar in one, and a header."""

import io
import json
import math
import re

import pytest
from flax_llama_runs import tiny, write_text
from rich.console import Console

from examples.flax_llama import progress
from examples.flax_llama.config import PRESETS
from examples.flax_llama.progress import Progress, fitting, header
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.tokens import write_tokens
from examples.flax_llama.train import open_dataset

SECOND = {"loss": 2.5, "lr": 0.01, "tokens": 400, "tokens_per_second": 400.0}
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
        shows.begin()
        for step in range(1, 26):
            clock[0] += 1
            shows.update({**SECOND, "step": step, "loss": 5 - step / 10})
            if step % 12 == 0:
                shows.evaluation({"step": step, "valid_loss": 3 - step / 100, **SCORES})
    lines = shown(console)
    begins = ["update 1/25 ", "update 11/25 ", "update 12: ", "update 21/25 ", "update 24: "]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=False)] == begins
    assert len(lines) == 6
    assert "loss 3.900  lr 0.01  400 tokens/s  0:00:14 left" in lines[1]
    assert "validation 2.880" in lines[3]
    assert re.fullmatch(r"update 25/25  loss 2.500 .* 0:00:00 left  .* [GM]iB used", lines[5])
    found = "validation loss 2.8800 ± 0.2500, perplexity 7.40, 2.9000 bits per byte"
    assert lines[2] == f"update 12: {found}"
    assert lines[4].endswith("bits per byte, the best so far")
    assert not re.search("nan|None", "".join(lines))


def test_there_is_no_loss_before_the_first_one(clock):
    shows = Progress(start=4, steps=9, console=plain())
    with shows.doing("compiling"):
        clock[0] += 75
        text = "  ".join(part for part, _ in shows.parts())
    assert re.fullmatch(r"update 4/9  compiling 0:01:15  [\d.,]+ [GM]iB used", text)


def test_an_evaluation_of_a_single_row_has_no_error():
    record = {"step": 1, "valid_loss": 2.0, **SCORES, "standard_error": math.nan}
    assert progress.scores(record).startswith("validation loss 2.0000, perplexity")


def test_what_a_device_says_of_its_memory_is_shown(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30, "bytes_in_use": 5}

    monkeypatch.setattr(progress.jax, "local_devices", lambda: [Device()])
    assert Progress(start=0, steps=1, console=plain()).parts()[-1][0] == "3.00 GiB used"


def test_the_parts_that_matter_most_are_those_that_fit():
    parts = [("aaaa", 0), ("bbbbbb", 3), ("cc", 1), ("ddddd", 2)]

    def best(width):
        """The longest run of the most important ones that fits, tried one by one."""
        ranked = sorted(parts, key=lambda part: part[1])
        for count in range(len(ranked), 0, -1):
            text = "  ".join(text for text, _ in parts if (text, _) in ranked[:count])
            if len(text) <= width or count == 1:
                return text
        raise AssertionError

    assert {fitting(parts, width) for width in range(40)} == {best(width) for width in range(40)}
    for width in range(40):
        assert fitting(parts, width) == best(width)


@pytest.mark.parametrize("width", [40, 60, 120])
def test_everything_fits_a_terminal_however_narrow(clock, width):
    console = plain(force_terminal=True, width=width, color_system=None)
    with Progress(start=0, steps=4, console=console) as shows:
        shows.say("a text of many words " * 9)
        shows.begin()
        for step in range(1, 4):
            clock[0] += 1
            shows.update({"step": step, **SECOND, "mfu": 0.4})
            shows.evaluation({"step": step, "valid_loss": 3 - step / 100, **SCORES})
            shows._live.refresh()
    text = re.sub(r"\x1b\[[\d?]*[A-Za-z]", "", console.file.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert max(map(len, lines)) <= width
    last = [line for line in lines if "update 3/4" in line][-1]
    assert "left" in last
    assert ("MFU" in last) == ("━" in last) == (width == 120)
    assert re.search(r"update 3: validation loss 2\.97", text)


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


@pytest.mark.parametrize("packing", [True, False])
def test_the_header_counts_documents_tokens_and_epochs(texts, tmp_path, packing):
    documents, _ = texts
    write_tokens(tmp_path / "tokens", [documents], train_tokenizer([], "bytes", eos=True))
    settings = {"tokenizer": None, "eval_tokens": None, "packing": packing, "steps": 700}
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
    assert float(found[3]) == pytest.approx(700 * 8 / rows, abs=0.005)


def test_the_header_is_of_the_real_model_and_of_files_says_what_it_can(texts):
    config = tiny(texts[1], preset="9m", steps=1).resolve()
    data = open_dataset(config)
    data.train.close()
    text = header(config, config.shape(257), data, 0)
    kernels = 2 * (4 * 16 * 16 + 3 * 16 * 40)
    count = kernels + 2 * 257 * 16 + 5 * 16
    assert f"LLaMA of {count:,} parameters: hidden 16, 2 layers, 2 heads, vocabulary 257;" in text
    assert not any(re.search(rf"\b{name}\b", text) for name in PRESETS)
    assert "tokens to train on are read as training goes on, and 200 to validate on" in text


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
