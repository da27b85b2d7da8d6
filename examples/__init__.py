"""Applications of `galore_optax`."""
