"""Inner transformations that keep parameters in their state are refused, and no others."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax

PARAMS = {"kernel": jax.ShapeDtypeStruct((8, 12), jnp.float32), "bias": jnp.ones(12)}
KEEP = {
    "schedule_free": (optax.contrib.schedule_free_adamw(1e-3), "z/kernel"),
    "prodigy": (optax.contrib.prodigy(1.0), "params0/kernel"),
    "novograd": (optax.novograd(1e-3, weight_decay=0.1), "0/mu/kernel"),
    "lars": (optax.lars(1e-3), "trace/kernel"),
    "decay ahead of adam": (
        optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_adam()),
        "1/mu/kernel",
    ),
    "decay ahead of a momentum": (
        optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9)),
        "1/trace/kernel",
    ),
    "apply_every": (optax.chain(optax.adamw(1e-3), optax.apply_every(4)), "1/grad_acc/kernel"),
    "an average of updates": (optax.chain(optax.adamw(1e-3), optax.ema(0.9)), "1/ema/kernel"),
    "in codes": (
        galore_optax.low_bit(
            optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9)), min_size=0
        ),
        "trace/kernel",
    ),
}
KEEP |= {
    "lbfgs": (optax.lbfgs(), "of optax.lbfgs"),
    "dog": (optax.contrib.dog(1.0), "init_params/kernel"),
    "dowg": (optax.contrib.dowg(1.0), "init_params/kernel"),
    "cocob": (optax.contrib.cocob(1.0), "init_particles/kernel"),
    "madgrad": (optax.contrib.madgrad(1e-3), "x0/kernel"),
    "mechanize": (optax.contrib.mechanize(optax.sgd(1e-3)), "x0/kernel"),
}
OTHERS = {
    "dadapt_adamw": optax.contrib.dadapt_adamw(1.0),
    "adamw": optax.adamw(1e-3, weight_decay=0.1),
    "masked decay": optax.adamw(1e-3, weight_decay=0.1, mask=lambda p: jax.tree.map(jnp.size, p)),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "adan": optax.adan(1e-3, weight_decay=0.1),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "decay after a momentum": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1)),
    "lamb": optax.lamb(1e-3, weight_decay=0.1),
    "adafactor": optax.adafactor(1e-3, weight_decay_rate=1e-3),
    "muon": optax.contrib.muon(1e-3, weight_decay=0.1),
    "injected": optax.inject_hyperparams(optax.adamw)(optax.constant_schedule(1e-3)),
    "if finite": optax.apply_if_finite(optax.adamw(1e-3), 3),
    "8 bits": galore_optax.adamw_8bit(1e-3, min_size=0),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
}


@pytest.mark.parametrize("name", KEEP)
def test_what_keeps_parameters_is_refused_before_the_first_step(name):
    inner, field = KEEP[name]
    tx = galore_optax.galore(inner, rank=2)
    with pytest.raises(ValueError, match=f"keeps parameters, or something .*{field}") as caught:
        tx.init(PARAMS)
    assert "Put what keeps them around galore" in str(caught.value)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.filterwarnings("ignore:the inner transformation of galore uses the parameters")
def test_what_keeps_none_is_taken(name):
    tx = galore_optax.galore(OTHERS[name], rank=2)
    state = jax.eval_shape(tx.init, PARAMS)
    updates, _ = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    assert updates["kernel"].shape == (8, 12)


def test_what_keeps_only_parameters_that_are_not_projected_is_taken():
    decayed = optax.masked(
        optax.chain(optax.add_decayed_weights(0.1), optax.trace(0.9)),
        lambda params: {"kernel": False, "bias": True},
    )
    tx = galore_optax.galore(optax.chain(decayed, optax.scale(-0.1)), rank=2)
    state = tx.init({"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)})
    assert optax.tree.get(state, "trace")["bias"].shape == (12,)


def test_schedule_free_goes_around():
    tx = optax.contrib.schedule_free(galore_optax.galore_adamw(1e-2, rank=2, b1=0.0), 1e-2, 0.9)
    params = {"kernel": jnp.eye(8, 12)}
    updates, _ = tx.update(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert 0.9 < jnp.linalg.norm(new["kernel"]) / jnp.linalg.norm(params["kernel"]) < 1


def refused():
    """All optimizers of Optax that galore refuses, by their names; of the others, that it takes."""
    found = {True: set(), False: set()}
    for module in (optax, optax.contrib):
        for name, make in vars(module).items():
            if name.startswith("_") or inspect.isclass(make) or not callable(make):
                continue
            for arguments in ((1e-3,), (), (optax.sgd(1e-3),)):
                try:
                    inner = make(*arguments)
                    inner.init({"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)})
                except Exception:  # it takes other arguments, or is no transformation
                    continue
                try:
                    jax.eval_shape(galore_optax.galore(inner, rank=2).init, PARAMS)
                except ValueError as error:
                    found["keeps parameters" in str(error)].add(name)
                else:
                    found[False].add(name)
                break
    return found


@pytest.mark.long("it tries all of Optax")
@pytest.mark.plain
@pytest.mark.filterwarnings("ignore")
def test_the_documentation_lists_what_is_refused():
    """Each name there is refused, and each that is refused is there, with Optax as it is."""
    found = refused()
    assert {"adamw", "adafactor", "dadapt_adamw", "lamb"} <= found[False]
    # These take more than one argument, or keep parameters only after a decay: see above.
    by_hand = {"schedule_free", "apply_every"}
    page = (pathlib.Path(__file__).parents[1] / "docs" / "inner.md").read_text()
    for text in (galore_optax.galore.__doc__, page):
        [passage] = re.findall(
            r"(?:ahead of a momentum \()(.*?)(?:decay after|Put\s+decay)", text, re.DOTALL | re.I
        )
        names = {name.removeprefix("optax.") for name in re.findall(r"`([\w.]+)`", passage)}
        listed = names - {"galore", "add_decayed_weights", "trace", "adam", "contrib", "init"}
        short = {re.sub("^scale_by_(?!distance)|_(adamw|sgd)$", "", x) for x in found[True]}
        assert listed == short | by_hand


def test_mechanize_goes_around():
    """From weights that are not zero, which it has to remember."""
    tx = optax.contrib.mechanize(galore_optax.galore_sgd(1.0, rank=6, scale=1.0))
    rng = np.random.default_rng(0)
    target, params = ({"kernel": jnp.asarray(rng.normal(size=(8, 12)))} for _ in range(2))

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(jnp.subtract, params, target)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def distance(params):
        return float(jnp.linalg.norm(params["kernel"] - target["kernel"]))

    state, begin = tx.init(params), distance(params)
    for _ in range(100):
        params, state = step(params, state)
    assert distance(params) < 0.5 * begin
