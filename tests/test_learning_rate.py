"""The learning rate that is made of AdamW's moves matrices as far as that does."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import Sign, learning_rate_from_adamw

SHAPE = (256, 640)


def first_step(tx):
    """The root of the mean square of the entries of the first update, of a random matrix."""
    params = {"kernel": jnp.zeros(SHAPE)}
    gradients = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=SHAPE), jnp.float32)}
    updates, _ = tx.update(gradients, tx.init(params), params)
    return float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2)))


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("preset", "options", "told", "tolerance"),
    [
        ("galore_adamw", {"rank": 64, "scale": 0.25}, {"rank": 64 / 256}, 1e-3),
        ("grass_adamw", {"rank": 0.1, "scale": 2.0}, {"rank": 0.1, "scale": 2.0}, 0.02),
        ("frugal_adamw", {"rank": 16, "scale": 0.5}, {"scale": 0.5, "residual": "sign"}, 1e-3),
        (
            "frugal_adamw",
            {"rank": 16, "scale": 1.0, "residual": Sign(beta=0.5)},
            {"scale": 1.0, "residual": Sign(beta=0.5)},
            1e-3,
        ),
        # Norms are estimated from sketches, with a relative deviation of sqrt(1 / 2 r).
        ("apollo_adamw", {"rank": 64}, {"rank": 64 / 256, "scale": 1.0}, 0.05),
    ],
)
def test_the_first_update_is_as_large_as_adamws(preset, options, told, tolerance):
    rate = learning_rate_from_adamw(0.01, **{"rank": 16 / 256} | told)
    tx = getattr(galore_optax, preset)(rate, **options)
    assert first_step(tx) == pytest.approx(first_step(optax.adamw(0.01, weight_decay=0)), tolerance)


def test_schedules_become_schedules():
    schedule = learning_rate_from_adamw(optax.linear_schedule(1.0, 0.0, 10), rank=1 / 16)
    assert [float(schedule(i)) for i in (0, 5)] == pytest.approx([16.0, 8.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 128}, r"rank of .* must be a fraction .* such as 128 / 512; got 128"),
        ({"rank": 0.0}, "got 0.0"),
        ({"rank": 0.5, "scale": 0.0}, "scale of .* above 0; got 0.0"),
        ({"rank": 0.5, "scale": float("nan")}, "got nan"),
        ({"rank": 0.5, "residual": "signs"}, "residual must be one of discard,"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_from_adamw(1e-3, **arguments)
