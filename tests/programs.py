"""Transformations compared by the programs that they are."""

import jax


def programs(tx, params):
    """What its init and its update compute, as StableHLO with all constants, not compiled."""
    # Not by the names of their functions, which the programs would show.
    init = jax.jit(lambda params: tx.init(params)).trace(params)
    update = jax.jit(lambda *arguments: tx.update(*arguments))
    lowered = init.lower(), update.lower(params, init.out_info, params)
    return [x.as_text() for x in lowered]
