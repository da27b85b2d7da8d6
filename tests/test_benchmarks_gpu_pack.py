"""What travels to a GPU machine: as it was, with all that is needed there, and not too much."""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu import packed
from examples.flax_llama.tokenizer import train_tokenizer
from examples.flax_llama.tokens import load_tokens

pytestmark = pytest.mark.plain

ROOT = pathlib.Path(__file__).parents[1]
GPU = ROOT / "benchmarks" / "gpu"
SCRIPT = GPU / "pack.sh"
TEXTS = [f"document {i}: " + "€ and words " * (i % 7) for i in range(60)]


def run(*options, expected=0):
    """What the script printed, on standard output and error."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, options)],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expected, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files of documents."""
    directory = tmp_path_factory.mktemp("corpus")
    for name, texts in (("a.jsonl", TEXTS[:40]), ("b.jsonl", TEXTS[40:])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (directory / name).write_text("".join(lines))
    return directory


@pytest.fixture(scope="module")
def options(corpus, tmp_path_factory):
    """How to pack that corpus without a network, and where."""
    pack = tmp_path_factory.mktemp("pack")
    return ["--data", f"{corpus}/*.jsonl", "--vocab-size", 300, "--no-wheels", "--pack", pack]


@pytest.fixture(scope="module")
def pack(options):
    """The folder that the script filled."""
    output = run(*options, "--limit", 10_000)
    assert re.search(r"tokens of 60 documents\n.* the repository, .*\n.* in all, of 10000", output)
    return options[-1]


def manifest(pack):
    return json.loads((pack / "manifest.json").read_text())


def test_what_is_unpacked_is_what_is_tokenized_directly(corpus, pack, tmp_path):
    run("--unpack", "--pack", pack, "--to", tmp_path)
    loaded, tokenizer = load_tokens(tmp_path / "tokens")
    expected = train_tokenizer(TEXTS, "bpe:300", eos=True)
    assert tokenizer.to_bytes() == expected.to_bytes()
    documents = expected.encode_documents(TEXTS)
    np.testing.assert_array_equal(loaded.ids, np.concatenate(documents))
    np.testing.assert_array_equal(np.diff(loaded.ends, prepend=0), list(map(len, documents)))
    about = manifest(pack)["corpus"]
    assert (about["tokens"], about["documents"]) == (len(loaded.ids), 60)
    assert about["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    sums = subprocess.check_output(
        ["sha256sum", corpus / "a.jsonl", corpus / "b.jsonl"], text=True
    ).split()[::2]
    assert [file["sha256"] for file in about["source"]["files"]] == sums
    # The second time there is nothing to do.
    assert "unpacked already" in run("--unpack", "--pack", pack, "--to", tmp_path)


def test_too_much_is_refused_and_a_corpus_not_packed_twice(options, pack):
    before = (pack / "corpus" / "tokens.bin.xz").stat().st_mtime_ns
    output = run(*options, "--limit", 0.5, expected=1)
    assert "packed already" in output
    assert re.search(r"error: [\d.]+ MiB would travel, and at most 0.5 may: 0.00 in ", output)
    assert (pack / "corpus" / "tokens.bin.xz").stat().st_mtime_ns == before


def test_another_corpus_or_a_part_of_one_is_packed_again(corpus, pack, tmp_path):
    files = f"{corpus}/*.jsonl"
    assert packed.is_current(pack, packed.source(files, 300))
    assert not packed.is_current(pack, packed.source(files, 301))
    assert not packed.is_current(pack, packed.source(f"{corpus}/a.jsonl", 300))
    assert not packed.is_current(tmp_path, packed.source(files, 300))
    with pytest.raises(packed.PackError, match=r"data='.*/c\*' matches no file"):
        packed.source(f"{corpus}/c*", 300)


@pytest.mark.parametrize("damage", ["other", "cut", "missing"])
def test_what_is_damaged_is_not_unpacked(damage, pack, tmp_path):
    """Nor is what was there before replaced by it."""
    copy, tokens = tmp_path / "pack", tmp_path / "tokens"
    tokens.mkdir()
    (copy / "corpus").mkdir(parents=True)
    for path in pack.rglob("*.*"):
        (copy / path.relative_to(pack)).write_bytes(path.read_bytes())
    file = copy / "corpus" / "tokens.bin.xz"
    if damage == "other":
        file.write_bytes((copy / "corpus" / "ends.bin.xz").read_bytes())
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        file.unlink()
    with pytest.raises(packed.PackError, match=r"tokens\.bin\.xz (cannot be unpacked|holds other)"):
        packed.unpack_corpus(copy, tokens)
    assert list(tokens.iterdir()) == []


def test_wheels_are_in_the_manifest_and_count(pack, tmp_path):
    (tmp_path / "wheels").mkdir()
    name = "array_record-0.8.6-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
    (tmp_path / "wheels" / name).write_bytes(b"0" * 3 * packed.MIB)
    packed.write_manifest(tmp_path, manifest(pack))
    packed.add_wheels(tmp_path)
    (wheel,) = manifest(tmp_path)["wheels"]
    assert (wheel["name"], wheel["version"]) == ("array_record", "0.8.6")
    assert wheel["bytes"] == 3 * packed.MIB
    table = packed.check_size(tmp_path, 10_000)
    assert "    3.00 MiB  array_record 0.8.6" in table
    total = float(table.splitlines()[-1].split()[0])
    with pytest.raises(packed.PackError, match=f"{total:.2f} MiB would travel"):
        packed.check_size(tmp_path, total - 1)


def test_without_git_the_size_is_not_guessed(monkeypatch, tmp_path):
    monkeypatch.setattr(packed, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(packed.PackError, match="must be a Git repository"):
        packed.repository_files()


def names(lines):
    return {canonicalize_name(re.match(r"[\w.-]+", line)[0]) for line in lines}


def needed(distributions):
    """Those distributions and what they need, in turn, as far as they are installed here."""
    found, left = set(), list(distributions)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        requirements = map(Requirement, lines)
        left += [r.name for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def imported(path):
    """Top-level modules that a file imports whenever it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_all_that_is_imported_is_there_or_travels():
    lines = (GPU / "machine.txt").read_text().splitlines()
    there = needed(names(line for line in lines if not line.startswith("#")))
    lacking = names(
        re.search(r"^lacking=\(([^)]*)\)$", SCRIPT.read_text(), re.MULTILINE)[1].split()
    )
    assert not lacking & there
    assert needed(lacking) <= lacking | there
    # Their versions are those that the tests run with.
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert lacking <= names(line for line in pinned if not line.startswith("#"))

    modules = set()
    for package in ("galore_optax", "examples", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            modules |= set(imported(path))
    modules -= sys.stdlib_module_names | {"galore_optax", "examples", "benchmarks"}
    # PyTorch is imported for one comparison, and the machine has it; gguf for files in that format,
    # of which none travel; hypothesis for searches that no GPU makes; the rest for notebooks.
    modules -= {"torch", "gguf", "hypothesis", "ipykernel", "nbclient", "nbformat"}
    distributions = importlib.metadata.packages_distributions()
    for module in modules:
        assert names(distributions[module]) & (lacking | there), module
