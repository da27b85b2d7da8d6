"""Runs of a tiny LLaMA on a tiny text, in this process and in others."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.flax_llama.config import Config
from examples.flax_llama.effects import has_effect
from examples.flax_llama.records import GROUPS
from examples.flax_llama.run_directory import write_settings

ROOT = pathlib.Path(__file__).parents[1]


def write_text(directory):
    """JSON lines of a few hundred documents in which letters follow each other with a pattern."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=4)) for _ in range(20)]
    documents = (" ".join(rng.choice(words, size=rng.integers(1, 40))) for _ in range(300))
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def tiny(data, **settings):
    """Settings of a run that takes a second."""
    shape = {"hidden": 16, "intermediate": 40, "layers": 2, "heads": 2, "rank": 4}
    small = {"tokenizer": "bytes", "batch": 8, "seq": 20, "update_proj_gap": 8, "eval_tokens": 200}
    shown = {"quiet": True, "tensorboard": False}
    return Config(**shape | small | shown | {"data": data, "steps": 20, "lr": 0.03} | settings)


def pretend(config, how_to_go_on=None):
    """Leaves what a run leaves for a comparison, at no cost: a loss that a larger rate makes lower.

    Diverges at rates beyond all bounds, falls from where the seed says, and differs by optimizer.
    """
    config = config.resolve()
    shape = config.shape(257)
    config.out.mkdir(parents=True)
    write_settings(config.out, config, shape)
    speed = {
        "tokens": 160,
        "seconds": 0.16,
        "tokens_per_second": 1000.0,
        "lr": config.lr,
        "grad_norm": 1.0,
    }
    first = 5.5 + 0.01 * config.seed
    optimizer = 0.01 * ("galore" not in config.optimizer) + 0.002 * ("8bit" in config.optimizer)
    losses = first - np.arange(config.steps) * (config.lr + optimizer)
    records = [{"step": k, "loss": loss} | speed for k, loss in enumerate(losses.tolist(), 1)]
    scores = {"standard_error": 0.1, "perplexity": 9.0, "bits_per_byte": 1.0}
    valid = {"step": config.steps, "valid_loss": losses[-1].item()} | scores
    diverges = config.lr > 1e30
    lines = [*records[:-1], records[-1] | {"loss": None}] if diverges else [*records, valid]
    (config.out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if diverges:
        raise FloatingPointError("loss is nan at update 3")
    model = types.SimpleNamespace(config=shape)
    return types.SimpleNamespace(model=model, train=records, valid=[valid], update_bytes=10**6)


def arguments(config):
    """The command line that asks for a configuration."""
    words = []
    for name, value in vars(config).items():
        if name in Config.HIDDEN or not has_effect(config, name):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words


def start(*command, cache=None, devices=1):
    """Starts Python in another process, on so many CPU devices, compiling as tests do.

    Those with the same `cache` share what they compile, where pytest keeps no cache for all.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
    }
    # As many threads as devices wait for each other, of which there would be one per core.
    environment.setdefault("NPROC", str(4 * devices))
    if cache is not None:
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, expected=0):
    """Waits for a process, and returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    return output


def without_checkpoints_after(out, step):
    """A run's directory as an interruption after that update would have left it."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)


def metrics(out):
    """Records of a run without what depends on the machine's speed."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in GROUPS["speed"]} for record in records]


def saved_arrays(out, step):
    """All arrays of a checkpoint, by path, as NumPy reads them."""
    arrays = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            path = out.absolute() / "checkpoints" / str(step) / item
            leaves = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
            tree = checkpointer.restore(path, restore_args=as_numpy)
            for key, leaf in jax.tree.leaves_with_path(tree):
                arrays[f"{item}{jax.tree_util.keystr(key)}"] = leaf
    return arrays


def assert_same_end(one, other, step):
    """Same metrics of every update and evaluation, and the same bits in the last checkpoint."""
    assert metrics(one) == metrics(other)
    left, right = saved_arrays(one, step), saved_arrays(other, step)
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def assert_same_losses(one, other):
    """Same updates and evaluations, to the round-off of float32 sums in another order."""
    for found, expected in zip(metrics(one), metrics(other), strict=True):
        names = [name for name in ("loss", "valid_loss", "grad_norm") if name in found]
        assert names
        for name in ("step", *names):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
