"""Whole runs of a small encoder on a small task, and comparisons of them."""

import contextlib
import dataclasses
import io
import json
import math
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from flax_glue_runs import ENCODERS, tiny, write_model, write_task
from flax_llama_runs import assert_same_end, without_checkpoints_after

import galore_optax
from examples.flax_glue import compare as compare_module
from examples.flax_glue import finetune as finetune_module
from examples.flax_glue import run_files
from examples.flax_glue.compare import compare, parse_methods, read_result
from examples.flax_glue.config import Config
from examples.flax_glue.finetune import finetune, from_command_line, main
from examples.flax_glue.model import Text
from examples.flax_glue.readers import open_task
from examples.flax_glue.report import edges, rows
from examples.flax_glue.step import graph_of
from examples.flax_glue.tokens import encode, open_tokenizer
from examples.flax_glue.weights import joined, load_weights
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.usage import UsageError

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("tasks") / "task")


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory, printed):
    """A run of three epochs of 16 updates with GaLore."""
    out = tmp_path_factory.mktemp("runs") / "galore"
    with contextlib.redirect_stdout(printed):
        return out, finetune(tiny(model, data, quiet=False, out=out))


def test_it_learns_the_task(run):
    _, result = run
    assert result.train[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    assert result.best["accuracy"] > 0.9
    assert result.best["test_accuracy"] > 0.8


def test_metrics_have_every_update_and_every_epoch_once(run, data):
    out, result = run
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 49))
    steps = [(r["step"], r["epoch"]) for r in records if "epoch" in r]
    assert steps == [(16, 1), (32, 2), (48, 3)]
    assert [r for r in records if "epoch" in r] == result.valid
    # Chosen on the updates 1, 9, 17, ...: six kernels of three layers.
    refreshes = [r["refreshes"] for r in result.train]
    assert refreshes == [18 * (1 + k // 8) for k in range(48)]
    # Of the tokens of 250 texts, none of the padding.
    tokens = [sum(r["tokens"] for r in result.train[i : i + 16]) for i in (0, 16, 32)]
    words = (data / "train.txt").read_text().split()
    # A label less of each text, and two tokens at its ends more.
    assert tokens == [len(words) + 250] * 3


def test_the_test_is_looked_at_where_dev_is_best_so_far(run):
    _, result = run
    best = -1.0
    for record in result.valid:
        assert ("test_score" in record) == (record["score"] > best)
        best = max(best, record["score"])
    assert result.best["score"] == best


def tokens_of(model, result, examples):
    """The tokens, types and mask of each text, for a batch of its own."""
    tokenizer = open_tokenizer(model, result.encoder, 16)
    for tokens in encode(tokenizer, examples.texts, result.encoder):
        ids, types = (np.pad(x, (0, 16 - len(x)))[None] for x in (tokens.ids, tokens.types))
        yield ids, types, (np.arange(16) < len(tokens))[None]


def test_the_scores_are_those_of_the_parameters_in_the_end(run, model, data):
    _, result = run
    encoder = nnx.merge(graph_of(result.encoder), result.params)
    dev = open_task("sst2", data, None).dev[""]
    right, losses = [], []
    forward = jax.jit(encoder)
    for tokens, label in zip(tokens_of(model, result, dev), dev.labels, strict=True):
        (logits,) = np.asarray(forward(Text(*tokens)), np.float64)
        right.append(logits.argmax() == label)
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert result.valid[-1]["accuracy"] == np.mean(right)
    assert result.valid[-1]["valid_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_what_is_said(run, printed):
    out, result = run
    said = printed.getvalue()
    assert "53 tensors taken; skipped pooler; newly drawn head" in said
    assert "sst2: 250 texts to train on, 60 to choose by, 40 to report on" in said
    assert (
        "galore_adamw of rank 4, peak learning rate 0.02; 48 updates of 16 texts, 3 times" in said
    )
    assert said.count("epoch ") == 3
    settings = json.loads((out / "config.json").read_text())
    assert settings["finetune"]["lr"] == 0.02
    assert settings["model"] == dataclasses.asdict(result.encoder)


@pytest.fixture
def stopped(model, data, tmp_path, monkeypatch):
    """The same run, told to stop after 20 updates, within its second epoch."""
    config = tiny(model, data, out=tmp_path / "run")

    def stopping_after_20(*_):
        return contextlib.nullcontext(lambda step: step == 20)

    monkeypatch.setattr(finetune_module, "stopping", stopping_after_20)
    with pytest.raises(SystemExit):
        finetune(config)
    monkeypatch.undo()
    return config.out


@pytest.mark.long("three runs, two of which go on")
def test_an_interrupted_run_goes_on_bit_for_bit(run, stopped, capsys):
    """From within an epoch, and from the end of one."""
    out, _ = run
    with Checkpoints(stopped, read_only=True) as checkpoints:
        assert checkpoints.steps == [16, 20]
    finetune(from_command_line(["--out", str(stopped), "--resume", "--quiet"]))
    assert_same_end(stopped, out, 48)
    without_checkpoints_after(stopped, 32)
    with Checkpoints(stopped, read_only=True) as checkpoints:
        (step,) = checkpoints.steps
    assert step in (16, 32)
    again = finetune(from_command_line(["--out", str(stopped), "--resume", "--quiet"]))
    assert_same_end(stopped, out, 48)
    assert len(again.train) == 48


def test_a_run_that_is_finished_reports_again(run, capsys):
    out, result = run
    before = (out / "metrics.jsonl").read_bytes()
    again = finetune(from_command_line(["--out", str(out), "--resume"]))
    assert again.valid == result.valid
    assert "Already finished after update 48" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "0.01"], "lr=0.01, which was 0.02"),
        (["--optimizer", "adamw"], "optimizer='adamw', which was 'galore_adamw'"),
    ],
)
def test_a_run_goes_on_as_it_was_alone(run, words, said):
    out, _ = run
    with pytest.raises(UsageError, match=said):
        finetune(from_command_line(["--out", str(out), "--resume", *words]))


def test_a_run_does_not_go_on_with_other_data(run, data, tmp_path):
    out, _ = run
    other = shutil.copytree(data, tmp_path / "other")
    config = from_command_line(["--out", str(out), "--resume", "--data", str(other)])
    finetune(dataclasses.replace(config, quiet=True))
    with open(other / "train.txt", "a") as file:
        file.write("1 good\n")
    with pytest.raises(UsageError, match=r"train.txt is not what the run began with"):
        finetune(config)


@pytest.mark.parametrize("kept", ["nothing", "updates", "evaluations", "a part"])
def test_a_run_that_lost_records_does_not_go_on(run, tmp_path, kept):
    """Dev could not choose the epoch among all of them."""
    out = shutil.copytree(run[0], tmp_path / "run")
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    wanted = {
        "updates": [line for line in lines if "valid_loss" not in line],
        "evaluations": [line for line in lines if "valid_loss" in line],
        "a part": [*lines[:-1], lines[-1][:-20]],
    }
    path.unlink()
    if kept != "nothing":
        path.write_text("".join(wanted[kept]))
    with pytest.raises(UsageError, match=r"metrics.jsonl has not all records of the 48 updates"):
        finetune(from_command_line(["--out", str(out), "--resume", "--quiet"]))


def test_a_gradient_that_is_not_finite_ends_the_run(model, data, tmp_path):
    plain = dict.fromkeys(("rank", "scale", "update_proj_gap"))
    config = tiny(model, data, optimizer="adamw", lr=1e30, out=tmp_path / "run", **plain)
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at update \d"):
        finetune(config)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_the_loss_of_an_update_is_the_mean_over_its_texts(model, data):
    """Of three texts in a batch of four, before anything is trained."""
    plain = dict.fromkeys(("rank", "scale", "update_proj_gap"))
    settings = {"optimizer": "adamw", "limit": 3, "batch": 4, "epochs": 1, "dropout": 0.0}
    result = finetune(tiny(model, data, **settings, **plain))
    (record,) = result.train
    encoder = nnx.merge(graph_of(result.encoder), load_weights(model, result.encoder, 0).params)
    train = open_task("sst2", data, None, limit=3).train
    losses, forward = [], jax.jit(encoder)
    for tokens, label in zip(tokens_of(model, result, train), train.labels, strict=True):
        logits = np.asarray(forward(Text(*tokens)), np.float64)[0]
        losses.append(np.log(np.exp(logits).sum()) - logits[label])
    assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_regression_of_pairs_by_the_first_token(model, tmp_path):
    """The number of a pair, by the columns of STS-B, is what its words lack to 1."""
    rng = np.random.default_rng(0)
    header = "index\tsentence1\tsentence2\tscore"
    for name, size in (("train", 200), ("dev", 48)):
        lines = [header]
        for i in range(size):
            one, other = rng.integers(2, size=2)
            words = ("good", "bad")[one], ("fine", "dull")[other]
            lines.append("\t".join([str(i), *words, str(1 - 0.6 * one - 0.4 * other)]))
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    plain = dict.fromkeys(("rank", "scale", "update_proj_gap"))
    settings = {"task": "stsb", "optimizer": "adamw", "pooling": "first", "lr": 0.01}
    config = tiny(model, tmp_path, epochs=5, **settings, **plain)
    result = finetune(config)
    assert result.best["pearson"] > 0.9
    assert result.best["score"] == pytest.approx(
        (result.best["pearson"] + result.best["spearman"]) / 2
    )
    # A third of the variance.
    assert result.valid[-1]["valid_loss"] < 0.04


def test_parameters_come_apart_and_together(model):
    config = Config(model=model, data=model, optimizer="lora").resolve()
    encoder = config.encoder(2)
    loaded = load_weights(model, encoder, 0)
    some, others = finetune_module.trained_and_frozen(config, encoder, loaded)
    jax.tree.map(np.testing.assert_array_equal, joined(some, others), loaded.params)


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ["--task", "sst3"], "error: --task sst3: expected one of cola, "),
        ({}, ["--max-length", "17"], "error: --max-length 17: the model has positions for 16 "),
        ({}, ["--optimizer", "adamw", "--rank", "4"], "error: --rank 4 has no effect with "),
        ({}, ["--ranc", "4"], "error: --ranc is not a flag: did you mean --rank?"),
        ({"model.safetensors": 200}, [], "model.safetensors is cut or damaged"),
        ({"config.json": 30}, [], "config.json is not JSON"),
        ({"tokenizer.json": None}, [], "has no tokenizer.json."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict | list) else "",
)
def test_what_cannot_work_is_a_line_before_anything_is_written(
    tmp_path, data, monkeypatch, change, words, said
):
    directory = write_model(tmp_path / "model")
    for name, size in change.items():
        path = directory / name
        contents = path.read_bytes()
        path.unlink()
        if size is not None:
            path.write_bytes(contents[:size])
    out = tmp_path / "run"
    argv = ["--model", directory, "--data", data, "--max-length", "16", "--out", out, *words]
    monkeypatch.setattr("sys.argv", ["finetune", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        main()
    line = str(stopped.value)
    assert said in line
    assert "\n" not in line
    assert not out.exists()


def test_a_digit_of_the_settings_that_was_changed_is_seen(tmp_path, model):
    config = Config(model=model, data=model, lr=0.25).resolve()
    run_files.write_settings(tmp_path, config, config.encoder(2), [])
    assert run_files.read_settings(tmp_path)["finetune"]["lr"] == 0.25
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("0.25", "0.35"))
    with pytest.raises(UsageError, match=r"config.json is damaged, .*Begin anew"):
        run_files.read_settings(tmp_path)


def pretend(config, how_to_go_on=None):
    """Leaves what a run leaves for a comparison: the nearer to 0.01 the rate, the better."""
    config = config.resolve()
    config.out.mkdir(parents=True)
    (config.out / "checkpoints").mkdir()
    files = run_files.digests(config, open_task(config.task, config.data, None).files)
    settings = {"finetune": finetune_module.settings_of(config), "model": {}, "files": files}
    (config.out / "config.json").write_text(json.dumps(settings))
    if config.lr > 1:
        raise FloatingPointError("loss is nan at update 3")
    far = abs(math.log10(config.lr) + 2)
    score = 0.9 - 0.1 * far - 0.01 * config.seed - 0.02 * (config.optimizer == "adamw")
    best = {"step": 6, "epoch": 1, "score": score, "valid_loss": 1 - score}
    best |= {"test_score": score - 0.05 - 0.002 * config.seed * (config.optimizer == "adamw")}
    memory = {"parameter_bytes": 1000, "trained_bytes": 1000, "state_bytes": 2000}
    memory["state_bytes"] -= 1500 * (config.optimizer != "adamw")
    train = [{"seconds": 1.5}] * 6
    return types.SimpleNamespace(best=best, valid=[best], memory=memory, train=train)


METHODS = ("adamw", "galore_adamw:4", "lora:2")
SWEEP = ("adamw=0.1,0.02,0.5", "galore_adamw=0.001,0.01", "lora:2=5,7")


def test_methods_are_compared_by_pairs_of_seeds(model, data, tmp_path, monkeypatch):
    trained = []

    def counted(config, how_to_go_on=None):
        trained.append(config.out.name)
        return pretend(config)

    monkeypatch.setattr(compare_module, "finetune", counted)
    shared = {"model": model, "data": data, "out": tmp_path / "compare", "max_length": 16}
    shared = Config(**shared, scale=2.0, seed=5)
    found = compare(shared, METHODS, SWEEP, seeds=3)
    assert {name: runs[0].lr for name, runs in found.best.items() if runs[0].best} == {
        "adamw": 0.02,
        "galore_adamw:4": 0.01,
    }
    assert [run.seed for run in found.best["adamw"]] == [5, 6, 7]
    assert len(trained) == 3 + 2 + 2 + 2 + 2 + 2
    by_name = {row["method"]: row for row in rows(found)}
    one, other = ([run.test for run in found.best[name]] for name in METHODS[:2])
    differences = 100 * (np.array(other) - np.array(one))
    difference = by_name["galore_adamw:4"]["difference"]
    assert difference["mean"] == pytest.approx(differences.mean())
    # Student's t of two degrees of freedom.
    half = 4.302653 * differences.std(ddof=1) / math.sqrt(3)
    assert difference["interval"] == pytest.approx(half, rel=1e-4)
    assert by_name["lora:2"]["runs"] == 0
    assert by_name["galore_adamw:4"]["seconds"] == 9.0
    assert edges(found)[:2] == [
        "The best learning rate of adamw, 0.02, is the smallest that was tried: a better one may "
        "lie beyond.",
        "The best learning rate of galore_adamw:4, 0.01, is the largest that was tried: a better "
        "one may lie beyond.",
    ]
    report = (tmp_path / "compare" / "report.md").read_text()
    assert "| lora:2 | 5 | diverged |" in report
    assert (tmp_path / "compare" / "report.png").stat().st_size > 10_000
    assert not list((tmp_path / "compare").glob("*/checkpoints"))
    # Again, with one rate more: nothing is trained twice.
    count = len(trained)
    compare(shared, METHODS, (*SWEEP[:2], "lora:2=5,7,0.01"), seeds=3)
    assert trained[count:] == [f"lora-r2-lr0.01-seed{seed}" for seed in (5, 6, 7)]
    with pytest.raises(UsageError, match="is of another configuration: batch=8, which was 16"):
        compare(dataclasses.replace(shared, batch=8), METHODS, SWEEP, seeds=3)


@pytest.fixture
def compared(model, data, tmp_path, monkeypatch):
    """The settings of a comparison of one run that was made, from copies of model and data."""
    monkeypatch.setattr(compare_module, "finetune", pretend)
    own = [shutil.copytree(path, tmp_path / path.name) for path in (model, data)]
    shared = Config(*own, out=tmp_path / "compare", max_length=16)
    compare(shared, ("adamw",), seeds=1)
    return shared


def test_a_comparison_is_read_again_with_the_same_files_elsewhere(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "finetune", None)
    report = (compared.out / "report.md").read_text()
    paths = {name: getattr(compared, name) for name in ("model", "data")}
    moved = {name: path.rename(tmp_path / f"moved {name}") for name, path in paths.items()}
    compare(dataclasses.replace(compared, **moved), ("adamw",), seeds=1)
    for name, path in paths.items():
        report = report.replace(str(path), str(moved[name]))
    # In the command a name with a space is quoted.
    assert (compared.out / "report.md").read_text().replace("'", "") == report.replace("'", "")


@pytest.mark.parametrize("methods", [("adamw",), ("lora:4",)])
@pytest.mark.parametrize(
    ("path", "change", "said"),
    [
        ("task/train.txt", lambda text: text.replace("good", "fine", 1), "train.txt is not what"),
        ("task/dev.txt", lambda text: text + "1 good\n", "dev.txt is not what"),
        ("task/test.txt", None, "test.txt, which the run began with, is not there any more"),
        ("model/config.json", lambda text: text.replace("1e-12", "1e-6"), "config.json is not"),
    ],
    ids=["train", "dev", "test", "model"],
)
def test_a_comparison_is_of_the_same_files(compared, tmp_path, path, change, said, methods):
    path = tmp_path / path
    text = path.read_text()
    path.unlink()
    if change:
        path.write_text(change(text))
    before = sorted(compared.out.rglob("*"))
    with pytest.raises(UsageError, match=said):
        compare(compared, methods, seeds=1)
    assert sorted(compared.out.rglob("*")) == before


@pytest.mark.parametrize("settings", [{"limit": 60}, {"dropout": 0.2}, {"clip": 1.0}], ids=str)
def test_a_comparison_is_of_the_same_settings(compared, settings):
    """Also where they were given before, and are left out now."""
    changed = dataclasses.replace(compared, **settings)
    (name,) = settings
    with pytest.raises(UsageError, match=f"is of another configuration: {name}="):
        compare(changed, ("adamw",), seeds=1)
    compare(changed, ("adamw",), ("adamw=0.1",), seeds=1)
    with pytest.raises(UsageError, match=f"is of another configuration: {name}="):
        compare(compared, ("adamw",), ("adamw=0.1",), seeds=1)


def test_what_came_out_of_a_run_must_be_whole(compared):
    (path,) = compared.out.glob("*/result.json")
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"result.json is not what a comparison writes: delete"):
        compare(compared, ("adamw",), seeds=1)


def test_rates_that_differ_have_runs_of_their_own():
    (method,) = parse_methods(["lora:4"])
    configs = [Config(ENCODERS, ENCODERS, lr=lr) for lr in (2.0, 0.02, 1e-5, 0.02000001)]
    names = [f"lora-r4-lr{lr}-seed0" for lr in ("2", "0.02", "1e-05", "0.02000001")]
    assert [method.run_name(config) for config in configs] == names


def test_the_runs_on_sst2_can_be_read():
    directory = ENCODERS.parents[2] / "benchmarks" / "results" / "finetune_sst2"
    runs = json.loads((directory / "results.json").read_text())["runs"]
    told = {run["name"]: run for run in runs}
    paths = sorted(directory.glob("*-seed*"))
    assert {path.name for path in paths} >= told.keys()
    for path in paths:
        settings, found = run_files.read_settings(path), read_result(path / "result.json")
        config = run_files.config_of(settings["finetune"])
        (method,) = parse_methods([found.method])
        assert path.name == found.name == method.run_name(dataclasses.replace(config, lr=found.lr))
        assert dataclasses.asdict(found) == told.get(found.name, dataclasses.asdict(found))
        names = ["config.json", "model.safetensors", "tokenizer.json"]
        names += ["train.txt", "dev.txt", "test.txt"]
        assert [name for name, *_ in settings["files"]] == names


@pytest.mark.parametrize(
    ("methods", "sweep", "said"),
    [
        ((), (), "methods is empty: expected at least one OPTIMIZER or OPTIMIZER:RANK."),
        (("adamw",), ("adamw=nan",), "sweep='adamw=nan': expected"),
        (("adamw",), ("adamw=1", "adamw=2"), "sweep='adamw=2': expected the rates of adamw once."),
        (
            *(("lora:4", "lora:8"), ("lora:4=1", "lora=2", "lora:8=3")),
            "sweep has rates of lora that have no effect",
        ),
        (("lora:0",), (), "rank=0: expected 1 to 15"),
        (("sgd",), (), "methods='sgd': expected OPTIMIZER or OPTIMIZER:RANK with"),
        (("lora:x",), (), "methods='lora:x': expected"),
        (("lora:4",), ("adamw=1",), "sweep='adamw=1': expected METHOD=RATE,RATE,... with a method"),
        (("adamw",), ("adamw=a",), "sweep='adamw=a': expected"),
        (("adamw:4",), (), "rank=4 has no effect with optimizer='adamw'"),
    ],
)
def test_comparisons_that_cannot_work(model, data, tmp_path, methods, sweep, said):
    with pytest.raises(UsageError) as error:
        compare(Config(model=model, data=data, out=tmp_path / "compare"), methods, sweep)
    assert said in str(error.value)
    assert not (tmp_path / "compare").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"scale": 2.0},
            "scale=2.0 has no effect with methods adamw, lora:4, only with optimizers",
        ),
        ({"data": pathlib.Path("none")}, "data=none is no directory"),
        ({"task": "mrpc"}, "has no train.tsv"),
        ({"max_length": 17}, "max_length=17: the model has positions for 16 tokens"),
        ({"seed": 2**31 - 1}, "seed=2147483648: expected"),
        ({"model": ENCODERS / "bert"}, "has no tokenizer.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_made_for_a_comparison_that_cannot_work(model, data, tmp_path, settings, said):
    given = {"model": model, "data": data, "out": tmp_path / "compare", "max_length": 16}
    with pytest.raises(UsageError, match=said):
        compare(Config(**given | settings), ("adamw", "lora:4"), ("lora=1", "adamw=1"))
    assert not (tmp_path / "compare").exists()


def test_nothing_is_made_for_a_comparison_with_weights_that_are_cut(model, data, tmp_path):
    weights = shutil.copytree(model, tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"model.safetensors is cut or damaged"):
        compare(Config(weights.parent, data, out=tmp_path / "compare", max_length=16), ("adamw",))
    assert not (tmp_path / "compare").exists()


@pytest.mark.long("the programs of two methods are compiled, one with weights in 8 bits")
def test_a_comparison_trains(model, data, tmp_path, monkeypatch):
    """With LoRA adapters and head alone, with Q-GaLore all, the kernels in 8 bits."""
    results = {}

    def kept(config, how_to_go_on=None):
        results[config.optimizer] = finetune(config, how_to_go_on)
        return results[config.optimizer]

    monkeypatch.setattr(compare_module, "finetune", kept)
    shared = tiny(model, data, out=tmp_path / "compare", rank=None, lora_targets="all")
    rates = ("lora=0.03", "q_galore_adamw=0.02")
    found = compare(shared, ("lora:4", "q_galore_adamw:4"), rates, seeds=1)
    for run, (name, result) in zip(found.runs, results.items(), strict=True):
        assert run.diverged is None
        assert run.method == f"{name}:4"
        assert run.dev == result.best["accuracy"] > 0.75
        assert run.memory["state_bytes"] == result.memory["state_bytes"] > 0
    changed = {}
    for name, result in results.items():
        after = flatten_dict(galore_optax.dequantize_params(result.params))
        before = flatten_dict(load_weights(model, result.encoder, 0).params)
        assert after.keys() == before.keys()
        changed[name] = {path for path in after if np.any(after[path] != before[path])}
    expected = {path for path in changed["lora"] if "lora" in path or path[0] == "head"}
    assert changed["lora"] == expected
    assert len(expected) == 6 * 2 + 2
    assert len(changed["q_galore_adamw"]) == len(before)
    kernel = results["q_galore_adamw"].params["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, galore_optax.QuantizedArray)


def test_the_encoders_here_are_small():
    assert sum(path.stat().st_size for path in ENCODERS.rglob("*")) < 300_000
