"""A LLaMA in Flax NNX, trained with GaLore on a built-in text."""
