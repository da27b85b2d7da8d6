"""What an installed wheel must do: name its version, have types, and train in three lines."""

import importlib.resources
import sys

import jax
import jax.numpy as jnp
import optax

import galore_optax
from galore_optax import chain, galore


def main() -> None:
    """Trains."""
    _, version, *_ = sys.argv[1].split("-")
    assert galore_optax.__version__ == version, (galore_optax.__version__, version)
    assert importlib.resources.files("galore_optax").joinpath("py.typed").is_file()

    key = jax.random.key(0)
    target = jax.random.normal(key, (64, 8)) @ jax.random.normal(key, (8, 96))
    params = {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96)}
    tx = chain(galore(rank=16, scale=1.0), optax.adamw(0.1))
    state = tx.init(params)

    def loss_of(params):
        return jnp.mean((params["kernel"] + params["bias"] - target) ** 2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(50):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2, losses
    report = galore_optax.memory_report(tx, params)
    print(
        f"galore_optax {version}, jax {jax.__version__}, optax {optax.__version__}: "
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {report.state} bytes of state"
    )


if __name__ == "__main__":
    main()
