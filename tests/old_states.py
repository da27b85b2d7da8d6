"""Runs whose states were saved by an earlier version of the library, for `test_old_states.py`.

    python -m tests.old_states 0.1

writes `tests/data/states/0.1/`: of each case a checkpoint in the middle of a gap, and the
parameters of the steps that followed, made by the version that is here. What is committed is never
made again.
"""

import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import galore_optax

DIRECTORY = pathlib.Path(__file__).parent / "data" / "states"
GAP, SAVED_AT, STEPS = 4, 6, 11  # refreshes at 0, 4 and, after the checkpoint, 8
SHAPES = {
    "embed": (24, 16),
    "bias": (32,),
    "kernel": (16, 32),
    "tall": (40, 16),
    "stack": (2, 16, 24),
}
NUMBERS = {"embed": None, "bias": None, "kernel": galore_optax.DimensionNumbers(0, 1)}
NUMBERS |= {"tall": NUMBERS["kernel"], "stack": galore_optax.DimensionNumbers(1, 2)}
OPTIONS = {"rank": 4, "update_proj_gap": GAP, "weight_dimension_numbers": NUMBERS}
LAZY = galore_optax.Lazy(threshold=0.05, queue=1)
CASES = {
    "adamw": functools.partial(galore_optax.galore_adamw, weight_decay=0.1, **OPTIONS),
    "rows": functools.partial(galore_optax.galore_adamw, projector="rows", **OPTIONS),
    "orthonormal": functools.partial(
        galore_optax.galore_adamw, projector="orthonormal", seed=3, **OPTIONS
    ),
    "both-sides": functools.partial(
        galore_optax.galore_adamw, side="both", diagnostics=True, **OPTIONS
    ),
    "8-bit": functools.partial(galore_optax.galore_adamw_8bit, min_size=0, **OPTIONS),
    "Q-GaLore": functools.partial(galore_optax.q_galore_adamw, min_size=0, **OPTIONS),
    "lazy": functools.partial(galore_optax.galore_adamw, refresh=LAZY, **OPTIONS),
    "staggered": functools.partial(galore_optax.galore_adamw, stagger=True, **OPTIONS),
    # Saved after the first of two gradients of a step.
    "accumulation": functools.partial(
        galore_optax.galore_adamw, accumulation_steps=2, **OPTIONS | {"update_proj_gap": 2}
    ),
}


def optimizer(case):
    return CASES[case](0.01)


def gradient_at(step):
    rng = np.random.default_rng(step)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()
    }


def start(case):
    """Parameters, in 8 bits where the case has them so, and the state of no step."""
    rng = np.random.default_rng(100)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
    if case == "Q-GaLore":
        params = galore_optax.quantize_params(
            params, rank=OPTIONS["rank"], weight_dimension_numbers=NUMBERS
        )
    return {"params": params, "state": optimizer(case).init(params)}


def steps(case, run, first, last):
    """Takes the steps from one number to before another; the run, and parameters after each."""
    tx = optimizer(case)

    @jax.jit
    def step(run, gradient, key):
        updates, state = tx.update(gradient, run["state"], run["params"])
        params = galore_optax.apply_updates(run["params"], updates, key)
        return {"params": params, "state": state}

    after = []
    for number in range(first, last):
        run = step(run, gradient_at(number), jax.random.key(number))
        after.append(jax.device_get(galore_optax.dequantize_params(run["params"])))
    return run, {name: np.stack([params[name] for params in after]) for name in SHAPES}


def saved_at(case):
    return 7 if case == "accumulation" else SAVED_AT


def main():
    """Writes all cases into the directory of a version, which must be new."""
    out = DIRECTORY / sys.argv[1]
    out.mkdir(parents=True)
    for case in CASES:
        run, _ = steps(case, start(case), 0, saved_at(case))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((out / case / "checkpoint").absolute(), run)
        # What it says is the path where it was written.
        (out / case / "checkpoint" / "commit_success.txt").unlink(missing_ok=True)
        _, after = steps(case, run, saved_at(case), STEPS)
        np.savez_compressed(out / case / "after.npz", **after)
    versions = {"jax": jax.__version__, "optax": optax.__version__, "orbax": ocp.__version__}
    (out / "versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main()
