"""Fine-tuning as a user does it: from a directory of Hugging Face, on chats, on and exported."""

import json
import math
import shutil
from unittest import mock

import chat_models
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from examples.flax_llama.adapters import lora_of, without_lora
from examples.flax_llama.architecture import Architecture
from examples.flax_llama.config import Config, LlamaConfig, UsageError
from examples.flax_llama.data import open_data
from examples.flax_llama.export_hf import export_hf
from examples.flax_llama.finetune import Settings, finetune, from_command_line
from examples.flax_llama.loading import load_params
from examples.flax_llama.model import is_quantized
from examples.flax_llama.pretrained import open_model
from examples.flax_llama.step import has_segments, initial_params
from examples.flax_llama.tokenizer import load_tokenizer
from examples.flax_llama.train import open_dataset
from examples.hf.configuration import config_of
from examples.hf.names import entries
from examples.hf.weights import load, tensor_of

QUICK = ["--seq", "60", "--batch", "4", "--quiet", "--no-tensorboard", "--sample-tokens", "8"]


def write_model(path):
    """A small model with random weights, and a tokenizer with a template of chats."""
    chat_models.make_model(path, "chatml")
    own = Architecture(kv_heads=1, tied=True, context=128, norm_eps=1e-5)
    size = load_tokenizer(path).vocab_size
    shape = LlamaConfig(32, 48, 2, 2, vocab_size=size, architecture=own)
    params = initial_params(Config(), shape)
    arrays = {entry.name: tensor_of(entry, params) for entry in entries(shape)}
    save_file(arrays, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config_of(shape)))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    write_model(path / "model")
    rng = np.random.default_rng(0)
    chats = [
        [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{a} {a}."}]
        for a in rng.integers(10, 99, size=80)
    ]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (path / "chats.jsonl").write_text(lines)
    return path


def settings(directory, *words):
    given = ["--init-from", str(directory / "model"), "--data", str(directory / "chats.jsonl")]
    return from_command_line([*given, *QUICK, *words])


@pytest.fixture(scope="module")
def tuned(directory):
    """The settings, what came of them, and how often the data was read and tokenized."""
    given = settings(directory, "--out", str(directory / "run"), "--epochs", "2.5", "--lr", "0.02")
    opened = mock.Mock(wraps=open_data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("examples.flax_llama.train.open_data", opened)
        return given, finetune(given), opened.call_count


def params_of(path):
    return load_params(path, "last", jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def of_model(path):
    model = open_model(path)
    return load(model.tensors, model.found.entries, model.like)


@pytest.mark.long("the program that a user runs, with all that it compiles")
def test_a_model_learns_to_answer(directory, tuned):
    given, found, opened = tuned
    assert opened == 1
    data = open_dataset(given.resolve().__class__(**vars(given) | {"data_format": "chat"}))
    data.train.close()
    assert len(found.result.train) == math.ceil(2.5 * data.rows / 4)
    losses = [record["valid_loss"] for record in found.result.valid]
    assert losses[-1] < losses[0] - 0.3
    samples = json.loads((directory / "run" / "samples.json").read_text())
    assert samples == found.samples
    assert [s.keys() for s in samples] == 3 * [{"prompt", "reference", "before", "after"}]
    for sample in samples:
        number = sample["prompt"].split("?")[0].split()[-1]
        assert sample["reference"] == f"{number} {number}."
        assert sample["after"] != sample["before"]


@pytest.mark.ci
def test_it_goes_on_and_is_exported_with_the_template(directory, tuned, tmp_path):
    shutil.copytree(directory / "run", tmp_path / "run")
    steps = len(tuned[1].result.train) + 1
    more = from_command_line(["--out", str(tmp_path / "run"), "--resume", "--steps", str(steps)])
    assert (more.batch, more.seq, more.init_from) == (4, 60, directory / "model")
    found = finetune(more)
    assert (len(found.result.train), found.samples) == (steps, [])
    export_hf(tmp_path / "run", tmp_path / "exported", quiet=True)
    for name in ("chat_template.jinja", "tokenizer.json"):
        original = (directory / "model" / name).read_bytes()
        assert (tmp_path / "exported" / name).read_bytes() == original
    models = directory / "model", tmp_path / "exported"
    before, after = (load_file(path / "model.safetensors") for path in models)
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.long("the program that a user runs, with all that it compiles")
@pytest.mark.ci
def test_lora_over_a_model_in_8_bits(directory):
    out = directory / "lora"
    words = ["--optimizer", "lora", "--rank", "2", "--int8-weights", "True", "--steps", "2"]
    finetune(settings(directory, "--out", str(out), "--samples", "1", *words))
    params, model = params_of(out), of_model(directory / "model")
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(lora_of(params)))
    base, quantized = without_lora(params), 0
    pairs = zip(
        jax.tree.leaves_with_path(base, is_leaf=is_quantized), jax.tree.leaves(model), strict=True
    )
    for (path, found), right in pairs:
        if is_quantized(found):
            quantized += 1
            assert np.abs(found.dequantize() - right).max() <= 0.01 * np.abs(right).max(), path
        else:
            np.testing.assert_array_equal(found, right, err_msg=str(path))
    assert quantized == 7


@pytest.mark.parametrize(
    ("words", "lr"),
    [
        # An update moves an entry by about 2e-5.
        (["--optimizer", "adamw"], 2e-5),
        (["--optimizer", "adamw", "--matrix-lr-ratio", "0.25"], 8e-5),
        (["--optimizer", "lora"], 2e-4),
        (["--lr", "0.5"], 0.5),
    ],
)
def test_the_learning_rate_is_one_of_fine_tuning(directory, words, lr):
    from examples.flax_llama.finetune import in_steps

    given, data = in_steps(settings(directory, *words))
    assert given.resolve().lr == pytest.approx(lr)
    data.train.close()


def test_what_nobody_says_is_that_of_fine_tuning_and_of_the_model(directory):
    given = settings(directory)
    assert isinstance(given, Settings)
    assert (given.attend_across, has_segments(given)) == (False, True)
    assert (given.weights_only, given.data_format, given.warmup) == (True, "auto", 0.03)
    config = given.resolve()
    assert (config.hidden, config.vocab_size, config.tokenizer) == (
        *(32, load_tokenizer(directory / "model").vocab_size),
        str(directory / "model"),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "2", "--steps", "3"], "epochs=2.0 and steps=3 say how long to train"),
        (["--epochs", "0"], "epochs=0.0: expected a positive number"),
        (["--samples", "0"], "sample_tokens=8 has no effect without samples"),
        (["--samples", "9"], "samples=9 of sample_tokens=8: expected 0 to 8"),
        (["--seq", "129", "--steps", "1"], "seq=129: expected at most 128, the positions"),
        (["--no-weights-only", "--steps", "1"], "is a model, which has no state of an optimizer"),
        (["--optimizer", "low_rank", "--steps", "1"], "makes no products: choose lora"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(directory, tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        finetune(settings(directory, "--out", str(tmp_path / "out"), *words))
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("words", [["--epochs", "nan"], ["--samples", "5"]])
def test_what_has_no_effect_on_a_run_that_goes_on_is_refused(tmp_path, words):
    name = words[0].removeprefix("--")
    given = from_command_line(["--resume", "--out", str(tmp_path), *words])
    with pytest.raises(UsageError, match=rf"^{name}=\S+ has no effect with resume=True, only wi"):
        finetune(given)


def test_a_few_chats_have_none_to_validate_on(directory, tmp_path):
    lines = (directory / "chats.jsonl").read_text().splitlines(keepends=True)[:19]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    message = (
        r"only 0 tokens to validate on: name other conversations, to train with valid_data=PATH, "
        r"to evaluate with data=PATH\. Of files that are trained on, one in twenty is kept to val"
    )
    with pytest.raises(UsageError, match=message):
        finetune(settings(directory, "--data", str(tmp_path / "few.jsonl"), "--steps", "1"))


def test_text_of_unknown_length_has_no_epochs(directory, tmp_path):
    (tmp_path / "text.txt").write_text("12 34 " * 70_000)
    given = from_command_line(
        ["--init-from", str(directory / "model"), "--data", str(tmp_path / "text.txt"), *QUICK]
    )
    with pytest.raises(UsageError, match="is streamed, and nobody knows how much it is: give"):
        finetune(given)


def test_a_model_is_needed():
    with pytest.raises(UsageError, match="init_from=DIRECTORY is missing"):
        finetune(from_command_line([]))
