"""The benchmarks of states in few bits and of lazy refreshes run, and compute what they say."""

import json
import sys

import numpy as np
import pytest
from flax_llama_runs import pretend, tiny, write_text

from benchmarks import lazy, low_bit, low_bit_training
from examples.flax_llama import compare


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """In place of the demo, which takes a minute."""
    text = write_text(tmp_path_factory.mktemp("text"))
    return tiny(text, steps=8, update_proj_gap=1, optimizer="galore_adamw")


def run_main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.ci
def test_times_of_low_bit_updates(monkeypatch, tmp_path, capsys):
    path = tmp_path / "times.json"
    run_main(monkeypatch, low_bit, *("--rows", 64, "--columns", 512, "--steps", 3, "--out", path))
    rows = json.loads(path.read_text())["updates"]
    found = [row["state_bytes_per_element"] for row in rows.values()]
    # Of Adam two moments and a count; of those in bfloat16 a second count.
    size = 64 * 512
    expected = [8 + 4 / size, 2 * (1 + 4 / 256) + 4 / size, 4 + 8 / size]
    np.testing.assert_allclose(found, expected)
    assert rows["optax.scale_by_adam"]["ratio"] == 1
    assert all(row["median_ms"] >= row["min_ms"] > 0 for row in rows.values())
    assert f"{found[1]:.3f}" in capsys.readouterr().out


def test_training_in_few_bits_is_compared_with_galore(monkeypatch, tmp_path, capsys, base):
    monkeypatch.setattr(low_bit_training, "GALORE", base)
    monkeypatch.setattr(low_bit_training, "OPTIMIZERS", ("galore_adamw", "galore_adamw_8bit"))
    monkeypatch.setattr(compare, "train", pretend)
    out = tmp_path / "low_bit"
    run_main(
        monkeypatch,
        low_bit_training,
        *("--out", out, "--rates", "0.03", "--seeds", 1, "--steps", 8),
    )
    lines = capsys.readouterr().out.splitlines()[-2:]
    runs = json.loads((out / "results.json").read_text())["runs"]
    losses = {run["optimizer"]: run["scores"]["valid_loss"] for run in runs}
    assert [line.split()[0] for line in lines] == list(losses)
    for line, loss in zip(lines, losses.values(), strict=True):
        assert float(line.split()[1]) == pytest.approx(loss, abs=1e-4)
        over = 100 * (loss / losses["galore_adamw"] - 1)
        assert float(line.split()[2].rstrip("%")) == pytest.approx(over, abs=0.01)
    assert (out / "report.md").is_file()


@pytest.mark.ci
def test_similarities_and_thresholds_of_lazy_refreshes(monkeypatch, tmp_path, capsys, base):
    monkeypatch.setattr(lazy, "GALORE", base)
    original, made = lazy.train, {}

    def train(config, refresh, means):
        """Once: that with which thresholds are compared was made for its similarities already."""
        if (config, refresh) not in made:
            made[config, refresh] = original(config, refresh, means)
        return made[config, refresh]

    monkeypatch.setattr(lazy, "train", train)
    path = tmp_path / "lazy.json"
    run_main(
        monkeypatch,
        lazy,
        *("--gaps", 1, "--lazy-gap", 1, "--thresholds", 1e-9, "--seeds", 1, "--means", 1, 2),
        *("--out", path),
    )
    result = json.loads(path.read_text())
    assert list(result["similarity"]) == ["galore_adamw, T=1", "q_galore_adamw, T=1"]
    for rows in result["similarity"].values():
        assert set(rows) == {*"kqvo", "gate", "up", "down", "all"}
        assert all(len(row["median_by_layer"]) == 2 for row in rows.values())
        low, *_, high = rows["all"]["quantiles"]
        assert -0.5 < low < high <= 1
    assert list(result["of_noise"]) == ["1", "2"]
    # Of 14 matrices. The queue of five is full at step 5, where the gap doubles, and again at 6.
    assert result["thresholds"]["periodic"]["refreshes"] == [14 * 8]
    assert result["thresholds"]["1e-09"]["refreshes"] == [14 * 7]
    assert f"{result['of_noise']['2']:.2f}" in capsys.readouterr().out


def test_similarity_is_1_for_a_subspace_and_0_for_chance():
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(2, 6, 40)).astype(np.float32)
    assert lazy.between({"w": stack}, {"w": 2 * stack}, rank=2) == pytest.approx(1, abs=1e-3)
    tall = {"w": stack.mT, "norm": np.ones(3)}
    assert lazy.between(tall, tall, rank=2) == pytest.approx(1, abs=1e-3)
    others = [rng.normal(size=(500, 6, 40)).astype(np.float32) for _ in range(2)]
    assert abs(lazy.between(*({"w": x} for x in others), rank=2)) < 0.1
