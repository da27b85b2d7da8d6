"""The planner: its estimate, what fits and what to change, the compiled step, and the picture."""

import dataclasses
import os
import re
import shlex
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tyro
from matplotlib.text import Text

from examples.flax_llama import compile_step as compiling
from examples.flax_llama import fit, memory, memory_chart, plan
from examples.flax_llama.compile_step import Compiled, TooLarge, compile_step, standard_error
from examples.flax_llama.config import Config, UsageError
from examples.flax_llama.devices import DEVICES, GIB, Device, device_named
from examples.flax_llama.memory import estimate
from examples.flax_llama.methods import ADAMW_8BIT, IN_GALORE
from examples.flax_llama.optimizers import OPTIMIZERS, make_optimizer
from examples.flax_llama.step import State, data_mesh, initial_params
from examples.flax_llama.topology import CUDA_PLUGINS, installed
from examples.flax_llama.train import from_command_line

VOCAB = 300


class Here(Device):
    """The device that the tests run on."""

    def mesh(self):
        return data_mesh()


HERE = Here("here", "this one", 16 * GIB, "made up")


def config(**settings):
    shape = {"hidden": 32, "intermediate": 48, "layers": 3, "heads": 2, "rank": 8}
    return Config(**shape | {"batch": 4, "seq": 16, **settings}).resolve()


def run(capsys, *words):
    """The exit status of the command, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plan", *words])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
    return stopped.value.code, capsys.readouterr().out


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
    {},
    # With GaLore there is an accumulator, but not with clipping.
    {"layerwise": True, "accumulate": 2, "clip": 0.0},
    {"param_dtype": "bfloat16", "layerwise": True, "accumulate": 2, "clip": 1.0},
)


# The other presets in 8 bits are made in the same way.
STAYS = [
    pytest.param(name, marks=[pytest.mark.ci] * (name in ADAMW_8BIT[1:-1])) for name in OPTIMIZERS
]


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.parametrize(
    "given", [GIVEN[0], *(pytest.param(given, marks=pytest.mark.ci) for given in GIVEN[1:])]
)
def test_what_stays_is_what_a_state_has(name, given):
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
    return Config(preset="7b", **shared | settings).resolve()


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
        ({"layerwise": True, "optimizer": "adamw", "batch": 1, "seq": 8, "clip": 0.0}, "head"),
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
    for change in ("--accumulate 1", "--clip 1"):
        assert re.search(f"^  {change}: [0-9.]+ GiB, fits$", printed, re.MULTILINE)
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
    words = "--model 7b --optimizer q_galore_adamw --device rtx4060ti_16gb --batch 16 --seq 256"
    status, printed = run(capsys, *words.split())
    assert status == 0
    sizes = dict(re.findall(r"^(\w+) +([\d.]+)", printed, re.MULTILINE))
    parts = ("weights", "projectors", "moments", "gradients", "inputs", "working")
    assert sum(float(sizes[part]) for part in parts) == pytest.approx(
        float(sizes["total"]), abs=0.03
    )
    # As the README has it.
    assert float(sizes["arguments"]) == 10.65
    total, usable, spare = map(
        float,
        re.search(r"estimate: ([\d.]+) of ([\d.]+) GiB, fits, with ([\d.]+)", printed).groups(),
    )
    assert (usable, spare) == (15.5, pytest.approx(usable - total, abs=0.011))


@pytest.mark.parametrize(
    "words",
    [
        "--optimizer adamw --no-layerwise --no-remat --device rtx4060ti_16gb",
        "--optimizer galore_adamw --dtype float32 --device rtx4090_24gb",
        "--batch 64 --device tpu_v5e",
        "--accumulate 2 --clip 0 --device rtx4060ti_16gb",
        "--optimizer galore_adamw_8bit --device rtx4060ti_16gb --seq 2048",
        "--optimizer galore_adamw_8bit --projector-dtype bfloat16 --device rtx4060ti_16gb",
        pytest.param(
            "--optimizer ldadamw --residual error_feedback --rank 0.125 --device rtx4090_24gb",
            marks=[pytest.mark.ci, pytest.mark.long("the state of many changes, one by one")],
        ),
    ],
)
def test_what_is_said_to_fit_does(capsys, words):
    status, printed = run(capsys, *words.split())
    assert status == 3
    assert "too much by" in printed
    changes = re.findall(r"^  (--.*): ([\d.]+) GiB, fits$", printed, re.MULTILINE)
    batches = re.findall(r"^  (--batch \d+): the largest that fits$", printed, re.MULTILINE)
    assert changes or batches
    for flags, size in [*changes, *((batch, None) for batch in batches)]:
        status, after = run(capsys, *words.split(), *shlex.split(flags))
        assert status == 0, flags
        assert size is None or f"estimate: {size} of" in after
    for batch in batches:
        larger = f"--batch {int(batch.split()[1]) + 1}"
        assert run(capsys, *words.split(), *larger.split())[0] == 3


def test_what_cannot_fit_is_told_so_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr(Device, "mesh", lambda self: None)
    monkeypatch.setattr(plan, "compile_step", lambda *_: pytest.fail("compiled"))
    device = "--device rtx4060ti_16gb"
    words = f"--model 13b {device} --optimizer adamw --no-layerwise --compile"
    status, printed = run(capsys, *words.split())
    assert status == 3
    assert "XLA: not compiled, since" in printed
    (found,) = re.findall(r"another device, or a smaller model: (.*) still needs (.*) GiB", printed)
    status, after = run(capsys, *words.split(), *shlex.split(found[0]))
    assert status == 3
    assert f"estimate: {found[1]} of" in after
    # The least sequences are not enough, and what they need is said.
    (size,) = re.findall(r"^  --batch 1: (.*) GiB, not enough by itself$", printed, re.MULTILINE)
    assert f"estimate: {size} of" in run(capsys, *words.split(), "--batch", "1")[1]
    assert "no batch fits, not even 1" in run(capsys, *words.split(), "--sweep")[1]


def test_advice_goes_by_what_the_compiler_found():
    given = {"optimizer": "q_galore_adamw", "layerwise": True, "attention": "xla"}
    settings, device = seven_billion(**given), HERE
    size = estimate(settings, 32_000).total
    more = device.usable - size + 1
    by_one = fit.advice(settings, 32_000, device, more)
    batch = int(by_one[0].removeprefix("--batch ").removesuffix(": the largest that fits"))
    sizes = [
        estimate(dataclasses.replace(settings, batch=n), 32_000).total for n in (batch, batch + 1)
    ]
    assert sizes[0] + more <= device.usable < sizes[1] + more
    cudnn = estimate(dataclasses.replace(settings, attention="cudnn"), 32_000).total + more
    assert f"--attention cudnn: {cudnn / GIB:.2f} GiB, fits" in by_one
    tpu = fit.advice(settings, 32_000, device_named("tpu_v5e"), more)
    assert not any("cudnn" in line for line in tpu)


@pytest.mark.parametrize("batch", [64, 3])
def test_a_sweep_takes_the_largest_batch_whatever_is_given(capsys, batch):
    words = ["--device", "h100_80gb", "--batch", str(batch), "--sweep"]
    status, printed = run(capsys, *words)
    assert status == 0
    batch = int(re.search(r"largest batch that fits: (\d+)", printed).group(1))
    for size, status in ((batch, 0), (batch + 1, 3)):
        assert run(capsys, "--device", "h100_80gb", "--batch", str(size))[0] == status


@pytest.mark.parametrize("refused", [0, 12])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compiled_sweep_ends_at_the_largest_batch_that_fits(monkeypatch, refused, accumulate):
    """Here each sequence takes 1 GiB and all else 2, where more than some are not refused."""

    def compile_step(config, vocab_size, device):
        if refused and config.batch >= refused:
            raise TooLarge("too large")
        size = config.batch * GIB
        return Compiled(2 * GIB, 2 * GIB, 2 * GIB, size, 2 * GIB + size, 0.0, ())

    monkeypatch.setattr(plan, "compile_step", compile_step)
    given = config(batch=16, accumulate=accumulate)
    device = dataclasses.replace(HERE, memory=11 * GIB, context=0)
    found, compiled = plan.compiled_to_fit(given, VOCAB, device)
    assert (found.batch, compiled.peak) == {1: (9, 11 * GIB), 2: (8, 10 * GIB)}[accumulate]
    device = dataclasses.replace(HERE, memory=2 * GIB, context=0)
    assert plan.compiled_to_fit(given, VOCAB, device)[1] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device a100", "--device a100: expected one of rtx4060ti_16gb, rtx4090_24gb, h100_80gb"),
        ("--model 8b", "--model 8b: expected one of 9m"),
        ("--optimizer adam", "--optimizer adam: expected one of adamw"),
        ("--attention auto", "--attention auto: expected xla or cudnn"),
        (
            "--attention cudnn --device tpu_v5e",
            "--attention cudnn needs an NVIDIA GPU and --d",
        ),
        (
            "--attention cudnn --dtype float32",
            "--attention cudnn needs an NVIDIA GPU and --d",
        ),
        ("--batch 3 --accumulate 2", "--batch 3 does not divide into --accumulate 2"),
        ("--vocab-size 0", "--vocab-size 0"),
        (
            "--optimizer apollo_adamw --transport rotate",
            "error: --optimizer apollo_adamw --transport rotate: --transport rotate is for bases "
            "of orthonormal vectors; those of the projector gaussian are not. What would work is "
            "--transport keep, --transport reset, --transport project.\n",
        ),
        ("--out no_such_directory/memory.png", "memory.png cannot be written"),
        ("--out memory.pgn", "--out memory.pgn: expected a name that ends in one of"),
        ("--out memory", "--out memory: expected a name that ends in one of"),
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


@pytest.mark.parametrize("device", [d for d in DEVICES.values() if not d.is_tpu])
def test_xla_is_told_the_memory_that_is_usable(device):
    (size,) = re.findall(r"^  device_memory_size: (\d+)$", device.target(), re.MULTILINE)
    # It takes four fifths.
    assert 0.8 * int(size) == pytest.approx(device.usable, abs=1)
    assert device.usable < device.memory


def test_the_settings_are_those_of_a_run():
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    own = {"model", "device", "compile", "sweep", "out"}
    planned = {field.name for field in dataclasses.fields(plan.Plan)} - own
    assert planned <= fields.keys()
    changed = {"rank": 7, "accumulate": 4, "clip_by": "layer", "seq": 8, "momentum": 0.5}
    made = plan.Plan(model="60m", **changed).given().resolve()
    assert {name: getattr(made, name) for name in changed} == changed
    assert (made.preset, made.hidden, made.int8_weights) == ("60m", 512, True)


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
    ],
)
def test_the_command_to_train_is_of_what_was_planned(capsys, words):
    status, printed = run(capsys, "--device", "h100_80gb", "--seq", "128", *words.split())
    assert status == 0
    (command,) = re.findall(r"^  python -m examples.flax_llama.train (.*)$", printed, re.MULTILINE)
    planned = tyro.cli(plan.Plan, args=["--seq", "128", *words.split()]).given()
    (batch,) = re.findall(r"largest batch that fits: (\d+)", printed) or [planned.batch]
    wanted = dataclasses.replace(planned, batch=int(batch))
    assert from_command_line(shlex.split(command)) == wanted


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
    columns = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+)", printed, re.MULTILINE))
    assert columns == {"arguments": "10.00", "temporaries": "2.00", "total": "13.00"}
    assert "XLA: 13.00 of 15.50 GiB, fits, with 2.50 to spare" in printed
    assert "or could not: Can't reduce" in printed
    assert "To train so" in printed
    # The compiler is believed, not the estimate.
    large = dataclasses.replace(found, peak=16 * GIB)
    monkeypatch.setattr(plan, "compile_step", lambda *_: large)
    status, printed = run(capsys, "--device", "rtx4060ti_16gb", "--compile")
    assert status == 3
    assert "To train so" not in printed
    assert re.search(r"What would help, with the 2\.95 GiB that XLA needs beyond", printed)

    def refused(*_):
        raise TooLarge("too large")

    monkeypatch.setattr(plan, "compile_step", refused)
    status, printed = run(capsys, "--device", "rtx4060ti_16gb", "--compile")
    assert status == 3
    # No batch as large as the one that was refused.
    assert int(re.search(r"--batch (\d+): the largest that fits", printed).group(1)) < 16


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


def test_bars_are_the_parts_and_lines_the_devices(tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(plt, "close", closed.append)
    estimates = [estimate(seven_billion(optimizer=name), 32_000) for name in ("adamw", "sgd")]
    bars = [memory_chart.Bar(e.moment, e.parts, peak=30 * GIB) for e in estimates]
    devices = [device_named("rtx4090_24gb"), device_named("rtx4060ti_16gb")]
    memory_chart.draw(bars, devices, memory_chart.picture(tmp_path))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = closed[0].axes
    ends = np.array([[bar.get_x() + bar.get_width() for bar in c] for c in axes.containers])
    np.testing.assert_allclose(ends[-1], [e.total / GIB for e in estimates])
    np.testing.assert_allclose(ends[0], [e.weights / GIB for e in estimates])
    lines = [line.get_xdata() for line in axes.get_lines()]
    np.testing.assert_array_equal(lines[0], [30, 30])
    np.testing.assert_allclose(lines[1:], [[d.usable / GIB] * 2 for d in devices])
    closed[0].draw_without_rendering()
    # Without the line below a name, which an annotation counts.
    texts = [Text.get_window_extent(text) for text in axes.texts]
    assert {text.get_text().strip() for text in axes.texts} == {
        *("30.0", "NVIDIA RTX 4090 24 GB", "NVIDIA RTX 4060 Ti 16 GB")
    }
    for i, box in enumerate(texts):
        assert 0 <= box.x0 < box.x1 <= closed[0].bbox.x1
        assert 0 <= box.y0 < box.y1 <= closed[0].bbox.y1
        # Beside or above the axes, in which the lines are, and over no other text.
        assert box.x0 >= axes.bbox.x1 or box.y0 >= axes.bbox.y1
        assert not box.count_overlaps(texts[i + 1 :])
    monkeypatch.undo()
    plt.close("all")


def test_the_command_says_where_the_picture_is(capsys, tmp_path):
    status, printed = run(capsys, "--model", "60m", "--out", str(tmp_path))
    assert status == 0
    assert f"wrote {tmp_path / 'memory.png'}" in printed
    assert (tmp_path / "memory.png").is_file()


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
