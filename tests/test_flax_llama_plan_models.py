"""The table of models and cards: what a cell says, and the table that is committed."""

import dataclasses
from pathlib import Path

import pytest

from examples.flax_llama import plan_models
from examples.flax_llama.devices import DEVICES
from examples.flax_llama.fit import Fit
from examples.flax_llama.plan_models import CARDS, MODELS, WAYS, Way, nearest, question, rows
from examples.flax_llama.usage import UsageError

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

COMMITTED = Path(plan_models.__file__).with_name("MODELS.md")


@pytest.mark.parametrize(
    ("model", "card"), [("gemma-3-1b", "rtx3080_10gb"), ("qwen3-0.6b", "rtx4090_24gb")]
)
def test_a_cell_is_the_first_way_that_fits_with_the_largest_batch(model, card):
    device = DEVICES[card]
    found = nearest(model, device)
    names = list(WAYS)
    for name in names[: names.index(found.name)]:
        assert question(model, WAYS[name], device).fit() is not Fit.SURE
    asked = question(model, WAYS[found.name], device)
    fits = [
        asked.fit(dataclasses.replace(asked.given, batch=batch)) is Fit.SURE
        for batch in (found.batch, found.batch + 1)
    ]
    assert fits == [True, False]


def test_what_fits_in_no_way_has_no_cell():
    assert nearest("qwen3-14b", DEVICES["rtx4060_8gb"]) is None
    assert str(Way("GaLore", 64)) == "GaLore: >= 64"


def test_the_committed_table_is_what_the_planner_says():
    """Of one model, which takes a second; all are made again by the command."""
    row = list(rows(["qwen3-1.7b"], CARDS))[-1]
    lines = COMMITTED.read_text().splitlines()
    assert row in lines
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][2:] == [*MODELS]


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="models='gpt-4': expected one of smollm2-135m"):
        plan_models.plan_models(tmp_path / "x.md", models=("gpt-4",))
    with pytest.raises(UsageError, match="devices='abacus': expected one of"):
        plan_models.plan_models(tmp_path / "x.md", devices=("abacus",))
