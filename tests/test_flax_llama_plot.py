"""Pictures of runs: what is read from metrics, what is drawn of it, and what is refused."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from examples.flax_llama import history, plot
from examples.flax_llama.config import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain


def write_run(out, steps=30, energy=False, every=10, bytes_per_token=1, **changed):
    """Metrics as a run writes them, a line for each update and evaluation."""
    out.mkdir(parents=True)
    with open(out / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "loss": 3 / step, "lr": 0.1, "grad_norm": 1.0, "tokens": 8}
            record |= {"tokens_per_second": 100.0} | ({"captured_energy": 0.5} if energy else {})
            file.write(json.dumps(record | changed.get(f"at_{step}", {})) + "\n")
            if step % every == 0:
                bits = 4 / step / math.log(2) / bytes_per_token
                valid = {"step": step, "valid_loss": 4 / step, "standard_error": 0.1}
                valid |= {"bits_per_byte": bits}
                file.write(json.dumps(valid) + "\n")
    return out


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are closed, by the titles of their panels."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield lambda: {panel.get_title() or "loss": panel for panel in figures[-1].axes}
    monkeypatch.undo()
    plt.close("all")


def lines(panel):
    return {line.get_label(): line.get_xydata() for line in panel.get_lines()}


def test_means_are_of_the_finite_values_among_the_last_ones():
    values = np.array([1.0, math.nan, 4.0, 7.0, math.nan, math.nan, math.nan])
    expected = [
        np.nanmean(window) if np.isfinite(window).any() else math.nan
        for window in (values[max(0, i - 2) : i + 1] for i in range(len(values)))
    ]
    np.testing.assert_allclose(plot.moving_mean(values, 3), expected)
    np.testing.assert_array_equal(plot.moving_mean(values, 1), values)


def test_losses_and_held_out_points_with_their_errors_are_those_of_the_files(tmp_path, drawn):
    run = write_run(tmp_path / "run")
    plot.plot((run,), tmp_path / "run.png", smooth=5)
    panel = drawn()["loss"]
    (steps, losses) = lines(panel)["run"].T
    np.testing.assert_array_equal(steps, np.arange(1, 31))
    means = [np.mean([3 / k for k in range(max(1, n - 4), n + 1)]) for n in range(1, 31)]
    np.testing.assert_allclose(losses, means)
    points, _, (bars,) = panel.containers[0]
    np.testing.assert_allclose(points.get_xydata(), [(10, 0.4), (20, 0.2), (30, 4 / 30)])
    heights = [np.ptp(bar[:, 1]) for bar in bars.get_segments()]
    np.testing.assert_allclose(heights, 0.2)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def within(panel):
    """Whether everything that is drawn of data lies within the axes."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    bars = [bar for box in panel.containers for bar in box[2][0].get_segments() if box[2]]
    found = [line.get_xydata() for line in panel.get_lines()] + bars
    x, y = np.concatenate([data[np.isfinite(data).all(axis=1)] for data in found]).T
    return left <= x.min() and x.max() <= right and bottom <= y.min() and y.max() <= top


def test_nothing_is_cut_and_the_second_half_has_a_panel_of_its_own(tmp_path, drawn):
    high = {"at_1": {"loss": 50.0}, "at_20": {"loss": 9.0}}
    plot.plot((write_run(tmp_path / "run", **high),), tmp_path / "run.png", smooth=4)
    panels = drawn()
    whole, half = panels["loss"], panels["after update 15"]
    assert whole.get_ylim()[1] > 50 > half.get_ylim()[1] > 9
    assert within(whole)
    assert within(half)
    (means, whole_means) = lines(half)["run"], lines(whole)["run"]
    np.testing.assert_array_equal(means, whole_means[15:])
    assert [x for x, _ in half.containers[0][0].get_xydata()] == [20, 30]


@pytest.mark.parametrize("steps", [2, 3, 30])
def test_updates_are_whole_on_every_axis(tmp_path, drawn, steps):
    plot.plot((write_run(tmp_path / "run", steps),), tmp_path / "run.png")
    for panel in drawn().values():
        ticks = panel.get_xticks()
        assert (ticks == ticks.round()).all()


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(tmp_path, drawn):
    """Of text that has 4 bytes in a token of one, and 2 in one of the other."""
    runs = [write_run(tmp_path / name, 30, bytes_per_token=k) for name, k in (("a", 4), ("b", 2))]
    for run in runs:
        (run / "tokenizer.json").write_text("the same")
    told = plot.plot(tuple(runs), tmp_path / "same.png", smooth=1)
    assert told == f"Wrote {tmp_path / 'same.png'}: losses in nats per token of a, b"
    np.testing.assert_allclose(lines(drawn()["loss"])["a"][:, 1], 3 / np.arange(1, 31))
    (runs[1] / "tokenizer.json").rename(runs[1] / "tokenizer.model")
    (runs[1] / "tokenizer.model").write_text("another one")
    told = plot.plot(tuple(runs), tmp_path / "other.png", smooth=1)
    assert told == f"Wrote {tmp_path / 'other.png'}: losses in bits per byte of a, b"
    panel = drawn()["loss"]
    assert panel.get_ylabel() == "cross entropy, bits per byte"
    for run, box, size in zip("ab", panel.containers, (4, 2), strict=False):
        bits = 3 / np.arange(1, 31) / math.log(2) / size
        np.testing.assert_allclose(lines(panel)[run][:, 1], bits)
        held_out, _, (bars,) = box
        expected = 4 / np.array([10, 20, 30]) / math.log(2) / size
        np.testing.assert_allclose(held_out.get_ydata(), expected)
        heights = [np.ptp(bar[:, 1]) for bar in bars.get_segments()]
        np.testing.assert_allclose(heights, 0.2 / math.log(2) / size)


def test_a_run_of_another_tokenizer_that_has_no_evaluation_is_not_compared(tmp_path):
    runs = tuple(write_run(tmp_path / name, steps) for name, steps in (("a", 30), ("b", 3)))
    for run in runs:
        (run / "tokenizer.json").write_text(run.name)
    with pytest.raises(UsageError, match=r"runs=b has another tokenizer .* no evaluation yet"):
        plot.plot(runs, tmp_path / "both.png")
    assert not (tmp_path / "both.png").exists()


def test_a_dashed_line_is_where_a_run_went_on_with_other_settings(tmp_path, drawn):
    changed, other = write_run(tmp_path / "changed"), write_run(tmp_path / "other")
    changes = {"lr": [0.1, 0.05], "keep": [2, 3], "optimizer": ["adamw", "lion"]}
    history.add_entry(changed, history.Entry(0))
    history.add_entry(changed, history.Entry(20, changes, marked=["lr", "optimizer"]))
    plot.plot((other, changed), tmp_path / "run.png")
    for panel in drawn().values():
        dashed = [line for line in panel.get_lines() if line.get_linestyle() == "--"]
        assert [list(line.get_xdata()) for line in dashed] == [[20.5, 20.5]]
        assert dashed[0].get_color() == "C1"
        # A number above the panel, which hides no curve.
        (number,) = panel.texts
        assert number.get_text() == "1"
        assert number.xy == (20.5, 1)
        assert number.get_position()[1] > 0
    (_, told) = drawn()["loss"].figure.legends
    (text,) = told.texts
    said = "1: changed after update 20: lr 0.1 → 0.05, optimizer adamw → lion"
    assert text.get_text() == said


def test_numbers_of_changes_that_would_touch_are_one_text(tmp_path, drawn):
    runs = [write_run(tmp_path / name, 100) for name in ("a", "b")]
    for run, steps in zip(runs, ([50, 90], [48, 50]), strict=True):
        history.add_entry(run, history.Entry(0))
        for step in steps:
            history.add_entry(run, history.Entry(step, {"lr": [step, 0]}, marked=["lr"]))
    plot.plot(tuple(runs), tmp_path / "both.png")
    panels = drawn()
    texts = {text.xy[0]: text.get_text() for text in panels["loss"].texts}
    assert texts == {49.5: "1, 3, 4", 90.5: "2"}
    assert [text.get_text() for text in panels["after update 50"].texts] == ["1, 4", "2"]
    (_, told) = panels["loss"].figure.legends
    names = [text.get_text().partition(":")[2].partition(" after")[0] for text in told.texts]
    assert names == [" a", " a", " b", " b"]


def test_names_are_read_line_by_line_and_the_picture_grows_with_them(tmp_path, drawn):
    names = [f"{letter}-{'x' * 40}" for letter in "abcde"]
    plot.plot(tuple(write_run(tmp_path / name) for name in names), tmp_path / "five.png")
    figure = drawn()["loss"].figure
    figure.canvas.draw()
    (legend,) = figure.legends
    places = {t.get_text(): t.get_window_extent() for t in legend.texts}
    order = sorted(places, key=lambda name: (-round(places[name].y0), places[name].x0))
    assert order == [*names, "held out"]
    top = max(panel.get_tightbbox().y1 for panel in figure.axes)
    assert all(box.y0 > top and box.x1 < figure.bbox.x1 for box in places.values())
    plot.plot((tmp_path / names[0],), tmp_path / "one.png")
    assert figure.bbox.height > drawn()["loss"].figure.bbox.height


def test_speed_is_all_tokens_over_all_time(tmp_path, drawn):
    fast = {"at_2": {"tokens_per_second": 1e9}}
    plot.plot((write_run(tmp_path / "run", 2, **fast),), tmp_path / "run.png", smooth=2)
    (line,) = drawn()["tokens per second"].get_lines()
    # Eight tokens at 100 per second, and eight in no time.
    np.testing.assert_allclose(line.get_ydata(), [100, 200], rtol=1e-6)


def test_panels_are_those_that_any_run_has_and_skip_the_others(tmp_path, drawn):
    plain = write_run(tmp_path / "plain")
    plot.plot((plain,), tmp_path / "one.png")
    assert plot.PANELS["captured_energy"] not in drawn()
    galore = write_run(tmp_path / "galore", energy=True)
    plot.plot((plain, galore), tmp_path / "two.png")
    panels = drawn()
    assert panels.keys() == {"loss", "after update 15", *plot.PANELS.values()}
    _, empty, _, energy = panels[plot.PANELS["captured_energy"]].get_lines()
    assert len(empty.get_xydata()) == 0
    np.testing.assert_array_equal(energy.get_ydata(), 0.5)
    assert panels[plot.PANELS["captured_energy"]].get_ylim() == (0, 1.05)


def test_more_than_all_of_the_energy_is_drawn_too(tmp_path, drawn):
    run = write_run(tmp_path / "run", energy=True, at_9={"captured_energy": 1.4})
    plot.plot((run,), tmp_path / "run.png")
    panel = drawn()[plot.PANELS["captured_energy"]]
    assert panel.get_ylim()[1] > 1.4


def test_means_are_of_a_fiftieth_of_each_run(tmp_path, drawn):
    runs = [write_run(tmp_path / name, steps) for name, steps in (("long", 300), ("short", 30))]
    plot.plot(tuple(runs), tmp_path / "both.png")
    found = lines(drawn()["loss"])
    np.testing.assert_allclose(found["short"][:, 1], 3 / np.arange(1, 31))
    assert found["long"][9, 1] == pytest.approx(np.mean(3 / np.arange(5, 11)))


def test_names_are_as_short_as_tells_the_directories_apart(tmp_path):
    same = [write_run(tmp_path / kind / "run") for kind in ("a", "b")]
    assert [run.name for run in plot.read_curves(same)] == ["a/run", "b/run"]
    assert [run.name for run in plot.read_curves(same[:1])] == ["run"]
    far = write_run(tmp_path / "a" / "deep" / "other")
    assert [run.name for run in plot.read_curves([*same, far])] == ["a/run", "b/run", "other"]


def test_a_run_in_progress_and_updates_that_were_skipped_are_drawn(tmp_path, drawn):
    run = write_run(tmp_path / "run", at_7={"loss": None, "grad_norm": None})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    plot.plot((run,), tmp_path / "run.png", smooth=1)
    losses = lines(drawn()["loss"])["run"]
    assert len(losses) == 30
    assert np.flatnonzero(np.isnan(losses[:, 1])).tolist() == [6]


def test_a_run_without_evaluations_or_of_one_update_is_drawn(tmp_path):
    plot.plot((write_run(tmp_path / "run", 1),), tmp_path / "run.png")
    assert (tmp_path / "run.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"runs=.*run is not the directory of a run: it has no metrics\.jsonl"),
        ("", "has no update yet"),
        ('{"step": 1, "lo', "has no update yet"),
        ('{"step": 1, "loss": 2.0}\nhello\n', r"metrics\.jsonl:2 is not a record of a run: 'hello"),
        ('{"loss": 2.0}\n', r"metrics\.jsonl:1 is not a record"),
        ("[1]\n", r"metrics\.jsonl:1 is not a record"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        plot.plot((tmp_path / "run",), tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


@pytest.mark.parametrize("out", ["run.doc", "missing/run.png"])
def test_a_picture_that_cannot_be_written_is_a_usage_error(tmp_path, out):
    run = write_run(tmp_path / "run", 2)
    with pytest.raises(UsageError, match=r"out=.* cannot be written"):
        plot.plot((run,), tmp_path / out)


def test_the_command_takes_several_directories_and_tells_errors_in_a_line(
    tmp_path, monkeypatch, capsys
):
    runs = [str(write_run(tmp_path / name, 3)) for name in ("a", "b")]
    command = ["plot", "--runs", *runs, "--out", str(tmp_path / "both.svg")]
    monkeypatch.setattr("sys.argv", command)
    plot.main()
    assert "<svg" in (tmp_path / "both.svg").read_text()
    assert capsys.readouterr().out.startswith(f"Wrote {tmp_path / 'both.svg'}: ")
    monkeypatch.setattr("sys.argv", [*command, "--smooth", "0"])
    with pytest.raises(SystemExit, match=r"^error: --smooth 0: expected at least 1"):
        plot.main()
