"""Transformations compared by the programs that they are."""

import jax


def programs(tx, params):
    """What its init and its update compute, as StableHLO with all constants, not compiled."""
    init, update = jax.jit(tx.init).trace(params), jax.jit(tx.update)
    lowered = init.lower(), update.lower(params, init.out_info, params)
    return [x.as_text() for x in lowered]
