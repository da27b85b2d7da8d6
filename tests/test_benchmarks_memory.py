"""The benchmark of memory at 7B: its rows, its runs at a size that takes seconds, its table."""

import json

import jax
import pytest

from benchmarks import memory_7b, memory_error, memory_table
from examples.flax_llama.compile_step import Compiled, TooLarge
from examples.flax_llama.config import Config
from examples.flax_llama.devices import DEVICES, GIB, Device
from examples.flax_llama.memory import SPREAD, SPREAD_OF_PLAN, estimate

SMALL = {"hidden": 32, "intermediate": 48, "layers": 2, "heads": 2, "batch": 2, "seq": 16}
NAME = "7b Q-GaLore power_iteration rtx4060ti_16gb"
MACHINE = {"machine": {"device": "A100", "driver": "580.1", "jax": "0.11.2"}}


def compiled(peak=12 * GIB, rematerializes=()):
    return Compiled(10 * GIB, 10 * GIB, 10 * GIB, 2 * GIB, peak, 1.0, rematerializes)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the benchmark with compilers that are there, and returns what it wrote."""
    monkeypatch.setattr(Device, "mesh", lambda self: None)
    out = tmp_path / "out.json"

    def run(*words, status=None):
        monkeypatch.setattr("sys.argv", ["memory_7b", *words, "--out", str(out)])
        if status is None:
            memory_7b.main()
        else:
            with pytest.raises(SystemExit) as stopped:
                memory_7b.main()
            assert stopped.value.code == status
        return json.loads(out.read_text())["rows"]

    return run


def test_rows_are_published_shapes_in_the_settings_of_the_papers():
    rows = memory_7b.table()
    for name, row in rows.items():
        config = Config(**row["settings"]).resolve()
        assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
        assert config.update_proj_gap == 500
        assert config.layerwise == ("AdamW" not in name)
        assert name.startswith(config.preset)
        fewest = {name: getattr(config, name) for name in memory_7b.FEWEST}
        if "fewest" in name:
            assert fewest == memory_7b.FEWEST
            assert f" {config.batch}x{config.seq} " in name
            assert ("Mini" in name) or f"rank {config.rank} " in name
            continue
        papers = config.preset in ("7b", "13b")
        own = config.batch, config.seq, config.rank
        assert own == ((16, 256, 1024) if papers else (1, 2048, 256))
        assert fewest == {
            "int8_weights": "Q-GaLore" in name,
            "tables": "adam",
            "inputs_dtype": None,
        }
    assert all(name.endswith(row["device"]) for name, row in rows.items())
    assert {row["device"] for row in rows.values()} <= DEVICES.keys()
    projectors = [
        row["settings"]["projector"] for row in rows.values() if "projector" in row["settings"]
    ]
    assert (projectors.count("svd"), projectors.count("power_iteration")) == (4, 5)
    # Parameters and state of the published 8-bit GaLore, projectors in bfloat16.
    settings = rows["7b 8-bit GaLore svd rtx4090_24gb"]["settings"]
    held = estimate(Config(**settings).resolve(), 32_000).arguments
    assert held == pytest.approx(17.86 * GIB, rel=1e-3)


@pytest.mark.parametrize("refused", [False, True])
def test_a_row_has_the_compilers_figures_or_says_why_not(monkeypatch, refused):
    def compile_step(config, vocab_size, device):
        assert (config.hidden, vocab_size, device.name) == (32, 300, "tpu_v5e")
        if refused:
            raise TooLarge("needs 20G")
        return compiled(rematerializes=("Can't reduce",))

    monkeypatch.setattr(memory_7b, "compile_step", compile_step)
    row = memory_7b.analyse("tpu_v5e", SMALL, 300)
    assert row["jax"] == jax.__version__
    assert row["compiler"]["jaxlib"]
    assert row["usable"] == int(15.75 * GIB)
    assert row["parameters"] == Config(**SMALL).resolve().shape(300).num_params
    assert row["estimate"]["total"] == estimate(Config(**SMALL).resolve(), 300).total
    if refused:
        assert row["error"] == "needs 20G"
        assert "xla" not in row
    else:
        assert row["xla"]["peak"] == 12 * GIB
        assert row["xla"]["rematerializes"] == ("Can't reduce",)


def test_the_same_command_does_what_is_missing(command, monkeypatch, capsys):
    done, failing = [], [NAME]

    def apart(device, settings, limit):
        name = next(
            name
            for name, row in memory_7b.table().items()
            if (device, settings) == (row["device"], row["settings"])
        )
        done.append(name)
        if name in failing:
            raise KeyboardInterrupt
        figures = json.loads(json.dumps(compiled().__dict__))
        return {"xla": figures, "estimate": {"total": 11 * GIB}, "usable": 15 * GIB}

    monkeypatch.setattr(memory_7b, "apart", apart)
    with pytest.raises(KeyboardInterrupt):
        command()
    failing.clear()
    first = list(done)
    rows = command()
    assert list(rows) == list(memory_7b.table())
    assert done == first + list(rows)[len(first) - 1 :]
    command()
    assert len(done) == len(rows) + 1
    command("--rows", NAME)
    assert done[-1] == NAME
    assert len(done) == len(rows) + 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.removeprefix(NAME).split() == ["11.00", "12.00", "15.00"]
    # Figures of other settings are none of this table, nor are rows that it has no more.
    changed = memory_7b.table()
    changed[NAME]["settings"]["seq"] = 512
    gone, _ = changed.popitem()
    monkeypatch.setattr(memory_7b, "table", lambda: changed)
    rows = command()
    assert done[-1] == NAME
    assert len(done) == len(changed) + 4
    assert rows[NAME]["settings"]["seq"] == 512
    assert gone not in rows


def test_a_row_that_failed_is_written_and_ends_with_an_error(command, monkeypatch):
    monkeypatch.setattr(memory_7b, "apart", lambda *_: {"error": "not done after 5 seconds"})
    rows = command("--rows", NAME, status=1)
    assert rows[NAME]["error"] == "not done after 5 seconds"


def test_unknown_rows_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        command("--rows", "8b")
    assert "expected some of 7b 8-bit GaLore power_iteration" in capsys.readouterr().err


@pytest.mark.ci
def test_a_process_of_its_own_ends_with_an_error_that_is_kept():
    error = memory_7b.apart("rtx4090_24gb", SMALL | {"heads": 3}, 300)["error"]
    assert "hidden=32 does not divide into heads=3" in error
    assert memory_7b.apart("rtx4090_24gb", SMALL, 0.01)["error"] == "not done after 0 seconds"


def record(**peaks):
    rows = {}
    for name, row in memory_7b.table().items():
        # APOLLO names no projector.
        projector = row["settings"].get("projector", "rows" if "APOLLO" in name else None)
        figures = {"arguments": 10 * GIB, "peak": peaks.get(projector)}
        found = {"xla": figures} if figures["peak"] else {"error": "too large"}
        rows[name] = row | {"usable": DEVICES[row["device"]].usable} | found
    return {"rows": rows}


def test_the_table_has_a_line_for_each_device_with_both_projectors():
    figures = record(power_iteration=12 * GIB, svd=13 * GIB)
    result = {"peak_bytes": 11 * GIB, "usable": 15 * GIB}
    measured = {NAME: {"result": result, **MACHINE}, "other": {"error": "none"}}
    lines = memory_table.markdown(figures, measured).splitlines()
    said = lines.pop()
    lines.pop()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {7}
    assert cells[3] == [
        *("LLaMA-7B, Q-GaLore", "NVIDIA RTX 4060 Ti 16 GB"),
        *("15.02", "10.00", "12.00", "13.00", "11.00"),
    ]
    assert {row[-1] for row in cells[2:3] + cells[4:]} == {"-"}
    assert len(cells) == 2 + 18
    assert "no more than 15.00 GiB for JAX, on A100, driver 580.1" in said
    refused = memory_table.markdown(record(power_iteration=12 * GIB), {}).splitlines()
    assert refused[3].endswith("| 12.00 | too much | - |")
    assert "Nothing has been measured on a GPU yet" in refused[-1]


def test_the_picture_has_a_bar_for_each_line_of_the_table():
    figures = record(power_iteration=12 * GIB, svd=13 * GIB, rows=12 * GIB)
    for row in figures["rows"].values():
        row["estimate"] = {"weights": 8 * GIB, "inputs": GIB, "total": 9 * GIB, "moment": "head"}
    bars = memory_table.bars(figures)
    assert len(bars) == len(memory_table.markdown(figures, {}).splitlines()) - 4
    assert bars[1].name == "LLaMA-7B, Q-GaLore\nNVIDIA RTX 4060 Ti 16 GB"
    assert bars[1].parts == {"weights": 8 * GIB, "inputs": GIB}
    assert [bar.peak for bar in bars] == [12 * GIB] * 9 + [None] + [12 * GIB] * 8


def test_the_table_goes_between_the_comments():
    text = f"a\n{memory_table.START}old\n{memory_table.END}b\n"
    new = memory_table.replaced(text, "new\n")
    assert new == text.replace("old", "new")
    for wrong in ("a\nb\n", text + text, memory_table.END + memory_table.START):
        with pytest.raises(ValueError, match="once each"):
            memory_table.replaced(wrong, "new\n")


def test_the_page_has_the_table_of_the_figures():
    text = memory_table.PAGE.read_text()
    assert memory_table.replaced(text, memory_table.current()) == text


def test_the_figures_are_of_the_tables_settings():
    rows = memory_7b.table()
    for name, row in json.loads(memory_table.FIGURES.read_text())["rows"].items():
        assert {key: row[key] for key in rows[name]} == rows[name], name


@pytest.mark.long("it traces the state of every row, for the tests that follow, too")
@pytest.mark.ci
def test_what_stays_is_what_the_compiler_found():
    for path in (memory_table.FIGURES, memory_error.FIGURES):
        for name, row in json.loads(path.read_text())["rows"].items():
            size = row.get("vocab_size", memory_7b.VOCAB_SIZE)
            estimated = estimate(Config(**row["settings"]).resolve(), size)
            # The compiler's are a batch more, which is small, and tables.
            beyond = row["xla"]["arguments"] - estimated.arguments
            assert abs(beyond) <= max(1e-3 * estimated.arguments, 1_100_000), name


@pytest.mark.long("it estimates every step that was compiled or measured")
def test_the_documentation_has_the_bounds_of_what_was_found():
    found = list(memory_error.ratios())
    measured = sum(name.startswith("measured") for name, _, _ in found)
    of_gpus = [ratio for _, kind, ratio in found if kind == "cuda"]
    text = " ".join((memory_table.ROOT / "examples/flax_llama/README.md").read_text().split())
    assert (
        f"{measured} steps were measured on an H100, and {len(found) - measured} compiled" in text
    )
    assert f"needed {min(of_gpus):.2f} to {max(of_gpus):.2f} times what is estimated" in text
    low, high = SPREAD["cuda"]
    assert f"*fits* if {high:g} times that does, it *does not fit* if {low:g} times that" in text


def test_the_estimate_is_as_near_as_the_planner_says():
    """All that was compiled and measured is within the bounds, which are not much wider."""
    found = list(memory_error.ratios())
    assert sum(name.startswith("measured") for name, _, _ in found) == 15
    for kind, (low, high) in SPREAD.items():
        ratios = [ratio for _, of, ratio in found if of == kind]
        assert low <= min(ratios), kind
        assert max(ratios) <= high <= max(ratios) + 0.12, kind
    low, high = SPREAD_OF_PLAN
    planned = json.loads(memory_table.FIGURES.read_text())["rows"]
    items = json.loads(memory_table.MEASURED.read_text())["items"]
    assert len(items) == 3
    for name, item in items.items():
        xla = planned[name]["xla"]
        passes = item["result"]["peak_bytes"] - xla["arguments"]
        assert low <= passes / (xla["peak"] - xla["arguments"]) <= high, name


def test_the_figures_of_the_error_are_of_its_rows():
    rows = json.loads(memory_error.FIGURES.read_text())["rows"]
    assert {
        name: {k: row[k] for k in row if k not in ("jax", "xla")} for name, row in rows.items()
    } == (memory_error.table())
    assert not [name for name, row in rows.items() if row["xla"]["rematerializes"]]


def test_the_error_of_a_row_is_found_by_compiling_it(monkeypatch, tmp_path, capsys):
    row = {"device": "cpu", "vocab_size": 300, "settings": SMALL | {"attention": "xla"}}
    monkeypatch.setattr(memory_error, "table", lambda: {"small": row})
    monkeypatch.setattr(memory_error, "ratios", lambda: [("small", "cpu", 1.25)])
    out = tmp_path / "error.json"
    monkeypatch.setattr("sys.argv", ["memory_error", "--out", str(out)])
    memory_error.main()
    (found,) = json.loads(out.read_text())["rows"].values()
    held = estimate(Config(**row["settings"]).resolve(), 300).arguments
    assert found["xla"]["arguments"] == pytest.approx(held, abs=500)
    assert found["xla"]["peak"] > found["xla"]["arguments"]
    assert " 1.250  small" in capsys.readouterr().out
    # What is there is not compiled again.
    monkeypatch.setattr(memory_error, "analyse", lambda row: pytest.fail("compiled"))
    memory_error.main()
