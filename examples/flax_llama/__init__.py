"""A LLaMA in Flax NNX, trained with GaLore."""

import os

# Of the library that does the SVDs on the CPU: its threads wait for each other in busy loops, which
# on a shared machine took seconds for matrices of milliseconds. It must be set before JAX comes in.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
