"""The search with random and damaged data finds nothing, and finds what is wrong."""

import json

import pytest

from benchmarks import fuzz_cases, fuzz_data, fuzz_search
from examples.flax_llama import files

# No version of JAX has a part in it.
pytestmark = pytest.mark.plain

CASES = 40


@pytest.mark.parametrize("kind", fuzz_cases.KINDS)
def test_what_is_damaged_is_refused_in_a_line_or_read_right(kind):
    wrong = {number: fuzz_data.try_case(18, number, kind)[1] for number in range(CASES)}
    assert not {number: said for number, said in wrong.items() if said}


def test_a_search_goes_on_where_it_was_and_ends_as_in_one_go(tmp_path, monkeypatch):
    tried = []

    def case(rng, directory):
        tried.append(rng.random())
        if tried[-1] < 0.2:
            raise fuzz_cases.Wrong("small")

    monkeypatch.setattr(fuzz_data, "KINDS", {"case": case})
    whole = fuzz_search.search(fuzz_data.try_case, 3, 30, tmp_path / "whole.json")
    fuzz_search.search(fuzz_data.try_case, 3, 11, tmp_path / "parts.json")
    parts = fuzz_search.search(fuzz_data.try_case, 3, 30, tmp_path / "parts.json")
    assert whole.failed == parts.failed
    assert [each["number"] for each in whole.failed] == [
        number for number, drawn in enumerate(tried[:30]) if drawn < 0.2
    ]
    assert tried[:30] == tried[30:]
    assert json.loads((tmp_path / "parts.json").read_text())["tried"] == 30
    with pytest.raises(SystemExit, match="is of seed 3"):
        fuzz_search.search(fuzz_data.try_case, 4, 30, tmp_path / "parts.json")


@pytest.mark.parametrize("fault", ["lost", "wrong line", "crash", "two lines"])
def test_the_search_finds_faults(monkeypatch, fault):
    """Those that it is for: what is lost, words that do not fit, and what is no error of ours."""
    lines = files.File._lines

    def faulty(self, offset, line, limit):
        for data, end, ends in lines(self, offset, line, limit):
            if fault == "crash" and b"\xff" in data:
                raise RuntimeError
            if fault != "lost" or ends != 3:
                yield data, end, ends + (fault == "wrong line" and ends > 1)

    if fault == "two lines":
        monkeypatch.setattr("examples.flax_llama.reading.one_line", lambda text: f"{text}\n")
    monkeypatch.setattr(files.File, "_lines", faulty)
    kind = "text" if fault == "wrong line" else "json_lines"
    assert any(fuzz_data.try_case(18, number, kind)[1] for number in range(CASES))
