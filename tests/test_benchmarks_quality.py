"""The benchmark of losses sweeps, goes on where it was, and computes what it says."""

import dataclasses
import json
import lzma
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.gpu import quality as on_gpu
from benchmarks.gpu.stage import GIB, Size
from benchmarks.quality import __main__ as quality
from benchmarks.quality import corpus, ranks, readme, statistics, workers
from benchmarks.quality.contenders import BUILDERS, CONTENDERS
from benchmarks.quality.stages import RATE, Bench, moved, sweep, transfers
from benchmarks.quality.training import Run, measure
from examples.flax_llama import data, train
from examples.flax_llama.config import Config

SHAPE = {"hidden": 16, "intermediate": 24, "layers": 1, "heads": 1}
BASE = Config(
    **SHAPE, tokenizer="bytes", batch=2, seq=16, eval_tokens=200, steps=3, clip=1.0, quiet=True
).resolve()
PLOTS = {name: getattr(quality, name) for name in ("plot_bytes", "plot_rates")}


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Of the built-in text the first part of each novel, which takes no time to tokenize."""
    split = [[text[:3000] for text in part] for part in data.read_split()]
    monkeypatch.setattr(data, "read_split", lambda: split)
    data.load_corpus.cache_clear()
    yield
    data.load_corpus.cache_clear()


def made_up(calls, at=0.16, diverges_at=math.inf):
    """A function in place of `measure`, whose losses are least at a learning rate and ratio 1/8."""

    def measured(config, run):
        calls.append(run)
        loss = 4 + 0.1 * abs(math.log2(run.lr / at)) + 0.01 * run.seed
        loss += 0.1 * abs(math.log2(8 * run.ratio)) * (run.contender == "adamw")
        loss += 0.02 * list(BUILDERS).index(run.contender) - 1e-3 * run.hidden
        loss += 0.3 * (run.rank == 1) + 0.05 * (run.rule not in (None, "by role"))
        return {
            "valid_loss": None if run.lr >= diverges_at else loss,
            "tokens_per_second": 100.0,
            "state_bytes": 10 * (run.rank or 20),
            "matrix_state_bytes": 5,
            "seconds": 60.0,
        }

    return measured


def run_main(monkeypatch, measured, *arguments, pictures=False):
    for name, plot in PLOTS.items():
        # They take longer than all else.
        monkeypatch.setattr(quality, name, plot if pictures else lambda *_: None)
    monkeypatch.setattr(workers, "measure", measured)
    monkeypatch.setattr(quality, "default_directory", lambda: None)
    monkeypatch.setattr(
        quality, "base_of", lambda model, steps, *_: (BASE, {"model": model, "steps": steps})
    )
    monkeypatch.setattr(sys, "argv", ["quality", *map(str, arguments)])
    cache = jax.config.jax_compilation_cache_dir
    quality.main()
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.parametrize("at", [0.02, 0.16, 0.00125])
def test_a_sweep_goes_on_until_the_best_is_at_no_edge(at):
    tried = {}

    def loss(run):
        assert run not in tried
        tried[run] = abs(math.log2(run.lr / at))
        return tried[run]

    start = Run("galore", 16, 4, lr=0.02)
    found = sweep(loss, start)
    assert found.lr == pytest.approx(at)
    assert len(tried) >= 5
    assert {moved(found, *factors) for factors in RATE} <= tried.keys()
    rates = sorted(run.lr for run in tried)
    np.testing.assert_allclose(np.diff(np.log2(rates)), 1)


def test_adamw_is_swept_along_both_of_its_learning_rates():
    tried = {}

    def loss(run):
        matrices, rest = math.log2(run.lr * run.ratio / 0.01), math.log2(run.lr / 0.64)
        # A narrow valley along neither the learning rate nor the ratio.
        tried[run] = abs(matrices) + abs(rest)
        return tried[run]

    found = sweep(loss, Run("adamw", 16, None, lr=0.04, ratio=0.125))
    assert (found.lr, found.ratio) == (0.64, pytest.approx(0.01 / 0.64))


def test_a_sweep_of_runs_that_all_diverge_ends():
    assert sweep(lambda run: math.inf, Run("galore", 16, 4, lr=0.02)).lr == 0.02


def test_all_stages_go_on_where_they_were(monkeypatch, tmp_path, capsys):
    calls = []
    out = tmp_path / "quality"
    arguments = ("--workers", 1, "--out", out, "--only", "adamw", "galore", "fira")
    measured = made_up(calls, diverges_at=0.5)

    def cut_off(config, run):
        if len(calls) == 12:
            raise KeyboardInterrupt
        return measured(config, run)

    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, cut_off, *arguments)
    assert len(json.loads(out.with_suffix(".json").read_text())["runs"]) == 12
    run_main(monkeypatch, measured, *arguments, "--minutes", 0)
    assert len(calls) == 12
    assert "The time is up" in capsys.readouterr().out
    run_main(monkeypatch, measured, *arguments)
    assert len(set(calls)) == len(calls)
    printed = capsys.readouterr().out
    assert "about 0 min left" in printed
    done = len(calls)
    run_main(monkeypatch, measured, *arguments, pictures=True)
    assert len(calls) == done
    written = json.loads(out.with_suffix(".json").read_text())
    assert len(written["runs"]) == done
    cells = {(cell["hidden"], cell["rank"]): cell["rows"] for cell in written["summary"]["cells"]}
    assert list(cells) == [(16, 4), (16, 1), (32, 8), (32, 2)]
    for rows in cells.values():
        assert [row["contender"] for row in rows] == ["adamw", "galore", "fira"]
        assert [row["lr"] for row in rows] == pytest.approx([0.16] * 3)
        assert rows[0]["ratio"] == 0.125
    assert [row["loss"]["n"] for row in cells[16, 4]] == [6, 6, 6]
    assert [row["loss"]["n"] for row in cells[32, 2]] == [6, 6, 6]
    rules = [row["rule"] for row in written["summary"]["ranks"]]
    assert rules == 2 * ["uniform", "by role", *(f"random {i}" for i in range(1, 6))]
    for rule in written["summary"]["rules"]:
        found = [place["over_swept"] for place in rule["places"]]
        if "one for all" in rule["of"]:
            assert found == [None] * 4
        else:
            # A factor of two away at the smaller ranks.
            assert [percent == 0 for percent in found] == [True, False] * 2
    for name in ("quality.png", "quality_rates.png"):
        assert (tmp_path / name).stat().st_size > 0
    with pytest.raises(SystemExit, match="is of other runs"):
        run_main(monkeypatch, measured, *arguments, "--steps", 7)


def test_the_plan_is_of_what_is_left(monkeypatch, tmp_path, capsys):
    calls = []
    out = tmp_path / "quality"
    arguments = ("--only", "galore", "apollo-mini", "--stages", "sweep", "seeds", "--workers", 1)
    run_main(monkeypatch, made_up(calls), *arguments, "--plan")
    # Five rates of GaLore at two ranks and of APOLLO-Mini at its own, and four other ratios of it;
    # two more seeds each.
    printed = capsys.readouterr().out
    assert "sweep       19 runs left,   32 min" in printed
    assert "seeds        6 runs left,   10 min" in printed
    assert not calls
    swept = [word for word in arguments if word != "seeds"]
    run_main(monkeypatch, made_up(calls), *swept, "--out", out)
    capsys.readouterr()
    run_main(monkeypatch, made_up(calls), *arguments, "--plan", "--out", out)
    printed = capsys.readouterr().out
    assert "sweep        0 runs left,    0 min" in printed
    # At the seconds that runs have taken.
    assert "seeds        6 runs left,    6 min" in printed


def test_errors_and_paired_differences_are_those_computed_by_hand():
    mine, adamw, galore = {0: 4.0, 1: 4.2, 2: 4.1}, {0: 4.0, 1: 4.0, 2: 4.0}, {0: 4.4, 1: 4.4, 3: 9}
    found = statistics.estimate([*mine.values()])
    assert found["mean"] == pytest.approx(4.1)
    assert found["error"] == pytest.approx(0.1 / 3**0.5)
    assert found["interval"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    over = statistics.paired_percent(mine, adamw)
    assert over["mean"] == pytest.approx(2.5)
    assert over["error"] == pytest.approx(2.5 / 3**0.5)
    # Of the seeds that all have: 100 % and 50 %.
    closed = statistics.gap_closed(mine, galore, adamw)
    assert (closed["mean"], closed["n"]) == (pytest.approx(75), 2)
    assert closed["error"] == pytest.approx(25)
    assert statistics.estimate([1.0])["error"] is None
    assert statistics.paired_percent({0: 1.0}, {1: 1.0}) is None


def test_rates_by_the_rule_are_compared_with_swept_ones():
    results = {}

    def sweep_at(at, run):
        def loss(run):
            results[run] = made_up([], at)(None, run)
            return results[run]["valid_loss"]

        sweep(loss, run)

    bench = Bench(BASE, ("adamw", "galore"))
    for hidden in (16, 32):
        sweep_at(0.04, Run("adamw", hidden, None, 0.04, 0.125))
        for rank, at in zip(bench.ranks(hidden), (0.02, 0.04 * hidden / 16), strict=True):
            sweep_at(at, Run("galore", hidden, rank, 0.02))
    (transfer,) = transfers(bench, results)
    # At a scale of 1/4 and ranks of 1/4 and 1/16 of the width: 8 and 16 times 0.005.
    assert [run.lr for _, run in transfer.pairs] == [0.04, 0.08, 0.04, 0.08]
    row = statistics.rule_row(results, transfer)
    # A factor of two costs a tenth.
    swept = results[transfer.pairs[0][0]]["valid_loss"]
    assert row["places"][0]["over_swept"] == pytest.approx(100 * 0.1 / swept)
    assert row["places"][3]["over_swept"] == 0


def test_rules_give_the_same_factors_to_other_roles():
    found = ranks.rules()
    assert list(found) == [ranks.BY_ROLE, *(f"random {i}" for i in range(1, 6))]
    assert found[ranks.BY_ROLE] == {role: ranks.MOARA.get(role, 1.0) for role in ranks.ROLES}
    assert {tuple(sorted(factors.values())) for factors in found.values()} == {
        (0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 2.0)
    }
    assert len({tuple(factors.items()) for factors in found.values()}) == 6


def test_the_first_documents_of_a_corpus_are_tokenized_once(tmp_path):
    source = tmp_path / "corpus"
    source.mkdir()
    for name, count in ((corpus.TRAIN, 50), (corpus.VALID, 9)):
        lines = [json.dumps({"text": f"Document {i}, {name}. " * 20}) for i in range(count)]
        with lzma.open(source / name, "wt") as file:
            file.write("\n".join(lines) + "\n")
    text = corpus.prepare(source, "bytes", 2000, tmp_path / "cache")
    assert text == corpus.prepare(source, "bytes", 2000, tmp_path / "cache")
    assert text.about["train_documents"] == 4
    assert text.about["valid_documents"] == 9
    assert text.about["sha256"][corpus.VALID] == corpus.digest(source / corpus.VALID)
    batches = {"batch": 2, "seq": 16, "seed": 0}
    opened = data.open_data(**text.settings, **batches)
    assert len(opened.train_tokens) == text.about["train_tokens"]
    opened.train.close()
    again = corpus.prepare(Path(text.settings["data"]), "bytes", 2000, tmp_path / "cache")
    assert again.settings["data"] == text.settings["data"]
    novels = corpus.prepare(None, "bytes", 2000, tmp_path / "cache")
    assert novels.about["train_tokens"] == len(data.load_corpus("bytes").train.ids)


@pytest.mark.ci
@pytest.mark.parametrize("name", [*CONTENDERS])
def test_every_contender_trains(name):
    contender = CONTENDERS[name]
    run = Run(name, 16, 4 if contender.ranked else None, contender.lr, contender.ratio or 1.0)
    result = measure(BASE, run)
    assert 5 < result["valid_loss"] < 6
    assert result["state_bytes"] > result["matrix_state_bytes"] > 0


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "optimizer", "ratio"), [("adamw", "adamw", 0.25), ("galore", "galore_adamw", 1.0)]
)
def test_a_run_is_that_of_the_application(name, optimizer, ratio):
    """With the learning rate as an argument of the program, from another seed too."""
    config = dataclasses.replace(BASE, optimizer=optimizer, update_proj_gap=50, seed=3)
    config = dataclasses.replace(config, lr=0.01, matrix_lr_ratio=ratio)
    expected = train.train(config).valid[-1]["valid_loss"]
    result = measure(BASE, Run(name, 16, 4, 0.01, ratio, seed=3))
    assert result["valid_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ci
@pytest.mark.long("two processes that begin with JAX")
def test_two_processes_make_the_runs_of_one(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of some text.\n" for i in range(3000)))
    base = dataclasses.replace(BASE, data=str(text), valid_data=str(text))
    runs = [Run("adamw", 16, None, lr) for lr in (0.01, 0.02)]
    with workers.executors(base, 2, tmp_path) as execute:
        found = [one(run)["valid_loss"] for one, run in zip(execute, runs, strict=True)]
    expected = [measure(base, run)["valid_loss"] for run in runs]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.ci
def test_a_run_that_diverges_has_no_loss():
    result = measure(BASE, Run("adamw", 16, None, 1e30))
    assert result["valid_loss"] is None


@pytest.mark.ci
def test_a_contender_is_swept_on_a_gpu(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(workers, "measure", made_up(calls))
    monkeypatch.setattr(on_gpu, "base_of", lambda *_: (BASE, {}))
    size = Size(rehearsal=True, data="austen", device_memory=GIB)
    cache = jax.config.jax_compilation_cache_dir
    result = on_gpu.measure(size, "galore", deadline=math.inf)
    jax.config.update("jax_compilation_cache_dir", cache)
    assert result["complete"]
    assert len(result["runs"]) == len(calls) == len(set(calls))
    assert on_gpu.describe("60m galore", result).startswith("loss 3.9980 of 3 seeds at lr 0.16 x 1")


def test_the_readme_has_the_tables_of_the_committed_results():
    text = readme.README.read_text()
    assert readme.current(text) == text
