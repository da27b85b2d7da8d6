"""Comparisons of tiny runs: what is trained, what is chosen, and what the report says of it."""

import asyncio
import dataclasses
import json
import logging
import math
import pathlib
import re
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import metrics, pretend, tiny, write_text
from matplotlib.figure import Figure

from examples.flax_llama import command, report
from examples.flax_llama import compare as module
from examples.flax_llama import train as training
from examples.flax_llama.compare import compare, parse_sweep, search
from examples.flax_llama.config import UsageError
from examples.flax_llama.flags import command_line
from examples.flax_llama.loading import load_run
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.report import Comparison, Run, mean_loss
from examples.flax_llama.report_pictures import draw_bytes, draw_curves, draw_sweep
from examples.flax_llama.step import initial_params

OPTIMIZERS = ("adamw", "galore_adamw")
SWEEP = ("adamw=0.01,0.03", "adamw.matrix-lr-ratio=0.5", "galore_adamw=0.01,0.03")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def compared(text, directory, train):
    """A comparison of six runs."""
    shared = tiny(text, steps=6, eval_every=6, save_every=6, out=directory / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", train)
        return shared, compare(shared, OPTIMIZERS, SWEEP, seeds=2)


@pytest.fixture(scope="module")
def pretended(text, tmp_path_factory):
    return compared(text, tmp_path_factory.mktemp("pretended"), pretend)


@pytest.fixture(scope="module")
def really(text, tmp_path_factory):
    return compared(text, tmp_path_factory.mktemp("really"), training.train)


def note(monkeypatch, names, train):
    """Lets `train` be what trains runs, whose names are noted."""

    def noting(config, how_to_go_on):
        names.append(config.out.name)
        return train(config, how_to_go_on)

    monkeypatch.setattr(module, "train", noting)


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that are trained, or are said to be."""
    names = []
    note(monkeypatch, names, pretend)
    return names


@pytest.fixture(params=["pretended", pytest.param("really", marks=pytest.mark.ci)])
def done(request, monkeypatch, trained):
    """Of runs that are not trained, and in CI of those that are, too."""
    if request.param == "really":
        note(monkeypatch, trained, training.train)
    return request.getfixturevalue(request.param)


def rows(report, start):
    """The cells of the table in a report that begins with a line."""
    lines = report.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    table = lines[first + 2 :]
    table = table[: next(i for i, line in enumerate(table) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_optimizer_has_its_own_defaults(text, tmp_path, monkeypatch):
    configs = []

    def train(config, _):
        configs.append(config)
        config.out.mkdir(parents=True)
        raise FloatingPointError("it is enough to know what would be trained")

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "write_report", lambda *_: None)
    compare(tiny(text, out=tmp_path / "out"), ("galore_adamw", "q_galore_adamw"))
    assert [(c.int8_weights, c.refresh) for c in configs] == [(False, "periodic"), (True, "lazy")]


def test_sweeps_are_of_the_learning_rate_unless_they_name_a_setting():
    words = ["adamw=0.1,0.2", "lion=1e-3", "lion.weight-decay=0,0.1,0.1", "lion.projector=svd,rows"]
    assert parse_sweep(words, ["adamw", "lion", "sgd"]) == {
        "adamw": {"lr": [0.1, 0.2]},
        "lion": {"lr": [0.001], "weight_decay": [0.0, 0.1], "projector": ["svd", "rows"]},
        "sgd": {},
    }


def test_ranks_may_be_fractions_which_are_the_ranks_that_they_come_to(text, tmp_path, trained):
    """Of a hidden size of 16, where 0.25 and 4 are the same."""
    words = ("galore_adamw.rank=125e-3,0.25,4,8",)
    comparison = compare(tiny(text, out=tmp_path / "out"), ("galore_adamw",), words)
    assert sorted(run.settings["rank"] for run in comparison.runs) == [2, 4, 8]
    assert len(trained) == 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "The best rank of galore_adamw, 2, is the smallest" in report


@pytest.mark.parametrize(
    "word",
    ["adamw", "adamw=", "adamw=fast", "lion=0.1", "adamw.batch=4", "adamw.rank=half", "=0.1"],
)
def test_other_words_in_a_sweep_are_refused_with_what_is_right(word):
    with pytest.raises(UsageError, match=rf"sweep='{word}': .* OPTIMIZER=RATE.* of adamw, sgd and"):
        parse_sweep([word], ["adamw", "sgd"])


@pytest.mark.parametrize("again", ["adamw=0.2", "adamw.lr=0.2"])
def test_values_of_a_setting_are_given_once(again):
    """The second would take the place of the first."""
    with pytest.raises(UsageError, match=rf"sweep='{again}': expected the values of adamw.* once"):
        parse_sweep(["adamw=0.1", again], ["adamw"])


@pytest.mark.parametrize("best", [(0, 0), (1, 2), (4, 1), (2, 3)])
def test_a_search_ends_where_no_single_value_is_better(best):
    tried = set()

    def loss(settings):
        point = settings["x"], settings["y"]
        tried.add(point)
        dx, dy = point[0] - best[0], point[1] - best[1]
        return dx**2 + dy**2 + 0.5 * dx * dy

    grid = {"x": range(5), "y": range(4)}
    assert search(grid, loss) == {"x": best[0], "y": best[1]}
    assert {(x, best[1]) for x in range(5)} | {(best[0], y) for y in range(4)} <= tried


def test_a_search_with_its_best_in_the_middle_tries_a_cross_and_one_of_nothing_a_point():
    tried = []

    def loss(settings):
        tried.append(tuple(settings.values()))
        return sum(abs(value) for value in settings.values())

    search({"x": [-1, 0, 1], "y": [-1, 0, 1]}, loss)
    assert set(tried) == {(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)}
    assert search({}, loss) == {}
    assert search({"x": [1, 2]}, lambda _: math.inf) == {"x": 1}


def test_each_optimizer_is_compared_at_its_best_from_every_seed(done):
    shared, comparison = done
    losses = {run.name: metrics(shared.out / run.name)[-1]["valid_loss"] for run in comparison.runs}
    assert len(losses) == len(comparison.runs) == 6
    assert {run.name: run.loss for run in comparison.runs} == losses
    for name, (first, second) in comparison.best.items():
        swept = [run for run in comparison.runs if run.optimizer == name and run.seed == 0]
        assert first == min(swept, key=lambda run: run.loss)
        assert (second.settings, second.seed) == (first.settings, 1)
    for run in comparison.runs:
        settings = json.loads((shared.out / run.name / "config.json").read_text())["train"]
        assert settings["matrix_lr_ratio"] == (0.5 if run.optimizer == "adamw" else 1.0)
        assert settings["lr"] == run.settings["lr"]


@pytest.mark.ci
def test_runs_are_saved_and_their_memory_is_known(really):
    shared, comparison = really
    for run in comparison.runs:
        assert (shared.out / run.name / "checkpoints" / "6").is_dir()
        model, _ = load_run(shared.out / run.name)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        scores = run.scores
        assert scores["parameter_bytes"] == sum(x.nbytes for x in jax.tree.leaves(params))
        # Parameters, state, and the gradients between them.
        held = scores["projector_bytes"] + scores["moment_bytes"]
        assert scores["update_bytes"] > 2 * scores["parameter_bytes"] + held


@pytest.mark.ci
def test_runs_of_one_seed_begin_alike_and_see_the_same_tokens(really):
    shared, comparison = really
    first_losses = {0: set(), 1: set()}
    for run in comparison.runs:
        first_losses[run.seed].add(metrics(shared.out / run.name)[0]["loss"])
    assert [len(losses) for losses in first_losses.values()] == [1, 1]
    assert first_losses[0] != first_losses[1]


def test_the_table_has_losses_ratios_bytes_and_speeds(done):
    shared, comparison = done
    report = (shared.out / "report.md").read_text()
    table = rows(report, "| optimizer")
    assert [row[0] for row in table] == list(OPTIMIZERS)
    reference = np.mean([run.loss for run in comparison.best["adamw"]])
    for row, (name, runs) in zip(table, comparison.best.items(), strict=True):
        losses = [run.loss for run in runs]
        mean, error = np.mean(losses), np.std(losses, ddof=1) / 2**0.5
        assert mean_loss(runs) == (pytest.approx(mean), pytest.approx(error))
        assert row[1:3] == [str(runs[0].settings["lr"]), "0.5" if name == "adamw" else ""]
        assert row[3:5] == [f"{mean:.4f} ± {error:.4f}", f"{mean / reference:.4f}"]
        assert row[5] == f"{math.exp(mean):.2f} ± {math.exp(mean) * error:.2f}"
        config = dataclasses.replace(shared, optimizer=name).resolve()
        params = jax.eval_shape(lambda: initial_params(config, config.shape(257)))  # noqa: B023
        shapes = jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, params))
        state = sum(x.size * x.dtype.itemsize for x in shapes)
        assert row[6] == f"{state / 1e6:.1f} MB"
        scores = runs[0].scores
        held = scores["projector_bytes"] + scores["moment_bytes"]
        assert held == pytest.approx(state, abs=200)
    assert len(rows(report, "| run")) == 6


def test_one_seed_has_the_standard_error_of_the_text(done):
    _, comparison = done
    run = comparison.runs[0]
    assert mean_loss([run]) == (run.loss, run.scores["standard_error"])


def test_the_report_shows_pictures_and_says_where_a_better_value_may_lie(done):
    shared, comparison = done
    report = (shared.out / "report.md").read_text()
    for name in ("losses.png", "sweep.png", "bytes.png"):
        assert f"({name})" in report
        assert (shared.out / name).read_bytes().startswith(b"\x89PNG")
    for name, rates in (("adamw", (0.01, 0.03)), ("galore_adamw", (0.01, 0.03))):
        best = comparison.best[name][0].settings["lr"]
        side = {min(rates): "smallest", max(rates): "largest"}.get(best)
        told = [line for line in report.splitlines() if line.startswith(f"The best lr of {name},")]
        assert len(told) == (side is not None)
        assert all(f"{best:g}, is the {side} that was tried" in line for line in told)


@pytest.fixture
def pictures(monkeypatch):
    """The figures of a report by the file that they are written to."""
    figures, save = {}, Figure.savefig

    def saved(figure, path, **options):
        figures[path.name] = figure
        save(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def test_pictures_cut_nothing_and_number_whole_updates(pretended, pictures):
    shared, comparison = pretended
    draw_curves(comparison, shared.out)
    (panel,) = pictures["losses.png"].axes
    best = comparison.best["adamw"][0]
    losses = [r["loss"] for r in metrics(shared.out / best.name) if "loss" in r]
    low, high = panel.get_ylim()
    valid, error = best.scores["valid_loss"], best.scores["standard_error"]
    assert low < min(*losses, valid - error)
    assert max(*losses, valid + error) < high
    assert all(tick == round(tick) for tick in panel.get_xticks())


def test_bytes_are_told_beside_their_bars_for_small_models_too(pretended, pictures):
    shared, comparison = pretended
    draw_bytes(comparison, shared.out)
    left, _ = pictures["bytes.png"].axes
    told = {text.xy[1]: text.get_text() for text in left.texts}
    for name, runs in comparison.best.items():
        parts = (runs[0].scores[f"{part}_bytes"] for part in ("parameter", "projector", "moment"))
        assert told[name] == f"{sum(parts) / 1e6:.2f}"


def run_of(lr, ratio, loss):
    settings = {"lr": lr, "matrix_lr_ratio": ratio}
    scores = {"valid_loss": loss, "standard_error": 0.01} if loss < math.inf else {}
    name = f"adamw-lr{lr}-ratio{ratio}"
    return Run(name, "adamw", 0, settings, scores, None if scores else "diverged")


@pytest.mark.parametrize("edge", [False, True])
def test_the_best_of_a_sweep_is_seen_beside_its_neighbours_and_marked_at_an_edge(
    text, tmp_path, pictures, edge
):
    """Its neighbour has the same learning rate, and nearly the same loss; others are far off."""
    best, neighbour = run_of(0.02, 0.5, 3.0), run_of(0.02, 0.25, 3.0001)
    if edge:
        others = [run_of(0.04, 0.5, 9.0), run_of(0.08, 0.5, math.inf)]
    else:
        others = [run_of(0.01, 0.5, 3.1), run_of(0.04, 0.5, 3.2), run_of(0.08, 0.5, 3.4)]
    runs = [best, neighbour, *others]
    rates = sorted({run.settings["lr"] for run in runs})
    grids = {"adamw": {"lr": rates, "matrix_lr_ratio": [0.25, 0.5, 1.0]}}
    comparison = Comparison(tiny(text), (), grids, runs, {"adamw": [best]})
    draw_sweep(comparison, tmp_path)
    figure = pictures["sweep.png"]
    (panel,) = figure.axes
    drawn = {line.get_label(): line for line in panel.get_lines()}
    for box in panel.containers:
        drawn[box.get_label()] = box[0]

    def places(label):
        """Where points are in the picture, in points of 1/72 inch."""
        line = drawn[label]
        return line.get_transform().transform(line.get_xydata()) * 72 / figure.dpi

    (name,) = [label for label in drawn if label.startswith("best")]
    assert name == ("best, smallest lr tried" if edge else "best")
    star = drawn[name]
    assert star.get_color() == ("red" if edge else "black")
    assert star.get_fillstyle() == "none"
    assert star.get_zorder() > max(line.get_zorder() for line in drawn.values() if line != star)
    (middle,) = places(name)
    own, beside = places("matrix_lr_ratio 0.5"), places("matrix_lr_ratio 0.25")
    assert np.abs(own - middle).max(axis=1).min() == pytest.approx(0, abs=1e-6)
    apart = np.linalg.norm(beside - middle, axis=1).min()
    assert apart > (star.get_markersize() + drawn["matrix_lr_ratio 0.25"].get_markersize()) / 2
    box = panel.get_window_extent().extents * 72 / figure.dpi
    for x, y in (*own, *beside):
        assert box[0] < x < box[2]
        assert box[1] < y < box[3]
    above = [text.get_text().split("\n")[-1] for text in panel.texts]
    assert above == (["9.00", "diverged"] if edge else [])


def test_a_setting_that_may_be_unset_is_asked_for_as_it_is_typed(text):
    """Of such a flag there is no --no-..., and of one that takes several words each is a word."""
    given = dataclasses.replace(tiny(text), lora_only=False, int8_weights=True, on_nan="skip")
    asked = shlex.split(report.command(given, ["lora"], [], 1).split(" --", 1)[1])
    found = dict(
        command_line(compare, [f"--{asked[0]}", *asked[1:]], hidden=module.DECIDED).keywords
    )
    assert found["shared"] == given


def test_the_command_in_the_report_asks_for_the_same_comparison(done, text):
    shared, comparison = done
    results = json.loads((shared.out / "results.json").read_text())
    assert f"```\n{results['command']}\n```" in (shared.out / "report.md").read_text()
    prefix, command = results["command"].split(" --", 1)
    assert prefix == "python -m examples.flax_llama.compare"
    asked = dict(command_line(compare, shlex.split(f"--{command}"), hidden=module.DECIDED).keywords)
    assert dataclasses.asdict(asked.pop("shared")) == dataclasses.asdict(shared)
    assert asked == {"optimizers": OPTIMIZERS, "sweep": SWEEP, "seeds": 2}
    assert results["runs"] == [dataclasses.asdict(run) for run in comparison.runs]


def test_finished_runs_are_not_trained_again(done, trained):
    shared, comparison = done
    before = (shared.out / "report.md").read_text()
    assert compare(shared, OPTIMIZERS, SWEEP, seeds=2) == comparison
    assert trained == []
    assert (shared.out / "report.md").read_text() == before


def test_new_values_are_trained_beside_finished_runs(pretended, trained):
    shared, _ = pretended
    more = compare(shared, ("galore_adamw",), ("galore_adamw=0.01,0.02,0.03",))
    assert trained == ["galore_adamw-lr0.02-seed0"]
    assert len(more.runs) == 3


def test_a_run_that_is_stopped_tells_how_to_go_on_with_all(text, tmp_path, monkeypatch):
    told = []

    def train(config, how_to_go_on):
        told.append(how_to_go_on)
        return pretend(config)

    monkeypatch.setattr(module, "train", train)
    shared = tiny(text, steps=3, out=tmp_path / "out")
    comparison = compare(shared, ("galore_adamw",), ("galore_adamw=0.01,0.02",), seeds=2)
    assert told == [comparison.command] * 3


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="of Linux")
@pytest.mark.parametrize("name", ["losses.png", "report.md.partial"])
def test_a_full_disk_is_told_of_the_report(pretended, tmp_path, trained, name):
    shared = dataclasses.replace(pretended[0], out=tmp_path / "out")
    shutil.copytree(pretended[0].out, shared.out)
    (shared.out / name).unlink(missing_ok=True)
    (shared.out / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as found:
        compare(shared, OPTIMIZERS, SWEEP, seeds=2)
    assert found.value.filename.startswith(str(shared.out))
    assert trained == []


@pytest.mark.ci
def test_an_interrupted_run_goes_on_to_the_same_end(really, tmp_path, monkeypatch):
    shared, comparison = really
    first = comparison.runs[0]
    word = f"adamw={first.settings['lr']}"
    own = {"rank": None, "update_proj_gap": None}  # for which adamw has no use
    shared_here = dataclasses.replace(shared, save_every=2, out=tmp_path / "out", **own)
    update = training.RunLog.update

    def interrupted(log, step, values):
        if step == 5:
            raise KeyboardInterrupt
        update(log, step, values)

    monkeypatch.setattr(training.RunLog, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(shared_here, ("adamw",), (word, SWEEP[1]))
    out = tmp_path / "out" / first.name
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    seen = []

    def recorded(log, step, values):
        seen.append(step)
        update(log, step, values)

    monkeypatch.setattr(training.RunLog, "update", recorded)
    (run,) = compare(shared_here, ("adamw",), (word, SWEEP[1])).runs
    assert seen == [5, 6]
    assert metrics(out) == metrics(shared.out / first.name)
    assert run.loss == first.loss


def test_a_rate_that_diverges_loses_and_is_not_trained_again(text, tmp_path, trained):
    own = {"rank": None, "update_proj_gap": None}  # for which sgd has no use
    shared = tiny(text, steps=3, warmup=0.0, clip=0.0, out=tmp_path / "out", **own)
    comparison = compare(shared, ("sgd",), ("sgd=0.1,1e38",))
    assert comparison.best["sgd"][0].settings["lr"] == 0.1
    (diverged,) = [run for run in comparison.runs if run.diverged]
    assert diverged.loss == math.inf
    report = (tmp_path / "out" / "report.md").read_text()
    assert ["sgd-lr1e+38-seed0", diverged.outcome, "", ""] in rows(report, "| run")
    assert len(trained) == 2
    compare(shared, ("sgd",), ("sgd=0.1,1e38",))
    assert len(trained) == 2
    # Alone, it is reported as what it is.
    compare(shared, ("sgd",), ("sgd=1e38",))
    (row,) = rows((tmp_path / "out" / "report.md").read_text(), "| optimizer")
    assert row[:3] == ["sgd", "1e+38", "diverged"]
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"out": None}, (), "A comparison needs a directory: out=DIRECTORY"),
        ({"resume": True}, (), "resume=True: leave it out"),
        ({}, ("galore_adamw.rank=4,16",), "rank=16: expected 1 to 15"),
        ({}, ("galore_adamw.projector=svd,none",), "projector='none': expected one of svd"),
        ({}, ("adamw.scale=0.25",), "scale=0.25 has no effect with optimizer='adamw', only"),
        ({"momentum": 0.9}, (), "momentum=0.9 has no effect with optimizer='adamw', optimizer='g"),
        ({"batch": 0}, (), "batch=0: expected at least 1"),
    ],
)
def test_what_cannot_work_is_refused_before_any_run(
    text, tmp_path, trained, settings, words, message
):
    shared = tiny(text, **{"out": tmp_path / "out"} | settings)
    with pytest.raises(UsageError, match=message):
        compare(shared, OPTIMIZERS, words)
    assert trained == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_optimizer_or_no_seed_is_refused(text, tmp_path):
    shared = tiny(text, out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"optimizers='adam': expected some of adamw, adafactor"):
        compare(shared, ("adam",))
    with pytest.raises(UsageError, match="optimizers is empty: expected some of adamw, adafactor"):
        compare(shared, ())
    assert not shared.out.exists()
    with pytest.raises(UsageError, match="seeds=0: expected at least 1"):
        compare(shared, seeds=0)


def test_a_directory_of_something_else_is_left_alone(text, tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(UsageError, match="neither empty nor of a comparison"):
        compare(tiny(text, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_runs_with_other_settings_are_not_mixed(done):
    shared, _ = done
    with pytest.raises(UsageError, match="of another configuration: steps=7, which was 6"):
        compare(dataclasses.replace(shared, steps=7), OPTIMIZERS, SWEEP)


@pytest.mark.parametrize("flag", ["--optimizer=sgd", "--resume", "--new-data", "--distributed"])
def test_flags_that_a_comparison_decides_itself_are_not_offered(monkeypatch, capsys, flag):
    name = flag.split("=")[0]
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    offered = capsys.readouterr().out
    assert "--matrix-lr-ratio FLOAT" in offered
    assert not re.search(rf"{name}\b(?!s)", offered)
    monkeypatch.setattr("sys.argv", ["compare", flag])
    with pytest.raises(SystemExit, match=f"^error: {name} is not a flag"):
        module.main()


def test_errors_of_the_command_line_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["compare", "--sweep", "adamw", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match=r"^error: --sweep adamw: expected"):
        module.main()


def test_writes_that_orbax_abandons_say_nothing_after_that_line(monkeypatch, caplog):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(logging.getLogger("asyncio"), "filters", [])
    # As in a process of its own, in which nothing has silenced them yet.
    monkeypatch.setattr(command, "hide_abandoned", command.hide_abandoned.__wrapped__)
    monkeypatch.setattr("sys.argv", ["compare"])
    with pytest.raises(SystemExit):
        module.main()
    loop = asyncio.new_event_loop()
    loop.create_future().set_exception(OSError("abandoned"))
    loop.call_exception_handler({"message": "something else"})
    loop.close()
    assert caplog.messages == ["something else"]
