"""The benchmark of fine-tuning: which runs it makes, goes on with, and what it says of them."""

import json

import matplotlib.pyplot as plt
import pytest

from benchmarks import finetune_smollm2 as finetuning
from benchmarks.finetune_smollm2 import METHODS, SEEDS, UNTRAINED, Bench, Run, planned, plot, table


def result(run):
    """Of the middle rate the loss is least; one in a hundred more is right with each seed."""
    rates = METHODS[run.method][1] if run.method in METHODS else (0.0,)
    distance = abs(rates.index(run.lr) - len(rates) // 2)
    return {
        **{"valid_loss": 1.0 + 0.1 * distance, "accuracy": 0.5 + 0.01 * run.seed},
        **{"accuracy_error": 0.03, "state_bytes": 2e6, "update_bytes": 3e9},
    }


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(finetuning, "untrained", lambda _: result(Run(UNTRAINED, 0.0, 0)))
    monkeypatch.setattr(finetuning, "trained", lambda run, *_: made.append(run) or result(run))
    bench = Bench(tmp_path / "found.json", tmp_path)
    for run in planned(bench):
        bench.do(run, tmp_path)
    return tmp_path, bench, made


def test_all_rates_have_one_seed_and_the_best_all(bench):
    path, found, made = bench
    for method, (_, rates) in METHODS.items():
        swept = [(lr, SEEDS[0]) for lr in rates] + [(rates[1], seed) for seed in SEEDS[1:]]
        assert sorted((r.lr, r.seed) for r in made if r.method == method) == sorted(swept)
    # What the file has is not made again.
    again = Bench(path / "found.json", path)
    for run in planned(again):
        again.do(run, path)
    assert len(made) == 5 * len(METHODS)
    assert again.results == found.results
    assert json.loads((path / "found.json").read_text())["about"]["tokens"] <= 40_000


def test_the_table_has_means_and_errors_and_the_picture_is_drawn(bench):
    path, found, _ = bench
    lines = table(found).splitlines()
    assert lines[2] == "| as it was | - | 50.0 | - | - | - |"
    assert lines[3] == "| AdamW | 3e-05 | 51.0 +- 0.6 | 1.000 +- 0.000 | 2.0 | 3.00 |"
    plot(found, path / "found.png")
    assert plt.imread(path / "found.png").std() > 0.01
