"""The planner: its estimate, what fits and what to change, the compiled step, and the picture."""

import dataclasses
import os
import re
import shlex
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
from flax_llama_runs import write_text
from matplotlib.text import Text

from examples.flax_llama import compile_step as compiling
from examples.flax_llama import devices, fit, memory, memory_chart, plan, plan_text, remedies
from examples.flax_llama.attention import attention_implementation
from examples.flax_llama.compile_step import Compiled, TooLarge, compile_step, standard_error
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.data import open_data, vocabulary_size
from examples.flax_llama.devices import DEVICES, GIB, Device, Here, device_named
from examples.flax_llama.fit import Fit, Need, Question
from examples.flax_llama.memory import estimate
from examples.flax_llama.methods import ADAMW_8BIT, IN_GALORE
from examples.flax_llama.optimizers import OPTIMIZERS, make_optimizer
from examples.flax_llama.step import State, initial_params
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.tokens import write_tokens
from examples.flax_llama.topology import CUDA_PLUGINS, installed
from examples.flax_llama.train import from_command_line

VOCAB = 300
UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}

HERE = Here("here", "this one", 16 * GIB, "made up", platform="cpu")
# A run that a consumer's card has room for.
LARGE = [
    "--preset",
    "7b",
    "--vocab-size",
    "32000",
    "--optimizer",
    "q_galore_adamw",
    "--layerwise",
    "--remat",
    "--batch",
    "16",
    "--dtype",
    "bfloat16",
    "--param-dtype",
    "bfloat16",
    "--attention",
    "xla",
]


def config(**settings):
    shape = {"hidden": 32, "intermediate": 48, "layers": 3, "heads": 2, "rank": 8}
    return Config(**shape | {"batch": 4, "seq": 16, **settings}).resolve()


def run(capsys, *words):
    """The exit status of the command for a large run with other settings, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plan", *LARGE, *words])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
    return stopped.value.code, capsys.readouterr().out


def table_of(printed):
    """The rows of the table, each as {name: (number, unit)}."""
    rows = re.findall(r"^(\w+) +([\d.,]+) (\w?i?B)\b", printed, re.MULTILINE)
    return {name: (float(number.replace(",", "")), unit) for name, number, unit in rows}


def refusal(capsys, *words):
    """What the command says of settings that cannot work, before it plans anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plan", *words])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    return printed.err


GIVEN = (
    # With GaLore there is an accumulator, but not with clipping.
    {"layerwise": True, "accumulate": 2, "clip": 0.0},
    {"param_dtype": "bfloat16", "layerwise": True, "accumulate": 2, "clip": 1.0},
)


# The other presets in 8 bits are made in the same way.
STAYS = [
    pytest.param({}, name, marks=[pytest.mark.ci] * (name in ADAMW_8BIT[1:-1]))
    for name in OPTIMIZERS
]
# With one of the others each, in turn.
STAYS += [
    pytest.param(GIVEN[i % len(GIVEN)], name, marks=pytest.mark.ci)
    for i, name in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("given", "name"), STAYS)
def test_what_stays_is_what_a_state_has(given, name):
    # The layers' kernels, which are updated so, are not those that LoRA trains.
    given = given | ({"layerwise": False} if name in ("lora", "relora") else {})
    settings = config(optimizer=name, **given)

    def initial_state():
        params = initial_params(settings, settings.shape(VOCAB))
        return State(params, make_optimizer(settings).init(params))

    state = jax.eval_shape(initial_state)
    estimated = estimate(settings, VOCAB)
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) for tree in state]
    assert estimated.arguments == sum(sizes)
    assert estimated.weights == sizes[0]
    assert estimated.total == sum(estimated.parts.values())
    # Random bases are made again when they are needed.
    keeps_bases = name in IN_GALORE and settings.projector != "gaussian"
    assert bool(estimated.projectors) == keeps_bases


def seven_billion(**settings):
    shared = {"batch": 16, "dtype": "bfloat16", "param_dtype": "bfloat16", "remat": True}
    return Config(**{"preset": "7b"} | shared | settings).resolve()


@pytest.mark.parametrize("batch", [16, 32])
@pytest.mark.parametrize("layerwise", [True, False])
def test_the_inputs_of_all_blocks_are_kept(batch, layerwise):
    settings = seven_billion(layerwise=layerwise, batch=batch)
    moments = memory.step_layerwise if layerwise else memory.step
    # 32 layers of 256 tokens of 4096 numbers of 2 bytes are 64 MiB.
    assert moments(settings, settings.shape(32_000))["block"][1] == batch * 2**26


def test_layerwise_has_the_gradients_of_one_layer_and_with_clipping_of_the_embedding():
    shape = seven_billion().shape(32_000)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    for clip in ({}, {"clip": 0.0}, {"clip_by": "layer"}):
        moments = memory.step_layerwise(seven_billion(layerwise=True, **clip), shape)
        assert moments["block"][0] == 2 * (layer + (not clip) * 32_000 * 4096)
    whole = memory.step(seven_billion(), shape)["block"][0]
    assert whole == 2 * (32 * (layer + 2 * 4096) + 2 * 32_000 * 4096 + 4096)
    # Micro-batches are added up in float32.
    summed = memory.step(seven_billion(accumulate=2), shape)["block"][0]
    assert summed == 3 * whole


@pytest.mark.parametrize(
    ("settings", "fullest"),
    [
        ({"layerwise": True, "optimizer": "adamw"}, "block"),
        # Its vocabulary makes the head's gradient larger than that of a layer.
        (
            {"preset": "llama-3.1-8b", "layerwise": True, "optimizer": "adamw", "clip": 0.0}
            | {"batch": 1, "seq": 8},
            "head",
        ),
        ({"optimizer": "adamw"}, "block"),
        # The update of a stack of kernels is more than what a block's backward pass needs.
        ({"optimizer": "q_galore_adamw"}, "update"),
    ],
)
def test_the_fullest_moment_counts(settings, fullest):
    settings = seven_billion(**settings)
    moments = memory.step_layerwise if settings.layerwise else memory.step
    found = moments(settings, settings.shape(32_000))
    estimated = estimate(settings, 32_000)
    assert estimated.moment == fullest
    assert estimated.temporaries == sum(found[fullest]) == max(map(sum, found.values()))


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({}, {"layerwise": True}),
        ({"remat": False}, {"remat": True}),
        ({"dtype": "float32", "layerwise": True}, {"layerwise": True}),
        ({"int8_weights": False}, {}),
        ({"attention": "xla", "layerwise": True}, {"attention": "cudnn", "layerwise": True}),
        ({"optimizer": "adamw"}, {"optimizer": "galore_adamw"}),
        ({"optimizer": "apollo_adamw"}, {"optimizer": "apollo_mini_adamw"}),
        ({"optimizer": "fira_adamw"}, {"optimizer": "galore_adamw"}),
        ({"batch": 32, "layerwise": True}, {"batch": 31, "layerwise": True}),
    ],
)
def test_settings_that_need_less(more, less):
    q_galore = {"optimizer": "q_galore_adamw"}
    totals = [estimate(seven_billion(**q_galore | s), 32_000).total for s in (more, less)]
    assert totals[0] > totals[1]


def test_the_accumulator_of_micro_batches_stays_and_what_leaves_it_out_is_told(capsys):
    # Of 32 000 x 4096 entries twice, of the layers' matrices at rank 1024, and norms, in float32.
    entries = 2 * 32_000 * 4096 + 32 * 1024 * (4 * 4096 + 3 * 11008) + 65 * 4096
    kept, without = (
        estimate(seven_billion(optimizer="q_galore_adamw", layerwise=True, **s), 32_000).arguments
        for s in ({"accumulate": 2, "clip": 0.0}, {})
    )
    assert kept - without == pytest.approx(4 * entries, rel=1e-3)
    words = "--device rtx4060ti_16gb --accumulate 2 --clip 0"
    status, printed = run(capsys, *words.split())
    assert status == 3
    fitting = printed.partition("What fits:")[2].partition("What ")[0]
    for change in ("--accumulate 1", "--clip 1"):
        assert re.search(f"^  {change} +[0-9.]+ GiB", fitting, re.MULTILINE)
    assert "Inputs are those of all 2 micro-batches" in printed
    assert "between refreshes, where GaLore averages" in printed
    adamw = run(capsys, "--optimizer", "adamw", "--accumulate", "2", "--device", "h100_80gb")[1]
    assert "all 2 micro-batches" in adamw
    assert "between refreshes" not in adamw


def test_seven_billion_parameters_are_planned_in_a_second():
    # The first trace of anything takes longer.
    estimate(config(optimizer="q_galore_adamw"), VOCAB)
    memory.held.cache_clear()
    start = time.process_time()
    estimate(seven_billion(optimizer="q_galore_adamw", layerwise=True), 32_000)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("most", [0, 1, 2, 7, 8, 1000])
def test_the_largest_batch_is_the_last_that_fits(accumulate, most):
    found = fit.largest_batch(config(batch=6, accumulate=accumulate), lambda c: c.batch <= most)
    assert found == max(n for n in range(0, most + 1) if n % accumulate == 0)


def test_the_command_says_how_much_room_there_is(capsys):
    status, printed = run(capsys, "--device", "rtx4060ti_16gb")
    assert status == 0
    sizes = table_of(printed)
    parts = ("weights", "projectors", "moments", "gradients", "inputs", "working")
    in_gib = {name: number * UNITS[unit] / GIB for name, (number, unit) in sizes.items()}
    assert sum(in_gib[part] for part in parts) == pytest.approx(in_gib["total"], abs=0.03)
    # As the README has it.
    stays = in_gib["stays"]
    assert sizes["stays"] == (10.65, "GiB")
    pattern = r"estimate: ([\d.]+) GiB of ([\d.]+) GiB: fits, with at least ([\d.]+) GiB to spare"
    total, usable, spare = map(float, re.search(pattern, printed).groups())
    low, high = memory.SPREAD["cuda"]
    most = stays + high * (total - stays)
    assert (usable, spare) == (15.02, pytest.approx(usable - most, abs=0.02))
    (least,) = re.findall(r"^\(([\d.]+) GiB to", printed, re.MULTILINE)
    assert float(least) == pytest.approx(stays + low * (total - stays), abs=0.02)


@pytest.mark.parametrize(("batch", "unit"), [(1, "KiB"), (4096, "GiB")])
def test_no_part_is_shown_as_nothing(batch, unit):
    found = estimate(config(optimizer="sgd", batch=batch, seq=64), VOCAB)
    shown = table_of(plan_text.table(found, None))
    for name, count in found.parts.items():
        assert (name in shown) == (count > 0), name
        if count:
            number, own = shown[name]
            assert number * UNITS[own] == pytest.approx(count, rel=0.05), name
    assert shown["total"][1] == unit
    # All else is in one unit with the total, where it can be read in it.
    assert shown["moments"] == (4, "B")
    assert {own for name, (_, own) in shown.items() if name in ("inputs", "passes")} <= {unit}


def test_what_fits_what_is_close_and_what_does_not():
    need = Need(stays=100, passes=100, spread=(0.9, 1.2))
    assert (need.least, need.total, need.most) == (190, 200, 220)
    device = dataclasses.replace(HERE, context=0)
    rooms = {189: Fit.NOT, 190: Fit.CLOSE, 219: Fit.CLOSE, 220: Fit.SURE}
    for room, expected in rooms.items():
        assert need.fit(dataclasses.replace(device, memory=room)) is expected


@pytest.mark.parametrize(
    ("room", "status", "words"),
    [(1.31, 0, "fits, with at least"), (1.1, 4, "close: try it"), (0.89, 3, "does not fit, by")],
)
def test_the_exit_status_says_how_surely_it_fits(capsys, room, status, words):
    found = estimate(config(batch=64, seq=256), 2048)
    context = 0.5
    size = (found.arguments + room * found.temporaries) / GIB + context
    shape = "--hidden 32 --intermediate 48 --layers 3 --heads 2 --rank 8 --batch 64 --seq 256"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plan", *shape.split(), "--memory", f"{size}"])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
    printed = capsys.readouterr().out
    assert (stopped.value.code, words in printed) == (status, True)
    assert ("To train so" in printed) == (status != 3)
    assert ("--layerwise" in printed) == (status != 0)


ADVISED = [
    pytest.param(
        "--optimizer adamw --no-layerwise --no-remat --device rtx4060ti_16gb",
        marks=pytest.mark.ci,
    ),
    "--batch 64 --device tpu_v5e",
    "--accumulate 2 --clip 0 --device rtx4060ti_16gb",
    pytest.param(
        "--optimizer galore_adamw_8bit --device rtx4060ti_16gb --seq 2048", marks=pytest.mark.ci
    ),
    "--preset 60m --no-layerwise --no-remat --batch 512 --optimizer adamw --device rtx3060_12gb",
    pytest.param(
        "--optimizer galore_adamw --dtype float32 --device rtx4090_24gb",
        marks=[pytest.mark.ci, pytest.mark.long("the state of many changes, one by one")],
    ),
    pytest.param(
        "--optimizer ldadamw --residual error_feedback --rank 0.125 --device rtx4090_24gb",
        marks=[pytest.mark.ci, pytest.mark.long("the state of many changes, one by one")],
    ),
]


# Neither here nor below has a version of JAX a part in what is suggested.
@pytest.mark.plain
@pytest.mark.parametrize("words", ADVISED)
def test_what_is_said_to_fit_does(capsys, words):
    status, printed = run(capsys, *words.split())
    assert status == 3
    as_asked = float(re.search(r"^estimate: ([\d.]+) GiB of", printed, re.MULTILINE)[1])
    groups = re.split(r"^(What [^:]*:|To train).*$", printed, flags=re.MULTILINE)
    expected = {
        "What fits:": Fit.SURE,
        "What is close, and worth a try:": Fit.CLOSE,
        "What needs less, but not enough by itself:": Fit.NOT,
    }
    told = []
    for title, lines in zip(groups[1::2], groups[2::2], strict=True):
        for flags, size in re.findall(r"^  (--.*?) +([\d.]+) GiB", lines, re.MULTILINE):
            asked = plan.from_command_line([*LARGE, *words.split(), *shlex.split(flags)])
            question = Question(asked.run, 2048, device_named(asked.device))
            assert question.fit() is expected[title], flags
            assert f"{question.need().total / GIB:.2f}" == size
            # No suggestion changes next to nothing.
            assert float(size) <= 0.99 * as_asked + 0.01
            told.append((expected[title], flags, asked))
    # The first fits, also as a whole command.
    found, flags, asked = told[0]
    assert found is Fit.SURE
    assert f"To train with {flags}:" in printed
    (command,) = re.findall(r"train (--.*[^:])$", printed, re.MULTILINE)
    assert from_command_line(shlex.split(command)) == asked.run
    assert run(capsys, *words.split(), *shlex.split(flags))[0] == 0


def test_what_leaves_training_as_it_is_comes_first(capsys):
    words = "--preset 60m --no-layerwise --no-remat --batch 512 --optimizer adamw"
    status, printed = run(capsys, *words.split(), "--device", "rtx3060_12gb")
    assert status == 3
    (line,) = re.findall(r"^What fits:\n(.*)$", printed, re.MULTILINE)
    assert line.startswith("  --")
    assert line.endswith("trains the same")


@pytest.mark.ci
@pytest.mark.plain
def test_what_cannot_fit_is_told_so_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr(Device, "mesh", lambda self: None)
    monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
    # So many tokens that it is not enough to have the layers in the memory of the machine.
    device = "--device rtx3070_8gb --batch 64 --seq 1024"
    words = f"--preset 13b {device} --optimizer adamw --no-layerwise --compile"
    status, printed = run(capsys, *words.split())
    assert status == 3
    assert "XLA: not compiled, since" in printed
    (names,) = re.findall(
        r"^Nothing that was tried is enough, in any combination: (.*)$", printed, re.M
    )
    for name in (
        "--layerwise",
        "--moment-dtype bfloat16",
        "--optimizer q_galore_adamw",
        "lower ran",
    ):
        assert f"{name}" in names
    # What needs least of it is that much too large.
    found = re.search(r"^Of all that this needs least, (.*) of (.*):\n  (--.*)$", printed, re.M)
    least, usable, flags = found.groups()
    assert (
        f"estimate: {least} of {usable}: does not fit"
        in run(capsys, *words.split(), *flags.split())[1]
    )
    assert "What fits" not in printed
    # The least sequences are not enough, and what they need is said.
    (size,) = re.findall(r"^  --batch 1 +(.*) GiB$", printed, re.MULTILINE)
    assert f"estimate: {size} GiB of" in run(capsys, *words.split(), "--batch", "1")[1]
    assert "no batch surely fits, not even 1" in run(capsys, *words.split(), "--sweep")[1]


def test_advice_goes_by_what_the_compiler_found():
    given = {"optimizer": "q_galore_adamw", "layerwise": True, "attention": "xla"}
    settings, device = seven_billion(**given), device_named("rtx5090_32gb")
    found = estimate(settings, 32_000)
    high = memory.SPREAD_OF_PLAN[1]
    # So much that it does not fit by a byte, at its most.
    more = round((device.usable - found.arguments) / high) - found.temporaries + 1
    question = Question(settings, 32_000, device, more=more)
    assert question.fit() is Fit.CLOSE
    (batch,) = [c.given.batch for c in remedies.advice(question) if c.flags.startswith("--batch")]
    for size, expected in ((batch, Fit.SURE), (batch + 1, Fit.CLOSE)):
        assert question.fit(dataclasses.replace(settings, batch=size)) is expected
    assert question.need().passes == found.temporaries + more


@pytest.mark.parametrize("batch", [64, 3])
def test_a_sweep_takes_the_largest_batch_whatever_is_given(capsys, batch):
    words = ["--device", "h100_80gb", "--batch", str(batch), "--sweep"]
    status, printed = run(capsys, *words)
    assert status == 0
    found = re.search(r"largest batch that fits: (\d+); up to (\d+) it is close", printed)
    sure, close = map(int, found.groups())
    for size, status in ((sure, 0), (sure + 1, 4), (close, 4), (close + 1, 3)):
        assert run(capsys, "--device", "h100_80gb", "--batch", str(size))[0] == status


@pytest.mark.parametrize("refused", [0, 12])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiled_sweep_ends_at_the_largest_batch_that_fits(monkeypatch, refused, accumulate):
    """Here each sequence takes 1 GiB and all else 2, where more than some are not refused.

    The device has room for nine, each taken for 7 % more.
    """

    def compile_step(config, vocab_size, device):
        if refused and config.batch >= refused:
            raise TooLarge("too large")
        size = config.batch * GIB
        return Compiled(2 * GIB, 2 * GIB, 2 * GIB, size, 2 * GIB + size, 0.0, ())

    monkeypatch.setattr(plan, "compile_step", compile_step)
    given = config(batch=16, accumulate=accumulate)
    device = dataclasses.replace(HERE, memory=2 * GIB + round(9 * 1.07 * GIB) + 1, context=0)
    found, compiled = plan.compiled_to_fit(Question(given, VOCAB, device))
    batch = found.given.batch
    assert (batch, compiled.peak) == {1: (9, 11 * GIB), 2: (8, 10 * GIB)}[accumulate]
    device = dataclasses.replace(HERE, memory=2 * GIB, context=0)
    assert plan.compiled_to_fit(Question(given, VOCAB, device))[1] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device a100", "--device a100: expected one of t4_16gb, rtx3060_12gb, rtx3070_8gb"),
        ("--memory 0.5", "--memory 0.5: expected the GiB that a device has, more than 0.5."),
        ("--preset 8b", "--preset 8b: expected one of 9m"),
        ("--optimizer adam", "--optimizer adam: expected one of adamw"),
        ("--attention cudnn --device tpu_v5e", "--attention cudnn needs an NVIDIA GPU of"),
        (
            "--attention cudnn --device t4_16gb",
            "8.0 or more and --dtype bfloat16; here are NVIDIA T4",
        ),
        (
            "--attention cudnn --dtype float32 --device l4_24gb",
            "--attention cudnn needs --dtype bfloat16; here are NVIDIA L4 24 GB",
        ),
        ("--compile --device rtx3060_12gb", "no description of rtx3060_12gb here. It has those of"),
        ("--tokenizer none.json", "--tokenizer none.json: there is no such file"),
        ("--data none.txt", "error: --data none.txt does not exist."),
        ("--valid-data none.txt", "error: --valid-data none.txt does not exist."),
        ("--seq 1", "error: --seq 1: expected at least 2. Attention to one token has no choice"),
        ("--resume --out no_run", "--out no_run holds no run to resume: leave out --resume"),
        ("--init-from no_run", "no_run is not the directory of a run"),
        ("--batch 3 --accumulate 2", "--batch 3 does not divide into --accumulate 2"),
        ("--vocab-size 0", "--vocab-size 0"),
        (
            "--optimizer apollo_adamw --transport rotate",
            "error: --optimizer apollo_adamw --transport rotate: --transport rotate is for bases "
            "of orthonormal vectors; those of the projector gaussian are not. What would work is "
            "--transport keep, --transport reset, --transport project.\n",
        ),
        ("--picture no_such_directory/memory.png", "memory.png cannot be written"),
        ("--picture memory.pgn", "--picture memory.pgn: expected a name that ends in one of"),
        ("--picture memory", "--picture memory: expected a name that ends in one of"),
    ],
)
def test_settings_that_cannot_work(capsys, words, message):
    assert message in refusal(capsys, *words.split())


@pytest.mark.parametrize(("device", "package"), [("tpu_v6e", "libtpu"), ("h100_80gb", "cuda13")])
def test_a_missing_compiler_is_named(capsys, monkeypatch, device, package):
    monkeypatch.setattr("examples.flax_llama.topology.installed", lambda modules: False)
    message = refusal(capsys, "--device", device, "--compile")
    assert f"Compiling for {device} needs pip install" in message
    assert package in message
    assert run(capsys, "--device", device)[0] == 0


def test_the_memory_of_a_device_can_be_given(capsys):
    """As a device that is known with as much memory, and any other GPU, too."""
    known = device_named("rtx4090_24gb")
    expected = run(capsys, "--device", known.name)[1]
    size = f"{known.memory / GIB}"
    for words in (("--memory", size), ("--memory", size, "--device", "h100_80gb")):
        status, printed = run(capsys, *words)
        assert status == 0
        assert "GiB (as given by --memory), 0.50 GiB of them" in printed
        assert printed.partition("\n\n")[2] == expected.partition("\n\n")[2]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_device_is_the_one_that_is_here(capsys, monkeypatch, platform):
    class Found:
        compute_capability = "9.0"

        def __init__(self):
            self.platform = platform
            self.device_kind = {"gpu": "NVIDIA H100", "tpu": "TPU v4", "cpu": "cpu"}[platform]

        def memory_stats(self):
            return None if platform == "cpu" else {"bytes_limit": 30 * GIB}

    monkeypatch.setattr(jax, "devices", lambda: [Found()])
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 2**21))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    # A GPU's is what JAX allows itself of it, a TPU's all there is; a CPU's that of the machine.
    expected = {
        "cpu": "This machine's CPU: 8.00 GiB (all that this machine has; --device plans for",
        "gpu": "NVIDIA H100: 40.00 GiB (read from it), 0.50 GiB of them for the driver",
        "tpu": "TPU v4: 30.00 GiB (what JAX may use of it)\n",
    }[platform]
    words = ["--preset", "9m", "--no-layerwise", "--optimizer", "adamw", "--attention", "auto"]
    status, printed = run(capsys, *words)
    assert status == 0
    assert expected in printed
    assert ("attention of cuDNN" in printed) == (platform == "gpu")
    low, high = memory.SPREAD[{"gpu": "cuda"}.get(platform, platform)]
    assert f"needed {low:g} to {high:g} times" in printed


@pytest.mark.parametrize("name", [d.name for d in DEVICES.values() if d.described_by])
def test_xla_is_told_the_memory_that_is_usable(name):
    device = device_named(name)
    (size,) = re.findall(r"^  device_memory_size: (\d+)$", device.target(), re.MULTILINE)
    # It takes four fifths.
    assert 0.8 * int(size) == pytest.approx(device.usable, abs=1)
    assert device.usable < device.memory


def test_each_device_has_nearly_the_memory_of_its_name_and_says_where_from():
    for device in DEVICES.values():
        named = int(re.findall(r"(\d+) GB$", device.description)[0])
        assert 0.9 * named <= device.memory / GIB <= 1.01 * named, device.name
        assert device.source
        assert (device.capability is None) == (device.platform == "tpu") == bool(device.topology)
    wanted = "3060 3070 3080 3090 4060 4060ti 4070 4070ti 4080 4090 5060ti 5070 5070ti 5080 5090"
    wanted = [f"rtx{number}_" for number in wanted.split()]
    wanted += ["t4_", "l4_", "a10_", "a100_40", "a100_80", "l40s_", "h100_", "h200_", "b200_"]
    wanted += ["tpu_v4", "tpu_v5e", "tpu_v5p", "tpu_v6e"]
    assert not [start for start in wanted if not any(map(lambda n: n.startswith(start), DEVICES))]


def test_the_documentation_has_the_table_of_devices():
    text = (Path(plan.__file__).parent / "README.md").read_text()
    assert devices.markdown() in text


def test_the_documentation_shows_what_is_printed(capsys):
    text = (Path(plan.__file__).parent / "README.md").read_text()
    pattern = r"^```\npython -m examples.flax_llama.plan (.*?[^\\])\n\n(.*?)^```$"
    shown = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    assert len(shown) == 2
    for words, output in shown:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["plan", *shlex.split(words.replace("\\\n", ""))])
            with pytest.raises(SystemExit):
                plan.main()
        assert capsys.readouterr().out == output


def test_a_plan_without_settings_is_of_the_run_without_settings():
    """All of a run's settings are taken, and no default is another."""
    assert plan.from_command_line([]).run == from_command_line([]) == Config()
    given = [
        "--preset",
        "60m",
        "--rank",
        "7",
        "--accumulate",
        "4",
        "--layerwise",
        "--clip",
        "1",
        "--clip-by",
        "layer",
        "--data",
        "x.txt",
        "--steps",
        "3",
    ]
    planned = plan.from_command_line([*given, "--memory", "3"])
    assert (planned.run, planned.memory) == (from_command_line(given), 3.0)


@pytest.mark.parametrize("tokenizer", [None, "bytes", "bpe:300", "saved"])
@pytest.mark.parametrize("data", ["austen", "text", "tokens"])
def test_the_vocabulary_is_that_of_the_run(tmp_path, data, tokenizer):
    if tokenizer == "saved":
        tokenizer = str(tmp_path / "tokenizer.json")
        small = train_tokenizer(["some text"], "bytes", eos=True)
        Path(tokenizer).write_bytes(small.to_bytes())
    if data == "text":
        data = str(write_text(tmp_path))
    if data == "tokens":
        tokenizer, made = None, train_tokenizer(["some text"], "bytes", eos=True)
        write_tokens(tmp_path / "tokens", [["some text"] * 40], made)
        data = str(tmp_path / "tokens")
    if (data, tokenizer) == ("austen", None):
        return  # the next two are of the same code, and that takes a while to train
    found = open_data(data, tokenizer=tokenizer, batch=2, seq=8).tokenizer.vocab_size
    size = vocabulary_size(data, tokenizer)
    assert size == found or (tokenizer is None and found < size == 2048)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--preset 13b --sweep --batch 3",
        "--no-layerwise --remat --optimizer galore_adamw --clip 0.5 --rank 64 --heads 16",
        "--int8-weights False --stochastic-rounding --projector rows --projector-dtype int8",
        "--preset 1b --optimizer adamw --dtype float32 --param-dtype float32 --no-remat",
        "--optimizer q_galore_adamw --accumulate 2 --attention cudnn --refresh periodic",
        "--preset 1b --optimizer fira_adamw_8bit --transport rotate --residual sign --rank 0.5",
        "--data DATA --tokenizer bpe:500 --attention auto --steps 7 --out runs/it --lr 0.1",
    ],
)
def test_the_command_to_train_is_of_what_was_planned(capsys, tmp_path, words):
    words = ["--seq", "128", *words.replace("DATA", write_text(tmp_path)).split()]
    status, printed = run(capsys, "--device", "h100_80gb", *words)
    assert status == 0
    (command,) = re.findall(r"^  (.*)python -m \S*train (.*)$", printed, re.MULTILINE)
    planned = plan.from_command_line([*LARGE, *words]).run
    (batch,) = re.findall(r"largest batch that fits: (\d+)", printed) or [planned.batch]
    wanted = dataclasses.replace(planned, batch=int(batch))
    assert from_command_line(shlex.split(command[1])) == wanted
    # Attention is then what was planned with, on such a device.
    shape = wanted.resolve().shape(32_000)
    assert f"attention of {'cuDNN' if shape.attention != 'xla' else 'XLA'}" in printed
    assert attention_implementation(shape, 9.0, "") == shape.attention.replace("auto", "cudnn")


@pytest.mark.parametrize(("batch", "fraction"), [(1, None), (64, 0.97)])
def test_the_command_allows_jax_the_memory_that_was_planned_with(capsys, batch, fraction):
    device = device_named("rtx4090_24gb")
    status, printed = run(capsys, "--device", device.name, "--batch", str(batch))
    assert status == 0
    found = re.findall(r"^  (?:XLA_PYTHON_CLIENT_MEM_FRACTION=(\S+) )?python", printed, re.M)
    assert found == ["" if fraction is None else str(fraction)]
    assert (fraction or 0.75) * device.memory <= device.usable


@pytest.mark.long("the compiler is asked about a whole update")
def test_the_compiled_step_is_that_of_the_run_and_its_arguments_as_estimated():
    settings = config(optimizer="galore_adamw")
    compiled = compile_step(settings, VOCAB, HERE)
    batch = 4 * 17 * 4 + 4 * 16
    # What diagnostics no step reads is not given to it.
    assert compiled.arguments == pytest.approx(estimate(settings, VOCAB).arguments + batch, abs=99)
    # All of the state is in the memory of the one before; the rest is metrics and a table.
    assert compiled.alias == pytest.approx(compiled.arguments - batch, abs=64)
    assert 0 < compiled.outputs - compiled.alias < 2000
    assert compiled.temporaries > 0
    assert compiled.peak >= compiled.arguments
    assert compiled.rematerializes == ()


def test_figures_stand_beside_the_estimate(capsys, monkeypatch, tmp_path):
    found = Compiled(10 * GIB, 10 * GIB, 10 * GIB, 2 * GIB, 13 * GIB, 5.0, ("Can't reduce",))
    monkeypatch.setattr(Device, "mesh", lambda self: None)
    monkeypatch.setattr(plan, "compile_step", lambda *_: found)
    status, printed = run(capsys, "--device", "rtx4060ti_16gb", "--compile")
    assert status == 0
    pattern = r"^(\w+) +[\d.]+ GiB +([\d.]+ GiB)"
    columns = dict(re.findall(pattern, printed, re.MULTILINE))
    assert columns == {"stays": "10.00 GiB", "passes": "2.00 GiB", "total": "13.00 GiB"}
    # 10 that stay, and at most 1.07 times 3.
    assert "XLA: 13.00 GiB of 15.02 GiB: fits, with at least 1.81 GiB to spare" in printed
    assert "or could not: Can't reduce" in printed
    assert "To train so" in printed
    # The compiler is believed, not the estimate.
    large = dataclasses.replace(found, peak=16 * GIB)
    monkeypatch.setattr(plan, "compile_step", lambda *_: large)
    status, printed = run(capsys, "--device", "rtx4060ti_16gb", "--compile")
    assert status == 3
    assert "To train so" not in printed
    assert "XLA: 16.00 GiB of 15.02 GiB: does not fit" in printed

    def refused(*_):
        raise TooLarge("too large")

    monkeypatch.setattr(plan, "compile_step", refused)
    status, printed = run(capsys, "--device", "rtx4060ti_16gb", "--compile")
    assert status == 3
    assert "XLA: too large" in printed
    assert "What needs less" in printed or "What fits" in printed


def test_what_libraries_write_to_standard_error_is_read(capfd):
    with standard_error() as logged:
        os.write(2, b"a line\n")
    assert logged() == "a line\n"
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="descriptor"), standard_error():
        os.write(os.write(2, b"before\n") + 1000, b"")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_lines_of_rematerialization_are_kept(monkeypatch):
    kept = (
        "Can't reduce memory use below 1.00GiB (1 bytes) by rematerialization",
        "exceeds the base limit (1). An error!",
    )
    before = "W0 1 a.cc:1] ", "E0 1 a.cc:1] The byte size of arguments (2) "
    lines = [f"{start}{end}\n" for start, end in zip(before, kept, strict=True)]
    lines.insert(1, "W0 1 a.cc:1] Something else\n")
    real = compiling.lower

    def lower(*args):
        os.write(2, "".join(lines).encode())
        return real(*args)

    monkeypatch.setattr(compiling, "lower", lower)
    assert compile_step(config(optimizer="sgd"), VOCAB, HERE).rematerializes == kept


def drawn(monkeypatch, bars, devices, out):
    """The axes of a picture, laid out, and its texts with where they are."""
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    memory_chart.draw(bars, devices, out)
    monkeypatch.undo()
    (figure,) = closed
    plt.close("all")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    # Without the line below a name, which an annotation counts.
    boxes = {text.get_text().strip(): Text.get_window_extent(text) for text in axes.texts}
    for box in boxes.values():
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
    return axes, boxes


def units_in(axes):
    """The units of all that is written in a picture."""
    words = [axes.get_xlabel(), *(text.get_text() for text in axes.texts)]
    return set(re.findall(r"\b[KMG]iB\b", " ".join(words)))


def test_bars_are_the_parts_and_lines_the_devices(tmp_path, monkeypatch):
    estimates = [estimate(seven_billion(optimizer=name), 32_000) for name in ("adamw", "sgd")]
    bars = [memory_chart.Bar(e.moment, e.parts, 30 * GIB, Fit.NOT) for e in estimates]
    devices = [device_named("rtx4090_24gb"), device_named("rtx4060ti_16gb")]
    axes, boxes = drawn(monkeypatch, bars, devices, memory_chart.picture(tmp_path))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    ends = np.array([[bar.get_x() + bar.get_width() for bar in c] for c in axes.containers])
    np.testing.assert_allclose(ends[-1], [e.total / GIB for e in estimates])
    np.testing.assert_allclose(ends[0], [e.weights / GIB for e in estimates])
    # As they are called in the table.
    assert [container.get_label() for container in axes.containers] == list(estimates[0].parts)
    lines = [line.get_xdata() for line in axes.get_lines()]
    np.testing.assert_array_equal(lines[0], [30, 30])
    np.testing.assert_allclose(lines[1:], [[d.usable / GIB] * 2 for d in devices])
    names = [name for name in boxes if name.startswith("NVIDIA")]
    assert len(names) == 2
    for name in names:
        # Above the axes, so that no total is taken for a device's, and over no other name.
        assert boxes[name].y0 >= axes.bbox.y1
        assert not boxes[name].count_overlaps([boxes[n] for n in names if n != name])
    # A total is beside the axes, at its bar, so that no line goes through it.
    totals = [text for text in axes.texts if text.get_text() == "30.00 GiB  does not fit"]
    for text, y in zip(totals, (0, 1), strict=True):
        box = Text.get_window_extent(text)
        assert box.x0 >= axes.bbox.x1
        assert box.y0 < axes.transData.transform((0, y))[1] < box.y1
    assert units_in(axes) == {"GiB"}


def test_a_small_model_on_a_large_card_can_be_read(tmp_path, monkeypatch):
    small = estimate(Config().resolve(), 2048)
    bars = [memory_chart.Bar("small", small.parts, None, Fit.SURE)]
    device = device_named("h100_80gb")
    axes, boxes = drawn(monkeypatch, bars, [device], tmp_path / "memory.png")
    # The bar takes most of the width, and the device is named with how much more it has.
    assert small.total / 2**20 > 0.9 * axes.get_xlim()[1]
    much = f"{device.usable / 2**20:,.0f} MiB for JAX are {device.usable / small.total:,.0f} times"
    assert any(much in name for name in boxes)
    assert not axes.get_lines()
    assert units_in(axes) == {"MiB"}


def test_a_bar_far_beyond_a_device_is_cut_so_that_what_fits_can_be_read(tmp_path, monkeypatch):
    device = device_named("rtx4090_24gb")
    parts = {"weights": 5 * GIB, "inputs": 15 * GIB}
    bars = [
        memory_chart.Bar("asked", parts | {"inputs": 1234 * GIB}, None, Fit.NOT),
        memory_chart.Bar("fits", parts, None, Fit.SURE),
        memory_chart.Bar("near", parts | {"inputs": 30 * GIB}, None, Fit.NOT),
    ]
    axes, boxes = drawn(monkeypatch, bars, [device], tmp_path / "memory.png")
    right = axes.get_xlim()[1]
    assert bars[1].end / GIB > right / 4
    # The one that is cut looks torn, and says how long it is.
    torn = [line for line in axes.get_lines() if line.get_color() == "white"]
    assert len(torn) == 1
    assert {round(y) for y in torn[0].get_ydata()} == {0}
    assert 0.9 * right < min(torn[0].get_xdata()) < max(torn[0].get_xdata()) < right
    assert {"1,239.00 GiB  does not fit", "20.00 GiB  fits"} <= boxes.keys()


def test_the_picture_shows_what_fits(capsys, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(plan, "draw", lambda bars, devices, out: shown.append((bars, out)))
    words = ["--optimizer", "galore_adamw_8bit", "--device", "rtx4060ti_16gb", "--picture"]
    status, printed = run(capsys, *words, str(tmp_path))
    ((bars, out),) = shown
    assert status == 3
    assert f"wrote {out}" in printed
    assert out == tmp_path / "memory.png"
    fits = [bar.fit for bar in bars]
    assert fits[:2] == [Fit.NOT, Fit.SURE]
    assert bars[0].name == "as asked: 7b, galore_adamw_8bit, 16 x 256"
    assert [bar.name for bar in bars[1:3]] == [
        "--offload moments weights",
        "--optimizer q_galore_adamw",
    ]
    usable = device_named("rtx4060ti_16gb").usable
    assert [bar.size <= usable for bar in bars] == [fit is Fit.SURE for fit in fits]
    # Of those that do not, the nearest, and few.
    assert fits.count(Fit.NOT) == 3
    assert run(capsys, *words[2:], str(tmp_path / "a.svg"))[0] == 0
    assert [bar.fit for bar in shown[1][0]] == [Fit.SURE]


def test_a_picture_that_cannot_be_written(tmp_path):
    bars = [memory_chart.Bar("one", {"weights": GIB})]
    with pytest.raises(UsageError, match=r"memory\.png cannot be written"):
        memory_chart.draw(bars, [HERE], tmp_path / "none" / "memory.png")


gpu_compiler = pytest.mark.skipif(
    not installed(list(CUDA_PLUGINS.values())), reason="needs JAX for CUDA"
)


@gpu_compiler
def test_a_step_is_compiled_for_a_gpu_that_is_not_here():
    settings = config(optimizer="galore_adamw", projector="power_iteration")
    compiled = compile_step(settings, VOCAB, device_named("rtx4090_24gb"))
    assert compiled.arguments == pytest.approx(estimate(settings, VOCAB).arguments, rel=0.01)
    assert compiled.arguments < compiled.peak
    assert compiled.peak <= compiled.arguments + compiled.temporaries + 1000
    assert compiled.rematerializes == ()
    device = device_named("rtx4090_24gb")
    tiny = dataclasses.replace(device, context=device.memory - compiled.arguments // 2)
    assert compile_step(settings, VOCAB, tiny).rematerializes


@gpu_compiler
def test_cudnn_needs_less_than_xla_for_attention():
    settings = {"dtype": "bfloat16", "hidden": 128, "seq": 1024, "optimizer": "sgd"}
    peaks = [
        compile_step(config(attention=name, **settings), VOCAB, device_named("h100_80gb")).peak
        for name in ("xla", "cudnn")
    ]
    assert peaks[0] > 1.5 * peaks[1]


@pytest.mark.skipif(not installed(["libtpu"]), reason="needs libtpu")
def test_a_step_is_compiled_for_a_tpu_that_is_not_here():
    settings = config(optimizer="sgd")
    compiled = compile_step(settings, VOCAB, device_named("tpu_v5e"))
    assert compiled.arguments < compiled.peak < compiled.arguments + 2**28
    large = config(optimizer="sgd", hidden=8192, intermediate=2**15, layers=8)
    with pytest.raises(TooLarge, match="exceeds available HBM"):
        compile_step(large, VOCAB, device_named("tpu_v5e"))
