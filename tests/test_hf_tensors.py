import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from examples.flax_llama.usage import UsageError
from examples.hf.tensors import Tensor, open_tensors, read

ARRAYS = {
    "a": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    "b": np.ones(3, np.float32),
    "c": np.full((1, 2), 0.5, np.float16),
}
PLACES = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}


@pytest.fixture
def shards(tmp_path):
    for file in sorted({*PLACES.values()}):
        save_file({k: ARRAYS[k] for k in ARRAYS if PLACES[k] == file}, tmp_path / file)
    write_index(tmp_path, PLACES)
    return tmp_path


def write_index(directory, places):
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places}))


def test_tensors_of_one_file_and_of_many(shards, tmp_path_factory):
    one = tmp_path_factory.mktemp("one")
    save_file(ARRAYS, one / "model.safetensors")
    for directory in (one, shards):
        tensors = open_tensors(directory)
        assert {k: (x.shape, x.dtype) for k, x in tensors.items()} == {
            k: (x.shape, x.dtype.name) for k, x in ARRAYS.items()
        }
        for name, array in read(tensors, ARRAYS):
            assert array.dtype == ARRAYS[name].dtype
            np.testing.assert_array_equal(array, ARRAYS[name])


def test_each_file_is_read_once_whatever_the_order(shards):
    tensors = open_tensors(shards)
    assert [name for name, _ in read(tensors, ["a", "b", "c"])] == ["a", "c", "b"]


def test_a_dtype_that_no_weights_have_keeps_its_name(tmp_path):
    save_file({"a": np.ones(2, np.int8)}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    assert open_tensors(tmp_path) == {"a": Tensor(path, (2,), "I8")}


def cut(directory, size):
    path = directory / "two.safetensors"
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda d: save_file(ARRAYS, d / "model.safetensors"),
            r"has both model\.safetensors and model\.safetensors\.index\.json, which does not name",
        ),
        (lambda d: cut(d, -2), r"two\.safetensors is cut or damaged"),
        (lambda d: cut(d, 4), r"two\.safetensors is cut or damaged"),
        (lambda d: (d / "two.safetensors").unlink(), r"names two\.safetensors, which is missing"),
        (lambda d: save_file(ARRAYS, d / "two.safetensors"), r"a is in .*one.* and in .*two"),
        (
            lambda d: write_index(d, PLACES | {"d": "two.safetensors"}),
            r"says that d is in two\.safetensors, where it is not",
        ),
        (lambda d: write_index(d, {"a": "../x"}), "names of files beside it"),
        (lambda d: write_index(d, {}), "names of files beside it"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "not an index"),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "neither model.safetensors nor"),
    ],
    ids=[
        "both",
        *("cut in its data", "cut in its header", "missing", "in two files"),
        *("not where the index says", "another directory", "no tensors", "not JSON", "neither"),
    ],
)
def test_what_is_wrong_with_a_directory(shards, spoil, message):
    spoil(shards)
    with pytest.raises(UsageError, match=message):
        open_tensors(shards)


def test_there_is_no_directory(tmp_path):
    with pytest.raises(UsageError, match="is not a directory with a model"):
        open_tensors(tmp_path / "none")
