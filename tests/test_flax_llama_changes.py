"""Runs that go on with other settings or other data, and runs that begin with others' weights."""

import dataclasses
import hashlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from flax_llama_runs import metrics, saved_arrays, tiny, without_checkpoints_after, write_text

import galore_optax
from examples.flax_llama import (
    changes,
    devices,
    evaluate,
    fingerprint,
    history,
    initial,
    optimizer_state,
    plan,
    remedies,
    sharding,
    step,
    train,
)
from examples.flax_llama.beginning import begin
from examples.flax_llama.changes import RULES
from examples.flax_llama.checkpoint import Checkpoints
from examples.flax_llama.config import Config
from examples.flax_llama.data import position_in_batches
from examples.flax_llama.fit import Fit
from examples.flax_llama.loading import load_run
from examples.flax_llama.loss import loss_sum
from examples.flax_llama.optimizers import make_optimizer
from examples.flax_llama.usage import UsageError

STEPS, SAVED = 6, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty files with a bad line, and a run on them of 6 updates, saved after 3 and 6."""
    root = tmp_path_factory.mktemp("changes")
    (root / "text").mkdir()
    lines = Path(write_text(root)).read_text().splitlines(keepends=True)
    for number in range(20):
        inside = [f'{{"meta": {line.rstrip()}}}\n' for line in lines[number::20]]
        (root / "text" / f"{number:02}.jsonl").write_text("".join(inside))
    with open(root / "text" / "13.jsonl", "a") as file:
        file.write('{"text": "of another field"}\n')
    reading = {"text_field": "meta.text", "on_bad_line": "skip"}
    shape = {"steps": STEPS, "eval_every": SAVED, "keep": 9, "update_proj_gap": 2}
    train.train(tiny(str(root / "text"), out=root / "run", **shape, **reading))
    return root


@pytest.fixture
def run(root, tmp_path):
    """A copy of that run and its files."""
    for name in ("run", "text"):
        shutil.copytree(root / name, tmp_path / name)
    return tmp_path / "run"


def arguments(run, *given):
    """Resumes a run, whose files are beside it now."""
    data = ["--data", str(run.parent / "text")]
    return train.from_command_line(["--out", str(run), "--resume", *data, *given])


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def records(run, field):
    return {record["step"]: record[field] for record in metrics(run) if field in record}


def loss_of_batch(out, number, config, **settings):
    """The loss of a checkpoint's weights on the batch of some number, counted from 1."""
    model, _ = load_run(out, settings.pop("step", "last"))
    dataset = train.open_dataset(dataclasses.replace(config, **settings))
    batch = [next(dataset.train) for _ in range(number)][-1]
    dataset.train.close()
    return float(loss_sum(model, batch["tokens"], batch["mask"]) / batch["mask"].sum())


def test_every_setting_has_a_rule():
    assert list(sorted(RULES)) == sorted(field.name for field in dataclasses.fields(Config))


@pytest.mark.long("two more updates, of another program")
def test_a_finished_run_goes_on_with_more_steps_another_rate_and_other_validation(run, capsys):
    config = arguments(
        *(run, "--steps", "8", "--lr", "0.01", "--schedule", "linear", "--no-quiet"),
        *("--eval-tokens", "100", "--clip", "0", "--on-nan", "skip", "--keep", "8"),
    )
    expected = loss_of_batch(run, 7, config)
    result = train.train(config)
    rates = records(run, "lr")
    # No warm-up of 8 updates is left: linear from 0.01 to a tenth of it.
    for update in (7, 8):
        assert rates[update] == pytest.approx(0.01 * (1 - 0.9 * update / 8), rel=1e-5)
    losses = records(run, "loss")
    assert list(losses) == list(range(1, 9))
    assert losses[7] == pytest.approx(expected, rel=1e-5)
    # The moments are those of the run: Adam has counted on.
    assert set(counts(run, 8)) == {8, 2, 0}
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    before = 0.03 * 0.1
    for line in (
        "Resuming after update 6 Changed from update 7 on: ",
        "steps 6 → 8 lr 0.03 → 0.01 schedule cosine → linear",
        f"Note: the learning rate of update 7 would have been {before:.3g} and is 0.00213.",
        "Note: validation losses before and after are of other tokens",
        "Left out 1 line that is no text.",
    ):
        assert line in output
    first, second = history.read_history(run)
    assert (first.step, first.changes, second.step) == (0, {}, 6)
    expected = {"steps": [6, 8], "lr": [0.03, 0.01], "eval_tokens": [200, 100], "keep": [9, 8]}
    assert {name: second.changes[name] for name in expected} == expected
    assert second.new_validation
    assert set(second.changes) - set(second.marked) == {"keep", "data"}
    stored = json.loads((run / "config.json").read_text())["train"]
    assert (stored["steps"], stored["lr"], stored["data"]) == (8, 0.01, config.data)
    ((place, label),) = history.marks(run)
    assert place == 6
    assert label.startswith("steps 6 → 8, lr 0.03 → 0.01")
    # Of losses over other tokens none is the best: even if it were lower.
    assert result.valid[-1]["step"] == 8
    with Checkpoints(run, read_only=True) as checkpoints:
        assert checkpoints.find("best") == 8


def counts(out, step):
    return [int(x) for x in saved_arrays(out, step).values() if x.ndim == 0 and x.dtype == np.int32]


@pytest.mark.long("killed twice, after one more update each time")
@pytest.mark.ci
def test_what_was_changed_holds_however_soon_the_run_ends_again(run, monkeypatch):
    """Killed before its first update nothing has changed; after it everything has."""
    before = contents(run)
    config = arguments(run, "--lr", "0.5", "--steps", "9")
    real = train.RunLog.update

    def killed(log, step, values):
        real(log, step, values)
        if step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_update", lambda *_: pytest.fail("out of memory"))
        with pytest.raises(BaseException, match="out of memory"):
            train.train(config)
    assert contents(run) == before
    for _ in range(2):
        monkeypatch.setattr(train.RunLog, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
        monkeypatch.undo()
        assert list(records(run, "loss")) == list(range(1, 8))
        assert [entry.step for entry in history.read_history(run)] == [0, 6]
        config = arguments(run)
        assert (config.lr, config.steps) == (0.5, 9)
    # A third rate, from the same checkpoint on.
    assert begin(arguments(run, "--lr", "0.1")).changes["lr"] == [0.03, 0.1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hidden", "32"], r"hidden=32, which was 16 \(the weights would have other shapes"),
        (["--seed", "1", "--lr", "1"], r": seed=1, which was 0 \(the order of the data, and so"),
        (["--steps", "5"], r"steps=5, which was 6 \(6 updates are done: 6 ends the run there"),
        (["--seq", "10"], r"seq=10, which was 20 .*init_from=RUN with weights_only=True starts"),
        (["--param-dtype", "bfloat16"], "kept in another form"),
        (["--optimizer", "q_galore_adamw"], "int8_weights=True, which was False"),
        (["--tokenizer", "bpe:300"], r"tokenizer='bpe:300', which was 'bytes' \(the weights are"),
        (["--init-from", "runs/other"], "a run begins only once"),
    ],
)
def test_what_would_be_another_run_is_refused_with_the_reason(run, given, message):
    before = contents(run)
    with pytest.raises(UsageError, match=message):
        train.train(arguments(run, *given))
    assert contents(run) == before


def test_another_optimizer_has_its_own_defaults_and_what_was_given_stays(run):
    config = arguments(run, "--optimizer", "apollo_adamw").resolve()
    assert (config.scale, config.projector, config.rank) == (1.0, "gaussian", 4)
    given = ("--optimizer", "apollo_adamw", "--scale", "0.25", "--steps", "8")
    config = arguments(run, *given).resolve()
    assert (config.scale, config.lr, config.update_proj_gap) == (0.25, 0.03, 2)
    found = begin(config)
    assert set(found.changes) == {"optimizer", "projector", "data", "steps"}
    assert found.anew
    assert any("moments and subspaces begin anew" in note for note in found.notes)


def test_what_an_optimizer_has_no_use_for_is_no_change_and_is_not_lost(run):
    given = ("--optimizer", "lion", "--steps", "8")
    config = arguments(run, *given).resolve()
    assert config.rank == 4
    found = begin(config)
    assert set(found.changes) == {"optimizer", "data", "steps"}
    # Of the other way round it is told what was, which is nothing.
    back = dataclasses.replace(config, optimizer="apollo_adamw", scale=1.0, projector="gaussian")
    differ = changes.changes(config, back)
    assert differ["projector"] == [None, "gaussian"]
    assert "rank" not in differ
    assert changes.changes(back, config).keys() == {"optimizer"}


SIZE = 0.25 * math.sqrt(4 / 16)  # of GaLore's updates here, in learning rates


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (["adamw"], f"adamw moves the layers' matrices as far with --lr {0.03 * SIZE:.2g}, by"),
        (["adamw", "--matrix-lr-ratio", "0.5"], f"with --lr {0.06 * SIZE:.2g}, by galore_optax"),
        (["fira_adamw", "--matrix-lr-ratio", "0.5"], r"fira_adamw moves .* with --lr 0\.06, by"),
        (["lion"], r"lion may want another \(--lr\)"),
        (["adamw", "--lr", "0.01"], None),
        (["fira_adamw"], None),
    ],
)
def test_another_optimizer_may_want_another_learning_rate(run, given, note):
    notes = begin(arguments(run, "--steps", "8", "--optimizer", *given)).notes
    told = [line for line in notes if "the learning rate is still 0.03" in line]
    assert len(told) == (note is not None)
    assert note is None or re.search(note, told[0])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--lr", "0.5", "--batch", "4"], r"batch=4 and lr=0.5|lr=0.5 and batch=4"),
        (["--optimizer", "apollo_adamw"], r"^optimizer='apollo_adamw' would"),
        (["--eval-tokens", "100"], "^eval_tokens=100"),
    ],
)
def test_what_could_hold_for_no_update_is_refused_and_nothing_is_written(run, given, named):
    before = contents(run)
    with pytest.raises(UsageError, match=rf"({named}).* none left after 6: .*, steps=N, or"):
        train.train(arguments(run, *given))
    assert contents(run) == before


def test_a_finished_run_is_told_of_a_new_place_of_its_data_and_of_nothing_else(run, capsys):
    """It has not been trained with anything else."""
    before = contents(run)
    config = dataclasses.replace(arguments(run, "--keep", "5", "--no-quiet"), tensorboard=False)
    there = json.loads((run / "config.json").read_text())["train"]["data"]
    train.train(dataclasses.replace(config, data=there))
    assert contents(run) == before
    output = capsys.readouterr().out
    assert "Already finished after update 6\nNot changed, since no update is left" in output
    assert "keep 9 → 5" in output
    train.train(config)
    stored = json.loads((run / "config.json").read_text())["train"]
    assert stored["data"] == str(run.parent / "text")
    valid = evaluate.valid_of_run(run, None, 100)
    (run.parent / "text").rename(run.parent / "moved")
    message = r"text does not exist\. If the files .* have moved, data=PLACE names where"
    with pytest.raises(UsageError, match=message):
        begin(train.from_command_line(["--out", str(run), "--resume"]))
    train.train(
        train.from_command_line(["--out", str(run), "--resume", "--data", f"{run.parent}/moved"])
    )
    np.testing.assert_array_equal(evaluate.valid_of_run(run, None, 100).rows, valid.rows)
    after = contents(run)
    for path in before:
        unchanged = path.parts[0] in ("checkpoints", "metrics.jsonl")
        assert not unchanged or after[path] == before[path]


@pytest.mark.parametrize("was", [1, 6, 8])
@pytest.mark.parametrize("now", [1, 4, 12])
def test_a_position_in_batches_is_one_in_batches_of_another_size(was, now):
    """No row is read twice, and fewer than a batch are left out."""
    for batches in range(20):
        position, skipped = position_in_batches({"next_index": batches}, was, now)
        assert position["next_index"] * now == batches * was + skipped
        assert 0 <= skipped < now


@pytest.mark.long("a run of its own, whose update is of another size")
@pytest.mark.ci
def test_another_batch_in_micro_batches_goes_on_after_the_same_row(run):
    without_checkpoints_after(run, SAVED)
    config = arguments(run, "--batch", "4", "--accumulate", "2", "--steps", "4")
    expected = loss_of_batch(run, 2 * SAVED + 1, config, step=SAVED)
    train.train(config)
    losses = records(run, "loss")
    assert losses[4] == pytest.approx(expected, rel=1e-5)
    assert records(run, "tokens")[4] == 4 * 20
    (*_, entry) = history.read_history(run)
    assert (
        "with another accumulate, what is computed is the same to round-off, not bit for bit"
        in entry.notes
    )


def state_of(config, fill):
    """The state of a tiny run's optimizer, full of numbers where it is not new."""
    params = jax.eval_shape(lambda: step.initial_params(config, config.shape(257)))
    shapes = jax.eval_shape(make_optimizer(config).init, params)
    return jax.tree.map(lambda x: np.full(x.shape, fill, x.dtype), shapes)


def test_moments_go_on_with_an_accumulator_and_where_updates_are_skipped():
    old = tiny("austen", clip=0.0).resolve()
    layerwise = dataclasses.replace(old, layerwise=True, accumulate=2)
    skips = dataclasses.replace(old, on_nan="skip")
    for config in (layerwise, skips):
        there, back = (
            optimizer_state.carry_over(state_of(new, 0), state_of(was, 1))
            for was, new in ((old, config), (config, old))
        )
        arrays = optimizer_state.arrays
        assert arrays(there) == arrays(state_of(config, 0))
        assert arrays(back) == arrays(state_of(old, 0))
        assert {float(x.min()) for x in jax.tree.leaves(back)} == {1.0}
        moments = galore_optax.metrics(there)["refreshes"]
        assert float(moments) > 0
    other = tiny("austen", optimizer="lion").resolve()
    assert optimizer_state.carry_over(state_of(old, 0), state_of(other, 1)) is None


# Data.


def rename(run):
    (run.parent / "text" / "03.jsonl").rename(run.parent / "text" / "30.jsonl")


def replace_six(run):
    for number in range(6):
        path = run.parent / "text" / f"{number:02}.jsonl"
        path.write_text(path.read_text().replace("a", "b"))


def append(run):
    with open(run.parent / "text" / "07.jsonl", "a") as file:
        file.write('{"text": "more"}\n')


CHANGED = {
    replace_six: r"00.jsonl has changed, .*04.jsonl has changed and 1 more \(of 20 files\)",
    append: r"07.jsonl has 17 bytes more at its end \(of 20 files\)",
    rename: r"03.jsonl is no longer among them, 30.jsonl is new \(of 20 files\); files that have",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_changed_files_are_named_and_nothing_is_changed(run, change):
    change(run)
    before = contents(run)
    message = f"text is not what the run was trained on: {CHANGED[change]}.*new_data=True"
    with pytest.raises(UsageError, match=message):
        train.train(arguments(run, "--steps", "8"))
    assert contents(run) == before
    with pytest.raises(UsageError, match=r"text_field was 'meta.text' and is 'text'"):
        begin(arguments(run, "--text-field", "text"))
    found = begin(arguments(run, "--steps", "8", "--new-data"))
    assert found.new_data
    assert re.search(CHANGED[change], found.changes["data"][1])


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_file_that_has_grown_is_told_from_one_that_has_changed(tmp_path, size):
    """Also where only samples of it are known."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(250)) * (size // 250))
    was = fingerprint.Marks(fingerprint.marks_of([path]))
    with open(path, "ab") as file:
        file.write(b"more")

    def told():
        return fingerprint.differences(was, fingerprint.Marks(fingerprint.marks_of([path])))

    assert told() == "text.txt has 4 bytes more at its end (of 1 file)"
    path.write_bytes(b"!" + path.read_bytes()[1:])
    assert told() == "text.txt has changed (of 1 file)"


@pytest.mark.plain
def test_data_of_which_other_documents_are_held_out_is_other_data(tmp_path):
    """Of a file that is named twice; what names none twice is known as it was."""
    for name in "ab":
        (tmp_path / name).with_suffix(".jsonl").write_text(f'{{"text": "{name}"}}\n')
    one, two = (
        fingerprint.fingerprint_of(Config(data=f"{tmp_path}{more}")).train
        for more in ("", f",{tmp_path}/a.jsonl")
    )
    assert (one.alike, two.alike) == ("", "2=0")
    before = [[file.known_by for file in one.files], "text", True]
    assert one.digest == hashlib.sha256(json.dumps(before).encode()).hexdigest()[:32]
    earlier = dataclasses.replace(two, alike="")
    assert "an earlier version trained on" in fingerprint.differences(earlier, two)
    # What is validated on besides is none of it.
    given = Config(data=str(tmp_path), valid_data=f"{tmp_path}/b.jsonl")
    assert [file.name for file in fingerprint.fingerprint_of(given).train.files] == ["a.jsonl"]


def test_the_same_files_at_another_place_are_the_same_data(run):
    (run.parent / "text").rename(run.parent / "moved")
    (run.parent / "moved" / "README.md").write_text("moved")
    config = train.from_command_line(
        ["--out", str(run), "--resume", "--data", f"{run.parent}/moved/*.jsonl"]
    )
    found = begin(config)
    assert (found.new_data, found.new_validation, found.notes) == (False, False, [])
    assert found.entry.marked == []
    assert list(found.changes) == ["data"]


@pytest.mark.long("evaluates, and trains two more updates")
def test_new_data_is_read_from_its_start_and_an_evaluation_is_of_the_files_the_run_had(run, root):
    valid = evaluate.valid_of_run(root / "run", None, 200)
    # A new file comes first, which would hold out other documents of all files.
    shutil.copy(root / "text" / "04.jsonl", root / "text" / "00-new.jsonl")
    try:
        np.testing.assert_array_equal(
            evaluate.valid_of_run(root / "run", None, 200).rows, valid.rows
        )
    finally:
        (root / "text" / "00-new.jsonl").unlink()
    replace_six(run)
    config = arguments(run, "--steps", "7", "--new-data")
    expected = loss_of_batch(run, 1, config)
    train.train(config)
    assert records(run, "loss")[7] == pytest.approx(expected, rel=1e-5)
    # From here on it is the run's data.
    assert begin(arguments(run, "--steps", "8")).changes.keys() == {"steps"}
    evaluate.valid_of_run(run, None, 100)
    append(run)
    with pytest.raises(UsageError, match=r"other files than there are now: 07.jsonl has 17 bytes"):
        evaluate.valid_of_run(run, None, 100)
    (run.parent / "text" / "09.jsonl").unlink()
    with pytest.raises(UsageError, match=r"09.jsonl is gone\. Bring them back; .* with data=PATH"):
        evaluate.valid_of_run(run, None, 100)


def test_other_text_to_validate_on_is_a_change_and_changed_text_is_not(run, tmp_path):
    text = tmp_path / "valid.jsonl"
    shutil.copy(run.parent / "text" / "00.jsonl", text)
    # What was held out of the files would be trained on.
    with pytest.raises(UsageError, match="documents to validate on are no longer taken out of it"):
        begin(arguments(run, "--valid-data", str(text)))
    found = begin(arguments(run, "--valid-data", str(text), "--new-data", "--steps", "8"))
    assert found.new_validation
    assert "valid_data" in found.entry.marked


def test_a_run_of_an_earlier_version_goes_on(run):
    for name in ("data.json", "history.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints" / "6" / "checksums")
    known = {"max_bad_lines", "init_from", "init_step", "new_data"}
    for path in (run / "config.json", run / "checkpoints" / "6" / "settings" / "metadata"):
        stored = json.loads(path.read_text())
        settings = stored.get("train", stored)
        settings |= {"new_subspace": False}
        settings.pop("digests", None)
        stored.pop("checksum", None)
        for name in known | {"weights_only"}:
            del settings[name]
        path.write_text(json.dumps(stored))
    found = begin(arguments(run, "--steps", "8"))
    assert set(found.changes) == {"steps", "data"}
    assert "kept no fingerprint of the data" in found.notes[-1]
    settings = json.loads((run / "config.json").read_text())["train"] | {"unheard_of": 1}
    with pytest.raises(UsageError, match=r"not the settings of this version: .*unheard_of"):
        changes.config_of(settings)


def test_another_machine_or_version_is_told(run):
    entries = json.loads((run / "history.json").read_text())
    entries[-1]["machine"] |= {"devices": "8 x TPU v5e"}
    del entries[-1]["checksum"]
    (run / "history.json").write_text(json.dumps(entries))
    (note,) = [n for n in begin(arguments(run, "--steps", "8")).notes if "rate" not in n]
    assert re.search("not bit for bit .*: devices 8 x TPU v5e before and 1 x cpu now", note)


# Beginning with the weights of another run.


def new_run(root, tmp_path, *given):
    words = ["--init-from", str(root / "run"), "--out", str(tmp_path / "new"), "--quiet"]
    words += ["--data", str(root / "text"), "--batch", "8", "--seq", "20", "--no-tensorboard"]
    words += ["--text-field", "meta.text", "--on-bad-line", "skip"]
    return train.from_command_line([*words, "--eval-tokens", "200", *given])


@pytest.mark.long("a run of its own, with a schedule of its own")
@pytest.mark.ci
def test_a_run_begins_with_the_weights_and_moments_of_another(run, tmp_path):
    config = new_run(tmp_path, tmp_path, "--lr", "0.02", "--steps", "2", "--seed", "5")
    expected = loss_of_batch(run, 1, config)
    result = train.train(config)
    assert records(tmp_path / "new", "loss")[1] == pytest.approx(expected, rel=1e-5)
    assert result.train[0]["lr"] == pytest.approx(0.02 * (0.1 + 0.9 * 0.5), rel=1e-4)
    # Adam and GaLore count on from 6, the schedule from 0.
    assert sorted(counts(tmp_path / "new", 2)) == [2, 2, 8, 8]
    (entry,) = history.read_history(tmp_path / "new")
    assert entry.notes == [
        f"begins with the weights and the state of the optimizer of {run} after update 6"
    ]
    # From here on it does without the other.
    shutil.rmtree(run)
    train.train(train.from_command_line(["--out", str(tmp_path / "new"), "--resume"]))


def test_weights_alone_go_into_another_form(root):
    model, _ = load_run(root / "run")
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    config = tiny("austen", optimizer="q_galore_adamw", param_dtype="bfloat16").resolve()
    shape, mesh = config.shape(257), sharding.make_mesh()
    like = jax.eval_shape(lambda: step.initial_params(config, shape))
    found = initial.in_the_form_of(like, params, config, mesh)
    assert optimizer_state.arrays(found) == optimizer_state.arrays(like)
    dense = galore_optax.dequantize_params(found)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(params), strict=True):
        # Of int8, half of a step of 255 between the extremes; of bfloat16, its last bit.
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert 0 < error <= 0.01 * np.abs(b).max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--hidden", "32"],
            r"hidden=32, which was 16\. Leave that out",
        ),
        (["--rank", "2"], r"rank=2, which was 4\. Give weights_only=True"),
        (["--init-step", "5"], r"init_step=5: there is no such checkpoint .* of 3, 6\."),
        (["--tokenizer", "bpe:300"], "another tokenizer than tokenizer=bpe:300"),
        (["--optimizer", "galore_lion"], "optimizer='galore_lion', which was 'galore_adamw'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(
    root, tmp_path, given, message
):
    with pytest.raises(UsageError, match=message):
        train.train(new_run(root, tmp_path, "--steps", "2", *given))
    assert not (tmp_path / "new").exists()


# Plans of runs that go on.


def going_on(root, how):
    words = {
        "resume": ["--resume", "--out", str(root / "run"), "--steps", str(2 * STEPS)],
        "init_from": ["--init-from", str(root / "run"), "--data", str(root / "text")],
    }[how]
    return [*words, "--data", str(root / "text"), "--text-field", "meta.text"]


@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_a_plan_is_of_the_run_that_goes_on(root, capsys, monkeypatch, how):
    real, named = plan.vocabulary_size, []

    def vocabulary_size(data, tokenizer):
        named.append(tokenizer)
        return real(data, tokenizer)

    monkeypatch.setattr(plan, "vocabulary_size", vocabulary_size)
    words = [*going_on(root, how), "--lr", "0.5"]
    asked = plan.from_command_line([*words, "--device", "t4_16gb"])
    question = plan.question_of(asked.run, devices.device_named(asked.device))
    arrays = saved_arrays(root / "run", STEPS).values()
    assert question.need().stays == sum(array.nbytes for array in arrays)
    # Its own tokenizer, wherever that was from.
    assert named == [str(root / "run")]
    # Another optimizer comes with its own defaults, as it would in training.
    if how == "resume":
        changed = dataclasses.replace(question.given, optimizer="apollo_mini_adamw")
        given = train.from_command_line([*words, "--optimizer", "apollo_mini_adamw"])
        assert changed.resolve() == given.resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["plan", *words, "--device", "t4_16gb"])
        with pytest.raises(SystemExit) as stopped:
            plan.main()
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    (command,) = re.findall(r"^  python -m examples\.flax_llama\.train (.*)$", printed, re.M)
    given = train.from_command_line(shlex.split(command))
    assert given == train.from_command_line(words)
    begin(given.resolve())


@pytest.mark.parametrize("how", ["resume", "init_from"])
def test_a_plan_suggests_only_what_a_run_may_change(root, how):
    words = going_on(root, how)
    device = dataclasses.replace(devices.device_named("t4_16gb"), context=0)
    question = plan.question_of(train.from_command_line(words), device)
    asked = question.need()
    assert question.fixed >= {"hidden", "param_dtype"}
    enough = dataclasses.replace(device, memory=asked.stays + asked.passes // 2)
    found = remedies.advice(dataclasses.replace(question, device=enough))
    for change in found:
        given = train.from_command_line([*words, *shlex.split(change.flags)]).resolve()
        assert given == change.given.resolve()
        begin(given)
        assert "--param-dtype" not in change.flags
    assert dataclasses.replace(question, device=enough).fit(found[0].given) is Fit.SURE
    assert "--optimizer" in " ".join(c.flags for c in found) or how == "init_from"


def test_a_run_that_has_finished_is_planned_with_more_updates_only(root):
    finished = train.from_command_line(["--resume", "--out", str(root / "run")])
    with pytest.raises(UsageError, match=rf"has finished after update {STEPS}: plan more updates"):
        plan.question_of(finished, devices.device_named("t4_16gb"))
