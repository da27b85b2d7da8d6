"""BERT, RoBERTa and MiniLM in Flax NNX, fine-tuned to classify texts, with GaLore and with LoRA."""

# Sets, before JAX comes in, what its SVDs need, and answers Ctrl-C while everything is imported.
import examples.flax_llama  # noqa: F401
