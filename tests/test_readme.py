"""The code of README and of docs/ runs as it stands there, and prints what pages say it prints."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_optax

# Its code is for the NNX of today.
pytestmark = pytest.mark.since(flax="0.12.8")

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
README = PAGES["README.md"]
# Code, and what stands after it in a block of no language: its output.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
# Written for programs that need not be here; test_trainers reads it.
ELSEWHERE = ("docs/trainers.md",)
# A program of its own, since it asks for eight devices before JAX starts.
ALONE = "docs/sharding.md: How it comes to lie there"


def sections():
    """The blocks of each section that has any, by page and title."""
    found = {}
    for page, text in PAGES.items():
        if page in ELSEWHERE:
            continue
        for section in re.split(r"^## ", text, flags=re.MULTILINE):
            blocks = [(match[1], match[2] or "") for match in BLOCK.finditer(section)]
            if blocks:
                title, _, _ = section.partition("\n")
                found[f"{page}: {title.removeprefix('# ')}"] = blocks
    return found


SECTIONS = sections()


def of_the_reader():
    """What stands for a reader's own things, which the pages name; all else the code imports."""
    params = {"kernel": jnp.ones((256, 512)), "learning_rate": jnp.ones(3)}
    return {
        **{"params": params, "grads": jax.tree.map(jnp.ones_like, params)},
        "loss_fn": lambda params, batch: jnp.sum((batch @ params["kernel"].dequantize()) ** 2),
        **{"batch": jnp.ones((2, 256)), "key": jax.random.key(0)},
        **{"checkpointer": Checkpointer(), "path": "checkpoints/1"},
    }


class Checkpointer:
    """What stands for one of Orbax."""

    @staticmethod
    def restore(path, like):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def run(code, names):
    """What code prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "page", "exec"), names)
    return printed.getvalue()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The names that the code of each section leaves, once it has run from top to bottom."""
    found = {}

    def of(title):
        if title not in found:
            found[title] = of_the_reader()
            with contextlib.chdir(tmp_path_factory.mktemp("page")):
                for code, output in SECTIONS[title]:
                    assert run(code, found[title]) == output, code
        return found[title]

    return of


def test_what_a_reader_has_to_bring_is_named():
    everything = "\n".join(PAGES.values())
    for name in of_the_reader():
        assert f"`{name}`" in everything


# These have figures, or leave what other tests need.
OF_CHECKPOINTS = "docs/checkpoints.md: Flax NNX and Orbax"
OF_RATES = "docs/checkpoints.md: The learning rate in the state"
ALWAYS = ("README.md: galore_optax", OF_CHECKPOINTS, OF_RATES)
ALWAYS += ("docs/will-it-fit.md: Bytes of the state",)


@pytest.mark.long("some sections train, others measure large models")
@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=[] if title in ALWAYS else [pytest.mark.ci])
        for title in SECTIONS
        if title != ALONE
    ],
)
def test_code_runs_and_prints_what_stands_after_it(ran, title):
    assert ran(title)


@pytest.mark.ci
@pytest.mark.long("a program of its own, on eight devices")
def test_the_program_for_many_devices_runs(tmp_path):
    [(code, output)] = SECTIONS[ALONE]
    assert not output
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"NamedSharding\(mesh=Mesh\('fsdp': 2, 'tensor': 1", done.stdout)


def test_the_figures_of_the_headline_are_those_of_real_states():
    """Of LLaMA-1B, from the shapes of the state that each optimizer makes."""
    h, i, layers, vocabulary, rank = 2048, 5461, 24, 32_000, 512
    stacks = {f"blocks/{name}": (layers, h, h) for name in "qkvo"}
    stacks |= {f"blocks/{name}": (layers, h, i) for name in ("gate", "up")}
    stacks |= {"blocks/down": (layers, i, h)}
    others = {"embed": (vocabulary, h), "lm_head": (h, vocabulary), "norm": ((2 * layers + 1) * h,)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in (stacks | others).items()
    }
    numbers = {name: galore_optax.DimensionNumbers(1, 2) for name in stacks}
    numbers |= dict.fromkeys(others)

    def gigabytes(tx):
        state = jax.eval_shape(tx.init, params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e9

    (line,) = re.findall(r"^tx = galore_adamw\(3e-4, rank=512(.*)\)$", README, re.MULTILINE)
    asked = eval(f"dict({line.strip(', ')})")
    common = {"rank": rank, "weight_dimension_numbers": numbers}
    sizes = [
        gigabytes(galore_optax.galore_adamw(1e-3, **common, **asked)),
        gigabytes(optax.adamw(1e-3)),
        gigabytes(galore_optax.galore_adamw(1e-3, **common)),
    ]
    shown = [f"{size:.2f}" for size in sizes]
    assert re.findall(r"(\d\.\d\d) GB", README) == shown[:2]
    three_lines = PAGES["docs/quickstart.md"].partition("## Three ways")[0]
    assert re.findall(r"(\d\.\d\d) GB", three_lines) == shown


def test_a_restored_optimizer_goes_on_as_if_uninterrupted(ran):
    names = ran(OF_CHECKPOINTS)
    model, optimizer = names["make"]()
    for _ in range(2):
        names["step"](model, optimizer, jnp.ones((4, 32)))
    expected, found = (
        jax.tree.leaves(nnx.state(both))
        for both in ((model, optimizer), (names["model"], names["optimizer"]))
    )
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_learning_rate_is_found_beside_a_parameter_of_that_name(ran):
    names = ran(OF_RATES)
    assert names["applied"] == names["schedule"](2)
    with pytest.raises(KeyError, match="Found multiple values for 'learning_rate'"):
        optax.tree.get(names["state"], "learning_rate")
    constant = optax.inject_hyperparams(galore_optax.galore_adamw, static_args=("rank",))
    tx, params = constant(3e-4, rank=8), names["params"]
    state = optax.tree.set(tx.init(params), names["is_hyperparameter"], learning_rate=1e-4)
    updates, _ = tx.update(names["grads"], state, params)
    # The first update of Adam is the learning rate, of what is not projected.
    np.testing.assert_allclose(updates["learning_rate"], -1e-4, rtol=1e-3)


def test_the_line_for_optax_contrib_is_the_same_algorithm():
    """To the second refresh, with the line that the page removes and the one it adds.

    But for the leaf whose short side is no longer than the rank, which is AdamW's here.
    """
    text = PAGES["docs/migration/optax-contrib.md"]
    [old] = re.findall(r"^-tx = (.*)$", text, re.MULTILINE)
    [new] = re.findall(r"^\+tx = (.*)\n\+ +(.*)$", text, re.MULTILINE)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (160, 140)),
        "up": jax.random.normal(keys[1], (140, 200)),
        "bias": jnp.zeros(5),
        "small": jax.random.normal(keys[1], (32, 48)),
    }

    def trained(tx):
        state, new = tx.init(params), params
        for key in jax.random.split(keys[2], 3):
            grads = jax.tree.map(lambda x, key=key: jax.random.normal(key, x.shape) + x, new)
            updates, state = tx.update(grads, state, new)
            new = optax.apply_updates(new, updates)
        return new

    names = {"optax": optax, "galore_optax": galore_optax}
    theirs, ours = trained(eval(old, names)), trained(eval("".join(new), names))
    small, ours_small = theirs.pop("small"), ours.pop("small")
    chex.assert_trees_all_close(theirs, ours, atol=1e-5)
    assert jnp.max(jnp.abs(small - ours_small)) > 1e-3
    in_full = trained(optax.adamw(1e-3, weight_decay=0.1))["small"]
    chex.assert_trees_all_close(ours_small, in_full, atol=1e-6)
