"""The benchmark of fine-tuning: which runs it makes, goes on with, and what it says of them."""

import importlib.util
import itertools
import json
import tempfile
import time

import matplotlib.pyplot as plt
import pytest
from flax_glue_runs import write_model, write_task

from benchmarks import finetune_smollm2 as finetuning
from benchmarks.finetune_smollm2 import METHODS, SEEDS, UNTRAINED, Bench, Run, planned, plot, table
from benchmarks.gpu import finetune as stage
from benchmarks.gpu.stage import GIB, Size, Unavailable


def result(run):
    """Of the middle rate the loss is least; one in a hundred more is right with each seed."""
    rates = METHODS[run.method][1] if run.method in METHODS else (0.0,)
    distance = abs(rates.index(run.lr) - len(rates) // 2)
    return {
        **{"valid_loss": 1.0 + 0.1 * distance, "accuracy": 0.5 + 0.01 * run.seed},
        **{"accuracy_error": 0.03, "state_bytes": 2e6, "update_bytes": 3e9},
        **{"seconds_of_an_update": 1.0},
    }


@pytest.fixture(autouse=True)
def three_problems(monkeypatch, request):
    """Without the package that makes problems."""
    if not request.node.get_closest_marker("live"):
        parts = {x: [{"question": x, "answer": "1"}] for x in ("train", "valid", "asked")}
        monkeypatch.setattr(finetuning, "problems", lambda: parts)


@pytest.mark.live("reasoning_gym")
def test_no_question_is_in_two_parts_and_the_package_knows_right_answers():
    parts = finetuning.problems()
    questions = [problem["question"] for part in parts.values() for problem in part]
    assert len(questions) == len(set(questions)) == 1260
    first, second = parts["asked"][:2]
    assert finetuning.right(f" {first['answer']}\n", first)
    assert not finetuning.right(first["question"], second)


def test_a_file_of_another_model_is_not_gone_on_with(bench):
    path, _, _ = bench
    (path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(SystemExit, match="has runs of other problems, settings or weights"):
        Bench(path / "found.json", path)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(finetuning, "untrained", lambda _: result(Run(UNTRAINED, 0.0, 0)))
    monkeypatch.setattr(finetuning, "trained", lambda run, *_: made.append(run) or result(run))
    bench = Bench(tmp_path / "found.json", tmp_path)
    for run in itertools.chain([Run(UNTRAINED, 0.0, 0)], planned(bench)):
        bench.do(run, tmp_path)
    return tmp_path, bench, made


def test_all_rates_have_one_seed_and_the_best_all(bench):
    path, found, made = bench
    for method, (_, rates) in METHODS.items():
        middle = rates[len(rates) // 2]
        swept = [(lr, SEEDS[0]) for lr in rates] + [(middle, seed) for seed in SEEDS[1:]]
        assert sorted((r.lr, r.seed) for r in made if r.method == method) == sorted(swept)
    # What the file has is not made again.
    again = Bench(path / "found.json", path)
    for run in planned(again):
        again.do(run, path)
    assert len(made) == sum(len(rates) + len(SEEDS) - 1 for _, rates in METHODS.values())
    assert again.results == found.results
    assert json.loads((path / "found.json").read_text())["about"]["tokens"] <= 40_000


def test_the_table_has_means_and_errors_and_the_picture_is_drawn(bench):
    path, found, _ = bench
    lines = table(found).splitlines()
    assert lines[2] == "| as it was | - | 50.0 | - | - | - |"
    assert lines[3] == "| AdamW | 0.0001 | 51.0 +- 0.6 | 1.000 +- 0.000 | 2.0 | 3.00 |"
    plot(found, path / "found.png")
    assert plt.imread(path / "found.png").std() > 0.01


@pytest.fixture
def size(tmp_path, monkeypatch):
    """Of a rehearsal with a small encoder and task; what is kept between tries is in `tmp_path`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, task = write_model(tmp_path / "model"), write_task(tmp_path / "task", (64, 20, 20))
    pretrained = {"minilm": str(model), "sst2": str(task), "smollm2": str(tmp_path)}
    return Size(True, "austen", GIB, pretrained=pretrained)


@pytest.mark.long("it compiles a run")
def test_a_method_on_sst2_is_a_stage_of_the_gpu_benchmark(size):
    name = "lora:4"
    result = json.loads(json.dumps(stage.measure_minilm(size, name, 0.0)))
    assert [(run["method"], run["seed"]) for run in result["runs"]][-2:] == [(name, 1), (name, 2)]
    assert len(result["runs"]) == 3 + 2
    assert result["test"]["n"] == result["dev"]["n"] == 3
    swept = {run["lr"]: run["best"]["score"] for run in result["runs"] if run["seed"] == 0}
    assert swept[result["lr"]] == max(swept.values())
    assert "% of the test at lr" in stage.describe(f"MiniLM {name}", result)
    # Another try makes nothing again.
    assert stage.measure_minilm(size, name, 0.0)["runs"] == result["runs"]


def test_a_method_on_sums_is_one_too_and_stops_in_time(size, monkeypatch):
    made = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(stage, "write_data", lambda directory: directory)
    monkeypatch.setattr(finetuning, "trained", lambda run, *_: made.append(run) or result(run))
    row = stage.measure_smollm2(size, "GaLore", time.time())
    assert not row["complete"]
    assert len(made) == 0
    assert stage.describe("SmolLM2 GaLore", row) == "no time for a run"
    row = stage.measure_smollm2(size, "GaLore", time.time() + 100)
    assert row["complete"]
    assert len(made) == len(row["runs"]) == 5
    told = stage.describe("SmolLM2 GaLore", row)
    assert told == "51.0 % right of 3 seeds at lr 0.0003, 1.00 s an update"


@pytest.mark.parametrize("name", ["SmolLM2 LoRA", "MiniLM adamw"])
def test_without_the_models_it_is_skipped_and_says_what_it_needs(name):
    [item] = [i for i in stage.items(Size(False, "austen", GIB)) if i.name == name]
    with pytest.raises(Unavailable, match=r"needs --(smollm2|minilm) DIR"):
        item.measure(0.0)
